"""ControlNets: make one from a U-Net, and load one."""

import math
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

from segcn.models.base import WIDE, lay_out
from segcn.utils.errors import UserError

SILU_GAIN = 1.68  # 1 / the root mean square of SiLU of a standard normal


def make_controlnet(unet: UNet2DConditionModel, latent_factor: int = 8) -> ControlNetModel:
    """A ControlNet that starts as a copy of the U-Net's encoder (Zhang et al. 2023, arXiv:2302.05543).

    UserError unless latent_factor, the width of a latent cell in pixels, is 8.
    """
    if latent_factor != 8:
        raise UserError(
            "--pretrained_model_name_or_path: expected an autoencoder that compresses 8x, as a ControlNet in diffusers"
            f" does, found {latent_factor}x"
        )
    narrow = unet.config.block_out_channels[0] < WIDE
    embedding = (16, 32, 64, 96) if narrow else (16, 32, 96, 256)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=embedding)
    keep_control_spread(controlnet.controlnet_cond_embedding)
    return lay_out(controlnet, unet.device)


def keep_control_spread(embedding: ControlNetConditioningEmbedding) -> None:
    """Initialize the control embedding so that the spread of its signal is kept (He et al. 2015, arXiv:1502.01852).

    With PyTorch's own initialization the differences between two masks shrink to less than a thousandth, and it takes
    a training long to undo that. The last convolution stays zero: the ControlNet still begins as the U-Net's encoder.
    """
    for convolution in (embedding.conv_in, *embedding.blocks):
        torch.nn.init.normal_(convolution.weight, std=SILU_GAIN / math.sqrt(convolution.weight[0].numel()))
        torch.nn.init.zeros_(convolution.bias)


def load_controlnet(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """A ControlNet, from a folder as diffusers writes it or by its name on the hub; UserError if there is none."""
    try:
        return lay_out(ControlNetModel.from_pretrained(folder, torch_dtype=dtype), device)
    except OSError as error:
        raise UserError(
            f"{folder}: expected a ControlNet (config.json and diffusion_pytorch_model.safetensors), found none in such"
            f" a folder, nor on the hub ({str(error).splitlines()[0]})"
        ) from None
