"""Commit, find, verify and prune checkpoints: a folder either stands whole with its manifest or does not exist.

The order of writes follows what LWN calls the only safe way to replace a file: write aside, fsync, rename, fsync the
folder (https://lwn.net/Articles/457667/)."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import ControlNetModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from segcn.data.metadata import Split
from segcn.models.base import Base
from segcn.models.controlnet import load_controlnet
from segcn.train.config import TrainConfig, differences
from segcn.train.launch import STOPPED
from segcn.train.log import LOG, Log, read_log
from segcn.utils import io
from segcn.utils.args import to_json
from segcn.utils.errors import UserError
from segcn.utils.io import CHECKPOINT, LOCK, aside, discard, lock, problem, release, restore_replaced, write_text
from segcn.utils.paths import RUN_FILE

if TYPE_CHECKING:
    from segcn.train.setup import Run

WAIT = timedelta(hours=3)  # of the other processes, while one validates

# --- checkpoint: Commit, find, verify and prune checkpoints: a folder either stands whole with its manifest or does not exist.
#
# The order of writes follows what LWN calls the only safe way to replace a file: write aside, fsync, rename, fsync the
# folder (https://lwn.net/Articles/457667/).

SMALL = 256  # numbers of an optimizer's tensor that may be shared


def steps(output_dir: Path) -> dict[int, Path]:
    """Every checkpoint-N folder of a run by its step, oldest first, verified or not."""
    matches = {path: re.fullmatch(CHECKPOINT, path.name) for path in Path(output_dir).glob("checkpoint-*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def find_latest(output_dir: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and skipped; None where there is none at all.

    Raises UserError when checkpoints are there and not one of them is whole: starting over must be the user's choice.
    """
    restore_replaced(output_dir)
    found = steps(output_dir)
    for folder in reversed(found.values()):
        wrong = problem(folder)
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
    """Delete the oldest checkpoints beyond `limit`, but none named in `keep`; called only after a newer one stands."""
    beyond = list(steps(output_dir).values())[: -max(limit, 1)] if limit is not None else []
    for folder in beyond:
        if folder.name not in keep:
            discard(folder)


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
            shared = value.numel() <= SMALL  # by several parameters: the quantisation maps of an 8-bit optimizer
            tensors[name] = value.clone() if shared else value.contiguous()
        else:
            scalars[name] = value
    rest = {"scalars": scalars, "channels_last": sorted(turned), "param_groups": state["param_groups"]}
    save_file(tensors, path, metadata={"json": json.dumps(rest)})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` stored, bit for bit."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["json"])
    state: dict[int, dict] = {}
    turned = set(rest.get("channels_last", ()))
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
    """(path, value) of every leaf of nested dictionaries: 8-bit optimizers nest their quantisation state."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


# --- ema: The exponential moving average of the trained weights, by diffusers' EMAModel: stored, resumed, painted with.

FOLDER = "controlnet_ema"  # in a checkpoint


def make_ema(controlnet: ControlNetModel, decay: float) -> EMAModel:
    """An average that starts at the present weights, float32, on their device."""
    return EMAModel(controlnet.parameters(), decay=decay, foreach=True)


@contextmanager
def averaged(controlnet: ControlNetModel, ema: EMAModel | None) -> Iterator[ControlNetModel]:
    """The ControlNet with the averaged weights for a while; without an average as it is."""
    if ema is None:
        yield controlnet
        return
    ema.store(controlnet.parameters())
    ema.copy_to(controlnet.parameters())
    try:
        yield controlnet
    finally:
        ema.restore(controlnet.parameters())


def save_ema(controlnet: ControlNetModel, ema: EMAModel, folder: Path) -> None:
    """Write checkpoint folder/controlnet_ema, which `ControlNetModel.from_pretrained` opens."""
    with averaged(controlnet, ema):
        controlnet.save_pretrained(folder / FOLDER)


@torch.no_grad()
def load_ema(ema: EMAModel, folder: Path, step: int) -> None:
    """Go on from a checkpoint at an optimizer step: from its average, or where it has none from its weights."""
    ema.optimization_step = step
    stored = next(folder / name for name in (FOLDER, "controlnet") if (folder / name).is_dir())
    for shadow, weight in zip(ema.shadow_params, load_controlnet(stored).parameters(), strict=True):
        shadow.copy_(weight)


# --- best: The best checkpoint of a training: what the log says of its validations, and best.json, which names it.

BEST = "best.json"


def validation_scores(entries: list[dict]) -> dict[int, dict]:
    """The faithfulness that a log's entries tell, by step."""
    return {entry["step"]: entry["faithfulness"] for entry in entries if "faithfulness" in entry}


def fractions(entries: list[dict]) -> tuple[list[int], list[float]]:
    """The steps, and the faithfulness there as a share of the ceiling."""
    found = validation_scores(entries)
    return list(found), [score["of_ceiling"] for score in found.values()]


def is_best(entries: list[dict]) -> bool:
    """Whether the last validation beats all before it."""
    *before, last = fractions(entries)[1]
    return last > max(before, default=-1.0)


def record_best(output_dir: Path) -> list[str]:
    """Write best.json for the best validation whose checkpoint stands; the checkpoint's name, to be kept.

    It follows from log.jsonl and the folders alone, so a resumed run has the one of a run that was never cut. The best
    until now goes, if it was saved for its score alone.
    """
    standing = steps(output_dir)
    found = {step: score for step, score in validation_scores(read_log(output_dir / LOG)).items() if step in standing}
    if not found:
        (output_dir / BEST).unlink(missing_ok=True)
        return []
    step = max(found, key=lambda step: found[step]["of_ceiling"])
    name = standing[step].name
    old = read_best(output_dir)
    told = {"step": step, "checkpoint": name, "miou": found[step]["miou"], "of_ceiling": found[step]["of_ceiling"]}
    write_text(output_dir / BEST, json.dumps(told) + "\n")
    if old and old["step"] < step and old["step"] in standing and only_best(standing[old["step"]]):
        io.discard(standing[old["step"]])
    return [name]


def only_best(folder: Path) -> bool:
    """Whether a checkpoint was saved for its score alone."""
    return json.loads((folder / "state.json").read_text()).get("only_best", False)


def read_best(output_dir: str | Path) -> dict | None:
    """step, checkpoint, miou and of_ceiling of the best checkpoint; None where none was scored."""
    path = Path(output_dir) / BEST
    return json.loads(path.read_text()) if path.is_file() else None


# --- claim: A run folder belongs to one run: its settings stand there, and other settings or another run are refused.


def claim(output_dir: Path, config: TrainConfig, split: Split, base: Base, accelerator, log: Log) -> None:
    """Write the resolved config to the run folder, or hold it against the one that stands there."""
    resolved = json.loads(to_json(config)) | {
        "data_fingerprint": split.fingerprint,
        "base_fingerprint": base.fingerprint,
        "palette_fingerprint": split.palette.fingerprint,
        "mixed_precision": accelerator.mixed_precision,  # accelerate's own where the flag is not given
        "processes": accelerator.num_processes,
    }
    path = output_dir / RUN_FILE
    allowed = {config.logging_dir, LOCK, aside(path).name}  # what a kill before the first line leaves
    if not path.is_file() and output_dir.exists() and {entry.name for entry in output_dir.iterdir()} - allowed:
        raise UserError(f"{output_dir} is not empty and holds no run of segcn: choose another --output_dir.")
    if accelerator.is_main_process:
        lock(output_dir, log.say)
    if path.is_file():
        hold_against(json.loads(path.read_text()), resolved, config, log)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(path, json.dumps(resolved, indent=1) + "\n")
        split.palette.save(output_dir / "palette.json")


def hold_against(old: dict, new: dict, config: TrainConfig, log: Log) -> None:
    """Say what changed since the run began; UserError unless --allow_changes."""
    changed = differences(old, new)
    if changed and not config.allow_changes:
        listed = "\n  ".join(changed)
        raise UserError(
            f"{config.output_dir} holds a run with other settings:\n  {listed}\n"
            "Choose another --output_dir, or go on with these by --allow_changes."
        )
    for line in changed:
        log.say(f"Changed: {line}")


# --- saving: A run is saved, resumed, and stopped by a signal, so that the same command goes on as if nothing had happened.

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
        folder = io.commit(
            run.output_dir, f"checkpoint-{run.step}", lambda folder: write(run, state, folder), bytes_of(run)
        )
        keep = record_best(run.output_dir)
        prune(run.output_dir, run.config.checkpoints_total_limit, keep)
        run.log.say(f"Saved {folder}.")
    run.saved = run.step
    accelerator.wait_for_everyone()


def write(run: Run, state: dict, folder: Path) -> None:
    """The files of a checkpoint: safetensors and JSON only."""
    controlnet = run.accelerator.unwrap_model(run.controlnet)
    controlnet.save_pretrained(folder / "controlnet")
    if run.ema is not None:
        save_ema(controlnet, run.ema, folder)
    save_optimizer(run.optimizer.optimizer, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def bytes_of(run: Run) -> int:
    """Disk space of a checkpoint, a little more than it takes."""
    averages = 1 if run.ema is not None else 0
    tensors = [*run.controlnet.state_dict().values()] * (1 + averages)
    tensors += [value for _, value in leaves(run.optimizer.state_dict()["state"])]
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
    weights = load_controlnet(folder / "controlnet").state_dict()
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
    load_optimizer(optimizer, folder / "optimizer.safetensors")
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = rates
    for group, settings, rate, factor in zip(optimizer.param_groups, given, rates, schedule.lr_lambdas, strict=True):
        group.update(settings | {"lr": rate * factor(schedule.last_epoch)})


def wanted_checkpoint(run: Run) -> Path | None:
    """The folder to go on from; None: the run has none yet. UserError where the one asked for is not whole."""
    wanted = run.config.resume_from_checkpoint
    if wanted == "latest":
        return find_latest(run.output_dir, run.log.say)
    io.restore_replaced(run.output_dir)
    folder = run.output_dir / Path(wanted).name
    wrong = io.problem(folder) if folder.is_dir() else "there is no such folder"
    if wrong:
        raise UserError(f"--resume_from_checkpoint {folder}: {wrong}.")
    return folder


def set_later_aside(run: Run) -> None:
    """What stands beyond the present step is damaged or of a course now left: it must not pass for this run's."""
    for step, folder in steps(run.output_dir).items():
        if step > run.step:
            run.log.say(f"Setting {folder} aside as {io.set_aside(folder).name}; delete it as you like.")


def restore_losses(run: Run, saved: list[list[float]]) -> None:
    """Give the log back what `pending_losses` took; on another number of processes each gets the mean of all."""
    if saved:
        losses, accelerator = torch.tensor(saved, device=run.accelerator.device), run.accelerator
        same = len(saved) == accelerator.num_processes
        run.log.losses = list(losses[accelerator.process_index] if same else losses.mean(0))
