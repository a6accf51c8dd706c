"""What a training step costs in arithmetic, counted on the shapes alone: no weights are loaded."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from segcn.models import latent_factor


def step_tflop(base: str | Path, resolution: int, batch: int = 1) -> dict[str, float]:
    """TFLOP of each part of a step: vae (encoding), text, and train, which is U-Net and ControlNet there and back.

    A multiplication with its addition counts as two operations; what is no matrix product or convolution, as none.
    """
    side = resolution // latent_factor(base)
    text_config = CLIPTextConfig.from_pretrained(base, subfolder="text_encoder")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base, subfolder="vae"))
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet"))
        controlnet, text_encoder = ControlNetModel.from_unet(unet), CLIPTextModel(text_config)
        image = torch.zeros(batch, 3, resolution, resolution)
        latents = torch.zeros(batch, unet.config.in_channels, side, side)
        tokens = torch.zeros(batch, text_config.max_position_embeddings, dtype=torch.long)
        embeddings = torch.zeros(*tokens.shape, unet.config.cross_attention_dim)
    for frozen in (vae, unet, text_encoder):
        frozen.requires_grad_(False)
    return {
        "vae": tflop(lambda: vae.encode(image)),
        "text": tflop(lambda: text_encoder(tokens)),
        "train": tflop(lambda: there_and_back(unet, controlnet, latents, embeddings, image)),
    }


def there_and_back(unet, controlnet, latents, embeddings, image) -> None:
    """A prediction from the mask's colours, and its gradient in the ControlNet."""
    step = torch.zeros(len(latents), dtype=torch.long, device="meta")
    down, middle = controlnet(latents, step, embeddings, controlnet_cond=image, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    unet(latents, step, embeddings, **residuals).sample.sum().backward()


def tflop(work) -> float:
    """10^12 operations of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def caching_limit(counted: dict[str, float]) -> float:
    """How many times faster steps can get when the frozen encoders leave them, by arithmetic alone."""
    return sum(counted.values()) / counted["train"]
