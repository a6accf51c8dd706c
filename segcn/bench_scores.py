"""How good are painted images? Faithfulness, kernel distance with its interval, and colour, one way against another."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.image.kid import poly_mmd

from segcn.augment import AUGMENTS
from segcn.colour import colour_shift
from segcn.dataset import PairedDataset, to_uint8
from segcn.evaluate import faithfulness, features
from segcn.features import Extractor
from segcn.records import Split
from segcn.segmenter import Segmenter

GROUPS = 20  # of rows that a jackknife leaves out in turn
CONFIDENCE = 1.96  # standard errors to either side: 95 %
BATCH = 32


@dataclass(frozen=True)
class Scores:
    """Of a set of images."""

    miou: float
    features: torch.Tensor  # [N, D], row by row
    colour: dict[str, float]  # `colour_shift` from the real ones


def score(images: Split, real: Split, segmenter: Segmenter, extractor: Extractor) -> Scores:
    """Of images painted for the masks of real ones, row by row."""
    found = faithfulness(images, segmenter, BATCH)["miou"] or 0.0
    shift = colour_shift(pictures(real, segmenter), pictures(images, segmenter))
    return Scores(found, features(images, segmenter, extractor, BATCH), shift)


def pictures(split: Split, segmenter: Segmenter) -> Iterator[np.ndarray]:
    """Every image as the judge sees it, uint8 [R, R, 3]."""
    resolution, fit = segmenter.settings["resolution"], segmenter.settings["fit"]
    return (to_uint8(sample.image) for sample in PairedDataset(split, resolution, AUGMENTS["none"], 0, fit))


def kernel_distance(real: torch.Tensor, painted: torch.Tensor) -> float:
    """The squared maximum mean discrepancy of features [N, D], unbiased, under a cubic kernel, from all rows at once.

    Bińkowski et al. 2018, arXiv:1801.01401: a KID where the features are Inception's.
    """
    return float(poly_mmd(real, painted))


def distance_interval(real: torch.Tensor, painted: torch.Tensor) -> tuple[float, float]:
    """(kernel distance, half of its 95 % interval)."""
    return jackknife(lambda rows: kernel_distance(real[rows], painted[rows]), len(real))


def excess_interval(real: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(our kernel distance less theirs, half of its 95 % interval); the same rows leave all three together."""
    return jackknife(
        lambda rows: kernel_distance(real[rows], ours[rows]) - kernel_distance(real[rows], theirs[rows]), len(real)
    )


def jackknife(statistic: Callable[[torch.Tensor], float], count: int) -> tuple[float, float]:
    """A statistic of all rows, and half of its 95 % interval, from leaving out one group of rows after the other.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11. A bootstrap would repeat rows, whose
    likeness to themselves an unbiased kernel distance must not count.
    """
    rows, groups = torch.arange(count), min(GROUPS, count // 2)
    if groups < 2:
        return statistic(rows), math.inf
    left = torch.tensor([statistic(rows[rows % groups != group]) for group in range(groups)], dtype=torch.float64)
    error = ((groups - 1) / groups * (left - left.mean()).square().sum()).sqrt()
    return statistic(rows), CONFIDENCE * float(error)
