"""A LoRA (Hu et al. 2021, arXiv:2106.09685) of a base's network and text encoder: add, save, load, fuse.

Files are those of diffusers: `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(FOLDER)` opens."""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, get_peft_kwargs
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from segcn.models.family import Family
from segcn.utils.errors import UserError

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # the attention of CLIP's text encoder
PLACE = "default"  # peft's name of the one adapter that is trained


def lora_file(lora: str | Path) -> Path | None:
    """The weights of --lora: a file, or those in a folder or its lora/; None: a name on the hub.

    UserError for a folder without them.
    """
    path = Path(lora)
    if path.is_file():
        return path
    found = next((folder / LORA_WEIGHTS for folder in (path, path / "lora") if (folder / LORA_WEIGHTS).is_file()), None)
    if found is None and (path.exists() or path.is_absolute() or str(lora).startswith(".")):
        what = f"no {LORA_WEIGHTS} in it" if path.exists() else "no such folder"
        raise UserError(f"--lora {lora}: expected a folder that segcn adapt or diffusers wrote, found {what}")
    return found


def add_lora(
    network: Any,
    rank: int,
    alpha: int,
    targets: tuple[str, ...],
    exclude: str | None = None,
) -> None:
    """Give the layers whose names end in one of `targets` trainable matrices, in float32; everything else is frozen.

    exclude: a pattern of names of layers that get none. The network computes the same until they are trained. UserError
    where no layer has such a name.
    """
    network.requires_grad_(False)
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            expected = "expected ends of the names of layers, such as to_q or conv1"
            raise UserError(f"--lora_targets: {expected}, found {target!r}")
    try:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), exclude_modules=exclude)
        inject_adapter_in_model(config, network, PLACE)
    except ValueError as error:  # a layer of another kind than linear or convolution
        raise UserError(f"--lora_targets: {str(error).splitlines()[0]}") from None


def has_lora(network: nn.Module) -> bool:
    """Whether `add_lora` was called for it."""
    return PLACE in getattr(network, "peft_config", {})


def save_lora(folder: Path, networks: Mapping[str, Any]) -> None:
    """Write the LoRA of unet or transformer, and text_encoder, those that have one, as diffusers does.

    Of the settings, rank, alpha and targets are recorded with it: other versions of peft have other fields.
    """
    weights: dict[str, torch.Tensor] = {}
    recorded: dict[str, Any] = {}
    for part, network in networks.items():
        if has_lora(network):
            config = network.peft_config[PLACE]
            settings = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
            recorded |= {f"{part}.{name}": value for name, value in settings.items()}
            found = get_peft_model_state_dict(network)  # diffusers reads peft's own names
            weights |= {f"{part}.{name}": value.detach().cpu().contiguous() for name, value in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recorded, indent=2, sort_keys=True)
    save_file(weights, folder / LORA_WEIGHTS, {LORA_ADAPTER_METADATA_KEY: text})  # of two keys the order would vary


def restore_lora(folder: Path, networks: Mapping[str, Any]) -> None:
    """Take over what `save_lora` wrote, bit for bit, into networks that have the same LoRA."""
    weights = load_file(folder / LORA_WEIGHTS)
    for part, network in networks.items():
        if has_lora(network):
            own = {
                name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")
            }
            set_peft_model_state_dict(network, own, PLACE)


def fuse_lora(lora: str | Path, family: Family, unet: Any, *text_encoders: nn.Module) -> None:
    """Add a LoRA to the weights of a float32 base, as `pipe.load_lora_weights` and `pipe.fuse_lora` do.

    text_encoders: the base's one or two. UserError where there is none, or where it is that of another architecture.
    """
    file = lora_file(lora)
    with quiet_diffusers():
        try:
            kind: Any = StableDiffusion3Pipeline if family.part == "transformer" else StableDiffusionPipeline
            read = kind.lora_state_dict  # never pickle
            weights, *alphas, settings = read(str(file or lora), use_safetensors=True, return_lora_metadata=True)
            if not all("lora" in name for name in weights):
                raise ValueError(f"{next(name for name in weights if 'lora' not in name)} is no weight of a LoRA")
            getattr(kind, f"load_lora_into_{family.part}")(weights, *alphas, unet, metadata=settings)
            unet.fuse_lora()
            unet.unload_lora()
            for part, text_encoder in zip(("text_encoder.", "text_encoder_2."), text_encoders, strict=False):
                _fuse_text(part, weights, alphas[0] if alphas else None, settings, text_encoder)
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"--lora {lora}: expected a LoRA for this base, found none that fits: {reason}") from None
    for network in (unet, *text_encoders):
        network.requires_grad_(False)


def _fuse_text(part: str, weights: dict, alphas: dict | None, settings: dict | None, text_encoder: nn.Module) -> None:
    """The part of a LoRA that is a text encoder's; peft alone does it, as transformers wants a newer one for it."""
    own = {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}
    if not own:
        return
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if settings:
        given = {name.removeprefix(part): value for name, value in settings.items() if name.startswith(part)}
    else:
        ranks = {name: value.shape[1] for name, value in own.items() if "lora_B" in name}
        given = get_peft_kwargs(ranks, alphas, own, is_unet=False)
    inject_adapter_in_model(LoraConfig(**given), text_encoder, PLACE)
    set_peft_model_state_dict(text_encoder, own, PLACE)
    merge_lora(text_encoder)


def merge_lora(network: Any) -> None:
    """Add the LoRA of a network to its weights; what is left is a network without one."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config


@contextmanager
def quiet_diffusers():
    """diffusers warns of every part that a LoRA leaves as it is."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def changed_layers(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
