"""A row and an epoch in, tensors out: image, control, mask, valid pixels, caption and the original."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from segcn.data.captions import mirrored, mirrored_ids
from segcn.data.config import BUCKET, FITS
from segcn.data.files import image_size
from segcn.data.masks import colorize, read_mask
from segcn.data.metadata import Split, read_row
from segcn.data.palette import IGNORE, Palette
from segcn.data.transforms import AugmentConfig, Box, Draw, apply, boxes, center_square, draw, output_shape
from segcn.utils import rng
from segcn.utils.errors import UserError

Augment = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class Sample(NamedTuple):
    """One augmented row at resolution R; with buckets, R x R is its bucket's height x width."""

    image: torch.Tensor  # float32 [3, R, R] in [-1, 1]
    control: torch.Tensor  # float32 [3, R, R] in [0, 1], the palette's colors; black where out of frame
    mask: torch.Tensor  # uint8 [R, R], class ids, 255 unlabelled
    valid: torch.Tensor  # bool [R, R], False where out of frame
    caption: str  # the one drawn, mirrored where the image is and the configuration asks for it
    original: torch.Tensor  # uint8 [3, H, W], as on disk
    draw: Draw


class PairedDataset(Dataset):
    """The rows of a split, each augmented differently in each epoch; index i is row i % len of epoch i // len.

    fit: crop, pad or stretch, how an image that is not square becomes one; bucket: it gets a shape like its own.
    function: one of your own, (image, mask, seed) -> (image, mask), that runs after the paired affine. image:
    uint8 [3, R, R]; mask: uint8 [R, R], 255 where unlabelled or out of frame; seed: an int that depends on (seed,
    epoch, row) alone. Out of frame its results are not used. UserError where they have another type, shape or class id.
    """

    def __init__(
        self,
        split: Split,
        resolution: int,
        augment: AugmentConfig,
        seed: int,
        fit: str = "crop",
        function: Augment | None = None,
    ):
        self.split, self.resolution = split, resolution
        self.mirrored_ids = mirrored_ids(split.palette)
        self.augment = augment if self.mirrored_ids is not None else replace(augment, hflip=0.0)
        self.function, self.seed = function, seed
        self.fit = known_fit(fit)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        epoch, row = divmod(index, len(self.split))
        return self.sample(row, epoch)

    def __iter__(self) -> Iterator[Sample]:
        """The rows of epoch 0."""
        return map(self.__getitem__, range(len(self)))

    @cached_property
    def shapes(self) -> np.ndarray:
        """Height and width that each row gets, int [N, 2]; with buckets by its image's size, of its file's header."""
        if self.fit != BUCKET:
            return np.full((len(self), 2), self.resolution)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = pool.map(image_size, [record.image for record in self.split.records])
            return np.array([output_shape(size, self.resolution, BUCKET) for size in sizes])

    @property
    def still(self) -> bool:
        """Whether every epoch gives the same images."""
        return self.augment.still and self.function is None

    def sample(self, row: int, epoch: int) -> Sample:
        """One row in that epoch, the same in any order and process; UserError if its files do not fit."""
        pixels, ids = read_row(self.split, row)
        original = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        drawn = self.draw(row, epoch)
        image, mask, valid = apply(original, torch.from_numpy(ids)[None], drawn, self.resolution)
        mask, valid = mask[0], valid[0]
        if drawn.flip and self.mirrored_ids is not None:
            mask = torch.from_numpy(self.mirrored_ids)[mask.long()]
        if self.function is not None:
            image, mask = self._changed(image, mask, rng.seed_of("augment function", self.seed, epoch, row))
            image, mask = image * valid, torch.where(valid, mask, IGNORE)
        control = to_control(mask, self.split.palette) * valid
        return Sample(to_image(image), control, mask, valid, self.caption(row, epoch, drawn.flip), original, drawn)

    def draw(self, row: int, epoch: int) -> Draw:
        """What is drawn for a row and epoch; whether it may be flipped depends on all captions of the row."""
        shape = self.shapes[row] if self.fit == BUCKET else (1, 1)
        return draw(self.augment, self.seed, epoch, row, "\n".join(self.split[row].captions), self.fit, shape)

    def caption(self, row: int, epoch: int, flip: bool) -> str:
        """One of the row's captions, by (seed, epoch, row); `flip` says whether its image is mirrored."""
        captions = self.split[row].captions
        chosen = 0 if len(captions) == 1 else rng.integer(len(captions), "caption", self.seed, epoch, row)
        return mirrored(captions[chosen]) if flip and self.augment.sided_captions == "rewrite" else captions[chosen]

    def captions(self) -> Iterator[str]:
        """Every caption that a sample may have, each once."""
        flips = self.augment.hflip > 0 and self.augment.sided_captions == "rewrite"
        written = (caption for record in self.split.records for caption in record.captions)
        forms = ((caption, mirrored(caption)) if flips else (caption,) for caption in written)
        return iter(dict.fromkeys(form for each in forms for form in each))

    def _changed(self, image: torch.Tensor, mask: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The results of `function`, checked."""
        assert self.function is not None
        results = self.function(image.clone(), mask.clone(), seed)
        where = f"the augmentation {getattr(self.function, '__name__', type(self.function).__name__)}"
        for found, given, name in zip(results, (image, mask), ("an image", "a mask"), strict=True):
            if found.dtype != given.dtype or found.shape != given.shape:
                expected = f"{name}, uint8 {list(given.shape)}"
                raise UserError(f"{where}: expected {expected}, found {found.dtype} {list(found.shape)}")
        ids = results[1].unique().numpy()
        wrong = ids[self.split.palette.class_of_id[ids] != ids].tolist()
        if wrong:
            raise UserError(f"{where}: expected class ids of palette.json, or 255, found {', '.join(map(str, wrong))}")
        return results


def read_framed_mask(
    path: str | Path, palette: Palette, resolution: int | None = None, fit: str = "crop"
) -> tuple[np.ndarray, Box]:
    """A mask file as class ids, uint8, and the part of it that holds image: all of it, but for what is padded.

    The mask is the square [R, R] that training sees (or bucket); without R as it is, [H, W].
    """
    mask = read_mask(path, palette)
    if resolution is None:
        return mask, Box(0, 0, *mask.shape)
    frame = boxes(Draw(fit=known_fit(fit)), mask.shape, resolution)[1]
    return center_square(torch.from_numpy(mask)[None], resolution, fit)[0].numpy(), frame


def by_shape(items: Sequence[Any]) -> list[list[int]]:
    """The places of the arrays or tensors of each shape: what can be stacked."""
    found: dict[tuple, list[int]] = {}
    for place, item in enumerate(items):
        found.setdefault(tuple(item.shape), []).append(place)
    return list(found.values())


def in_batches(items: Sequence[Any], make: Callable[[list[int]], Iterable[Any]]) -> list[Any]:
    """What `make` gives for the places of the items of each shape, in the order of all items."""
    made = {place: one for places in by_shape(items) for place, one in zip(places, make(places), strict=True)}
    return [made[place] for place in range(len(items))]


def known_fit(fit: str) -> str:
    """The fit itself; UserError for an unknown one."""
    if fit not in (*FITS, BUCKET):
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
