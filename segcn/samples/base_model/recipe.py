"""The recipe of the embedded base model, step by step, and a random base of Stable Diffusion 1.5's size for timings."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from segcn.data.captions import SEASONS, TIMES
from segcn.models.base import keep_freed_memory, pick_device
from segcn.samples.base_model import training
from segcn.samples.base_model.training import UnetRecipe, VaeRecipe, to_pixels
from segcn.samples.earth import tile
from segcn.samples.landscapes.scene import describe, draw_landscape
from segcn.utils import io
from segcn.utils.errors import UserError

EARTH_IDS = 32  # added to the class ids of earth tiles, so that no class of theirs is one of the landscapes'
WORD_END = "</w>"
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
OTHER_WORDS = (
    "a an the of with and in on at by to from over under near behind beside between photo picture painting image "
    "aerial satellite topographic shaded relief map tile earth ocean sea coast island desert sand forest jungle "
    "savanna shrub grassland cropland field wetland tundra ice glacier urban city barren land soil rock hill valley "
    "bridge boat person car animal flower red orange yellow green blue purple pink brown black white grey dark bright "
    "no none one two three"
)
SIZE_OF_SD15 = 5e9  # bytes on disk, and a little more


@dataclass(frozen=True)
class BaseRecipe:
    """How the embedded base is made: from what, and how long."""

    landscapes: int = 32768  # drawn for it
    earth: int = 12288  # tiles of the train side of the earth
    resolution: int = 128  # image size in pixels
    seed: int = 1234567  # of the images: not the seed of any sample data set
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    unet: UnetRecipe = field(default_factory=UnetRecipe)


SMOKE = BaseRecipe(
    landscapes=24, earth=0, vae=VaeRecipe(steps=3, batch_size=4, crop=64, channels=(8, 8, 16, 16)),
    unet=UnetRecipe(steps=3, batch_size=8, channels=(16, 32), text_layers=1),
)  # fmt: skip


def build_base(work: Path, out: Path, recipe: BaseRecipe = BaseRecipe(), log: Callable[[str], None] = print) -> Path:
    """Run the whole recipe in `work` (it resumes there) and write the finished model to `out`, which must not exist."""
    if out.exists():
        raise UserError(f"{out} exists: choose another folder for the finished model")
    written, text = work / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n"
    if work.is_dir() and any(work.iterdir()) and not (written.is_file() and written.read_text() == text):
        raise UserError(f"{work} holds something else than the state of this recipe: choose another folder by --work")
    work.mkdir(parents=True, exist_ok=True)
    io.write_text(written, text)
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device(pick_device())
    keep_freed_memory(device)
    pixels, masks, captions = draw_images(work / "images", recipe, log)
    images = torch.from_numpy(pixels).to(device)
    vae = training.train_vae(images, torch.from_numpy(masks).to(device), recipe.vae, work / "vae", log)
    training.standardize_latents(vae, images[:: max(1, len(images) // 1024)])
    tokenizer = build_tokenizer(captions)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    latents = encode_views(vae, images, work / "latents.npy", log).to(device)
    denoiser = training.train_denoiser(latents, tokens.to(device), tokenizer, recipe.unet, work / "unet", log)
    return export_base(out, recipe, vae, tokenizer, denoiser)


def draw_images(folder: Path, recipe: BaseRecipe, log: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray, list]:
    """Images uint8 [N,R,R,3], class ids uint8 [N,R,R] and captions [N]: drawn by all cores, or read from `folder`."""
    written = folder / "captions.json"  # last
    if not written.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        count, size, captions = recipe.landscapes + recipe.earth, recipe.resolution, []
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, size, size, 3))
        masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (count, size, size))
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 1 + count // 32)) as pool:
            for row, drawn in enumerate(pool.imap(partial(draw_one, recipe), range(count), chunksize=16)):
                images[row], masks[row], caption = drawn
                captions.append(caption)
                if (row + 1) % 2048 == 0 or row + 1 == count:
                    log(f"drew {row + 1}/{count} images")
        images.flush()
        masks.flush()
        io.write_text(written, json.dumps(captions))
    images, masks = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("images", "masks"))
    return images, masks, json.loads(written.read_text())


def draw_one(recipe: BaseRecipe, row: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Image, class ids and caption of one row: the landscapes come first."""
    if row < recipe.landscapes:
        landscape = draw_landscape(recipe.seed, row, recipe.resolution)
        return landscape.image, landscape.mask, landscape.caption
    found = tile(recipe.seed, row - recipe.landscapes, recipe.resolution, side="train")
    return found.image, found.mask + np.uint8(EARTH_IDS), found.caption


def build_tokenizer(captions: list[str], length: int = 48) -> CLIPTokenizer:
    """CLIP's tokenizer with a few hundred tokens, learned from captions and common words, instead of 49,408.

    Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): any text can be written, words that the
    captions use are one token each. Texts are padded and cut to `length` tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False)
    learner.train_from_iterator([*captions, *OTHER_WORDS.split() * 3], trainer)
    pairs = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(pair) for pair in merges), *SPECIAL]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


@torch.no_grad()
def encode_views(vae, images: torch.Tensor, path: Path, log: Callable[[str], None]) -> torch.Tensor:
    """Latents float16 [2,N,C,h,w] of every image (uint8 [N,H,W,3]) and of its mirror image, kept in a file."""
    if path.is_file():
        return torch.from_numpy(np.load(path))
    views = []
    for number, flip in enumerate((False, True)):
        log(f"Encoding view {number + 1} of 2: {len(images)} images.")
        batches = (to_pixels(batch.flip(2) if flip else batch) for batch in images.split(16))
        views.append(torch.cat([vae.encode(batch).latent_dist.mean.half().cpu() for batch in batches]))
    latents = torch.stack(views)
    io.write_whole(path, lambda aside: np.save(aside, latents.numpy()))
    return latents


def export_base(out: Path, recipe: BaseRecipe, vae, tokenizer, denoiser) -> Path:
    """Write fp16 safetensors in Stable Diffusion 1.5's folder layout (commits the folder in one step)."""

    def write(folder: Path) -> None:
        vae.to(memory_format=torch.contiguous_format).half().save_pretrained(folder / "vae")
        denoiser.text_encoder.half().save_pretrained(folder / "text_encoder")
        denoiser.unet.half().save_pretrained(folder / "unet")
        config = folder / "text_encoder" / "config.json"  # transformers opens it in the precision that is said here
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
        write_rest(folder, training.build_scheduler(), MODEL_INDEX, tokenizer=tokenizer)
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    return io.commit(out.parent, out.name, write)


def write_rest(folder: Path, scheduler: SchedulerMixin, index: dict[str, Any], **tokenizers: CLIPTokenizer) -> None:
    """What a pipeline's folder holds besides its networks."""
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0",
    "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
    "safety_checker": [None, None], "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip

# The numbers are those of the configs that stable-diffusion-v1-5 was published with (Rombach et al. 2022,
# arXiv:2112.10752). With random weights its images are noise; its time, memory and files are the real one's.
UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
VAE = {
    "sample_size": 512, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,  # 2 as published: transformers looks for the highest id
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
PARTS = {
    "unet": lambda: UNet2DConditionModel(**UNET),
    "vae": lambda: AutoencoderKL(**VAE),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
}


def build_sd15(out: str | Path, seed: int = 0, log: Callable[[str], None] = print) -> Path:
    """Write a base of Stable Diffusion 1.5's size with random weights, 4.3 GB, in one step; `out` must not exist."""

    def rest(folder: Path) -> None:
        write_rest(folder, DDPMScheduler(**SCHEDULER), MODEL_INDEX, tokenizer=sample_tokenizer())

    return write_random(out, PARTS, rest, SIZE_OF_SD15, seed, log)


def sample_tokenizer() -> CLIPTokenizer:
    """One of the landscapes' words: CLIP's own vocabulary is large."""
    return build_tokenizer(sample_captions(), TEXT["max_position_embeddings"])


def sample_captions() -> list[str]:
    """The landscapes' captions without classes."""
    return [describe(season, time, []) for season in SEASONS for time in TIMES]


def write_random(
    out: str | Path,
    parts: Mapping[str, Callable[[], Any]],
    rest: Callable[[Path], None],
    size: float,
    seed: int,
    log: Callable[[str], None],
) -> Path:
    """Build each network with random weights and write it to its folder, then the `rest`; size: bytes on disk."""
    out = Path(out).absolute()
    if out.exists():
        raise UserError(f"{out} exists: choose another folder for the model")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise UserError(f"{out}: expected {size / 1e9:.0f} GB of free disk space, found {free / 1e9:.1f} GB")
    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        for number, (name, build) in enumerate(parts.items()):
            torch.manual_seed(seed + number)
            part = build()
            log(f"{name}: {part.num_parameters():,} random parameters")
            part.save_pretrained(folder / name)
        rest(folder)

    return io.commit(out.parent, out.name, write)
