"""A run folder belongs to one run: its settings stand there, and other settings or another run are refused."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from segcn import models
from segcn.arguments import to_json
from segcn.atomic import aside, write_text
from segcn.errors import UserError
from segcn.records import Split
from segcn.train_config import TrainConfig, differences
from segcn.watch import Log

RUN_FILE = "train_config.json"
LOCK = ".lock"  # in the run folder; the system frees it with the death of the process that holds it
STOP = "it saves a checkpoint on SIGTERM"
HELD: list[IO] = []  # the locks of this process


def claim(output_dir: Path, config: TrainConfig, split: Split, base: models.Base, accelerator, log: Log) -> None:
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
