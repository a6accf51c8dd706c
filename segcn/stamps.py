"""Which files of a data set have changed since a run began: those that went bad need not end it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from segcn import seeds
from segcn.atomic import write_whole
from segcn.errors import UserError
from segcn.records import Split, check_split, stamp


def remember_stamps(split: Split, folder: Path) -> None:
    """Keep sizes and times of a split's files under its fingerprint, so that it can be told later which changed."""
    path = _stamps_path(split, split.fingerprint, folder)
    if not path.is_file():
        stamps = _stamps(split)
        write_whole(path, lambda aside: np.save(aside, stamps))


def overlook_bad(split: Split, recorded: str, folder: Path, limit: int) -> None:
    """Give a split its recorded fingerprint back if all that changed is at most `limit` rows, unreadable now.

    Without it a run could not go on after a file went bad: its data would count as changed.
    """
    path = _stamps_path(split, recorded, folder)
    if not limit or split.fingerprint == recorded or not path.is_file():
        return
    changed = np.flatnonzero(np.load(path) != _stamps(split))
    if len(changed) <= limit and all(row < len(split) and _gone_bad(split, row) for row in changed.tolist()):
        vars(split)["fingerprint"] = recorded  # a cached property


def _gone_bad(split: Split, row: int) -> bool:
    try:
        check_split(replace(split, records=(split[row],)))
    except UserError:
        return True
    return False


def _stamps_path(split: Split, fingerprint: str, folder: Path) -> Path:
    return folder / f"stamps-{fingerprint}-{len(split)}.npy"


def _stamps(split: Split) -> np.ndarray:
    """A number for each row's two files, and one for metadata and palette, int64 [N + 1]."""
    whole = seeds.seed_of(hashlib.sha256(split.metadata.read_bytes()).hexdigest(), split.palette.fingerprint)
    return np.array([*(seeds.seed_of(stamp(row.image), stamp(row.mask)) for row in split.records), whole])
