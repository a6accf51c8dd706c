"""A sample set on disk: splits, pairs, metadata, and the record that says which set a folder holds."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.data.masks import write_mask
from segcn.data.metadata import write_metadata
from segcn.data.palette import Palette
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.progress import Progress

RECORD = "samples.json"
VERSION = 1  # of the images; changes whenever a pixel does


@dataclass(frozen=True)
class SamplePair:
    """An image (uint8 [R, R, 3]), its class ids (uint8 [R, R]) and its caption; more: further columns of its row."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    more: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class SampleKind:
    """What makes up a kind of sample set."""

    name: str
    palette: Palette
    draw: dict[str, Callable[[int, int, int], SamplePair]]  # by split: a pure function of (seed, index, resolution)
    resolutions: tuple[int, int] = (32, 1024)  # px, least and most


def write_set(
    out: str | Path, kind: SampleKind, count: int, resolution: int, seed: int, test: int | None, workers: int = 0
) -> Path:
    """Write `count` pairs to `out`, or with `test` to out/train and out/test; returns `out`.

    A finished set of the same settings is reused and an unfinished one written again; UserError if the settings make no
    sense or the folder holds something else. workers: processes that draw; 0: one for each core.
    """
    out, (least, most) = Path(out), kind.resolutions
    if count < 1 or (test is not None and test < 1):
        raise UserError(f"--count {count} --test {test}: expected at least 1 pair in each folder")
    if not least <= resolution <= most:
        raise UserError(f"--resolution {resolution}: expected {least} to {most} px")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    record = {"count": count, "resolution": resolution, "seed": seed, "test": test, "kind": kind.name}
    record["version"] = VERSION
    folders = {out: ("train", seed, count)}
    if test is not None:
        folders = {
            out / name: (name, split_seed(seed, name), size) for name, size in (("train", count), ("test", test))
        }
    files = [folder / name for folder, (*_, size) in folders.items() for row in range(size)
             for name in (*sample_names(row), "metadata.csv")]  # fmt: skip
    files.append(out / "palette.json")
    if is_complete_set(out, record) and all(path.is_file() for path in files):
        print(f"{out}: reused, it already holds this set")
        return out
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECORD, json.dumps(record | {"finished": False}, indent=2) + "\n")
    kind.palette.save(out / "palette.json")
    for folder, (split, own_seed, size) in folders.items():
        jobs = [(kind.draw[split], kind.palette, folder, own_seed, index, resolution) for index in range(size)]
        write_folder(folder, jobs, workers)
    write_text(out / RECORD, json.dumps(record | {"finished": True}, indent=2) + "\n")
    return out


def split_seed(seed: int, name: str) -> int:
    """Seed of a split's images: hashed with its name, so that train and test never share an image."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def sample_names(index: int) -> tuple[str, str]:
    """(image, mask) file names of pair `index` within its folder."""
    return f"images/{index:06d}.png", f"masks/{index:06d}.png"


def is_complete_set(out: Path, wanted: dict) -> bool:
    """Whether `out` holds this set, finished; UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        finished = record.pop("finished")
    except (OSError, ValueError, AttributeError, KeyError):
        raise UserError(f"{out}: holds something else than {wanted['kind']}; choose another folder") from None
    if record != wanted:
        raise UserError(f"{out}: holds another set, {record}; choose another folder or delete this one")
    return finished


def write_folder(folder: Path, jobs: list[tuple], workers: int) -> None:
    """Draw the pairs of the jobs with all cores and write images/, masks/ and metadata.csv."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    workers = min(workers or os.cpu_count() or 1, 1 + len(jobs) // 32)
    progress, rows = Progress(f"{folder.name}: drawn", len(jobs)), list[tuple[str, str, str]]()
    columns = list[dict[str, str]]()
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
        for caption, more in pool.imap(write_sample, jobs, chunksize=8) if pool else map(write_sample, jobs):
            rows.append((*sample_names(len(rows)), caption))
            columns.append(more)
            progress(len(rows))
    print(f"{folder}: {len(jobs)} pairs drawn", flush=True)
    write_metadata(folder, rows, columns)


def write_sample(job: tuple[Callable[[int, int, int], SamplePair], Palette, Path, int, int, int]) -> tuple[str, dict]:
    """Draw and write one pair; returns its caption and further columns. One argument, as a process of its own takes."""
    draw, palette, folder, seed, index, resolution = job
    pair = draw(seed, index, resolution)
    image_name, mask_name = sample_names(index)
    Image.fromarray(pair.image).save(folder / image_name)
    write_mask(folder / mask_name, pair.mask, palette)
    return pair.caption, pair.more
