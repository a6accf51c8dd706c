"""Files that are written whole or not at all, by one process after the other."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from segcn.errors import UserError


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
