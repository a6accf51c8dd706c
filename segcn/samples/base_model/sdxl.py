"""Bases of Stable Diffusion XL's architecture with random weights: one of its size, and a toy for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from segcn.samples.base_model.recipe import (
    MODEL_INDEX,
    SCHEDULER,
    TEXT,
    VAE,
    sample_tokenizer,
    write_random,
    write_rest,
)

# The numbers are those of the configs that stable-diffusion-xl-base-1.0 was published with (Podell et al. 2023,
# arXiv:2307.01952). The ControlNet of each is a copy of the U-Net's encoder, as that of any base.
UNET_XL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}  # fmt: skip
VAE_XL = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
TEXT_2 = TEXT | {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip
# 8 cells of latents at 64 pixels. The two text encoders differ in width, the pooled embedding in both of them.
TOY_UNET = UNET_XL | {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), "cross_attention_dim": 16 + 24,
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
TOY_VAE = VAE_XL | {
    "sample_size": 64, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
TOY_TEXT = TEXT | {
    "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TOY_TEXT_2 = TEXT_2 | {
    "hidden_size": 24, "intermediate_size": 48, "projection_dim": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
INDEX_XL = {name: value for name, value in MODEL_INDEX.items() if "safety" not in name} | {
    "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}  # fmt: skip
SIZE_OF_SDXL, SIZE_OF_TOY = 14.5e9, 1e7  # bytes on disk, and a little more


def parts_of_sdxl(toy: bool = False, vocabulary: int = TEXT["vocab_size"]) -> dict[str, Callable[[], Any]]:
    """What builds each network; vocabulary: the number of tokens."""
    unet, vae, *texts = (TOY_UNET, TOY_VAE, TOY_TEXT, TOY_TEXT_2) if toy else (UNET_XL, VAE_XL, TEXT, TEXT_2)
    text, text_2 = (CLIPTextConfig(**config | {"vocab_size": vocabulary}) for config in texts)
    return {
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(**vae),
        "text_encoder": lambda: CLIPTextModel(text),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(text_2),
    }


def build_sdxl(out: str | Path, toy: bool = False, seed: int = 0, log: Callable[[str], None] = print) -> Path:
    """Write a base of Stable Diffusion XL's size with random weights, 13.9 GB, in one step; `out` must not exist.

    toy: one of 2 MB. `StableDiffusionXLPipeline.from_pretrained` opens both.
    """
    tokenizers = {"tokenizer": sample_tokenizer(), "tokenizer_2": sample_tokenizer()}
    tokenizers["tokenizer_2"].pad_token = "!"  # as published: the first one's is the end of the text

    def rest(folder: Path) -> None:
        schedule = {name: value for name, value in SCHEDULER.items() if name != "clip_sample"}
        write_rest(folder, EulerDiscreteScheduler(**schedule, timestep_spacing="leading"), INDEX_XL, **tokenizers)

    vocabulary = len(tokenizers["tokenizer"]) if toy else TEXT["vocab_size"]
    return write_random(out, parts_of_sdxl(toy, vocabulary), rest, SIZE_OF_TOY if toy else SIZE_OF_SDXL, seed, log)
