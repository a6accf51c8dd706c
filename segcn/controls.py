"""The masks that are painted from: files of a folder or data set, read one by one, moved where they are augmented."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segcn.augment import AugmentConfig, Draw, apply, draw
from segcn.config import GenerateConfig
from segcn.dataset import read_framed_mask
from segcn.errors import UserError, refuse_failed
from segcn.geometry import Box
from segcn.labels import Palette, find_palette
from segcn.masks import read_mask
from segcn.progress import Progress
from segcn.records import read_named_split
from segcn.survey import is_dataset, mask_files

CHECKED_AT_ONCE = 256  # masks


@dataclass(frozen=True)
class Controls:
    """Every row of --controls, --limit or not: nothing of a mask is held but its name."""

    files: Sequence[str]
    captions: Sequence[tuple[str, ...]]  # none where a folder of masks has no captions
    palette: Palette
    limit: int | None
    resolution: int | None
    fit: str
    augment: AugmentConfig | None  # of --augment_masks
    seed: int

    def __len__(self) -> int:
        """The rows to paint."""
        return len(self.files) if self.limit is None else min(self.limit, len(self.files))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any file name or caption."""
        digest = hashlib.sha256()
        for row, file in enumerate(self.files):
            digest.update(repr((os.path.basename(file), *self.captions[row : row + 1])).encode())
        return digest.hexdigest()[:16]

    def read(self, row: int, replicate: int, caption: str) -> tuple[np.ndarray, Box, Draw | None]:
        """Class ids, uint8 [H, W], the part of them that holds picture, and how they were moved.

        caption: what is told of the picture; where it says left or right it is not mirrored. UserError names the file.
        """
        file = self.files[row]
        if self.augment is None:
            return *read_framed_mask(file, self.palette, self.resolution, self.fit), None
        mask = read_mask(file, self.palette)
        side = self.resolution or mask.shape[0]
        if self.resolution is None and mask.shape[0] != mask.shape[1]:
            raise UserError(f"{file}: --augment_masks moves squares, found {_size(mask)}: give a side by --resolution")
        drawn = draw(self.augment, self.seed, replicate, row, caption, self.fit)
        blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, *mask.shape)
        moved = apply(blank, torch.from_numpy(mask)[None], drawn, side)[1][0]
        return moved.numpy(), Box(0, 0, side, side), drawn


def read_controls(config: GenerateConfig) -> Controls:
    """The rows, captions and palette of --controls; UserError where there are none."""
    if not config.controls:
        raise UserError("--controls: expected a data set or a folder of masks, found nothing")
    folder = Path(config.controls)
    if is_dataset(folder):
        split = read_named_split(folder, config.split)
        files, captions = [str(record.mask) for record in split.records], [row.captions for row in split.records]
        palette = Palette.load(config.palette) if config.palette else split.palette
    else:
        files = [str(path) for path in mask_files(folder)]
        palette, captions = Palette.load(config.palette or find_palette(folder)), []
    if not files:
        raise UserError(f"--controls {folder}: --split {config.split} leaves no row")
    augment = _augment(config.augment_masks) if config.augment_masks else None
    return Controls(files, captions, palette, config.limit, config.resolution, config.fit, augment, config.seed)


def _augment(text: str) -> AugmentConfig:
    """What --augment_masks says of layouts; scaled up until nothing leaves the frame, unless it says fill=ignore."""
    try:
        found = AugmentConfig.parse(text)
    except UserError as error:
        raise UserError(str(error).replace("--augment:", "--augment_masks:")) from None
    still: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return replace(found, **still, fill=found.fill if "fill=" in text.replace(" ", "") else "cover")


def check_masks(
    controls: Controls, places: Iterable[tuple[int, int]], factor: int, log: Callable[[str], None] = print
) -> None:
    """Read the masks of (row, replicate) on all cores before anything is painted.

    factor: pixels a side of one latent cell. UserError names the first that cannot be painted and how many more fail.
    """
    failed: list[str] = []
    done, rows = 0, list(dict.fromkeys(row for row, _ in places))
    told = Progress("masks checked", len(rows), log)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for some in _cut(rows, CHECKED_AT_ONCE):
            failed += filter(None, pool.map(lambda row: _problem(controls, row, factor), some))
            done += len(some)
            told(done)
    refuse_failed(failed, len(rows), "masks")


def _problem(controls: Controls, row: int, factor: int) -> str | None:
    try:
        mask = controls.read(row, 0, "")[0]
    except UserError as error:
        return str(error)
    if mask.shape[0] % factor or mask.shape[1] % factor:
        return (
            f"{controls.files[row]}: expected sides that are multiples of {factor}, found {_size(mask)}:"
            " --resolution paints a square of a side of your own"
        )
    return None


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]} x {mask.shape[0]}"


def _cut(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))
