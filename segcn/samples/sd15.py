"""A base of Stable Diffusion 1.5's size with random weights: what a step costs there, with nothing to download.

The numbers are those of the configs that stable-diffusion-v1-5 was published with (Rombach et al. 2022,
arXiv:2112.10752). What it paints is noise; its time, memory and files are the real one's.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from segcn import checkpoint
from segcn.captions import SEASONS, TIMES
from segcn.errors import UserError
from segcn.samples.base import MODEL_INDEX
from segcn.samples.landscapes import describe
from segcn.samples.tokenizer import build_tokenizer

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*(CROSS.format("Down"),) * 3, PLAIN.format("Down")),
    "up_block_types": (PLAIN.format("Up"), *(CROSS.format("Up"),) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published: transformers then looks for the highest id
    "pad_token_id": 1,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}
PARTS = {
    "unet": lambda: UNet2DConditionModel(**UNET),
    "vae": lambda: AutoencoderKL(**VAE),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
}
SIZE = 5e9  # bytes on disk, and a little more


def build_sd15(out: Path, seed: int = 0, log: Callable[[str], None] = print) -> Path:
    """Write the folder, 4.3 GB of float32 safetensors, in one step; `out` must not exist."""
    out = out.absolute()
    if out.exists():
        raise UserError(f"{out} exists: choose another folder for the model")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < SIZE:
        raise UserError(f"{out}: expected {SIZE / 1e9:.0f} GB of free disk space, found {free / 1e9:.1f} GB")

    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        for number, (name, build) in enumerate(PARTS.items()):
            torch.manual_seed(seed + number)
            part = build()
            log(f"{name}: {part.num_parameters():,} random parameters")
            part.save_pretrained(folder / name)
        build_tokenizer(spoken(), TEXT["max_position_embeddings"]).save_pretrained(folder / "tokenizer")
        DDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")

    return checkpoint.commit(out.parent, out.name, write)


def spoken() -> list[str]:
    """Captions whose words become tokens of their own: CLIP's own vocabulary would have to be downloaded."""
    return [describe(season, time, []) for season in SEASONS for time in TIMES]
