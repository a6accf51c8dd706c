"""How far would a number move with other images? The bootstrap of Efron 1979, over images."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from segcn import seeds

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
        rows = torch.randint(count, size, generator=seeds.generator("bootstrap", name, count, first))
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
