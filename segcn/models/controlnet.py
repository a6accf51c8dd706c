"""ControlNets: make one from a U-Net or a transformer, check that one fits a base, and load one."""

import math
from pathlib import Path

import torch
from diffusers import ControlNetModel, SD3ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

from segcn.models.base import WIDE, Base, lay_out
from segcn.models.family import copied_blocks
from segcn.utils.errors import UserError

SILU_GAIN = 1.68  # 1 / the root mean square of SiLU of a standard normal
FILES = "config.json and diffusion_pytorch_model.safetensors"
ControlNet = ControlNetModel | SD3ControlNetModel


def make_controlnet(unet: UNet2DConditionModel | SD3Transformer2DModel, latent_factor: int = 8) -> ControlNet:
    """A ControlNet that starts as a copy of the U-Net's encoder (Zhang et al. 2023, arXiv:2302.05543).

    Of a transformer it is a copy of the first half of the blocks. UserError unless latent_factor, the width of a latent
    cell in pixels, is 8, where a U-Net's ControlNet sees the mask itself.
    """
    if isinstance(unet, SD3Transformer2DModel):
        return copy_blocks(unet)
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


def copy_blocks(transformer: SD3Transformer2DModel) -> SD3ControlNetModel:
    """A ControlNet of a transformer's first blocks, which sees the latents of a mask and adds nothing yet.

    It reads the pooled text and shifted latents, as its training in diffusers gives them, in plain pipelines as well.
    """
    sizes = {"num_layers": copied_blocks(transformer), "extra_conditioning_channels": 0}
    sizes |= {"use_pos_embed": True, "force_zeros_for_pooled_projection": False}
    controlnet = SD3ControlNetModel.from_config({**transformer.config, **sizes})
    controlnet.load_state_dict(transformer.state_dict(), strict=False)
    return lay_out(controlnet, transformer.device)


def make_all_trainable(controlnet: ControlNet) -> None:
    """Let every weight be trained that has an effect.

    The last block of a transformer's ControlNet has a stream of text that ends there: several processes could not train
    together what never gets a gradient.
    """
    controlnet.requires_grad_(True)
    if isinstance(controlnet, SD3ControlNetModel):
        last = controlnet.transformer_blocks[-1]
        last.ff_context.requires_grad_(False)
        last.attn.to_add_out.requires_grad_(False)


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
) -> ControlNet:
    """A ControlNet, from a folder as diffusers writes it or by its name on the hub; UserError if there is none."""
    try:
        name = ControlNetModel.load_config(folder).get("_class_name")
        kind = SD3ControlNetModel if name == SD3ControlNetModel.__name__ else ControlNetModel
        return lay_out(kind.from_pretrained(folder, torch_dtype=dtype), device)
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
    family = base.family
    expected = {"_class_name": family.controlnet.__name__}
    expected |= {"extra_conditioning_channels": 0} if family.encodes_control else {"conditioning_channels": 3}
    expected |= {key: base.unet.config[key] for key in family.shared_sizes}
    for key, value in expected.items():
        here, there = (list(v) if isinstance(v, tuple) else v for v in (found.get(key, value), value))
        if here != there:
            raise UserError(
                f"--controlnet_model_name_or_path {name}: its {key} is {here}, and {there} fits the base {base.folder};"
                " leave the flag out to begin with a copy of the base's encoder"
            )
