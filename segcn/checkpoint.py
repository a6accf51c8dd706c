"""Commit, find, verify and prune checkpoints: a folder either stands whole with its manifest or does not exist.

The order of writes follows what LWN calls the only safe way to replace a file: write aside, fsync, rename, fsync the
folder (https://lwn.net/Articles/457667/).
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from segcn.errors import UserError

MANIFEST = "manifest.json"
SMALL = 256  # numbers of an optimizer's tensor that may be shared
CHECKPOINT = r"checkpoint-(\d+)"
FULL = r"No space left|[Qq]uota exceeded|os error (28|122)\b"  # safetensors knows a full disk by its text alone


def commit(output_dir: Path, name: str, write: Callable[[Path], None], needed: int = 0) -> Path:
    """Let `write(folder)` fill a folder aside, then make it appear as output_dir/name in one step.

    A folder of that name that was committed before is replaced; any other is set aside under a new name. Killed
    anywhere, the old one or the new one stands once `mend` has run. needed: bytes that `write` will write; UserError
    where they are not free, or where the disk fills in the midst.
    """
    final, staged, replaced = output_dir / name, output_dir / f".{name}.staged", output_dir / f".{name}.replaced"
    output_dir.mkdir(parents=True, exist_ok=True)
    mend(output_dir, name)
    if needed > shutil.disk_usage(output_dir).free:
        raise UserError(_no_room(final, needed))
    try:
        staged.mkdir()
        write(staged)
        _seal(staged)
    except Exception as error:
        message = _no_room(final, needed)
        shutil.rmtree(staged, ignore_errors=True)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or re.search(FULL, str(error)):
            raise UserError(message) from error
        raise
    if (final / MANIFEST).is_file():
        os.replace(final, replaced)
    elif final.exists():
        set_aside(final)
    os.replace(staged, final)
    _fsync(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _seal(folder: Path) -> None:
    """Write the manifest and bring every file and folder to the disk."""
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in _files(folder)}
    (folder / MANIFEST).write_bytes(_manifest(hashes))
    for path in [*_files(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _fsync(path)


def _no_room(folder: Path, needed: int) -> str:
    """What to say when the disk is full."""
    free, wanted = shutil.disk_usage(folder.parent).free, f"{needed:,} bytes" if needed else "more bytes than are free"
    return (
        f"{folder} cannot be written: it needs {wanted}, {free:,} bytes are free. What was saved before stands. "
        "Make room on this disk and give the same command again; --checkpoints_total_limit keeps fewer checkpoints."
    )


def mend(output_dir: Path, name: str = "") -> None:
    """Finish what a kill cut short: half-written and half-deleted folders go, a replaced one comes back if alone.

    It minds the checkpoints of a run, and the folder `name`; nobody else may be writing them.
    """
    for path in list(output_dir.glob(".*")):
        match = re.fullmatch(rf"\.({CHECKPOINT}|{re.escape(name)})\.(staged|pruned|replaced)", path.name)
        if match and match[3] == "replaced" and not (output_dir / match[1]).exists():
            os.replace(path, output_dir / match[1])
        elif match:
            shutil.rmtree(path)


def set_aside(folder: Path) -> Path:
    """Give a folder a name that no run uses, and return it."""
    free = folder.with_name(f"{folder.name}.set-aside-{time.time_ns()}")
    os.replace(folder, free)
    return free


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if its files are those of its manifest; hidden ones are free."""
    if not (folder / MANIFEST).is_file():
        return "has no manifest: it was never finished"
    try:
        written = (folder / MANIFEST).read_bytes()
        hashes = json.loads(written)
    except (ValueError, OSError):
        return f"{MANIFEST} is not readable JSON"
    if not hashes or written != _manifest(hashes):
        return f"{MANIFEST} is not as it was written"
    return _wrong_file(folder, hashes)


def _wrong_file(folder: Path, hashes: dict[str, str]) -> str | None:
    """The first file that is missing, changed, unreadable or not in the manifest."""
    for name, digest in hashes.items():
        try:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} does not match the hash in {MANIFEST}"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in hashes and name != MANIFEST and not path.name.startswith("."):
            return f"{name} is not in {MANIFEST}"
    return None


def steps(output_dir: Path) -> dict[int, Path]:
    """Every checkpoint-N folder of a run by its step, oldest first, verified or not."""
    matches = {path: re.fullmatch(CHECKPOINT, path.name) for path in Path(output_dir).glob("checkpoint-*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def find_latest(output_dir: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and skipped; None where there is none at all.

    Raises UserError when checkpoints are there and not one of them is whole: starting over must be the user's choice.
    """
    mend(output_dir)
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


def discard(folder: Path) -> None:
    """Delete a checkpoint; a kill in the midst leaves nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.pruned")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


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


def _manifest(hashes: dict[str, str]) -> bytes:
    return json.dumps(hashes, indent=1, sort_keys=True).encode()


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
