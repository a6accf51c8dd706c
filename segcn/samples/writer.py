"""A sample set on disk: splits, pairs, metadata, and the record by which a finished set is known again."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from segcn.data.masks import write_mask
from segcn.data.metadata import write_metadata
from segcn.data.palette import Label, Palette
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.progress import Progress

RECORD = "samples.json"


class Pair(Protocol):
    """An image (uint8 [R, R, 3]), its class ids (uint8 [R, R]) and its caption."""

    image: np.ndarray
    mask: np.ndarray
    caption: str


Painter = Callable[[int, int, int], Pair]  # (seed, index, resolution), a pure function that can be pickled


@dataclass(frozen=True)
class Kind:
    """What a kind of sample set is made of."""

    name: str
    palette: Palette
    painter: Callable[[str], Painter]  # of the split "train" or "test"
    resolutions: tuple[int, int] = (32, 1024)  # px, least and most


@dataclass(frozen=True)
class SampleSet:
    """What fixes every byte of a written set; kept in samples.json beside it."""

    count: int  # pairs in the one folder, or in train
    resolution: int  # px
    seed: int
    test: int | None  # pairs in test; None writes one folder
    kind: str
    version: int = 1  # changes whenever a pixel does

    def folders(self, out: Path) -> list[tuple[Path, str, int, int]]:
        """(folder, split, seed of its images, number of pairs) of every split; one folder is "train"."""
        if self.test is None:
            return [(out, "train", self.seed, self.count)]
        sizes = {"train": self.count, "test": self.test}
        return [(out / name, name, split_seed(self.seed, name), size) for name, size in sizes.items()]


def split_seed(seed: int, name: str) -> int:
    """Seed of a split's images: hashed with its name, so that train and test never share an image."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def as_palette(entries: Iterable[tuple[int, str, tuple[int, int, int]]]) -> Palette:
    """The palette of rows of (id, name, color)."""
    return Palette(tuple(Label(*entry) for entry in entries))


def pair_names(index: int) -> tuple[str, str]:
    """(image, mask) file names of pair `index` within its folder."""
    return f"images/{index:06d}.png", f"masks/{index:06d}.png"


def write_set(out: str | Path, samples: SampleSet, kind: Kind, workers: int | None = None) -> Path:
    """Write the folder, or the folders, of a set; returns `out`.

    A finished set of the same settings is reused and an unfinished one painted again; UserError if the
    settings make no sense or the folder holds something else.
    """
    out = Path(out)
    check_settings(samples, kind.resolutions)
    if stands_complete(out, samples):
        print(f"{out}: reused, this set already stands here")
        return out
    out.mkdir(parents=True, exist_ok=True)
    write_record(out, samples, finished=False)
    kind.palette.save(out / "palette.json")
    for folder, split, seed, size in samples.folders(out):
        jobs = [(kind.painter(split), kind.palette, folder, seed, index, samples.resolution) for index in range(size)]
        write_folder(folder, jobs, workers)
    write_record(out, samples, finished=True)
    return out


def check_settings(samples: SampleSet, resolutions: tuple[int, int]) -> None:
    """UserError for counts, resolutions and seeds that make no sense."""
    least, most = resolutions
    if samples.count < 1 or (samples.test is not None and samples.test < 1):
        raise UserError(f"--count {samples.count} --test {samples.test}: expected at least 1 pair in each folder")
    if not least <= samples.resolution <= most:
        raise UserError(f"--resolution {samples.resolution}: expected {least} to {most} px")
    if samples.seed < 0:
        raise UserError(f"--seed {samples.seed}: expected 0 or more")


def stands_complete(out: Path, samples: SampleSet) -> bool:
    """Whether `out` holds this very set, finished; UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        finished = record.pop("finished")
    except (OSError, ValueError, AttributeError, KeyError):
        raise UserError(f"{out}: holds something else than {samples.kind}; choose another folder") from None
    if record != asdict(samples):
        raise UserError(f"{out}: holds another set, {record}; choose another folder or delete this one")
    return finished and all(folder_complete(folder, size) for folder, _, _, size in samples.folders(out))


def folder_complete(folder: Path, size: int) -> bool:
    """Whether the metadata and every image and mask are there."""
    names = [name for index in range(size) for name in pair_names(index)]
    return all((folder / name).is_file() for name in ["metadata.csv", *names])


def write_record(out: Path, samples: SampleSet, finished: bool) -> None:
    """Record the settings, and whether every file is written, in samples.json."""
    write_text(out / RECORD, json.dumps({**asdict(samples), "finished": finished}, indent=2) + "\n")


def write_folder(folder: Path, jobs: list[tuple], workers: int | None = None) -> None:
    """Paint the pairs of the jobs with all cores and write images/, masks/ and metadata.csv."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    count = len(jobs)
    workers = min(workers or os.cpu_count() or 1, 1 + count // 32)
    if workers == 1:
        captions = collect(map(write_pair, jobs), folder, count)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            captions = collect(pool.imap(write_pair, jobs, chunksize=8), folder, count)
    print(f"{folder}: {count} pairs painted", flush=True)
    write_metadata(folder, [(*pair_names(index), caption) for index, caption in enumerate(captions)])


def collect(captions: Iterator[str], folder: Path, count: int) -> list[str]:
    """The captions as a list, saying now and then how many pairs stand."""
    told, collected = Progress(f"{folder.name}: painted", count), []
    for caption in captions:
        collected.append(caption)
        told(len(collected))
    return collected


def write_pair(job: tuple[Painter, Palette, Path, int, int, int]) -> str:
    """Paint and write one pair; returns its caption. In a process of its own, hence one argument."""
    paint, palette, folder, seed, index, resolution = job
    pair = paint(seed, index, resolution)
    image_name, mask_name = pair_names(index)
    Image.fromarray(pair.image).save(folder / image_name)
    write_mask(folder / mask_name, pair.mask, palette)
    return pair.caption
