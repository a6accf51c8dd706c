"""What a training step minimises: noise the latents, predict with U-Net and ControlNet, compare."""

from segcn import models
from segcn.errors import UserError
from segcn.loss import diffusion_loss
from segcn.prepare import Run


def step_loss(run: Run, batch: dict):
    """Noise the latents, predict with U-Net and ControlNet, compare: a scalar, the mean over the micro-batch."""
    base, device = run.base, run.accelerator.device
    dtype = base.unet.dtype
    moments = batch["moments"] if "moments" in batch else models.encode_moments(base.vae, batch["image"])
    text = batch["text"] if "text" in batch else models.encode_text(base, batch["caption"])
    clean = models.sample_latents(base.vae_config, moments.to(device), batch["posterior"].to(device))
    noise, timestep = batch["noise"].to(device), batch["timestep"].to(device)
    noisy = base.scheduler.add_noise(clean, noise, timestep).to(dtype)
    text, control = text.to(device, dtype), batch["control"].to(device, dtype)
    down, middle = run.controlnet(noisy, timestep, text, controlnet_cond=control, return_dict=False)
    prediction = base.unet(
        noisy,
        timestep,
        text,
        down_block_additional_residuals=[residual.to(dtype) for residual in down],
        mid_block_additional_residual=middle.to(dtype),
    ).sample
    target = base.scheduler.get_velocity(clean, noise, timestep) if predicts_v(base) else noise
    return diffusion_loss(prediction, target, batch["cells"].to(device)).mean()


def predicts_v(base: models.Base) -> bool:
    """Whether the base was trained on v (Stable Diffusion 2.x at 768) rather than on noise."""
    kind = base.scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{base.folder}/scheduler: expected epsilon or v_prediction, found {kind}")
    return kind == "v_prediction"
