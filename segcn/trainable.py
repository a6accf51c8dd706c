"""What is trained, and how: the ControlNet, its optimizer and its learning rate."""

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel
from diffusers.optimization import get_scheduler

from segcn import models
from segcn.train_config import TrainConfig


def make_trainable(config: TrainConfig, base: models.Base) -> ControlNetModel:
    """The ControlNet to train, in float32."""
    if config.controlnet_model_name_or_path:
        controlnet = models.load_controlnet(config.controlnet_model_name_or_path)
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
    settings = {
        "lr": config.learning_rate * (effective if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(controlnet.parameters(), **settings)
    return torch.optim.AdamW(controlnet.parameters(), fused=config.fused_adam or None, **settings)


def make_schedule(config: TrainConfig, optimizer):
    """The learning rate by optimizer steps, whatever the number of processes."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
