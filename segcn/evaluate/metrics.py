"""What is measured of images: agreement with masks, distances between features, memorization, and colors."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.nn import functional as F

from segcn.data.colors import to_lab
from segcn.data.palette import IGNORE, Palette
from segcn.evaluate.bootstrap import Estimate, bootstrap, mean
from segcn.utils import rng

IOU_RULE = (
    "IoU of a class: the pixels that belong to it both in the masks and in the predictions, over those that belong to "
    "it in either, counted over all images of a set; unlabelled pixels (255) are left out. mIoU is the mean over the "
    "classes that the masks of the set hold. A class that no mask holds is left out of the mean; where it is predicted "
    "all the same, it lowers the IoU of the classes that these pixels belong to."
)
BINS = 15  # of confidence
TOLERANCE = 0.0075  # of the diagonal, as in BSDS and Csurka et al. 2013
CLOSEST_PAIRS = 8  # shown in the report
FRECHET_WORK = 2e11  # multiplications that the bootstrap of a Fréchet distance may take, about
FRECHET_DRAWS = (20, 200)  # at least, at most
COMPARED = 5000  # images at most for what looks at every pair
NEIGHBORS = 5  # of precision, recall, density and coverage
NEEDED = 5  # images a feature, below which a Fréchet distance is mostly bias: 10,000 for Inception's 2048


# Agreement with the mask


def confusion_matrix(predicted: torch.Tensor, mask: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels of each class of the mask (row) that were predicted as each class (column), int64 [K, K].

    predicted, mask: class ids, uint8 of one shape; where the mask is 255 nothing is counted.
    """
    labelled = mask != IGNORE
    pairs = mask[labelled].long() * num_classes + predicted[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_counts(confusion: torch.Tensor) -> torch.Tensor:
    """Of each class its pixels in the mask, in the prediction, and in both: [..., K, K] -> [..., K, 3]."""
    return torch.stack([confusion.sum(-1), confusion.sum(-2), confusion.diagonal(dim1=-2, dim2=-1)], -1)


def iou(confusion: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each class, float64 [..., K], of added-up confusion matrices [..., K, K].

    A class that no mask holds (its row is 0) is nan, so `iou(confusion).nanmean(-1)` is the mIoU over the classes that
    the masks hold. Where such a class is predicted all the same, it lowers the IoU of the classes it covers.
    """
    return iou_of_counts(class_counts(confusion))


def iou_of_counts(counts: torch.Tensor) -> torch.Tensor:
    """The same of added-up `class_counts`: [..., K, 3] -> [..., K]."""
    in_mask, predicted, both = counts.double().unbind(-1)
    return torch.where(in_mask > 0, both / (in_mask + predicted - both), float("nan"))


def boundary_counts(predicted: torch.Tensor, mask: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels on each class's outlines, int64 [K, 4]: predicted, of these near the mask's, the mask's, of these near.

    predicted, mask: class ids, uint8 [H, W]; 255 in the mask is left out. A pixel is on an outline where one of its
    four neighbors has another class, and near one that is at most `boundary_tolerance` pixels off in each direction.
    """
    predicted = torch.where(mask == IGNORE, mask, predicted)
    ids = sorted({*predicted.unique().tolist(), *mask.unique().tolist()} - {IGNORE})
    column = torch.tensor(ids, dtype=torch.uint8)[:, None, None]
    outlines = torch.stack([_edges(one)[None] & (one == column) for one in (predicted, mask)])  # [2, C, H, W]
    reach = boundary_tolerance(mask.shape)
    near = F.max_pool2d(outlines.float(), 2 * reach + 1, 1, reach).bool().flip(0)  # the other's
    counts = torch.zeros(num_classes, 4, dtype=torch.int64)
    counts[ids] = torch.stack([outlines, outlines & near], 1).sum((-2, -1)).flatten(0, 1).T
    return counts


def boundary_tolerance(size: tuple[int, ...]) -> int:
    """Pixels that two outlines in an image of (height, width) may be apart, at least 1."""
    return max(1, round(TOLERANCE * (size[0] ** 2 + size[1] ** 2) ** 0.5))


def _edges(mask: torch.Tensor) -> torch.Tensor:
    """Where a pixel, [H, W], has a labelled neighbor of another class."""
    edge = torch.zeros(mask.shape, dtype=torch.bool)
    for view, own in ((mask, edge), (mask.T, edge.T)):
        differs = (view[1:] != view[:-1]) & (view[1:] != IGNORE) & (view[:-1] != IGNORE)
        own[1:] |= differs
        own[:-1] |= differs
    return edge


def boundary_f(counts: torch.Tensor) -> torch.Tensor:
    """F-score of added-up `boundary_counts` [..., 4] -> [...]; nan where the masks have no outline of the class.

    Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?"
    """
    predicted, right, in_mask, reached = counts.double().unbind(-1)
    precision, recall = right / predicted.clamp(min=1e-9), reached / in_mask
    return torch.where(in_mask > 0, 2 * precision * recall / (precision + recall).clamp(min=1e-9), float("nan"))


def mask_scores(counts: torch.Tensor, edges: torch.Tensor, palette: Palette) -> dict:
    """mIoU, boundary F-score, pixel accuracy and each class's scores as Estimates.

    counts [N, K, 3] and edges [N, K, 4]: `class_counts` and `boundary_counts` of each image.
    """
    classes = [label for label in palette.labels if not label.ignore]
    counts, edges = counts.double(), edges.double()

    def scores(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        summed = torch.einsum("bn,nkc->bkc", weights, counts)
        each, outlined = iou_of_counts(summed), boundary_f(torch.einsum("bn,nkc->bkc", weights, edges))
        found = {"miou": each.nanmean(1), "boundary_f": outlined.nanmean(1)}
        found["accuracy"] = summed[..., 2].sum(1) / summed[..., 0].sum(1)
        for label in classes:
            found[f"per_class/{label.id}"] = each[:, label.id]
            found[f"per_class_boundary_f/{label.id}"] = outlined[:, label.id]
        return found

    found = bootstrap(scores, rows=len(counts))
    per_class = {kind: {label.name: found.pop(f"{kind}/{label.id}") for label in classes}
                 for kind in ("per_class", "per_class_boundary_f")}  # fmt: skip
    return found | {"images": len(counts)} | per_class


def confidence_bins(probability: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Pixels, right ones and the sum of their probabilities in 15 equal bins of confidence, float64 [BINS, 3].

    probability in [0, 1] of the predicted class, and whether it is the mask's, of the labelled pixels [P].
    """
    place = (probability * BINS).long().clamp(0, BINS - 1)
    values = torch.stack([torch.ones_like(probability), right.float(), probability], 1).double()
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, place, values)


def calibration(bins: torch.Tensor) -> dict:
    """How far the segmenter's confidence is from its accuracy (expected calibration error, arXiv:1706.04599).

    bins: float64 [N, BINS, 3], the `confidence_bins` of each image. The error is an Estimate; the curve is accuracy
    over confidence in each bin that holds pixels.
    """

    def error(weights: torch.Tensor) -> torch.Tensor:
        pixels, right, sure = torch.einsum("bn,nkc->bkc", weights, bins).unbind(-1)
        return (right - sure).abs().sum(1) / pixels.sum(1)

    pixels, right, sure = bins.sum(0)[bins.sum(0)[:, 0] > 0].unbind(-1)
    curve = {"confidence": sure / pixels, "accuracy": right / pixels, "pixels": pixels.long()}
    found = {"expected_calibration_error": bootstrap(error, rows=len(bins))}
    return found | {name: values.tolist() for name, values in curve.items()}


# Distances between the features of two sets of images


def frechet_distance(real: torch.Tensor, synthetic: torch.Tensor) -> float:
    """Between Gaussians fitted to two sets of features, each [N, D]; biased upwards while N is small.

    Heusel et al. 2017, arXiv:1706.08500: an FID where the features are Inception's.
    """
    return float(_frechet(*(_moments(one.double(), torch.ones(len(one)).double()) for one in (real, synthetic))))


def frechet_estimate(real: torch.Tensor, synthetic: torch.Tensor) -> Estimate:
    """The same with 20 to 200 bootstrap draws, as time allows.

    The draws are moved so that their mean is the value: repeated images add a bias of their own.
    """
    real, synthetic = real.double(), synthetic.double()
    few, many = sorted((len(real), len(synthetic)))
    least, most = FRECHET_DRAWS
    draws = max(least, min(most, int(FRECHET_WORK / max(1, many * real.shape[1] * min(few, real.shape[1])))))

    def distances(*blocks: torch.Tensor) -> torch.Tensor:
        pairs = zip(*blocks, strict=True)
        return torch.stack([_frechet(_moments(real, v), _moments(synthetic, w)) for v, w in pairs])

    found = bootstrap(distances, draws, real=len(real), synthetic=len(synthetic))
    return found if few == 1 else found._replace(draws=(found.draws - found.draws.mean() + found.value).clamp(min=0))


def _moments(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D], and R [min(N, D), D] with R'R the covariance, of features [N, D] that are there `weights` times."""
    features, weights = features[weights > 0], weights[weights > 0, None]
    total = weights.sum()
    center = (weights * features).sum(0) / total
    return center, torch.linalg.qr((features - center) * (weights / (total - 1)).sqrt(), mode="r").R


def _frechet(one: tuple, other: tuple) -> torch.Tensor:
    """tr sqrt(R'R S'S) is the sum of the singular values of R S': no root of a singular matrix is needed."""
    (center, root), (far_center, far_root) = one, other
    shared = torch.linalg.svdvals(root @ far_root.T).sum()
    return ((center - far_center) ** 2).sum() + (root**2).sum() + (far_root**2).sum() - 2 * shared


def few_images(count: int, features: int, extractor: str) -> str | None:
    """A warning about a Fréchet distance of too few images, or None."""
    if count >= NEEDED * features:
        return None
    return (
        f"The Fréchet distance is taken between {features} features ({extractor}) of {count} images: below "
        f"{NEEDED * features} images it is mostly bias. Compare it only with one of the same number of images; the "
        "kernel distance has no such bias."
    )


def cubic(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The kernel of KID between features [N, D] and [M, D]: [N, M]."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def cmmd(real: torch.Tensor, synthetic: torch.Tensor) -> Estimate:
    """CMMD of CLIP's image vectors [N, D]: 1000 times the unbiased squared MMD of unit vectors, Gaussian kernel of 10.

    Jayasumana et al. 2024, arXiv:2401.09603; their code keeps the pairs of an image with itself, which adds about
    2 * 1000 * (1 - mean kernel) / N.
    """
    near, far = (features.double() / features.double().norm(dim=1, keepdim=True) for features in (real, synthetic))
    found = kernel_distance(near, far, lambda one, other: torch.exp((one @ other.T - 1) / 100))
    return Estimate(None if found.value is None else 1000 * found.value, 1000 * found.draws)


def kernel_distance(
    real: torch.Tensor,
    synthetic: torch.Tensor,
    kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cubic,
) -> Estimate:
    """Unbiased squared MMD of all images of two sets of features [N, D], at most 5000 each; below 0 by chance.

    Bińkowski et al. 2018, arXiv:1801.01401, with their kernel (x y / D + 1)^3: a KID, with one subset of all images,
    where the features are Inception's. An image is not compared with itself: in its own set however often it was
    drawn, and in the other set if it is there.
    """
    near, far = compared(real, "real"), compared(synthetic, "synthetic")
    within = [kernel(one, one).fill_diagonal_(0) for one in (near, far)]
    across, (rows, columns) = kernel(near, far), _shared(near, far)
    across[rows, columns] = 0

    def distance(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        same = [((x @ k) * x).sum(1) / (x.sum(1) ** 2 - (x**2).sum(1)) for x, k in zip((v, w), within, strict=True)]
        pairs = v.sum(1) * w.sum(1) - (v[:, rows] * w[:, columns]).sum(1)
        return sum(same) - 2 * ((v @ across) * w).sum(1) / pairs

    return bootstrap(distance, real=len(near), synthetic=len(far))


def compared(features: torch.Tensor, name: str) -> torch.Tensor:
    """At most 5000 rows of a set, the same ones each time, float64."""
    if len(features) <= COMPARED:
        return features.double()
    return features[rng.permutation(len(features), "compared", name)[:COMPARED]].double()


def _shared(near: torch.Tensor, far: torch.Tensor) -> tuple[list[int], list[int]]:
    """The rows of the first set, and those of the second, that hold the same image."""
    places: dict[bytes, list[int]] = {}
    for column, row in enumerate(far.numpy()):
        places.setdefault(row.tobytes(), []).append(column)
    pairs = [(number, column) for number, row in enumerate(near.numpy()) for column in places.get(row.tobytes(), ())]
    return [row for row, _ in pairs], [column for _, column in pairs]


def neighborhoods(real: torch.Tensor, synthetic: torch.Tensor) -> dict[str, Estimate]:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797), k = 5, of features [N, D].

    A ball around each image reaches to its 5th neighbor in its own set. Precision: share of the generated images in a
    real ball; density: in how many, over k; recall: share of the real images in a generated ball; coverage: share of
    the real balls that hold a generated image. Draws resample the images that are counted; the balls stay.
    """
    near, far = compared(real, "real"), compared(synthetic, "synthetic")
    radius, far_radius = (torch.cdist(one, one).kthvalue(min(NEIGHBORS + 1, len(one)), 1).values for one in (near, far))
    apart = torch.cdist(near, far)  # [N, M]
    inside = apart < radius[:, None]
    counted = {
        "precision": inside.any(0), "recall": (apart < far_radius).any(1),
        "density": inside.sum(0) / NEIGHBORS, "coverage": apart.min(1).values < radius,
    }  # fmt: skip
    return {name: mean(hits) for name, hits in counted.items()}


# Memorization: are generated images copies of training images?


def memorization(synthetic: torch.Tensor, real: torch.Tensor, train: torch.Tensor) -> dict:
    """How close generated images [N, D] are to training images [T, D], compared with real test images [M, D].

    nearer_than_real: the chance that a generated image is nearer to its nearest training image than a real test image
    is to its own; 0.5: no memorization, near 1: copies (the statistic of Meehan et al. 2020, arXiv:2004.05675).
    """
    (near, rows), (apart, _) = (nearest(one, train) for one in (synthetic, real))
    below = (near[:, None] < apart).double() + 0.5 * (near[:, None] == apart).double()  # ties count half
    closest = torch.argsort(near, stable=True)[:CLOSEST_PAIRS].tolist()
    return {
        "training_images": len(train),
        "nearer_than_real": bootstrap(
            lambda v, w: ((v @ below) * w).sum(1) / below.numel(), synthetic=len(near), real=len(apart)
        ),
        "median_distance": float(near.median()),
        "median_distance_of_real": float(apart.median()),
        "closest": [{"row": row, "training_row": int(rows[row]), "distance": float(near[row])} for row in closest],
        "distances": near.tolist(),
        "distances_of_real": apart.tolist(),
    }


def nearest(features: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance of each row of [N, D] to its nearest of [T, D], and which one that is: [N], [N]."""
    found = [torch.cdist(part, train.double()).min(1) for part in features.double().split(1024)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


# Color

VISIBLE = 2.3  # delta E (CIE 1976) that is just noticed: Mahy, Van Eycken and Oosterlinck 1994, Color Res. Appl. 19(2)


def color_shift(real: Iterable[np.ndarray], synthetic: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean color of generated images less that of real ones, uint8 [H, W, 3] each: L, a, b and their norm delta_e."""
    means = [np.mean([to_lab(image).mean((0, 1)) for image in images], axis=0) for images in (real, synthetic)]
    shift = means[1] - means[0]
    return dict(zip("Lab", map(float, shift), strict=True)) | {"delta_e": float(np.linalg.norm(shift))}


def color_estimate(real: torch.Tensor, synthetic: torch.Tensor, partners: list[int] | None) -> dict[str, Estimate]:
    """The same with intervals, of the mean L*a*b* of each image, [N, 3] and [M, 3].

    partners: of each generated image the real one with the same mask, whose color is compared; none: of all images.
    """

    def shift(apart: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip("Lab", apart.unbind(1), strict=True)) | {"delta_e": apart.norm(dim=1)}

    if partners is not None:
        apart = synthetic - real[partners]
        return bootstrap(lambda weights: shift(weights @ apart / len(apart)), rows=len(apart))
    return bootstrap(
        lambda v, w: shift(w @ synthetic / len(synthetic) - v @ real / len(real)),
        real=len(real), synthetic=len(synthetic),
    )  # fmt: skip
