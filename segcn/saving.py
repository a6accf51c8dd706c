"""A run is saved, resumed, and stopped by a signal, so that the same command goes on as if nothing had happened."""

import json
import signal
import sys
from pathlib import Path

from segcn import checkpoint, models
from segcn.ema import load_ema, save_ema
from segcn.errors import UserError
from segcn.prepare import Run


def catch_signals(run: Run) -> None:
    """Remember SIGTERM and SIGUSR1 until the step is done."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: run.stop_signal.append(received))


def stop_if_asked(run: Run) -> None:
    """End with exit code 143 once a signal has come; its checkpoint stands."""
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
            if run.ema is not None:
                save_ema(controlnet, run.ema, folder)
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
    if run.ema is not None:
        load_ema(run.ema, folder, state["step"])
    checkpoint.load_optimizer(run.optimizer.optimizer, folder / "optimizer.safetensors")
    run.schedule.load_state_dict(state["schedule"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.log.rewind(run.step)
    run.log.say(f"Resuming from {folder}.")
