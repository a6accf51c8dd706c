"""What a training step minimises: noise the latents, predict with U-Net and ControlNet, compare."""

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.training_utils import compute_snr
from torch.utils.data import DataLoader

from segcn.models.base import encode_moments, encode_text, sample_latents
from segcn.train.batches import Plan
from segcn.train.checkpoint import catch_signals, ignore_signals, resume, save, stop_if_asked, stoppable
from segcn.train.config import TrainConfig
from segcn.train.export import finish
from segcn.train.loss import diffusion_loss, min_snr_weights
from segcn.train.preflight import preflight
from segcn.train.setup import Run, prepare
from segcn.train.validation import begin_validation, validate

# --- objective: What a training step minimises: noise the latents, predict with U-Net and ControlNet, compare.


def step_losses(run: Run, batch: dict) -> torch.Tensor:
    """The losses of a micro-batch's samples, float32 [B]; `batch` as `Examples` collates it."""
    base, device = run.base, run.accelerator.device
    dtype = base.dtype
    moments = batch["moments"] if "moments" in batch else encode_moments(base.vae, batch["image"])
    text = batch["text"] if "text" in batch else encode_text(base, batch["caption"])
    clean = sample_latents(base.vae_config, moments.to(device), batch["posterior"].to(device))
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


# --- train: Train a ControlNet on a frozen base: `accelerate launch -m segcn.train`, with the flags of diffusers' script.


@stoppable()
def train(config: TrainConfig) -> Path | None:
    """Train as configured and return the run folder, a ControlNet that plain diffusers opens. Resumes by itself."""
    if config.preflight:
        preflight(config, learn)
        return None
    run = prepare(config)
    resume(run)
    catch_signals(run)
    begin_validation(run)
    stop_if_asked(run)
    for stepped in learn(run):
        if stepped:
            look_and_save(run)
        stop_if_asked(run)
    return finish(run)


def learn(run: Run) -> Iterator[bool]:
    """Learn from each micro-batch that is left, and yield whether that completed an optimizer step."""
    config, controlnet, accelerator = run.config, run.controlnet, run.accelerator
    controlnet.train()
    for batch in batches(run):
        run.bad_rows.seen(batch)
        with accelerator.accumulate(controlnet):
            losses = step_losses(run, batch)
            accelerator.backward(losses.mean())
            run.finite.seen(batch["row"], losses)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(controlnet.parameters(), config.max_grad_norm)
                run.finite.check(norm, run.step + 1)
                run.log.gradient(norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.log.loss(losses.mean())
        if accelerator.sync_gradients:
            count_step(run)
        yield accelerator.sync_gradients


def batches(run: Run) -> DataLoader:
    """The micro-batches of this process from the current step to the last."""
    config, accelerator = run.config, run.accelerator
    plan = Plan(
        len(run.split),
        config.seed,
        run.step,
        run.total_steps,
        config.gradient_accumulation_steps,
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        run.repeats,
    )
    left = f"steps {run.step + 1} to {run.total_steps} on {accelerator.num_processes} process(es)"
    run.log.say(
        f"Training {left}." if run.step < run.total_steps else f"Nothing left to do: all {run.step} steps stand."
    )
    run.log.began(run.step)
    return DataLoader(
        run.examples, batch_sampler=plan, num_workers=config.dataloader_num_workers, worker_init_fn=ignore_signals
    )


def count_step(run: Run) -> None:
    """An optimizer step is done: its average, its learning rate, its line in the log."""
    if run.ema is not None:
        run.ema.step(run.accelerator.unwrap_model(run.controlnet).parameters())
    run.schedule.step()
    run.step += 1
    run.log.step(run.step, run.total_steps, float(run.schedule.get_last_lr()[0]))


def look_and_save(run: Run) -> None:
    """Validation images and checkpoints when their step has come."""
    config, last = run.config, run.step == run.total_steps
    best, due = validate(run), last or run.step % config.checkpointing_steps == 0
    if best or due:
        save(run, only_best=not due)
