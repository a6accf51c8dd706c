"""A run is saved, resumed, and stopped by a signal, so that the same command goes on as if nothing had happened."""

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from segcn import checkpoint, models
from segcn.best import record_best
from segcn.claim import release
from segcn.ema import load_ema, save_ema
from segcn.errors import UserError
from segcn.launch import STOPPED
from segcn.prepare import WAIT, Run

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Around a whole training: a signal ends it with exit code 143, and its folder is free again when it ends."""
    before = {number: signal.signal(number, lambda *_: sys.exit(STOPPED)) for number in SIGNALS}
    try:
        yield
    finally:
        release()
        for number, handler in before.items():
            signal.signal(number, handler)


def catch_signals(run: Run) -> None:
    """From here on signals are remembered until `stop_if_asked`."""
    for number in SIGNALS:
        signal.signal(number, lambda received, _: run.stop_signal.append(received))


def ignore_signals(_worker: int) -> None:
    """In a process that reads data: a signal is the training's to answer, which ends its readers itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_if_asked(run: Run) -> None:
    """After each micro-batch: once a signal has come, save the last finished step and end with exit code 143."""
    number = signal_of_any(run)
    if number:
        if run.saved != run.step:
            save(run)
        run.log.say(f"Stopped by {signal.Signals(number).name} at step {run.step}; the same command goes on.")
        run.accelerator.end_training()
        sys.exit(STOPPED)


def signal_of_any(run: Run) -> int:
    """A signal that reached one of the processes, the same in all of them, or 0."""
    number = max(run.stop_signal, default=0)
    if run.accelerator.num_processes == 1:
        return number
    highest = torch.tensor(number)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=processor_group())
    return int(highest)


@functools.cache
def processor_group():
    """All processes, speaking by their processors: a GPU need not finish its work before a flag is passed on."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT)


def save(run: Run, only_best: bool = False) -> None:
    """Commit a checkpoint of everything that the next steps depend on; older ones go after it stands.

    only_best: it is kept for its score alone, and goes once another is better.
    """
    accelerator = run.accelerator
    state = {"step": run.step, "schedule": run.schedule.state_dict(), "losses": pending_losses(run)}
    state["only_best"] = only_best
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        folder = checkpoint.commit(
            run.output_dir, f"checkpoint-{run.step}", lambda folder: write(run, state, folder), bytes_of(run)
        )
        keep = record_best(run.output_dir)
        checkpoint.prune(run.output_dir, run.config.checkpoints_total_limit, keep)
        run.log.say(f"Saved {folder}.")
    run.saved = run.step
    accelerator.wait_for_everyone()


def write(run: Run, state: dict, folder: Path) -> None:
    """The files of a checkpoint: safetensors and JSON only."""
    controlnet = run.accelerator.unwrap_model(run.controlnet)
    controlnet.save_pretrained(folder / "controlnet")
    if run.ema is not None:
        save_ema(controlnet, run.ema, folder)
    checkpoint.save_optimizer(run.optimizer.optimizer, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def bytes_of(run: Run) -> int:
    """Disk space of a checkpoint, a little more than it takes."""
    averages = 1 if run.ema is not None else 0
    tensors = [*run.controlnet.state_dict().values()] * (1 + averages)
    tensors += [value for _, value in checkpoint.leaves(run.optimizer.state_dict()["state"])]
    return 2**20 + sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def pending_losses(run: Run) -> list[list[float]]:
    """[processes][micro-batches]: what the next line of the log will average, but those of an unfinished step."""
    losses = run.log.losses
    finished = losses[: len(losses) - len(losses) % run.config.gradient_accumulation_steps]
    return run.accelerator.gather(torch.stack(finished)[None]).tolist() if finished else []


def resume(run: Run) -> None:
    """Load the newest whole checkpoint of this run, or the one asked for; later ones are set aside by name."""
    with run.accelerator.main_process_first():  # it alone mends what a kill left; the others read after it
        folder = wanted_checkpoint(run)
    run.accelerator.wait_for_everyone()
    if folder is None:
        return run.log.rewind(0)
    state = json.loads((folder / "state.json").read_text())
    weights = models.load_controlnet(folder / "controlnet").state_dict()
    run.accelerator.unwrap_model(run.controlnet).load_state_dict(weights)
    if run.ema is not None:
        load_ema(run.ema, folder, state["step"])
    restore_optimizer(run, folder, state)
    if run.accelerator.scaler is not None and "scaler" in state:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = run.saved = state["step"]
    restore_losses(run, state.get("losses", []))
    run.log.rewind(run.step)
    if run.accelerator.is_main_process:
        set_later_aside(run)
    run.log.say(f"Resuming from {folder}.")


def restore_optimizer(run: Run, folder: Path, state: dict) -> None:
    """The optimizer's moments and the schedule's place; rates and the like are those of this run's settings."""
    optimizer, schedule = run.optimizer.optimizer, run.schedule
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    rates = schedule.base_lrs
    checkpoint.load_optimizer(optimizer, folder / "optimizer.safetensors")
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = rates
    for group, settings, rate, factor in zip(optimizer.param_groups, given, rates, schedule.lr_lambdas, strict=True):
        group.update(settings | {"lr": rate * factor(schedule.last_epoch)})


def wanted_checkpoint(run: Run) -> Path | None:
    """The folder to go on from; None: the run has none yet. UserError where the one asked for is not whole."""
    wanted = run.config.resume_from_checkpoint
    if wanted == "latest":
        return checkpoint.find_latest(run.output_dir, run.log.say)
    checkpoint.mend(run.output_dir)
    folder = run.output_dir / Path(wanted).name
    wrong = checkpoint.problem(folder) if folder.is_dir() else "there is no such folder"
    if wrong:
        raise UserError(f"--resume_from_checkpoint {folder}: {wrong}.")
    return folder


def set_later_aside(run: Run) -> None:
    """What stands beyond the present step is damaged or of a course now left: it must not pass for this run's."""
    for step, folder in checkpoint.steps(run.output_dir).items():
        if step > run.step:
            run.log.say(f"Setting {folder} aside as {checkpoint.set_aside(folder).name}; delete it as you like.")


def restore_losses(run: Run, saved: list[list[float]]) -> None:
    """Give the log back what `pending_losses` took; on another number of processes each gets the mean of all."""
    if saved:
        losses, accelerator = torch.tensor(saved, device=run.accelerator.device), run.accelerator
        same = len(saved) == accelerator.num_processes
        run.log.losses = list(losses[accelerator.process_index] if same else losses.mean(0))
