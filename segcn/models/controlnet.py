"""ControlNets: make one from a U-Net, check that one fits a base, and load one."""

import math
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

from segcn.models.base import WIDE, Base, lay_out
from segcn.utils.errors import UserError

SILU_GAIN = 1.68  # 1 / the root mean square of SiLU of a standard normal
FILES = "config.json and diffusion_pytorch_model.safetensors"
SHARED_SIZES = (  # with the U-Net
    "in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type",
)  # fmt: skip


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
            f"{folder}: expected a ControlNet ({FILES}), found none in such a folder, nor on the hub"
            f" ({str(error).splitlines()[0]})"
        ) from None


def check_controlnet(name: str, base: Base) -> None:
    """UserError where --controlnet_model_name_or_path is no ControlNet or does not fit the base."""
    try:
        found = ControlNetModel.load_config(name)
    except OSError:
        raise UserError(
            f"--controlnet_model_name_or_path {name}: expected a ControlNet ({FILES}), found none in such a folder,"
            " nor on the hub"
        ) from None
    expected = {"_class_name": "ControlNetModel", "conditioning_channels": 3}
    expected |= {key: base.unet.config[key] for key in SHARED_SIZES}
    for key, value in expected.items():
        here, there = (list(v) if isinstance(v, tuple) else v for v in (found.get(key, value), value))
        if here != there:
            raise UserError(
                f"--controlnet_model_name_or_path {name}: its {key} is {here}, and {there} fits the base {base.folder};"
                " leave the flag out to begin with a copy of the base's encoder"
            )
