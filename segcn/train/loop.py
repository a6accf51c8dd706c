"""The training loop: batch, loss, backward, clip, step, log, save."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch.utils.data import DataLoader

from segcn.models.base import encode_moments, encode_text, sample_latents, unscale
from segcn.models.controlnet import ControlNet
from segcn.models.family import each_residual
from segcn.train.batches import Plan
from segcn.train.checkpoint import catch_signals, end_on_signals, ignore_signals, resume, save, stop_if_interrupted
from segcn.train.config import TrainConfig
from segcn.train.export import finish_training
from segcn.train.loss import Loss, decoder_loss, min_snr_weights
from segcn.train.memory import preflight
from segcn.train.reward import reward_losses
from segcn.train.setup import AugmentFunction, Run, prepare
from segcn.train.validation import begin_validation, validate_if_due


@end_on_signals()
def train(
    config: TrainConfig,
    loss: Loss | None = None,
    augment: AugmentFunction | None = None,
    make_controlnet: Callable[[Any], ControlNet] | None = None,
) -> Path | None:
    """Train as configured and return the run folder, a ControlNet that plain diffusers opens; rerun to resume.

    loss: replaces `diffusion_loss`, with its signature; --snr_gamma still weights what it returns. augment(image, mask,
    seed) -> (image, mask): applied after the paired affine. make_controlnet(unet): the ControlNet to begin with; of
    Stable Diffusion 3 it gets the transformer.
    Returns None after a --preflight.
    """
    if config.preflight:
        preflight(config, micro_steps)
        return None
    run = prepare(config, loss, augment, make_controlnet)
    resume(run)
    catch_signals(run)
    begin_validation(run)
    stop_if_interrupted(run)
    for stepped in micro_steps(run):
        if stepped:
            validate_and_save(run)
        stop_if_interrupted(run)
    return finish_training(run)


def micro_steps(run: Run) -> Iterator[bool]:
    """Train on each micro-batch that is left, and yield whether that completed an optimizer step."""
    config, networks, accelerator = run.config, run.networks.values(), run.accelerator
    for network in networks:
        network.train()
    for batch in micro_batches(run):
        with accelerator.accumulate(*networks):
            losses = step_losses(run, batch)
            shares = batch["share"].to(losses.device) if "share" in batch else 1  # of rows in a group, by --buckets
            accelerator.backward((losses * shares).mean())
            run.finite.add(batch["row"], losses)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.weights, config.max_grad_norm)
                run.finite.check(norm, run.step + 1)
                run.log.norm = norm
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.log.add(losses.mean().detach())
        if accelerator.sync_gradients:
            if run.ema is not None:
                run.ema.step(run.weights)
            run.schedule.step()
            run.step += 1
            run.log.step(run.step, run.total_steps, float(run.schedule.get_last_lr()[0]))
        yield accelerator.sync_gradients


def step_losses(run: Run, batch: dict) -> torch.Tensor:
    """The losses of a micro-batch's samples, float32 [B]; `batch` as `Examples` collates it."""
    base, process, device, dtype = run.base, run.base.process, run.accelerator.device, run.base.dtype
    moments = batch["moments"] if "moments" in batch else encode_moments(base.vae, batch["image"])  # [B,2C,h,w]
    if "vae" in run.networks:
        return decoder_losses(run, batch, moments)
    trained_text = run.networks.get("text_encoder")
    text = batch["text"] if "text" in batch else encode_text(base, batch["caption"], trained_text)  # [B,L,D]
    clean = sample_latents(base.vae_config, moments.to(device), batch["posterior"].to(device))  # [B,C,h,w]
    noise, timestep = batch["noise"].to(device), batch["timestep"].to(device)
    late = run.step >= run.config.reward_start * run.total_steps
    rewards = run.reward_segmenter if late else None  # the segmenter, once it rewards
    if rewards is not None:
        timestep = torch.where(batch["reward_timestep"].to(device) < 0, timestep, batch["reward_timestep"].to(device))
    noisy, times = process.noisy(clean, noise, timestep), process.times(timestep)
    text, sizes, residuals = text.to(device, torch.float32), batch.get("sizes"), {}
    if run.controlnet is not None:
        control = base.encode_control(batch["control"].to(device), run.controlnet)
        residuals = base.residuals(run.controlnet, noisy, times, text, sizes, control)
        residuals = each_residual(residuals, lambda residual: residual.to(dtype))
    prediction = base.predict(noisy.to(dtype), times, text.to(dtype), sizes, residuals, run.unet)
    target = process.target(clean, noise, timestep)
    weights = batch["weights"].to(device) if "weights" in batch else None
    losses = run.loss(prediction, target, batch["cells"].to(device), weights)
    if run.config.snr_gamma is not None:
        snr, predicts_v = compute_snr(base.scheduler, timestep), process.predicts == "v"
        losses = losses * min_snr_weights(snr, run.config.snr_gamma, predicts_v)
    if run.reward_segmenter is not None:
        run.log.reward = losses.new_zeros(())
    if rewards is not None and (rows := torch.where(batch["reward_timestep"] >= 0)[0].to(device)).numel():
        clean = process.clean(noisy[rows], prediction.float()[rows], timestep[rows])
        found = run.config.reward_weight * reward_losses(base, rewards, clean, batch["mask"].to(device)[rows])
        run.log.reward = found.detach().sum() / len(losses)
        losses = losses.index_add(0, rows, found)
    return losses


def decoder_losses(run: Run, batch: dict, moments: torch.Tensor) -> torch.Tensor:
    """The losses of what the autoencoder's decoder makes of its own latents, float32 [B]."""
    device, config = run.accelerator.device, run.base.vae_config
    latents = unscale(config, sample_latents(config, moments.to(device), batch["posterior"].to(device)))
    image = run.networks["vae"](latents.to(run.base.dtype))
    return decoder_loss(image, batch["image"].to(device), batch["valid"].to(device))


def micro_batches(run: Run) -> DataLoader:
    """The micro-batches of this process from the current step to the last."""
    accelerator = run.accelerator
    if run.step < run.total_steps:
        processes = accelerator.num_processes
        run.log.say(f"Training steps {run.step + 1} to {run.total_steps} on {processes} process(es).")
    else:
        run.log.say(f"Nothing left to do: all {run.step} steps are complete.")
    run.log.start_clock(run.step)
    plan = Plan(
        len(run.split),
        run.config.seed,
        run.step,
        run.total_steps,
        run.config.gradient_accumulation_steps,
        run.config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        run.repeats,
        run.examples.dataset.shapes if run.config.buckets else None,
    )
    workers = run.config.dataloader_num_workers
    return DataLoader(run.examples, batch_sampler=plan, num_workers=workers, worker_init_fn=ignore_signals)


def validate_and_save(run: Run) -> None:
    """Validation images and checkpoints when their step has come."""
    best = validate_if_due(run)
    due = run.step == run.total_steps or run.step % run.config.checkpointing_steps == 0
    if best or due:
        save(run, only_best=not due)
