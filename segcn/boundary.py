"""How well the outlines of the classes agree, in counts that can be added up over images."""

import torch
from torch.nn import functional as F

from segcn.labels import IGNORE

TOLERANCE = 0.0075  # of the diagonal, as in BSDS and Csurka et al. 2013


def boundary_counts(found: torch.Tensor, wanted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Of each class the pixels of the found outline, those of them near the wanted one, and the reverse: int64 [K, 4].

    found, wanted: class ids, uint8 [H, W]; 255 in `wanted` is left out. A pixel is on an outline where one of its four
    neighbours has another class, and near one that is at most `tolerance` pixels off in each direction.
    """
    found = torch.where(wanted == IGNORE, wanted, found)
    ids = sorted({*found.unique().tolist(), *wanted.unique().tolist()} - {IGNORE})
    outlines = torch.stack([_outline(mask)[None] & (mask == _column(ids)) for mask in (found, wanted)])  # [2, C, H, W]
    reach = tolerance(wanted.shape)
    near = F.max_pool2d(outlines.float(), 2 * reach + 1, 1, reach).bool().flip(0)  # the other's
    counted = torch.stack([outlines, outlines & near], 1).sum((-2, -1))  # [2, 2, C]
    counts = torch.zeros(num_classes, 4, dtype=torch.int64)
    counts[ids] = counted.flatten(0, 1).T
    return counts


def tolerance(size: tuple[int, ...]) -> int:
    """Pixels that two outlines in a picture of (height, width) may be apart, at least 1."""
    return max(1, round(TOLERANCE * (size[0] ** 2 + size[1] ** 2) ** 0.5))


def boundary_f(counts: torch.Tensor) -> torch.Tensor:
    """F-score of added-up counts [..., 4] -> [...], of precision and recall; nan without a wanted one.

    Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?"
    """
    found, right, wanted, reached = counts.double().unbind(-1)
    precision, recall = right / found.clamp(min=1e-9), reached / wanted
    return torch.where(wanted > 0, 2 * precision * recall / (precision + recall).clamp(min=1e-9), float("nan"))


def _outline(mask: torch.Tensor) -> torch.Tensor:
    """Where a pixel, [H, W], has a labelled neighbour of another class."""
    edge = torch.zeros(mask.shape, dtype=torch.bool)
    for one, other in (((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
                       ((slice(None), slice(1, None)), (slice(None), slice(None, -1)))):  # fmt: skip
        differs = (mask[one] != mask[other]) & (mask[one] != IGNORE) & (mask[other] != IGNORE)
        edge[one] |= differs
        edge[other] |= differs
    return edge


def _column(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.uint8)[:, None, None]
