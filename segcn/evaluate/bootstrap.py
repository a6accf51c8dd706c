"""IoU over seeds and test images, and 95 % intervals of it and of differences, by bootstrap."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from segcn.utils import rng

# --- utility_intervals: IoU over seeds and test images, and 95 % intervals of it and of differences, by bootstrap.

COVERED = (2.5, 97.5)  # percentiles: an interval of 95 %
METHOD = (
    "95 % percentile intervals of a bootstrap that draws test images and, independently, seeds, each with replacement"
    " (the pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1(2), 386-411); of differences the"
    " same images and seeds are drawn for both sides. They tell what another sample of test images and other seeds of"
    " the segmenter might have given; which rows were drawn, and the one ControlNet of each fraction, are taken as they"
    " are."
)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersections and unions [..., 2 or 3, K] -> IoU [..., K], NaN where a class is neither found nor there."""
    both, either = counts[..., 0, :].astype(float), counts[..., 1, :].astype(float)
    return np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)


def with_mean(per_class: np.ndarray) -> np.ndarray:
    """IoU [..., K] -> [..., K + 1]: the mean over the classes that have one comes last."""
    known = ~np.isnan(per_class)
    mean = np.nansum(per_class, -1) / known.sum(-1).clip(1)
    return np.concatenate([per_class, np.where(known.any(-1), mean, np.nan)[..., None]], -1)


def estimate_over_seeds(counts: np.ndarray) -> np.ndarray:
    """What was found, float [K + 1]: IoU over all test images, averaged over seeds; the mean over classes comes last.

    counts: int [seeds, images, 2 or 3, K], the intersections and unions of each image; only classes that occur.
    """
    return with_mean(iou(counts.sum(1))).mean(0)


def resampled(counts: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """`estimate` of each resample of images and seeds, float [resamples, K + 1].

    The same number of seeds and images and the same `seed` give the same draws: what two arms differ by is paired.
    """
    seeds, images = counts.shape[:2]
    drawn = np.random.default_rng(seed)
    of_images = drawn.multinomial(images, np.full(images, 1 / images), resamples)  # how often each was drawn [B, N]
    of_seeds = drawn.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # [B, S]
    summed = of_images.astype(float) @ counts.reshape(seeds, images, -1).astype(float)  # [S, B, 2 K or 3 K]
    found = with_mean(iou(summed.reshape(seeds, resamples, *counts.shape[2:])))  # [S, B, K + 1]
    return np.einsum("bs,sbk->bk", of_seeds, found)


def interval(resamples: np.ndarray) -> np.ndarray:
    """Lower and upper end, float [2, K + 1], of what `resampled` gives, or of the difference of two such.

    Resamples in which a class is NaN are left out of its interval.
    """
    return np.nanpercentile(resamples, COVERED, axis=0)


# --- bootstrap: How far would a number move with other images? The bootstrap of Efron 1979, over images.

DRAWS, BLOCK = 1000, 100  # resamples of a set; as many at once
LEVEL = 0.95


class Estimate(NamedTuple):
    """A number, and what it is on resampled images, float64 [B]; nan where it has none there."""

    value: float | None
    draws: torch.Tensor

    def interval(self) -> list[float] | None:
        """The 95 % percentile interval; None where the number has none."""
        known = self.draws[self.draws.isfinite()].double()
        if self.value is None or not len(known):
            return None
        return torch.quantile(known, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()


def resamples(count: int, name: str = "rows", draws: int = DRAWS) -> Iterator[torch.Tensor]:
    """How often each of `count` images is drawn, float64 [b, count], in blocks.

    Sets of one size and name get the same draws: what is measured on the same rows is compared row by row.
    """
    for first in range(0, draws, BLOCK):
        size = (min(BLOCK, draws - first), count)
        rows = torch.randint(count, size, generator=rng.generator("bootstrap", name, count, first))
        yield torch.zeros(size, dtype=torch.float64).scatter_add_(1, rows, torch.ones(size, dtype=torch.float64))


def bootstrap(
    count: int, statistic: Callable[[torch.Tensor], dict[str, torch.Tensor]], name: str = "rows"
) -> dict[str, Estimate]:
    """Each number that `statistic` tells of image weights, float64 [b, count] -> [b], with its draws."""
    found = statistic(torch.ones(1, count, dtype=torch.float64))
    drawn = [statistic(weights) for weights in resamples(count, name)]
    return {key: estimate(value[0], torch.cat([block[key] for block in drawn])) for key, value in found.items()}


def mean(values: torch.Tensor, name: str = "rows") -> Estimate:
    """The mean of a number of each image, [N], without those that are nan."""
    values = values.double()
    values = values[values.isfinite()]
    if not len(values):
        return Estimate(None, torch.full((DRAWS,), float("nan"), dtype=torch.float64))
    return bootstrap(len(values), lambda weights: {"mean": weights @ values / len(values)}, name)["mean"]


def ratio(part: Estimate, whole: Estimate) -> Estimate:
    """One number as a share of another."""
    value = part.value / whole.value if part.value is not None and whole.value else None
    return Estimate(value, part.draws / whole.draws)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """One number less another; of unequal numbers of draws the first ones."""
    count = min(len(one.draws), len(other.draws))
    value = one.value - other.value if one.value is not None and other.value is not None else None
    return Estimate(value, one.draws[:count] - other.draws[:count])


def estimate(value: torch.Tensor, draws: torch.Tensor) -> Estimate:
    """From tensors; nan is None."""
    return Estimate(float(value) if torch.isfinite(value) else None, draws)


def values_of(told: dict) -> dict:
    """A nest of dictionaries with each Estimate as its value alone."""
    return {key: _shown(value, values_of, lambda one: one.value) for key, value in told.items()}


def intervals_of(told: dict) -> dict:
    """The same nest with each Estimate as [low, high]; what is no Estimate is left out."""
    kept = {key: value for key, value in told.items() if isinstance(value, dict | Estimate)}
    found = {key: _shown(value, intervals_of, Estimate.interval) for key, value in kept.items()}
    return {key: value for key, value in found.items() if value != {}}


def draws_of(told: dict, above: str = "") -> dict[str, torch.Tensor]:
    """Every Estimate's draws, float32 [B], by its place in the nest: faithfulness/synthetic/miou."""
    found = {}
    for key, value in told.items():
        if isinstance(value, Estimate):
            found[above + key] = value.draws.float()
        elif isinstance(value, dict):
            found |= draws_of(value, f"{above}{key}/")
    return found


def _shown(value, deeper: Callable, leaf: Callable):
    if isinstance(value, Estimate):
        return leaf(value)
    return deeper(value) if isinstance(value, dict) else value
