"""Files that are written whole or not at all, by one process after the other."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from segcn.utils.errors import UserError

# --- atomic: Files that are written whole or not at all, by one process after the other.


def write_whole(path: Path, write: Callable[[Path], Any], work: Path | None = None) -> None:
    """Let `write(file)` write a file in the folder `work`, and move it to its path in one step once it is on the disk.

    work: on the same disk; none: the folder of the path. UserError where the disk does not take it.
    """
    work = work or path.parent
    staged = work / f".{os.getpid()}-{threading.get_ident()}-{path.name}"
    try:
        for folder in (work, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write(staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. What stands is whole; mend that, and the same"
            " command goes on."
        ) from error
    finally:
        with suppress(OSError):
            staged.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, and leave it to the system when it reaches the disk."""
    aside(path).write_text(text, encoding="utf-8")
    os.replace(aside(path), path)


def aside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.staged")


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process after the other into the block; the system wakes the next even if one is killed in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks: they get in each other's way at most
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# --- checkpoint: Commit, find, verify and prune checkpoints: a folder either stands whole with its manifest or does not exist.
#
# The order of writes follows what LWN calls the only safe way to replace a file: write aside, fsync, rename, fsync the
# folder (https://lwn.net/Articles/457667/).

MANIFEST = "manifest.json"
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
    restore_replaced(output_dir, name)
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


def restore_replaced(output_dir: Path, name: str = "") -> None:
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


def discard(folder: Path) -> None:
    """Delete a checkpoint; a kill in the midst leaves nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.pruned")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


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


# --- claim: A run folder belongs to one run: its settings stand there, and other settings or another run are refused.

LOCK = ".lock"  # in the run folder; the system frees it with the death of the process that holds it
STOP = "it saves a checkpoint on SIGTERM"
HELD: list[IO] = []  # the locks of this process


def lock(output_dir: Path, say: Callable[[str], None], work: str = "trains", stop: str = STOP) -> None:
    """Keep other runs out of the folder until `release` or the end of this process; UserError names who holds it.

    work, stop: what this one does there, and what becomes of that when it is stopped. A POSIX lock: processes that
    read data do not inherit it, and NFS knows it between machines.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file = (output_dir / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return say(f"{output_dir}: locks do not work here ({error}); let no second run use this folder.")
        file.seek(0)
        raise UserError(
            f"{output_dir} is in use: {file.read().strip() or 'another process'} {work} there. Wait for it, stop it"
            f" ({stop}), or choose another --output_dir."
        ) from None
    started = datetime.now(UTC).isoformat(" ", "seconds")
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}, started {started},", file=file, flush=True)
    HELD.append(file)


def release() -> None:
    """Give the folders of this process free."""
    while HELD:
        HELD.pop().close()
