"""The networks that a training changes, and their weights in a checkpoint: a ControlNet, a LoRA of the base, weights of
its U-Net, or the decoder of its autoencoder.

Everything that is not trained is frozen and is in no checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from segcn.models.base import Base
from segcn.models.controlnet import load_controlnet, read_light, save_controlnet
from segcn.models.lora import TEXT_TARGETS, add_lora, changed_layers, has_lora, restore_lora, save_lora
from segcn.train.config import TrainConfig
from segcn.utils.errors import UserError

Networks = Mapping[str, Any]  # by part: controlnet, unet or transformer, text_encoder, vae
EMA = "_ema"  # ends the names of the averaged weights in a checkpoint


class LatentDecoder(nn.Module):
    """The second half of an autoencoder, as a network of its own; it shares the autoencoder's weights."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B,C,h,w], not scaled -> image [B,3,H,W] in about [-1,1]."""
        return self.decoder(self.post_quant_conv(latents))


def in_full(config: TrainConfig) -> bool:
    """Whether weights of the base itself are trained: they are held in float32."""
    return bool({"decoder", "all", "vae_decoder"} & set(config.trains))


def trained_parts(config: TrainConfig, base: Base) -> dict[str, nn.Module]:
    """The parts of the base that are trained, made trainable in place; none where it is frozen."""
    trains = config.trains
    found: dict[str, nn.Module] = {}
    if trains == ("controlnet",):
        return found
    alpha = config.lora_alpha or config.lora_rank
    torch.manual_seed(config.seed)
    if "lora" in trains:
        add_lora(base.unet, config.lora_rank, alpha, tuple(config.lora_targets))
        found[base.family.part] = base.unet
    if "decoder" in trains or "all" in trains:
        for network in [base.unet] if "all" in trains else base.family.decoder(base.unet):
            network.requires_grad_(True)
        found[base.family.part] = base.unet
    if "text_encoder" in trains:
        found["text_encoder"] = base.one_text_encoder("--lora_text_encoder")
        add_lora(found["text_encoder"], config.lora_rank, alpha, TEXT_TARGETS)
    if "vae_decoder" in trains:
        assert base.vae is not None
        decoder = LatentDecoder(base.vae).requires_grad_(True)
        if config.gradient_checkpointing:
            base.vae.enable_gradient_checkpointing()
        found["vae"] = decoder
    return found


def check_trained(config: TrainConfig) -> None:
    """UserError for settings of what is trained that contradict each other."""
    if config.train_unet == "lora" and config.lora:
        raise UserError(
            "--train_unet lora: expected a base without --lora, since a LoRA on a LoRA opens nowhere else; add it to"
            " the base first (segcn adapt --merge does), or continue with --train_unet decoder"
        )
    if config.controlnet == "lora" and config.train_unet == "lora":
        raise UserError(
            "--controlnet lora: expected a frozen encoder of the U-Net, which it shares, found --train_unet lora, which"
            " changes it; use --controlnet full, or --train_unet decoder"
        )
    if config.merge and "controlnet" in config.trains and config.controlnet != "lora":
        raise UserError("--merge: expected --controlnet lora, whose LoRA it merges; a full ControlNet has none")
    unlock = getattr(config, "unlock", None)
    if config.merge and not {"controlnet", "lora"} & set(config.trains):
        raise UserError("--merge: expected a LoRA to merge; --unlock and --vae_decoder write a base anyway")
    if getattr(config, "vae_decoder", False) and (unlock or getattr(config, "lora_text_encoder", False)):
        raise UserError("--vae_decoder: is trained by itself; rerun with the base that it wrote for the U-Net")
    if getattr(config, "lora_text_encoder", False) and unlock:
        raise UserError("--lora_text_encoder: goes with a LoRA of the U-Net, not with --unlock")


def write_networks(networks: Networks, folder: Path, suffix: str = "") -> None:
    """Store the trained weights in a checkpoint's folder; suffix: `EMA` for averaged ones."""
    if "controlnet" in networks:
        save_controlnet(networks["controlnet"], folder / f"controlnet{suffix}")
    base = {name: network for name, network in networks.items() if name != "controlnet"}
    if any(map(has_lora, base.values())):
        save_lora(folder / f"lora{suffix}", base)
    for name, network in base.items():
        if not has_lora(network):
            weights = {key: value.detach().cpu().contiguous() for key, value in changed_layers(network).items()}
            save_file(weights, folder / f"{name}{suffix}.safetensors")


@torch.no_grad()
def read_networks(networks: Networks, folder: Path, suffix: str = "") -> None:
    """Take over what `write_networks` stored, bit for bit; without averaged weights the others."""
    suffix = suffix if any(folder.glob(f"*{suffix}*")) else ""
    controlnet, place = networks.get("controlnet"), folder / f"controlnet{suffix}"
    if controlnet is not None and has_lora(controlnet):
        read_light(controlnet, place)
    elif controlnet is not None:
        controlnet.load_state_dict(load_controlnet(place).state_dict())
    base = {name: network for name, network in networks.items() if name != "controlnet"}
    if any(map(has_lora, base.values())):
        restore_lora(folder / f"lora{suffix}", base)
    for name, network in base.items():
        if not has_lora(network):
            weights = load_file(folder / f"{name}{suffix}.safetensors")
            for key, value in changed_layers(network).items():
                value.copy_(weights[key])
