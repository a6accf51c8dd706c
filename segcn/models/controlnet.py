"""ControlNets: make one from a U-Net or a transformer, check that one fits a base, load and save one.

A light one is the encoder of the base with a LoRA, and the layers that a U-Net does not have, as in Stability AI's
control-lora (https://huggingface.co/stabilityai/control-lora). Its files are peft's and hold no more than the LoRA and
those layers: the encoder's weights are the base's own, in memory as well."""

import copy
import json
import math
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import ControlNetModel, SD3ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from safetensors.torch import load_file, save_file

from segcn.models.base import WIDE, Base, lay_out
from segcn.models.family import Family, copied_blocks
from segcn.models.lora import PLACE, add_lora, changed_layers, has_lora, merge_lora
from segcn.utils.errors import UserError
from segcn.utils.paths import LIGHT_WEIGHTS, WEIGHTS

SILU_GAIN = 1.68  # 1 / the root mean square of SiLU of a standard normal
FILES = f"config.json and {WEIGHTS}"
LIGHT_SETTINGS = "adapter_config.json"
NEW = "controlnet_"  # begins the names of the layers that a U-Net does not have
PREFIX = "base_model.model."  # begins the names of weights in peft's files
ControlNet: TypeAlias = ControlNetModel | SD3ControlNetModel


def make_controlnet(unet: UNet2DConditionModel | SD3Transformer2DModel, latent_factor: int = 8) -> ControlNet:
    """A ControlNet that starts as a copy of the U-Net's encoder (Zhang et al. 2023, arXiv:2302.05543).

    Of a transformer it is a copy of the first half of the blocks. UserError unless latent_factor, the width of a latent
    cell in pixels, is 8, where a U-Net's ControlNet sees the mask itself.
    """
    if isinstance(unet, SD3Transformer2DModel):
        return copy_blocks(unet)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=_channels(unet, latent_factor))
    keep_control_spread(controlnet.controlnet_cond_embedding)
    return lay_out(controlnet, unet.device)


def _channels(unet: UNet2DConditionModel, latent_factor: int) -> tuple[int, ...]:
    """The widths of the control embedding for a U-Net."""
    if latent_factor != 8:
        raise UserError(
            "--pretrained_model_name_or_path: expected an autoencoder that compresses 8x, as a ControlNet in diffusers"
            f" does, found {latent_factor}x"
        )
    return (16, 32, 64, 96) if unet.config.block_out_channels[0] < WIDE else (16, 32, 96, 256)


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


def make_light(
    unet: UNet2DConditionModel, rank: int, alpha: int, targets: tuple[str, ...], latent_factor: int = 8
) -> ControlNetModel:
    """A light ControlNet, which starts as `make_controlnet` does; what is trained of it is in float32."""
    with torch.device("meta"):  # what comes from the U-Net takes no memory
        widths = _channels(unet, latent_factor)
        controlnet = ControlNetModel.from_unet(unet, "rgb", widths, load_weights_from_unet=False)
    for name, layer in controlnet.named_children():
        if name.startswith(NEW):
            layer.to_empty(device=unet.device)
            for weight in layer.parameters():
                torch.nn.init.zeros_(weight)
    share_layers(controlnet, unet)
    keep_control_spread(controlnet.controlnet_cond_embedding)
    add_lora(controlnet, rank, alpha, targets, exclude=f"{NEW}.*")
    for name, weight in controlnet.named_parameters():
        if name.startswith(NEW):
            weight.requires_grad_(True)
        if weight.requires_grad:
            weight.data = weight.data.float()
    return lay_out(controlnet, unet.device)


def share_layers(controlnet: ControlNetModel, source: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give a ControlNet the layers of another network that have the same names, their weights shared in memory.

    dtype: that of the ControlNet, which is frozen; weights of another one are copied. None: all weights as they are.
    """
    weights = {id(weight): weight for weight in source.parameters()}
    if dtype is not None:
        frozen = [torch.nn.Parameter(one.detach().to(dtype), requires_grad=False) for one in weights.values()]
        weights = dict(zip(weights, frozen, strict=True))
    for name, layer in source.named_children():
        if getattr(controlnet, name, None) is not None:
            setattr(controlnet, name, copy.deepcopy(layer, dict(weights)))


def is_light(folder: str | Path) -> bool:
    """Whether a folder holds a light ControlNet."""
    return (Path(folder) / LIGHT_WEIGHTS).is_file()


def is_finished_controlnet(folder: str | Path) -> bool:
    """Whether a folder holds a full or a light ControlNet, whose weights are written last."""
    return (Path(folder) / WEIGHTS).is_file() or is_light(folder)


def load_controlnet(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet: UNet2DConditionModel | None = None,
) -> ControlNetModel:
    """A ControlNet, from a folder as diffusers or `save_controlnet` writes it or by its name on the hub.

    unet: the base's, of which a light one has its encoder. UserError if there is no ControlNet, or another base's.
    """
    if is_light(folder):
        return _load_light(Path(folder), dtype, unet)
    try:
        name = ControlNetModel.load_config(folder).get("_class_name")
        kind = SD3ControlNetModel if name == SD3ControlNetModel.__name__ else ControlNetModel
        return lay_out(kind.from_pretrained(folder, torch_dtype=dtype), device)
    except OSError as error:
        raise UserError(
            f"{folder}: expected a ControlNet ({FILES}), found none in such a folder, nor on the hub"
            f" ({str(error).splitlines()[0]})"
        ) from None


def _load_light(folder: Path, dtype: torch.dtype, unet: UNet2DConditionModel | None) -> ControlNetModel:
    if unet is None:
        raise UserError(f"{folder}: expected a full ControlNet, found a light one, which is opened with its base")
    config = ControlNetModel.load_config(folder)
    for key in Family.shared_sizes:
        here, there = (list(v) if isinstance(v, tuple) else v for v in (config.get(key), unet.config[key]))
        if here != there:
            raise UserError(
                f"{folder}: a light ControlNet is opened with the base that it was trained on; its {key} is {here}, the"
                f" base's {there}; name its own by --pretrained_model_name_or_path"
            )
    settings = json.loads((folder / LIGHT_SETTINGS).read_text())
    controlnet = make_light(unet, settings["r"], settings["lora_alpha"], tuple(settings["target_modules"]))
    read_light(controlnet, folder)
    for weight in changed_layers(controlnet).values():
        weight.data = weight.data.to(dtype)
    return controlnet


@torch.no_grad()
def read_light(controlnet: ControlNetModel, folder: Path) -> None:
    """Take over what `save_controlnet` wrote of a light ControlNet, bit for bit, into one with the same LoRA."""
    weights = load_file(folder / LIGHT_WEIGHTS)
    for name, weight in changed_layers(controlnet).items():
        weight.copy_(weights[_name_in_file(name)])


def _name_in_file(name: str) -> str:
    return PREFIX + name.replace(f".{PLACE}.", ".")


def save_controlnet(controlnet: ControlNetModel, folder: Path) -> None:
    """Write config.json and weights as diffusers does, of a light ControlNet its LoRA and new layers as peft does.

    `PeftModel.from_pretrained(ControlNetModel.from_unet(unet), folder)` opens a light one in plain diffusers.
    """
    if not has_lora(controlnet):
        return controlnet.save_pretrained(folder)
    controlnet.save_config(folder)
    lora = controlnet.peft_config[PLACE]
    new = [name for name, layer in controlnet.named_modules() if name.startswith(NEW) and hasattr(layer, "weight")]
    settings = {
        "peft_type": "LORA", "r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules),
        "exclude_modules": lora.exclude_modules, "modules_to_save": new,
    }  # fmt: skip
    trained = changed_layers(controlnet).items()
    weights = {_name_in_file(name): weight.detach().cpu().contiguous() for name, weight in trained}
    (folder / LIGHT_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    save_file(weights, folder / LIGHT_WEIGHTS, {"format": "pt"})


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


def check_light(name: str, wanted: tuple[int, int, tuple[str, ...]] | None) -> None:
    """UserError where --controlnet_model_name_or_path is not of the kind of --controlnet, or has another LoRA.

    wanted: rank, alpha and targets of the LoRA to train; None: a full ControlNet.
    """
    if not is_light(name):
        if wanted is None:
            return
        raise UserError(
            f"--controlnet lora: expected a light ControlNet to go on from, found a full one in {name}; leave out"
            " --controlnet lora, or --controlnet_model_name_or_path to begin with the base's encoder"
        )
    if wanted is None:
        raise UserError(
            f"--controlnet_model_name_or_path {name}: expected a full ControlNet, found a light one; go on with it by"
            " --controlnet lora, or rerun its own command with --merge, which makes it a full one"
        )
    found = json.loads((Path(name) / LIGHT_SETTINGS).read_text())
    rank, alpha, targets = found["r"], found["lora_alpha"], found["target_modules"]
    if (rank, alpha, targets) != (*wanted[:2], sorted(wanted[2])):
        raise UserError(
            f"--controlnet_model_name_or_path {name}: expected a LoRA of rank {wanted[0]} and alpha {wanted[1]} on"
            f" {', '.join(wanted[2])}, found another; go on with --lora_rank {rank} --lora_alpha {alpha} --lora_targets"
            f" {' '.join(targets)}"
        )


def merge_light(folder: Path, unet: UNet2DConditionModel) -> ControlNetModel:
    """The full ControlNet that a light one is, in float32; unet: of its base, in float32, which is used up."""
    controlnet = load_controlnet(folder, unet=unet)
    merge_lora(controlnet)
    return controlnet
