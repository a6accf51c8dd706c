"""The step at which a ControlNet begins to obey its condition, read from a curve of faithfulness."""

from collections.abc import Sequence

LEAST_RISE = 0.15  # share of the ceiling


def convergence_step(steps: Sequence[int], fractions: Sequence[float]) -> int | None:
    """The first validation past half of the rise from the first value to the best, None where there is no such rise.

    fractions: faithfulness as a share of the ceiling, at the steps. A ControlNet does not learn to obey bit by bit but
    within a few hundred steps ("sudden convergence", Zhang et al. 2023, arXiv:2302.05543, section 3.3): half-way is in
    the middle of that jump wherever the curve begins and ends, and of a gradual rise in its middle. The rise must be at
    least 0.15, far above the 0.01 by which scores of six rows differed before it, and the value after the step must be
    past half-way too: a single lucky value is not a convergence.
    """
    if not fractions or max(fractions) - fractions[0] < LEAST_RISE:
        return None
    half_way = (fractions[0] + max(fractions)) / 2
    past = [fraction > half_way for fraction in fractions]
    stays = [here and after for here, after in zip(past, [*past[1:], True], strict=True)]
    return steps[stays.index(True)] if any(stays) else None
