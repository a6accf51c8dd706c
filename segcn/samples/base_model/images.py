"""What the embedded base sees: landscapes and, where asked for, tiles of the earth, painted once by all cores."""

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from segcn.samples.earth import tile
from segcn.samples.landscapes.scene import draw
from segcn.utils.io import write_text

EARTH_IDS = 32  # added to the class ids of earth tiles, so that no class of theirs is one of the landscapes'


@dataclass(frozen=True)
class TrainingImages:
    """images uint8 [N,R,R,3], class ids uint8 [N,R,R], captions [N]."""

    images: np.ndarray
    masks: np.ndarray
    captions: list[str]


def draw_images(folder: Path, recipe, log: Callable[[str], None] = print) -> TrainingImages:
    """Paint `recipe.landscapes` landscapes and `recipe.earth` tiles into `folder`, or read what stands there."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = folder / "captions.json"  # written last
    if not captions.is_file():
        write_images(folder, recipe, log)
    images, masks = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("images", "masks"))
    return TrainingImages(images, masks, json.loads(captions.read_text()))


def write_images(folder: Path, recipe, log: Callable[[str], None]) -> None:
    """Fill images.npy, masks.npy and captions.json, all cores painting."""
    count, side = recipe.landscapes + recipe.earth, recipe.resolution
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, side, side, 3))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (count, side, side))
    captions = []
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 1 + count // 32)) as pool:
        for row, painted in enumerate(pool.imap(partial(draw_one, recipe), range(count), chunksize=16)):
            images[row], masks[row], caption = painted
            captions.append(caption)
            if (row + 1) % 2048 == 0 or row + 1 == count:
                log(f"painted {row + 1}/{count} images")
    images.flush()
    masks.flush()
    write_text(folder / "captions.json", json.dumps(captions))


def draw_one(recipe, row: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Image, class ids and caption of one row: the landscapes come first."""
    if row < recipe.landscapes:
        landscape = draw(recipe.seed, row, recipe.resolution)
        return landscape.image, landscape.mask, landscape.caption
    found = tile(recipe.seed, row - recipe.landscapes, recipe.resolution, side="train")
    return found.image, found.mask + np.uint8(EARTH_IDS), found.caption
