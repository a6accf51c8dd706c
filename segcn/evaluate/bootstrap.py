"""How far would a number move with other images? 95 % intervals by the bootstrap (Efron 1979), over images.

Draw i of a set is a function of the set's name, its size and i alone (`resamples`), so intervals can be reproduced, and
two numbers that were measured on the same images can be compared image by image."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from segcn.utils import rng

DRAWS, BLOCK = 1000, 100  # resamples of a set; as many at once
LEVEL = 0.95


class Estimate(NamedTuple):
    """A number, and what it is on resampled images, float64 [draws]; nan where it has none there."""

    value: float | None
    draws: torch.Tensor

    def interval(self) -> list[float] | None:
        """The 95 % percentile interval; None where the number has none."""
        known = self.draws[self.draws.isfinite()].double()
        if self.value is None or not len(known):
            return None
        return torch.quantile(known, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()


def resamples(count: int, name: str = "rows", draws: int = DRAWS) -> Iterator[torch.Tensor]:
    """How often each of `count` images is drawn with replacement, float64 [b, count], in blocks of b = 100 draws.

    The block that starts at draw `first` counts torch.randint(count, (b, count), generator=g) with
    g = rng.generator("bootstrap", name, count, first).
    """
    for first in range(0, draws, BLOCK):
        size = (min(BLOCK, draws - first), count)
        rows = torch.randint(count, size, generator=rng.generator("bootstrap", name, count, first))
        yield torch.zeros(size, dtype=torch.float64).scatter_add_(1, rows, torch.ones(size, dtype=torch.float64))


def bootstrap(statistic: Callable, draws: int = DRAWS, **counts: int) -> Any:
    """A number or a dictionary of numbers with bootstrap draws: an Estimate, or a dictionary of them.

    counts: the size of each set that is resampled, independently of the others, by its name; "rows" for the images of
    one set. statistic: takes how often each image of each set counts, float64 [b, count] each, and returns [b] numbers
    or a dictionary of such. Images and the seeds of a training can be resampled together (the pigeonhole bootstrap,
    Owen 2007): bootstrap(statistic, rows=images, seeds=seeds).
    """
    found = statistic(*(torch.ones(1, count, dtype=torch.float64) for count in counts.values()))
    blocks = zip(*(resamples(count, name, draws) for name, count in counts.items()), strict=True)
    drawn = [statistic(*weights) for weights in blocks]
    if isinstance(found, dict):
        return {key: _estimate(value[0], torch.cat([one[key] for one in drawn])) for key, value in found.items()}
    return _estimate(found[0], torch.cat(drawn))


def _estimate(value: torch.Tensor, draws: torch.Tensor) -> Estimate:
    return Estimate(float(value) if torch.isfinite(value) else None, draws)


def mean(values: torch.Tensor, name: str = "rows") -> Estimate:
    """The mean of a number of each image, [N], without those that are nan."""
    values = values.double()
    values = values[values.isfinite()]
    if not len(values):
        return Estimate(None, torch.full((DRAWS,), float("nan"), dtype=torch.float64))
    return bootstrap(lambda weights: weights @ values / len(values), **{name: len(values)})


def ratio(part: Estimate, whole: Estimate) -> Estimate:
    """One number as a share of another."""
    value = part.value / whole.value if part.value is not None and whole.value else None
    return Estimate(value, part.draws / whole.draws)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """One number less another; of unequal numbers of draws the first ones."""
    count = min(len(one.draws), len(other.draws))
    value = one.value - other.value if one.value is not None and other.value is not None else None
    return Estimate(value, one.draws[:count] - other.draws[:count])


def values_of(nest: Any) -> Any:
    """Nested dictionaries with each Estimate as its value alone."""
    if isinstance(nest, Estimate):
        return nest.value
    return {key: values_of(value) for key, value in nest.items()} if isinstance(nest, dict) else nest


def intervals_of(nest: dict) -> dict:
    """The same dictionaries with each Estimate as [low, high]; what is no Estimate is left out."""
    found = {key: value.interval() if isinstance(value, Estimate) else intervals_of(value)
             for key, value in nest.items() if isinstance(value, dict | Estimate)}  # fmt: skip
    return {key: value for key, value in found.items() if value != {}}


def draws_of(nest: dict, above: str = "") -> dict[str, torch.Tensor]:
    """Every Estimate's draws, float32, by its place in the dictionaries: faithfulness/synthetic/miou."""
    found = {}
    for key, value in nest.items():
        if isinstance(value, Estimate):
            found[above + key] = value.draws.float()
        elif isinstance(value, dict):
            found |= draws_of(value, f"{above}{key}/")
    return found
