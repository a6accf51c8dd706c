"""Train a ControlNet on a frozen base: `accelerate launch -m segcn.train`, with the flags of diffusers' script."""

import json
import signal
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from segcn import checkpoint, latents, models
from segcn.arguments import main_guard, parse
from segcn.errors import UserError
from segcn.loss import diffusion_loss
from segcn.prepare import RUN_FILE, Run, prepare
from segcn.train_config import TrainConfig
from segcn.validate import paint_validation


def train(config: TrainConfig) -> Path:
    """Train as configured and return the run folder, a ControlNet that plain diffusers opens. Resumes by itself."""
    run = prepare(config)
    resume(run)
    catch_signals(run)
    controlnet, accelerator = run.controlnet, run.accelerator
    controlnet.train()
    for batch in batches(run):
        with accelerator.accumulate(controlnet):
            loss = step_loss(run, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.log.gradient(accelerator.clip_grad_norm_(controlnet.parameters(), config.max_grad_norm))
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.log.loss(loss)
        if accelerator.sync_gradients:
            run.schedule.step()
            run.step += 1
            run.log.step(run.step, run.total_steps, run.schedule.get_last_lr()[0])
            look_and_save(run)
    return finish(run)


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


def catch_signals(run: Run) -> None:
    """Remember SIGTERM and SIGUSR1 until the step is done."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: run.stop_signal.append(received))


def batches(run: Run) -> DataLoader:
    """The micro-batches of this process from the current step to the last."""
    config, accelerator = run.config, run.accelerator
    plan = latents.Plan(
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
    return DataLoader(run.examples, batch_sampler=plan, num_workers=config.dataloader_num_workers)


def look_and_save(run: Run) -> None:
    """Validation pictures and checkpoints when their step has come; a signal commits and ends with exit code 143."""
    config, last = run.config, run.step == run.total_steps
    if config.validation_image and (run.step % config.validation_steps == 0 or last):
        paint_validation(run)
    if run.step % config.checkpointing_steps == 0 or last or run.stop_signal:
        save(run)
    if run.stop_signal:
        run.log.say(
            f"Stopped by {signal.Signals(run.stop_signal[0]).name} at step {run.step}; the same command goes on."
        )
        sys.exit(143)


def save(run: Run) -> None:
    """Commit a checkpoint of weights, optimizer and schedule; older ones go after it stands."""
    accelerator = run.accelerator
    if accelerator.is_main_process:
        controlnet = accelerator.unwrap_model(run.controlnet)
        state = {"step": run.step, "schedule": run.schedule.state_dict()}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()

        def write(folder: Path) -> None:
            controlnet.save_pretrained(folder / "controlnet")
            checkpoint.save_optimizer(run.optimizer.optimizer, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps(state))

        folder = checkpoint.commit(run.output_dir, f"checkpoint-{run.step}", write)
        checkpoint.prune(run.output_dir, run.config.checkpoints_total_limit)
        run.log.say(f"Saved {folder}.")
    accelerator.wait_for_everyone()


def resume(run: Run) -> None:
    """Load the newest whole checkpoint of this run, or the one asked for."""
    wanted = run.config.resume_from_checkpoint
    if wanted == "latest":
        folder = checkpoint.find_latest(run.output_dir, run.log.say)
    else:
        folder = run.output_dir / Path(wanted).name
        wrong = checkpoint.problem(folder) if folder.is_dir() else "there is no such folder"
        if wrong:
            raise UserError(f"--resume_from_checkpoint {folder}: {wrong}.")
    if folder is None:
        return run.log.rewind(0)
    state = json.loads((folder / "state.json").read_text())
    weights = models.load_controlnet(folder / "controlnet").state_dict()
    run.accelerator.unwrap_model(run.controlnet).load_state_dict(weights)
    checkpoint.load_optimizer(run.optimizer.optimizer, folder / "optimizer.safetensors")
    run.schedule.load_state_dict(state["schedule"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.log.rewind(run.step)
    run.log.say(f"Resuming from {folder}.")


def finish(run: Run) -> Path:
    """Write the ControlNet where `ControlNetModel.from_pretrained(output_dir)` finds it."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(run.controlnet).save_pretrained(run.output_dir)
        run.log.say(f"Done: {run.output_dir} opens with ControlNetModel.from_pretrained.")
        if run.config.push_to_hub:
            upload(run)
    accelerator.end_training()
    return run.output_dir


def upload(run: Run) -> None:
    """Put the finished ControlNet, without checkpoints and tracker files, on the hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=run.config.hub_token)
    name = api.create_repo(run.config.hub_model_id or run.output_dir.name, exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=run.output_dir, allow_patterns=["*.json", "*.safetensors"],
                      ignore_patterns=["checkpoint-*", RUN_FILE])  # fmt: skip


def main() -> None:
    """Command line: `accelerate launch -m segcn.train --help`."""
    main_guard(lambda: train(parse(TrainConfig, sys.argv[1:], "accelerate launch -m segcn.train")))


if __name__ == "__main__":
    main()
