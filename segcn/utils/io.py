"""Files and folders that are written completely or not at all, run locks, and the split of work among processes."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from segcn.utils.errors import UserError

MANIFEST = "manifest.json"  # in a committed folder: the SHA-256 of each of its files
CHECKPOINT = r"checkpoint-(\d+)"
FULL = r"No space left|[Qq]uota exceeded|os error (28|122)\b"  # safetensors reports a full disk by its text alone
LOCK = ".lock"  # in a run folder; the system frees it when the process that holds it ends
HELD_LOCKS: list[IO] = []  # the locks of this process


@dataclass(frozen=True)
class Process:
    """One of `world` processes that share a job without communicating."""

    rank: int = 0
    world: int = 1

    def share(self, count: int) -> range:
        """Which of `count` pieces of work belong to this process: every world-th one."""
        return range(self.rank, count, self.world)


def this_process() -> Process:
    """RANK of WORLD_SIZE, as torchrun and accelerate set them; selects the GPU of LOCAL_RANK where there is one."""
    if "LOCAL_RANK" in os.environ:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def write_whole(path: Path, write: Callable[[Path], Any], work: Path | None = None) -> None:
    """Let `write(file)` write a file in the folder `work`, flush it to the disk, and move it to its path in one step.

    work: on the same disk; none: the folder of the path. UserError where the disk refuses it.
    """
    work = work or path.parent
    staged = work / f".{os.getpid()}-{threading.get_ident()}-{path.name}"
    try:
        for folder in (work, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write(staged)
        _fsync(staged)
        os.replace(staged, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Files written before are complete. Fix the cause,"
            " then rerun the same command to resume."
        ) from error
    finally:
        with suppress(OSError):
            staged.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, without waiting until it has reached the disk."""
    aside(path).write_text(text, encoding="utf-8")
    os.replace(aside(path), path)


def aside(path: Path) -> Path:
    """Where `write_text` writes a file before it gets its name."""
    return path.with_name(f".{path.name}.staged")


def same_settings(
    path: Path,
    settings: dict[str, Any],
    free: Set[str] = frozenset(),
    allow: bool = False,
    log: Callable[[str], None] = print,
    what: str = "run",
    write: bool = True,
) -> list[str]:
    """Compare settings with those recorded in the JSON file `path`, and record the new ones; return what changed.

    UserError lists each changed setting as "name: was X, is Y"; allow: log the changes and record them. free: settings
    that may change. what: what the folder of `path` holds, for the message. write: no, in all processes but the
    first one.
    """
    new, old = json.loads(json.dumps(settings, default=str)), None
    if path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(
                f"{path}: is not readable JSON. Move {path.parent} away, or choose another folder."
            ) from None
    changed = [
        f"{name}: was {old.get(name)!r}, is {value!r}"
        for name, value in new.items()
        if old is not None and name not in free and old.get(name) != value
    ]
    if changed and not allow:
        listed = "\n  ".join(changed)
        raise UserError(
            f"{path.parent} holds a {what} with other settings:\n  {listed}\n"
            "Use these settings again to resume it, or choose another --output_dir."
        )
    for line in changed:
        log(f"Changed: {line}")
    if write and old != new:
        write_whole(path, lambda file: file.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8"))
    return changed


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process after the other into the block; a killed process frees it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks: at worst they do the same work twice
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def commit(output_dir: Path, name: str, write: Callable[[Path], None], needed: int = 0) -> Path:
    """Let `write(folder)` fill a staging folder, then make it appear as output_dir/name in one step.

    The order of writes is the safe way to replace a file: write aside, fsync, rename, fsync the folder
    (https://lwn.net/Articles/457667/). A folder of that name that was committed before is replaced; any other is moved
    to a new name. Whenever the process is killed, the old folder or the new one is complete once `restore_replaced`
    has run. needed: bytes that `write` will write; UserError where they are not free, or where the disk gets full.
    """
    final, staged, replaced = output_dir / name, output_dir / f".{name}.staged", output_dir / f".{name}.replaced"
    output_dir.mkdir(parents=True, exist_ok=True)
    restore_replaced(output_dir, name)
    if needed > shutil.disk_usage(output_dir).free:
        raise UserError(_disk_full(final, needed))
    try:
        staged.mkdir()
        write(staged)
        files = _files(staged)
        (staged / MANIFEST).write_bytes(
            _manifest({path.relative_to(staged).as_posix(): _sha256(path) for path in files})
        )
        for path in [*staged.rglob("*"), staged]:
            _fsync(path)
    except Exception as error:
        message = _disk_full(final, needed)
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


def _disk_full(folder: Path, needed: int) -> str:
    free, wanted = shutil.disk_usage(folder.parent).free, f"{needed:,} bytes" if needed else "more bytes than are free"
    return (
        f"{folder} cannot be written: it needs {wanted}, {free:,} bytes are free. What was saved before is complete. "
        "Free space on this disk and rerun the same command; --checkpoints_total_limit keeps fewer checkpoints."
    )


def restore_replaced(output_dir: Path, name: str = "") -> None:
    """Finish what a kill interrupted: half-written and half-deleted folders go, a replaced one returns if it is alone.

    For the checkpoints of a run and the folder `name`; no other process may be writing them.
    """
    for path in list(output_dir.glob(".*")):
        match = re.fullmatch(rf"\.({CHECKPOINT}|{re.escape(name)})\.(staged|pruned|replaced)", path.name)
        if match and match[3] == "replaced" and not (output_dir / match[1]).exists():
            os.replace(path, output_dir / match[1])
        elif match:
            shutil.rmtree(path)


def set_aside(folder: Path) -> Path:
    """Rename a folder to a name that no run uses, and return it."""
    free = folder.with_name(f"{folder.name}.set-aside-{time.time_ns()}")
    os.replace(folder, free)
    return free


def discard(folder: Path) -> None:
    """Delete a checkpoint; a kill while it is deleted leaves nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.pruned")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def problem(folder: Path) -> str | None:
    """What is wrong with a committed folder, or None if its files match its manifest; hidden files are not checked."""
    if not (folder / MANIFEST).is_file():
        return "has no manifest: it was never finished"
    try:
        written = (folder / MANIFEST).read_bytes()
        hashes = json.loads(written)
    except (ValueError, OSError):
        return f"{MANIFEST} is not readable JSON"
    if not hashes or written != _manifest(hashes):
        return f"{MANIFEST} is not as it was written"
    for name, digest in hashes.items():
        try:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} does not match the hash in {MANIFEST}"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    names = {path.relative_to(folder).as_posix() for path in _files(folder) if not path.name.startswith(".")}
    extra = sorted(names - set(hashes) - {MANIFEST})
    return f"{extra[0]} is not in {MANIFEST}" if extra else None


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


def lock(
    output_dir: Path,
    log: Callable[[str], None],
    work: str = "trains",
    stop: str = "it saves a checkpoint on SIGTERM",
) -> None:
    """Keep other runs out of the folder until `release` or the end of this process; UserError names who holds it.

    work, stop: what this run does there, and what happens to it when it is stopped. A POSIX lock: processes that read
    data do not inherit it, and it works between machines over NFS.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file = (output_dir / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return log(f"{output_dir}: locks do not work here ({error}); let no second run use this folder.")
        file.seek(0)
        raise UserError(
            f"{output_dir} is in use: {file.read().strip() or 'another process'} {work} there. Wait for it, stop it"
            f" ({stop}), or choose another --output_dir."
        ) from None
    started = datetime.now(UTC).isoformat(" ", "seconds")
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}, started {started},", file=file, flush=True)
    HELD_LOCKS.append(file)


def release() -> None:
    """Release the locks of this process."""
    while HELD_LOCKS:
        HELD_LOCKS.pop().close()
