"""What is trained, and how: the ControlNet and its optimizer."""

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel

from segcn import models
from segcn.errors import UserError
from segcn.schedule import check_schedule
from segcn.train_config import TrainConfig

SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block")  # of ControlNet and U-Net


def check_trainable(config: TrainConfig, base: models.Base) -> None:
    """UserError for an unknown schedule, or a ControlNet to go on from that is none or does not fit the base."""
    check_schedule(config.lr_scheduler)
    name = config.controlnet_model_name_or_path
    if name is None:
        return
    try:
        found = ControlNetModel.load_config(name)
    except OSError:
        raise UserError(
            f"--controlnet_model_name_or_path {name}: expected a ControlNet (config.json and "
            "diffusion_pytorch_model.safetensors), found none in such a folder, nor on the hub"
        ) from None
    expected = {"_class_name": "ControlNetModel", "conditioning_channels": 3}
    expected |= {key: base.unet.config[key] for key in SHARED}
    for key, value in expected.items():
        if _plain(found.get(key, value)) != _plain(value):
            raise UserError(
                f"--controlnet_model_name_or_path {name}: its {key} is {_plain(found[key])}, and {_plain(value)} fits"
                f" the base {base.folder}; leave the flag out to begin with a copy of the base's encoder"
            )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def make_trainable(config: TrainConfig, base: models.Base) -> ControlNetModel:
    """The ControlNet to train, in float32."""
    if config.controlnet_model_name_or_path:
        controlnet = models.load_controlnet(config.controlnet_model_name_or_path, base.unet.device)
    else:
        torch.manual_seed(config.seed)
        controlnet = models.make_controlnet(base.unet, base.latent_factor).float()
    controlnet.requires_grad_(True)
    if config.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
    return controlnet


def make_optimizer(config: TrainConfig, controlnet: ControlNetModel, accelerator: Accelerator):
    """AdamW, fused, or in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""
    effective = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    settings: dict[str, Any] = {
        "lr": config.learning_rate * (effective if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(controlnet.parameters(), **settings)
    return torch.optim.AdamW(controlnet.parameters(), fused=config.fused_adam or None, **settings)
