"""How far would a number move with other images? 95 % intervals by the bootstrap (Efron 1979), over images.

Draw i of a set is a function of the set's name, its size and i alone (`resamples`), so intervals can be reproduced, and
two numbers that were measured on the same images can be compared image by image."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from segcn.utils import rng

DRAWS, BLOCK = 1000, 100  # resamples of a set; as many at once
LEVEL = 0.95
# By how much Student's t is wider than the normal distribution at this level, with 1, 2 ... degrees of freedom
STUDENT = (6.483, 2.195, 1.624, 1.416, 1.312, 1.248, 1.206, 1.177, 1.154, 1.137)


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


def nested_resamples(groups: int, members: int, draws: int = DRAWS) -> Iterator[torch.Tensor]:
    """What each of `members` members of each of `groups` groups weighs, float64 [b, groups, members], in such blocks.

    A hierarchical bootstrap of a mean over both: groups are drawn first and, for each that was drawn, its members,
    both with replacement; the mean weight is 1. Of the groups, or of the members where there is one group, one fewer is
    drawn than there are, so that the variance of their mean is not underestimated (McCarthy and Snowden 1985), and the
    weights are moved further from 1 as Student's t asks with so few: three draws are not taken for many. Weights may be
    below 0, so the statistic must be linear in them.
    """
    few = groups if groups > 1 else members
    wide = 1.0 if few < 2 else STUDENT[few - 2] if few - 2 < len(STUDENT) else 1 + 1.35 / (few - 1)
    drawn, inside = max(1, groups - 1), members if groups > 1 else max(1, members - 1)
    for first in range(0, draws, BLOCK):
        size, source = min(BLOCK, draws - first), rng.generator("bootstrap", "nested", groups, members, first)
        which = torch.randint(groups, (size, drawn, 1), generator=source)
        places = (which * members + torch.randint(members, (size, drawn, inside), generator=source)).flatten(1)
        weights = torch.zeros(size, groups * members, dtype=torch.float64)
        weights.scatter_add_(1, places, torch.full(places.shape, groups * members / (drawn * inside)).double())
        yield 1 + wide * (weights.view(size, groups, members) - 1)


def bootstrap(statistic: Callable, draws: int = DRAWS, **counts: int | tuple[int, int]) -> Any:
    """A number or a dictionary of numbers with bootstrap draws: an Estimate, or a dictionary of them.

    counts: the size of each set that is resampled, independently of the others, by its name; "rows" for the images of
    one set. statistic: takes how often each image of each set counts, float64 [b, count] each, and returns [b] numbers
    or a dictionary of such. A pair of counts is (groups, members of each), as in `nested_resamples`. Images can be
    resampled together with the networks that look at them (the pigeonhole bootstrap, Owen 2007):
    bootstrap(statistic, rows=images, networks=(draws, seeds)).
    """
    sizes = (count if isinstance(count, tuple) else (count,) for count in counts.values())
    found = statistic(*(torch.ones(1, *size, dtype=torch.float64) for size in sizes))
    sets = (nested_resamples(*count, draws) if isinstance(count, tuple) else resamples(count, name, draws)
            for name, count in counts.items())  # fmt: skip
    blocks = zip(*sets, strict=True)
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
