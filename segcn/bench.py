"""Benchmarks that a user can repeat: the doctor against plain decoding, and reading a large metadata file."""

import contextlib
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from segcn.config import DoctorConfig
from segcn.doctor import examine
from segcn.labels import Label, Palette
from segcn.metadata import COLUMNS
from segcn.records import find_splits, read_split
from segcn.timed import resident_gib

READ = "from segcn.bench import read_once; read_once({!r})"


def bench_validate(dataset: str | Path, rounds: int = 3, log: Callable[[str], None] = print) -> float:
    """`segcn validate` without its report against decoding every file with Pillow, all cores each, in turns.

    Returns the doctor's speed as a share of plain decoding: the median of the rounds.
    """
    splits = [read_split(metadata) for metadata in find_splits(dataset).values()]
    paths = [path for split in splits for record in split.records for path in (record.image, record.mask)]
    examined(dataset)  # the files are in the system's cache from now on
    shares = []
    for number in range(1, rounds + 1):
        plain = seconds(lambda: decode(paths))
        doctor = seconds(lambda: examined(dataset))
        shares.append(plain / doctor)
        log(
            f"round {number}: {len(paths)} files decoded in {plain:.2f} s, examined in {doctor:.2f} s: {shares[-1]:.2f}"
        )
    share = sorted(shares)[len(shares) // 2]
    log(f"the doctor runs at {share:.0%} of the speed of decoding alone (median of {rounds})")
    return share


def examined(dataset: str | Path) -> None:
    """Examine every file, and say nothing of it."""
    examine(DoctorConfig(dataset_name=str(dataset)), log=lambda _: None)


def bench_metadata(rows: int = 1_000_000, log: Callable[[str], None] = print) -> tuple[float, float]:
    """Read and check a metadata.csv in a process of its own; seconds and GiB of its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), rows)
        told = subprocess.run([sys.executable, "-c", READ.format(folder)], capture_output=True, text=True, check=True)
    taken, peak = map(float, told.stdout.split())
    log(f"{rows:,} rows read and checked in {taken:.1f} s, {peak:.2f} GiB at most")
    return taken, peak


def read_once(folder: str) -> None:
    """Print the seconds that reading took, and this process's peak memory in GiB."""
    taken = seconds(lambda: read_split(folder))
    print(taken, peak_gib())


def peak_gib() -> float:
    """The most memory that this process held, in GiB; getrusage would count the process that started it too."""
    return resident_gib("self") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_rows(folder: Path, rows: int, files: int = 1000) -> None:
    """A data set of so many rows, each with a caption of its own, on a thousand pairs of small files."""
    Palette((Label(0, "sky", (135, 206, 235)),)).save(folder / "palette.json")
    for name, mode in (("images", "RGB"), ("masks", "L")):
        (folder / name).mkdir()
        for number in range(files):
            Image.new(mode, (8, 8)).save(folder / name / f"{number:06d}.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in range(rows):
            names = [f"{name}/{row % files:06d}.png" for name in ("images", "masks")]
            writer.writerow([*names, f"a winter landscape at dusk with mountains, a lake, pine trees and house {row}"])


def decode(paths: Iterable[Path]) -> None:
    """Load every picture, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, paths))


def load(path: Path) -> None:
    """Decode a picture, and do nothing with it."""
    with contextlib.closing(Image.open(path)) as image:
        image.load()


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
