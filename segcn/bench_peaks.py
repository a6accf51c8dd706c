"""How much memory painting takes, in processes of their own: `segcn generate` at two sizes, and the plain way."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from segcn.arguments import arguments_of, parse
from segcn.bench_sides import Side, read_masks
from segcn.config import GenerateConfig
from segcn.devices import pick_device
from segcn.errors import UserError
from segcn.generate import generate_dataset
from segcn.memory import peak_bytes
from segcn.pipeline import load_painter
from segcn.records import read_named_split
from segcn.timed import environment

COMMAND = "import sys; from segcn.bench_peaks import tell; tell(sys.argv[1:])"


def peaks(config: GenerateConfig, counts: tuple[int, ...]) -> dict[str, float]:
    """The most memory in GiB after so many masks, ascending, of one process that goes on with them."""
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier measurement that was interrupted
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", COMMAND, json.dumps(counts), *arguments_of(config)]
    told = subprocess.run(words, capture_output=True, text=True, env=environment())
    shutil.rmtree(folder, ignore_errors=True)
    if told.returncode:
        raise UserError(f"painting {counts[-1]} masks failed: {told.stderr.strip().splitlines()[-1]}")
    return json.loads(told.stdout.splitlines()[-1])


def tell(words: list[str]) -> None:
    """Paint the first masks, then more of them, and print the peak after each; --batch_size 0: the plain way."""
    counts, config = json.loads(words[0]), parse(GenerateConfig, words[1:], "segcn bench generate")
    paint = paint_plainly if config.batch_size == 0 else generate_dataset
    found, device = {}, torch.device(pick_device())
    for count in counts:
        with contextlib.redirect_stdout(sys.stderr):
            paint(dataclasses.replace(config, limit=count))
        found[str(count)] = peak_bytes(device) / 2**30
    print(json.dumps(found))


def paint_plainly(config: GenerateConfig) -> None:
    """A call of diffusers' pipeline for each mask; nothing is written."""
    split = read_named_split(config.controls, config.split).first(config.limit)
    masks = read_masks(split, config)
    side = Side("", config, 0, load_painter(config, split.palette))
    for row, caption in enumerate(masks.captions):
        side.paint(masks.ids[row : row + 1], [caption], [row])
