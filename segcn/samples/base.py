"""The recipe of the embedded base model: paint, compress, read, denoise; written as a Stable Diffusion 1.5 folder."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from segcn import checkpoint
from segcn.atomic import write_text, write_whole
from segcn.devices import keep_freed_memory, pick_device
from segcn.errors import UserError
from segcn.samples.learning import to_pixels
from segcn.samples.pictures import paint_pictures
from segcn.samples.tokenizer import build_tokenizer
from segcn.samples.unet import UnetRecipe, build_scheduler, train_denoiser
from segcn.samples.vae import VaeRecipe, standardise_latents, train_vae


@dataclass(frozen=True)
class BaseRecipe:
    """How the embedded base is made: from what, and how long."""

    landscapes: int = 32768  # painted for it
    earth: int = 12288  # tiles of the train side of the earth
    resolution: int = 128  # pixels a side
    seed: int = 1234567  # of the pictures: not the seed of any sample data set
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    unet: UnetRecipe = field(default_factory=UnetRecipe)


SMOKE = BaseRecipe(
    landscapes=24,
    earth=0,
    vae=VaeRecipe(steps=3, batch_size=4, crop=64, channels=(8, 8, 16, 16)),
    unet=UnetRecipe(steps=3, batch_size=8, channels=(16, 32), text_layers=1),
)


def build_base(work: Path, out: Path, recipe: BaseRecipe = BaseRecipe(), log: Callable[[str], None] = print) -> Path:
    """Run the whole recipe in `work` (it resumes there) and write the finished model to `out`, which must not exist."""
    if out.exists():
        raise UserError(f"{out} exists: choose another folder for the finished model")
    claim_work(work, recipe)
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device(pick_device())
    keep_freed_memory(device)
    pictures = paint_pictures(work / "pictures", recipe, log)
    images = torch.from_numpy(pictures.images).to(device)
    vae = train_vae(images, torch.from_numpy(pictures.masks).to(device), recipe.vae, work / "vae", log)
    standardise_latents(vae, images[:: max(1, len(images) // 1024)])
    tokenizer = build_tokenizer(pictures.captions)
    tokens = tokenizer(pictures.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    latents = encode_views(vae, images, work / "latents.npy", log).to(device)
    denoiser = train_denoiser(latents, tokens.to(device), tokenizer, recipe.unet, work / "unet", log)
    return export_base(out, recipe, vae, tokenizer, denoiser)


def claim_work(work: Path, recipe: BaseRecipe) -> None:
    """Write the recipe to `work`, or hold it against the one that stands there; UserError where they differ."""
    path, wanted = work / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n"
    if work.is_dir() and any(work.iterdir()) and not (path.is_file() and path.read_text() == wanted):
        raise UserError(f"{work} holds something else than the state of this recipe: choose another folder by --work")
    work.mkdir(parents=True, exist_ok=True)
    write_text(path, wanted)


@torch.no_grad()
def encode_views(vae, images: torch.Tensor, path: Path, log=print, batch_size: int = 16) -> torch.Tensor:
    """Latents float16 [2,N,C,h,w] of every picture (uint8 [N,H,W,3]) and of its mirror image, kept in a file."""
    if path.is_file():
        return torch.from_numpy(np.load(path))
    views = []
    for number, flip in enumerate((False, True)):
        log(f"Encoding view {number + 1} of 2: {len(images)} pictures.")
        batches = (to_pixels(batch.flip(2) if flip else batch) for batch in images.split(batch_size))
        views.append(torch.cat([vae.encode(batch).latent_dist.mean.half().cpu() for batch in batches]))
    latents = torch.stack(views)
    write_whole(path, lambda aside: np.save(aside, latents.numpy()))
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
