"""The recipe of the embedded base model: paint, compress, read, denoise; written as a Stable Diffusion 1.5 folder."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segcn import checkpoint
from segcn.errors import UserError
from segcn.records import read_split
from segcn.samples.landscapes import write_landscapes
from segcn.samples.tokenizer import build_tokenizer
from segcn.samples.unet import UnetRecipe, build_scheduler, train_denoiser
from segcn.samples.vae import VaeRecipe, standardise_latents, train_vae


@dataclass(frozen=True)
class BaseRecipe:
    count: int = 4096  # landscapes painted for it
    resolution: int = 128  # pixels a side
    seed: int = 1234567  # of the landscapes: not the seed of any sample data set
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    unet: UnetRecipe = field(default_factory=UnetRecipe)


SMOKE = BaseRecipe(
    count=24,
    vae=VaeRecipe(steps=3, channels=(8, 8, 16, 16)),
    unet=UnetRecipe(steps=3, channels=(16, 32), text_layers=1),
)


def build_base(work: Path, out: Path, recipe: BaseRecipe = BaseRecipe(), log=print) -> Path:
    """Run the whole recipe in `work` (it resumes there) and write the finished model to `out`, which must not exist."""
    if out.exists():
        raise UserError(f"{out} exists: choose another folder for the finished model")
    torch.set_num_threads(os.cpu_count() or 1)
    images, masks, captions = load_landscapes(work, recipe)
    vae = train_vae(images, masks, recipe.vae, work / "vae", log)
    standardise_latents(vae, images[:512])
    tokenizer = build_tokenizer(captions)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    latents = encode_views(vae, images, work / "latents.npy", log)
    denoiser = train_denoiser(latents, tokens, tokenizer, recipe.unet, work / "unet", log)
    return export_base(out, recipe, vae, tokenizer, denoiser)


def load_landscapes(work: Path, recipe: BaseRecipe) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Paint the landscapes once and read them: images uint8 [N,R,R,3], masks uint8 [N,R,R], captions."""
    folder = work / "landscapes"
    write_landscapes(folder, recipe.count, resolution=recipe.resolution, seed=recipe.seed)
    records = read_split(folder).records
    images = np.stack([np.asarray(Image.open(record.image).convert("RGB")) for record in records])
    masks = np.stack([np.asarray(Image.open(record.mask)) for record in records])
    return images, masks, [record.caption for record in records]


@torch.no_grad()
def encode_views(vae, images: np.ndarray, path: Path, log=print, batch_size: int = 16) -> torch.Tensor:
    """Latents float16 [2,N,C,h,w] of every picture and of its mirror image, kept in a file."""
    if path.is_file():
        return torch.from_numpy(np.load(path))
    views = []
    for number, view in enumerate((images, images[:, :, ::-1])):
        log(f"Encoding view {number + 1} of 2: {len(images)} pictures.")
        batches = range(0, len(view), batch_size)
        pixels = (
            torch.tensor(view[i : i + batch_size].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1 for i in batches
        )
        views.append(torch.cat([vae.encode(batch).latent_dist.mean.half() for batch in pixels]))
    latents = torch.stack(views)
    np.save(path.with_suffix(".staged.npy"), latents.numpy())
    os.replace(path.with_suffix(".staged.npy"), path)
    return latents


def export_base(out: Path, recipe: BaseRecipe, vae, tokenizer, denoiser) -> Path:
    """Write fp16 safetensors in Stable Diffusion 1.5's folder layout (commits the folder in one step)."""

    def write(folder: Path) -> None:
        vae.to(memory_format=torch.contiguous_format).half().save_pretrained(folder / "vae")
        denoiser.text_encoder.half().save_pretrained(folder / "text_encoder")
        denoiser.unet.half().save_pretrained(folder / "unet")
        tokenizer.save_pretrained(folder / "tokenizer")
        build_scheduler().save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    return checkpoint.commit(out.parent, out.name, write)


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
