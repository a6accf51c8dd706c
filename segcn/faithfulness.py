"""Does an image obey its mask? Pixels and outlines that a segmenter finds, counted image by image and added up."""

import torch

from segcn.bootstrap import Estimate, bootstrap
from segcn.boundary import boundary_f
from segcn.labels import IGNORE, Palette

BINS = 15  # of confidence


def confusion(found: torch.Tensor, wanted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels of each wanted class (row) that were found as each class (column), int64 [K, K]; 255 is left out.

    found, wanted: class ids, uint8 of one shape.
    """
    labelled = wanted != IGNORE
    pairs = wanted[labelled].long() * num_classes + found[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def pixels_of(confused: torch.Tensor) -> torch.Tensor:
    """Of each class the pixels wanted, found, and both, [..., K, 3], of confusion matrices [..., K, K]."""
    return torch.stack([confused.sum(-1), confused.sum(-2), confused.diagonal(dim1=-2, dim2=-1)], -1)


def iou(pixels: torch.Tensor) -> torch.Tensor:
    """Intersection over union of added-up counts [..., K, 3] -> [..., K]; nan where the class is not wanted."""
    wanted, found, both = pixels.double().unbind(-1)
    return torch.where(wanted > 0, both / (wanted + found - both), float("nan"))


def confidence_bins(probability: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Pixels, right ones and the sum of their probabilities in 15 equal bins of confidence, float64 [BINS, 3].

    probability in [0, 1] of the class that was found, and whether it is the wanted one, of the labelled pixels [P].
    """
    place = (probability * BINS).long().clamp(0, BINS - 1)
    told = torch.stack([torch.ones_like(probability), right.float(), probability], 1).double()
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, place, told)


def faithfulness_of(seen: dict[str, torch.Tensor], palette: Palette) -> dict:
    """mIoU, boundary F-score and pixel accuracy, with their bootstrap draws, the means over the classes wanted.

    seen: `pixels` [N, K, 3] and `edges` [N, K, 4] of each image.
    """
    classes = [label for label in palette.labels if not label.ignore]
    pixels, edges = seen["pixels"].double(), seen["edges"].double()

    def told(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        summed = torch.einsum("bn,nkc->bkc", weights, pixels)
        outlines = torch.einsum("bn,nkc->bkc", weights, edges)
        found, outlined = iou(summed), boundary_f(outlines)
        means = {
            "miou": found.nanmean(1), "boundary_f": outlined.nanmean(1),
            "accuracy": summed[..., 2].sum(1) / summed[..., 0].sum(1),
        }  # fmt: skip
        each = {f"per_class/{label.id}": found[:, label.id] for label in classes}
        return means | each | {f"per_class_boundary_f/{label.id}": outlined[:, label.id] for label in classes}

    found = bootstrap(len(pixels), told)
    nests = {
        kind: {label.name: found.pop(f"{kind}/{label.id}") for label in classes}
        for kind in ("per_class", "per_class_boundary_f")
    }
    return found | {"images": len(pixels)} | nests


def calibration(bins: torch.Tensor) -> dict:
    """How far the segmenter's confidence is from its accuracy (expected calibration error, arXiv:1706.04599).

    bins: float64 [N, BINS, 3] of each image, as of `confidence_bins`. The error has an interval; the curve is
    accuracy over confidence in each bin that holds pixels.
    """

    def told(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels, right, sure = torch.einsum("bn,nkc->bkc", weights, bins).unbind(-1)
        return {"": (right - sure).abs().sum(1) / pixels.sum(1)}

    error: Estimate = bootstrap(len(bins), told)[""]
    pixels, right, sure = bins.sum(0).unbind(-1)
    shown = pixels > 0
    curve = {"confidence": (sure / pixels)[shown], "accuracy": (right / pixels)[shown], "pixels": pixels[shown].long()}
    return {"expected_calibration_error": error} | {name: values.tolist() for name, values in curve.items()}
