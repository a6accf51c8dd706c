"""Commit, find, verify and prune checkpoints: a folder either stands whole with its manifest or does not exist.

The order of writes follows what LWN calls the only safe way to replace a file: write aside, fsync, rename, fsync the
folder (https://lwn.net/Articles/457667/).
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from segcn.errors import UserError

MANIFEST = "manifest.json"


def commit(output_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let `write(folder)` fill a folder aside, then make it appear as output_dir/name in one step.

    A folder of that name that was committed before is replaced; any other is set aside under a new name.
    """
    final = output_dir / name
    staged = output_dir / f".{name}.staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    write(staged)
    hashes = {path.relative_to(staged).as_posix(): _sha256(path) for path in _files(staged)}
    (staged / MANIFEST).write_text(json.dumps(hashes, indent=1, sort_keys=True))
    for path in [*_files(staged), *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        _fsync(path)
    if (final / MANIFEST).is_file():
        shutil.rmtree(final)
    elif final.exists():
        os.replace(final, output_dir / f"{name}.set-aside-{time.time_ns()}")
    os.replace(staged, final)
    _fsync(output_dir)
    return final


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file matches its manifest."""
    if not (folder / MANIFEST).is_file():
        return "has no manifest: it was never finished"
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is not readable JSON"
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} does not match the hash in {MANIFEST}"
    return None


def steps(output_dir: Path) -> dict[int, Path]:
    """Every checkpoint-N folder of a run by its step, oldest first, verified or not."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def find_latest(output_dir: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and skipped; None where there is none at all.

    Raises UserError when checkpoints are there and not one of them is whole: starting over must be the user's choice.
    """
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


def prune(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; called only after a newer one stands."""
    if limit is not None:
        for folder in list(steps(output_dir).values())[: -max(limit, 1)]:
            shutil.rmtree(folder)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Store an optimizer's state without pickle: tensors in safetensors, everything else as JSON in its metadata."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for keys, value in _leaves(state["state"]):
        name = "/".join(map(str, keys))
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
        else:
            scalars[name] = value
    rest = {"scalars": scalars, "param_groups": state["param_groups"]}
    save_file(tensors, path, metadata={"json": json.dumps(rest)})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` stored, bit for bit."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["json"])
    state: dict[int, dict] = {}
    for name, value in {**load_file(path), **rest["scalars"]}.items():
        index, *folders, key = name.split("/")
        place = state.setdefault(int(index), {})
        for folder in folders:
            place = place.setdefault(folder, {})
        place[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    for parameter, entries in optimizer.state.items():  # fused kernels want the memory layout of the parameter
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _leaves(tree: dict, path: tuple = ()):
    """(path, value) of every leaf of nested dictionaries: 8-bit optimizers nest their quantisation state."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    aside = path.with_name(f".{path.name}.staged")
    aside.write_text(text)
    os.replace(aside, path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
