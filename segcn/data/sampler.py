"""Which row comes when, and how much each class weighs: repeat-factor sampling, the stream of rows, class weights."""

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from segcn.data.masks import count_ids, read_mask
from segcn.data.metadata import Record, Split
from segcn.data.palette import Palette
from segcn.utils import rng
from segcn.utils.io import write_whole

COUNTED_ROWS = 1000  # masks that are read where an estimate of the class shares is enough


class Stream:
    """(visit, row) at every position of the endless stream of rows: each epoch is its own permutation.

    With repeats, row i occurs floor((e + 1) r + u) - floor(e r + u) times in epoch e, u in [0, 1) by (seed, row); its
    visits are numbered on and on, from floor(e r + u). Without repeats it occurs once, and the visit is the epoch. The
    stream does not depend on batch size or processes, and any position is found without going through those before it.
    """

    def __init__(self, rows: int, seed: int, repeats: np.ndarray | None = None):
        self.rows, self.seed, self.repeats = rows, seed, repeats  # repeats: float64 [N], at least 1; None: all 1
        if repeats is not None:
            self._offsets = np.array([rng.uniform("repeats", seed, row) for row in range(rows)])
        self._span = range(0)  # the positions of the epoch in use
        self._keys = np.empty(0, np.int64), np.empty(0, np.int64)  # their visits and rows

    def start(self, epoch: int) -> int:
        """The position at which an epoch starts: how many rows are in those before it."""
        return epoch * self.rows if self.repeats is None else int(self._visits(epoch).sum())

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position not in self._span:
            epoch = int(position / (self.rows if self.repeats is None else self.repeats.sum()))
            while self.start(epoch) > position:  # the guess is at most a few off
                epoch -= 1
            while self.start(epoch + 1) <= position:
                epoch += 1
            self._span = range(self.start(epoch), self.start(epoch + 1))
            self._keys = self.epoch(epoch)
        visits, rows = self._keys
        place = position - self._span.start
        return int(visits[place]), int(rows[place])

    def _visits(self, epoch: int) -> np.ndarray:
        """The number of visits of each row before an epoch, int64 [N]; where rows are repeated."""
        assert self.repeats is not None
        return np.floor(epoch * self.repeats + self._offsets).astype(np.int64)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Visit and row at each position of an epoch, in order."""
        order = np.array(rng.permutation(self.start(epoch + 1) - self.start(epoch), "rows", self.seed, epoch))
        if self.repeats is None:
            return np.full(self.rows, epoch), order
        first = self._visits(epoch)
        times = self._visits(epoch + 1) - first
        rows = np.repeat(np.arange(self.rows), times)
        visits = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times - first, times)
        return visits[order], rows[order]


class Groups:
    """The stream of rows in groups of one shape, one for each optimizer step.

    Each epoch's rows of a shape are cut, in the order of the stream, into groups of `size`; what is left is a smaller
    group of its own, and the groups are shuffled. So in an epoch each row occurs as often as in the stream, none twice
    to fill a group, and none waits for another epoch.
    """

    def __init__(self, stream: Stream, shapes: np.ndarray, size: int):
        """shapes: int [N, 2], of each row."""
        self.stream, self.size = stream, size
        self.shapes = np.unique(shapes, axis=0, return_inverse=True)[1].reshape(-1)  # the number of each row's shape
        self._starts, self._of = [0], (-1, list[np.ndarray]())  # of the epochs; epoch in use, its groups

    def start(self, epoch: int) -> int:
        """How many groups are in the epochs before one."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._cut(len(self._starts) - 1)))
        return self._starts[epoch]

    def __getitem__(self, number: int) -> list[tuple[int, int]]:
        """(visit, row) of each row of a group."""
        while self._starts[-1] <= number:
            self.start(len(self._starts))
        epoch = bisect_right(self._starts, number) - 1
        if self._of[0] != epoch:
            order = rng.permutation(self.start(epoch + 1) - self.start(epoch), "groups", self.stream.seed, epoch)
            groups = self._cut(epoch)
            self._of = epoch, [groups[place] for place in order]
        return [(int(visit), int(row)) for visit, row in self._of[1][number - self.start(epoch)]]

    def _cut(self, epoch: int) -> list[np.ndarray]:
        """The groups of an epoch, int [n, 2] each, by shape."""
        keys = np.stack(self.stream.epoch(epoch), 1)
        alike = (keys[self.shapes[keys[:, 1]] == shape] for shape in range(self.shapes.max() + 1))
        return [part[first : first + self.size] for part in alike for first in range(0, len(part), self.size)]


def class_pixels(split: Split) -> np.ndarray:
    """How many pixels of each class each mask shows, uint32 [N, K]; unlabelled ones are left out."""
    classes = split.palette.num_classes

    def counted(record: Record) -> np.ndarray:
        return count_ids(read_mask(record.mask, split.palette))[:classes].astype(np.uint32)

    pixels = np.empty((len(split), classes), np.uint32)
    with ThreadPoolExecutor() as pool:
        for row, counts in enumerate(pool.map(counted, split.records)):
            pixels[row] = counts
    return pixels


def read_class_pixels(split: Split, folder: Path, accelerator) -> np.ndarray:
    """The same, counted once by the main process and kept in `folder` for all processes and later runs."""
    path = folder / f"class_pixels-{split.fingerprint}-{len(split)}.npy"
    if accelerator.is_main_process and not path.is_file():
        pixels = class_pixels(split)
        write_whole(path, lambda file: np.save(file, pixels))
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")


def frequencies(pixels: np.ndarray, repeats: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of each class the share of the rows that show it and its share of the labelled pixels, [K] each."""
    weights = np.ones(len(pixels)) if repeats is None else repeats
    area = weights @ pixels
    return weights @ (pixels > 0) / weights.sum(), area / max(1, area.sum())


def repeat_factors(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """How often each row occurs in an epoch, float64 [N], at least 1: as often as its rarest class asks for.

    A class that the share f of the rows shows is repeated max(1, sqrt(threshold / f)) times (Gupta, Dollár and Girshick
    2019, LVIS, arXiv:1908.03195). There a fraction is a chance; in a `Stream` every row has an offset of its own, so
    that over the epochs it occurs exactly so often.

    pixels: [N, K]; threshold: classes that a smaller share of the rows shows are repeated.
    """
    shows = pixels > 0
    share = shows.mean(axis=0)
    of_class = np.sqrt(np.maximum(1.0, threshold / np.where(share > 0, share, 1.0)))
    return np.where(shows, of_class, 1.0).max(axis=1, initial=1.0)


def balanced(split: Split, threshold: float, folder: Path, accelerator, log: Callable[[str], None]) -> np.ndarray:
    """The repeat factors of a split's rows, float64 [N]; logs what they change."""
    pixels = read_class_pixels(split, folder, accelerator)
    repeats = repeat_factors(pixels, threshold)
    for line in balance_lines(split.palette, pixels, repeats):
        log(line)
    return repeats


def balance_lines(palette: Palette, pixels: np.ndarray, repeats: np.ndarray) -> list[str]:
    """What the repeats change, in a few lines: the six classes that the fewest rows show."""
    times = f"{repeats.sum():.0f} times an epoch in all, the rarest {repeats.max():.1f} times"
    lines = [f"Class balance: {len(pixels)} rows occur {times}."]
    before, after = frequencies(pixels), frequencies(pixels, repeats)
    labels = sorted((label for label in palette.labels if not label.ignore), key=lambda label: before[0][label.id])
    for label in labels[:6]:
        rows, area = ((old[label.id], new[label.id]) for old, new in zip(before, after, strict=True))
        change = "in {:.1%} -> {:.1%} of the rows, {:.2%} -> {:.2%} of the pixels".format(*rows, *area)
        lines.append(f"  {label.name}: {change}")
    return lines + ([f"  and {len(labels) - 6} more frequent classes"] if len(labels) > 6 else [])


def class_weights(pixels: np.ndarray, exponent: float = 0.5) -> torch.Tensor:
    """The weight of each class in a loss, float32 [K]: 1 / (its share of the labelled pixels)^exponent, scaled.

    pixels: counts [N, K] (see `class_pixels`). The mean over all labelled pixels is 1; classes without a pixel get 0.
    """
    counts = torch.from_numpy(pixels.sum(axis=0, dtype=np.int64))
    share = counts / counts.sum().clamp(min=1)
    weights = torch.where(share > 0, share**-exponent, 0.0)
    return weights / (weights * share).sum().clamp(min=1e-12)


def cell_weights(mask: torch.Tensor, weights: torch.Tensor, factor: int) -> torch.Tensor:
    """Class ids, uint8 [H, W] -> the mean weight of the pixels of each latent cell, float32 [H/factor, W/factor].

    weights: float32 [K] by class id; unlabelled pixels weigh nothing.
    """
    of_id = F.pad(weights, (0, 256 - len(weights)))
    return F.avg_pool2d(of_id[mask.long()][None], factor)[0]
