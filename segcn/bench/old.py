"""A training step of the networks alone, with memory and weights laid out in each way of devices.py, in turns."""

import contextlib
import csv
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

from segcn.bench.train import resident_gib
from segcn.data.config import DoctorConfig
from segcn.data.doctor.findings import examine
from segcn.data.metadata import COLUMNS, find_splits, read_split
from segcn.data.palette import Label, Palette
from segcn.models.base import keep_freed_memory
from segcn.utils.paths import BASE

# --- bench_step: A training step of the networks alone, with memory and weights laid out in each way of devices.py, in turns.

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MEMORIES = ("given back", "kept")
RUN = "from segcn.bench_step import time_steps; time_steps({!r}, {!r}, {!r}, {}, {}, {})"


def bench_step(
    pretrained_model_name_or_path: str | Path = BASE,
    resolution: int = 128,
    batch_size: int = 8,
    steps: int = 10,
    rounds: int = 2,
    log: Callable[[str], None] = print,
) -> dict[tuple[str, str], list[float]]:
    """Seconds of a step of ControlNet, U-Net and AdamW in float32 on the CPU, one a round, by (memory, layout).

    Each is measured in a process of its own, where the median of its steps counts. The ratios compare the fastest
    rounds: what else a machine does only ever adds.
    """
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(MEMORIES, LAYOUTS)}
    for number in range(1, rounds + 1):
        for (memory, layout), seconds in found.items():
            code = RUN.format(str(pretrained_model_name_or_path), memory, layout, resolution, batch_size, steps)
            told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            seconds.append(json.loads(told.splitlines()[-1]))
            log(f"round {number}: memory {memory:10}, {layout:13} {seconds[-1]:.3f} s a step")
    plain = found["given back", "contiguous"]
    for (memory, layout), seconds in found.items():
        ratio = min(plain) / min(seconds)
        log(f"memory {memory:10}, {layout:13} {ratio:.2f}x the pace of PyTorch's defaults (fastest of {rounds})")
    return found


def time_steps(base: str, memory: str, layout: str, resolution: int, batch_size: int, steps: int) -> None:
    """Print the median of the seconds of a step; two go before."""
    if memory == "kept":
        keep_freed_memory()
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).requires_grad_(False)
    controlnet = ControlNetModel.from_unet(unet).train()
    for network in (unet, controlnet):
        network.to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-6, fused=True)
    taken = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step(unet, controlnet, optimizer, resolution, batch_size)
        taken.append(time.perf_counter() - began)
    print(json.dumps(statistics.median(taken[2:])))


def step(unet, controlnet, optimizer, resolution: int, batch_size: int) -> None:
    """One update of the ControlNet on noise."""
    channels, side, width = unet.config.in_channels, resolution // 8, unet.config.cross_attention_dim
    latents, control = torch.randn(batch_size, channels, side, side), torch.rand(batch_size, 3, resolution, resolution)
    at = (latents, torch.full((batch_size,), 500), torch.randn(batch_size, 77, width))
    down, middle = controlnet(*at, controlnet_cond=control, return_dict=False)
    said = unet(*at, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    said.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# --- bench: Benchmarks that a user can repeat: the doctor against plain decoding, and reading a large metadata file.

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
    """Load every image, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, paths))


def load(path: Path) -> None:
    """Decode an image, and do nothing with it."""
    with contextlib.closing(Image.open(path)) as image:
        image.load()


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
