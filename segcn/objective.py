"""What a training step minimises: noise the latents, predict with U-Net and ControlNet, compare."""

import torch
from diffusers.training_utils import compute_snr

from segcn import models
from segcn.loss import diffusion_loss, min_snr_weights
from segcn.prepare import Run


def step_losses(run: Run, batch: dict) -> torch.Tensor:
    """The losses of a micro-batch's samples, float32 [B]; `batch` as `Examples` collates it."""
    base, device = run.base, run.accelerator.device
    dtype = base.dtype
    moments = batch["moments"] if "moments" in batch else models.encode_moments(base.vae, batch["image"])
    text = batch["text"] if "text" in batch else models.encode_text(base, batch["caption"])
    clean = models.sample_latents(base.vae_config, moments.to(device), batch["posterior"].to(device))
    noise, timestep = batch["noise"].to(device), batch["timestep"].to(device)
    noisy = base.scheduler.add_noise(clean, noise, timestep)
    text, control = text.to(device, torch.float32), batch["control"].to(device)
    down, middle = run.controlnet(noisy, timestep, text, controlnet_cond=control, return_dict=False)
    prediction = base.unet(
        noisy.to(dtype),
        timestep,
        text.to(dtype),
        down_block_additional_residuals=[residual.to(dtype) for residual in down],
        mid_block_additional_residual=middle.to(dtype),
    ).sample
    target = base.scheduler.get_velocity(clean, noise, timestep) if base.predicts_v else noise
    weights = batch["weights"].to(device) if "weights" in batch else None
    losses = diffusion_loss(prediction, target, batch["cells"].to(device), weights)
    if run.config.snr_gamma is not None:
        losses = losses * min_snr_weights(compute_snr(base.scheduler, timestep), run.config.snr_gamma, base.predicts_v)
    return losses
