"""Bases of Stable Diffusion 3.5 medium's architecture with random weights: one of its size, and a toy for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from segcn.models.family import SD3
from segcn.samples.base_model.recipe import (
    OTHER_WORDS,
    TEXT,
    sample_captions,
    sample_tokenizer,
    write_random,
    write_rest,
)
from segcn.samples.base_model.sdxl import TEXT_2, TOY_TEXT, TOY_TEXT_2, TOY_VAE, VAE_XL

# The numbers are those of the configs that stable-diffusion-3.5-medium was published with (Esser et al. 2024,
# arXiv:2403.03206); T5 is t5-v1_1-xxl. The ControlNet of each is a copy of the first half of the transformer's blocks.
TRANSFORMER: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
LATENTS: dict[str, Any] = {
    "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
# 4 x 4 places at 64 pixels. T5 is as wide as the transformer reads; the others are narrower together.
TOY_TRANSFORMER = TRANSFORMER | {
    "sample_size": 8, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 48,
    "caption_projection_dim": 16, "pooled_projection_dim": 16 + 20, "pos_embed_max_size": 24,
    "dual_attention_layers": (0, 1),
}  # fmt: skip
TOY_T5 = T5 | {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
INDEX_SD3 = {
    "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.38.0",
    "feature_extractor": [None, None], "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": ["transformers", "T5TokenizerFast"],
}  # fmt: skip
SIZE_OF_SD3, SIZE_OF_TOY_SD3 = 32e9, 1e7  # bytes on disk, and a little more


def parts_of_sd3(
    toy: bool = False, vocabulary: int = TEXT["vocab_size"], words: int = T5["vocab_size"]
) -> dict[str, Callable[[], Any]]:
    """What builds each network; vocabulary, words: the number of tokens of CLIP and of T5."""
    transformer, third = (TOY_TRANSFORMER, TOY_T5) if toy else (TRANSFORMER, T5)
    vae, text, text_2 = (TOY_VAE, TOY_TEXT, TOY_TEXT_2) if toy else (VAE_XL, TEXT, TEXT_2)
    return {
        "transformer": lambda: SD3Transformer2DModel(**transformer),
        "vae": lambda: _sure_vae(vae | LATENTS),
        "text_encoder": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**text | {"vocab_size": vocabulary})),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**text_2 | {"vocab_size": vocabulary})),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(**third | {"vocab_size": words})),
    }


@torch.no_grad()
def _sure_vae(config: dict[str, Any]) -> AutoencoderKL:
    """An autoencoder whose posterior hardly varies, as that of a trained one."""
    vae = AutoencoderKL(**config)
    weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    weight[config["latent_channels"] :] = 0
    bias[config["latent_channels"] :] = -20
    return vae


def build_sd3(out: str | Path, toy: bool = False, seed: int = 0, log: Callable[[str], None] = print) -> Path:
    """Write a base of Stable Diffusion 3.5 medium's size with random weights, 31.6 GB, in one step.

    toy: one of 1 MB. `StableDiffusion3Pipeline.from_pretrained` opens both. UserError where `out` exists.
    """
    tokenizers: dict[str, Any] = {"tokenizer": sample_tokenizer(), "tokenizer_2": sample_tokenizer()}
    tokenizers["tokenizer_2"].pad_token = "!"  # as published
    tokenizers["tokenizer_3"] = t5_tokenizer()

    def rest(folder: Path) -> None:
        write_rest(folder, FlowMatchEulerDiscreteScheduler(shift=3.0), INDEX_SD3, **tokenizers)

    sizes = (len(tokenizers["tokenizer"]), len(tokenizers["tokenizer_3"])) if toy else ()
    return write_random(out, parts_of_sd3(toy, *sizes), rest, SIZE_OF_TOY_SD3 if toy else SIZE_OF_SD3, seed, log)


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer with the landscapes' words and the letters: a unigram model that prefers whole words."""
    words = sorted({word for caption in sample_captions() for word in caption.split()} | set(OTHER_WORDS.split()))
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    known = {token for token, _ in tokens}
    tokens += [(letter, -10.0) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=tokens, extra_ids=0, model_max_length=2 * SD3.T5_LENGTH)
