"""A row and an epoch in, tensors out: image, control, mask, valid pixels, caption and the original."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from segcn.data.captions import mirrored
from segcn.data.config import FITS
from segcn.data.masks import colorize, read_mask
from segcn.data.metadata import Split, read_image
from segcn.data.palette import Palette
from segcn.data.transforms import AugmentConfig, Box, Draw, apply, boxes, centre_square, draw
from segcn.utils import rng
from segcn.utils.errors import UserError


class Sample(NamedTuple):
    """One augmented row at resolution R."""

    image: torch.Tensor  # float32 [3, R, R] in [-1, 1]
    control: torch.Tensor  # float32 [3, R, R] in [0, 1], the palette's colors; black where out of frame
    mask: torch.Tensor  # uint8 [R, R], class ids, 255 unlabelled
    valid: torch.Tensor  # bool [R, R], False where out of frame
    caption: str  # the one drawn, mirrored where the image is and the configuration asks for it
    original: torch.Tensor  # uint8 [3, H, W], as on disk
    draw: Draw


class PairedDataset(Dataset):
    """The rows of a split, augmented anew in each epoch; index i is row i % len of epoch i // len."""

    def __init__(self, split: Split, resolution: int, augment: AugmentConfig, seed: int, fit: str = "crop"):
        self.split = split
        self.resolution = resolution
        self.augment = augment
        self.seed = seed
        self.fit = known_fit(fit)  # crop, pad or stretch: how an image that is not square becomes one

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        epoch, row = divmod(index, len(self.split))
        return self.sample(row, epoch)

    def __iter__(self) -> Iterator[Sample]:
        """The rows of epoch 0."""
        return map(self.__getitem__, range(len(self)))

    def sample(self, row: int, epoch: int) -> Sample:
        """One row as that epoch sees it, the same whenever asked for; UserError if its files do not fit."""
        original, original_mask = self._read(row)
        drawn = self.draw(row, epoch)
        image, mask, valid = apply(original, original_mask, drawn, self.resolution)
        control = to_control(mask[0], self.split.palette) * valid
        return Sample(
            to_image(image), control, mask[0], valid[0], self.caption(row, epoch, drawn.flip), original, drawn
        )

    def draw(self, row: int, epoch: int) -> Draw:
        """What is drawn for a row and epoch; whether it may be flipped depends on all captions of the row."""
        told = "\n".join(self.split[row].captions)
        return draw(self.augment, self.seed, epoch, row, told, self.fit)

    def caption(self, row: int, epoch: int, flip: bool) -> str:
        """One of the row's captions, by (seed, epoch, row); `flip` says whether its image is mirrored."""
        captions = self.split[row].captions
        chosen = 0 if len(captions) == 1 else rng.integer(len(captions), "caption", self.seed, epoch, row)
        return mirrored(captions[chosen]) if flip and self.augment.sided_captions == "rewrite" else captions[chosen]

    def captions(self) -> Iterator[str]:
        """Every caption that a sample may have, each once."""
        told: set[str] = set()
        flips = self.augment.hflip > 0 and self.augment.sided_captions == "rewrite"
        for record in self.split.records:
            for caption in record.captions:
                for form in {caption: None, mirrored(caption): None} if flips else (caption,):
                    if form not in told:
                        told.add(form)
                        yield form

    def _read(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [3, H, W] and uint8 [1, H, W] from the files of a row."""
        record = self.split[row]
        where = f"{self.split.metadata}, line {record.line} (row {row})"
        try:
            image, mask = read_image(record.image), read_mask(record.mask, self.split.palette)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if image.shape[:2] != mask.shape:
            expected, found = "{1} x {0}".format(*image.shape), "{1} x {0}".format(*mask.shape)
            raise UserError(f"{where}: {record.mask}: expected its image's size, {expected}, found {found}")
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)[None]


def read_control_mask(
    path: str | Path, palette: Palette, resolution: int | None = None, fit: str = "crop"
) -> np.ndarray:
    """A mask file as class ids, uint8 [R, R], the square that training sees; without R as on disk, [H, W]."""
    return read_framed_mask(path, palette, resolution, fit)[0]


def read_framed_mask(
    path: str | Path, palette: Palette, resolution: int | None = None, fit: str = "crop"
) -> tuple[np.ndarray, Box]:
    """As `read_control_mask`, and the part of it that holds image: all of it, but for what is padded."""
    mask = read_mask(path, palette)
    if resolution is None:
        return mask, Box(0, 0, *mask.shape)
    frame = boxes(Draw(fit=known_fit(fit)), mask.shape, resolution)[1]
    return centre_square(torch.from_numpy(mask)[None], resolution, fit)[0].numpy(), frame


def known_fit(fit: str) -> str:
    """The fit itself; UserError for an unknown one."""
    if fit not in FITS:
        raise UserError(f"--fit: expected one of {', '.join(FITS)}, found {fit!r}")
    return fit


def to_image(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32 [..., 3, H, W] in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1], clipped -> uint8 [..., H, W, 3]; the inverse of `to_image`."""
    pixels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def to_control(mask: torch.Tensor | np.ndarray, palette: Palette) -> torch.Tensor:
    """Class ids, uint8 [..., H, W] -> the ControlNet's condition, float32 [..., 3, H, W] in [0, 1]."""
    colors = torch.from_numpy(colorize(np.asarray(mask), palette))
    return colors.movedim(-1, -3).float() / 255
