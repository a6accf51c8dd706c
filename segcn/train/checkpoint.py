"""A run folder and its checkpoints: lock, save, prune, resume, the best one, and signals that end a run with one.

A checkpoint is committed (utils/io.py): it is complete with its manifest or does not exist."""

from __future__ import annotations

import functools
import json
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segcn.data.metadata import Split
from segcn.models.base import Base, folder_digest
from segcn.train.config import FREE_TO_CHANGE, MODELS_BY_CONTENT, TrainConfig
from segcn.train.log import LOG, STOPPED, Log, read_log, validation_scores
from segcn.train.networks import EMA, read_networks, write_networks
from segcn.utils import io
from segcn.utils.args import to_json
from segcn.utils.errors import UserError
from segcn.utils.paths import RUN_FILE

if TYPE_CHECKING:
    from segcn.train.setup import Run

BEST = "best.json"
SHARED_NUMBERS = 256  # of an optimizer's tensor that parameters may share: quantization maps of 8-bit optimizers
WAIT = timedelta(hours=3)  # of the other processes, while one validates


def lock_run_folder(
    output_dir: Path,
    config: TrainConfig,
    split: Split,
    base: Base,
    accelerator,
    log: Log,
    functions: dict[str, str | None],
) -> None:
    """Lock the run folder and write the resolved config, or compare it with the one that is there.

    functions: source digests of the functions that replace the package's own. UserError for a folder of something else,
    of another run, or in use.
    """
    resolved = json.loads(to_json(config)) | {
        "data_fingerprint": split.fingerprint,
        "base_fingerprint": base.fingerprint,
        "palette_fingerprint": split.palette.fingerprint,
        "mixed_precision": accelerator.mixed_precision,  # accelerate's own where the flag is not given
        "processes": accelerator.num_processes,
        "trains": config.trains,
        **functions,
    }
    places = {name: getattr(config, name) for name in MODELS_BY_CONTENT}
    resolved |= {f"{name}_content": folder_digest(place) if place else None for name, place in places.items()}
    path = output_dir / RUN_FILE
    allowed = {config.logging_dir, io.LOCK, io.aside(path).name}  # what a kill before the first line leaves
    if not path.is_file() and output_dir.exists() and {entry.name for entry in output_dir.iterdir()} - allowed:
        raise UserError(f"{output_dir} is not empty and holds no run of segcn: choose another --output_dir.")
    if accelerator.is_main_process:
        io.lock(output_dir, log.say)
    try:
        io.same_settings(path, resolved, FREE_TO_CHANGE, config.allow_changes, log.say, write=False)
    except UserError as error:
        raise UserError(f"{error} --allow_changes resumes with the new ones.") from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        io.write_text(path, json.dumps(resolved, indent=1) + "\n")
        if "controlnet" in config.trains:
            split.palette.save(output_dir / "palette.json")


def steps(output_dir: Path) -> dict[int, Path]:
    """Every checkpoint-N folder of a run by its step, oldest first, verified or not."""
    matches = {path: re.fullmatch(io.CHECKPOINT, path.name) for path in Path(output_dir).glob("checkpoint-*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def find_latest(output_dir: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and skipped; None where there is none at all.

    Raises UserError when checkpoints are there and not one of them is whole: starting over must be the user's choice.
    """
    io.restore_replaced(output_dir)
    found = steps(output_dir)
    for folder in reversed(found.values()):
        wrong = io.problem(folder)
        if wrong is None:
            return folder
        log(f"Skipping {folder}: {wrong}.")
    if found:
        raise UserError(
            f"{output_dir}: none of its {len(found)} checkpoints is whole. To start over, move them away or choose "
            "another --output_dir."
        )
    return None


def prune(output_dir: Path, limit: int | None, keep: Collection[str] = ()) -> None:
    """Delete the oldest checkpoints beyond `limit`, but none named in `keep`; called after a newer one is committed."""
    if limit is not None:
        for folder in list(steps(output_dir).values())[: -max(limit, 1)]:
            if folder.name not in keep:
                io.discard(folder)


def save(run: Run, only_best: bool = False) -> None:
    """Commit a checkpoint of everything that the next steps depend on, then delete older ones.

    only_best: it is kept for its score alone, and deleted once another is better.
    """
    accelerator, losses = run.accelerator, run.log.losses
    finished = losses[: len(losses) - len(losses) % run.config.gradient_accumulation_steps]
    state = {
        "step": run.step,
        "schedule": run.schedule.state_dict(),
        # [processes][micro-batches]: what the next line of the log will average, without those of an unfinished step
        "losses": accelerator.gather(torch.stack(finished)[None]).tolist() if finished else [],
        "only_best": only_best,
    }
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        tensors = [*run.weights] * (1 if run.ema is None else 2)
        tensors += [value for _, value in leaves(run.optimizer.state_dict()["state"])]
        needed = 2**20 + sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))  # a little more
        name = f"checkpoint-{run.step}"
        folder = io.commit(run.output_dir, name, lambda folder: write(run, state, folder), needed)
        prune(run.output_dir, run.config.checkpoints_total_limit, record_best(run.output_dir))
        run.log.say(f"Saved {folder}.")
    run.saved = run.step
    accelerator.wait_for_everyone()


def write(run: Run, state: dict, folder: Path) -> None:
    """The files of a checkpoint: safetensors and JSON only."""
    write_networks(run.own_networks, folder)
    if run.ema is not None:
        with run.averaged() as networks:
            write_networks(networks, folder, EMA)
    save_optimizer(run.optimizer.optimizer, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def resume(run: Run) -> None:
    """Load the newest whole checkpoint of this run, or the one requested; later ones are set aside by name."""
    with run.accelerator.main_process_first():  # it alone repairs what a kill left; the others read after it
        folder = wanted_checkpoint(run)
    run.accelerator.wait_for_everyone()
    if folder is None:
        return run.log.rewind(0)
    state = json.loads((folder / "state.json").read_text())
    if run.ema is not None:
        run.ema.optimization_step = state["step"]
        read_networks(run.own_networks, folder, EMA)
        for shadow, weight in zip(run.ema.shadow_params, run.weights, strict=True):
            shadow.copy_(weight.detach())
    read_networks(run.own_networks, folder)
    restore_optimizer(run, folder, state)
    if run.accelerator.scaler is not None and "scaler" in state:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = run.saved = state["step"]
    if state["losses"]:  # on another number of processes each gets the mean of all
        losses = torch.tensor(state["losses"], device=run.accelerator.device)
        same = len(losses) == run.accelerator.num_processes
        run.log.losses = list(losses[run.accelerator.process_index] if same else losses.mean(0))
    run.log.rewind(run.step)
    if run.accelerator.is_main_process:
        for step, later in steps(run.output_dir).items():
            if step > run.step:  # damaged, or of a course that is left now
                run.log.say(f"Setting {later} aside as {io.set_aside(later).name}; delete it as you like.")
    run.log.say(f"Resuming from {folder}.")


def wanted_checkpoint(run: Run) -> Path | None:
    """The folder to resume from; None: the run has none yet. UserError where the one requested is not whole."""
    wanted = run.config.resume_from_checkpoint
    if wanted == "latest":
        return find_latest(run.output_dir, run.log.say)
    io.restore_replaced(run.output_dir)
    folder = run.output_dir / Path(wanted).name
    wrong = io.problem(folder) if folder.is_dir() else "there is no such folder"
    if wrong:
        raise UserError(f"--resume_from_checkpoint {folder}: {wrong}.")
    return folder


def restore_optimizer(run: Run, folder: Path, state: dict) -> None:
    """The optimizer's moments and the schedule's place; rates and the like are those of this run's settings."""
    optimizer, schedule = run.optimizer.optimizer, run.schedule
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    rates = schedule.base_lrs
    load_optimizer(optimizer, folder / "optimizer.safetensors")
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = rates
    for group, settings, rate, factor in zip(optimizer.param_groups, given, rates, schedule.lr_lambdas, strict=True):
        group.update(settings | {"lr": rate * factor(schedule.last_epoch)})


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Store an optimizer's state without pickle: tensors in safetensors, everything else as JSON in its metadata.

    Tensors are written from where they lie, since a copy may not fit into memory: those in channels_last with their
    dimensions in that order.
    """
    state = optimizer.state_dict()
    tensors, scalars, turned = {}, {}, []
    for keys, value in leaves(state["state"]):
        name = "/".join(map(str, keys))
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            if value.dim() == 4 and not value.is_contiguous():
                turned.append(name)
                value = value.permute(0, 2, 3, 1)
            tensors[name] = value.clone() if value.numel() <= SHARED_NUMBERS else value.contiguous()
        else:
            scalars[name] = value
    rest = {"scalars": scalars, "channels_last": sorted(turned), "param_groups": state["param_groups"]}
    save_file(tensors, path, metadata={"json": json.dumps(rest)})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` stored, bit for bit."""
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["json"])
    state: dict[int, dict] = {}
    turned = set(rest["channels_last"])
    for name, value in {**load_file(path), **rest["scalars"]}.items():
        index, *folders, key = name.split("/")
        place = state.setdefault(int(index), {})
        for folder in folders:
            place = place.setdefault(folder, {})
        place[key] = value.permute(0, 3, 1, 2) if name in turned else value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    for parameter, entries in optimizer.state.items():  # fused kernels want the memory layout of the parameter
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def leaves(tree: dict, path: tuple = ()):
    """(path, value) of every leaf of nested dictionaries: 8-bit optimizers nest their quantization state."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


@contextmanager
def averaged(weights: Sequence[torch.nn.Parameter], ema: EMAModel | None) -> Iterator[None]:
    """The trained weights are their averages for a while; without an average they stay as they are."""
    if ema is None:
        yield
        return
    ema.store(weights)
    ema.copy_to(weights)
    try:
        yield
    finally:
        ema.restore(weights)


def record_best(output_dir: Path) -> list[str]:
    """Write best.json for the best validation whose checkpoint exists; the checkpoint's name, to be kept.

    It follows from log.jsonl and the folders alone, so a resumed run has the one of a run that was never cut. The best
    until now is deleted, if it was saved for its score alone.
    """
    existing = steps(output_dir)
    found = {step: score for step, score in validation_scores(read_log(output_dir / LOG)).items() if step in existing}
    if not found:
        (output_dir / BEST).unlink(missing_ok=True)
        return []
    step = max(found, key=lambda step: found[step]["of_ceiling"])
    old, name = read_best(output_dir), existing[step].name
    new = {"step": step, "checkpoint": name, "miou": found[step]["miou"], "of_ceiling": found[step]["of_ceiling"]}
    io.write_text(output_dir / BEST, json.dumps(new) + "\n")
    if old and old["step"] < step and old["step"] in existing:
        folder = existing[old["step"]]
        if json.loads((folder / "state.json").read_text())["only_best"]:
            io.discard(folder)
    return [name]


def read_best(output_dir: str | Path) -> dict | None:
    """step, checkpoint, miou and of_ceiling of the best checkpoint; None where none was scored."""
    path = Path(output_dir) / BEST
    return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Around a whole training: a signal ends it with exit code 143, and its folder is free again when it ends."""
    before = handle_signals(lambda *_: sys.exit(STOPPED))
    try:
        yield
    except SystemExit:
        before = dict.fromkeys(before, signal.SIG_IGN)  # a second Ctrl-C must not cut short how the program ends
        raise
    finally:
        io.release()
        for number, handler in before.items():
            signal.signal(number, handler)


def catch_signals(run: Run) -> None:
    """From here on signals are remembered until `stop_if_interrupted`."""
    handle_signals(lambda received, _: run.stop_signal.append(received))


def ignore_signals(_worker: int) -> None:
    """In a process that reads data: the training answers the signal, and ends its readers itself."""
    handle_signals(signal.SIG_IGN)


def handle_signals(handler) -> dict[int, Any]:
    """Set the handler of every signal that stops a training, and return those before.

    One that is ignored, such as SIGHUP under nohup and SIGINT of a job in the background, stays ignored.
    """
    return {number: signal.signal(number, handler) for number in stopping_signals()}


@functools.cache
def stopping_signals() -> tuple[int, ...]:
    """The signals that stop a training, without those that this process ignored at the first call."""
    stopping = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    return tuple(number for number in stopping if signal.getsignal(number) != signal.SIG_IGN)


def stop_if_interrupted(run: Run) -> None:
    """After each micro-batch: once a signal reached one of the processes, all save the last finished step and end."""
    number = max(run.stop_signal, default=0)
    if run.accelerator.num_processes > 1:
        highest = torch.tensor(number)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=cpu_group())
        number = int(highest)
    if number:
        if run.saved != run.step:
            save(run)
        run.log.say(f"Stopped by {signal.Signals(number).name} at step {run.step}; rerun the same command to resume.")
        run.accelerator.end_training()
        sys.exit(STOPPED)


@functools.cache
def cpu_group():
    """All processes, connected by their CPUs: a GPU need not finish its work before a flag is passed on."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT)
