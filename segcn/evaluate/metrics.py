"""Mean colors, and how far those of painted images are from those of real ones of the same masks."""

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional as F

from segcn.data.palette import IGNORE, Palette
from segcn.evaluate.bootstrap import Estimate, bootstrap, estimate, mean, resamples
from segcn.utils import rng

# --- color: Mean colors, and how far those of painted images are from those of real ones of the same masks.

TO_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.95030]])
KNEE = 6 / 29  # below it the lightness of dark colors is taken as linear
SRGB = np.arange(256) / 255
LINEAR = np.where(SRGB <= 0.04045, SRGB / 12.92, ((SRGB + 0.055) / 1.055) ** 2.4)


def to_lab(image: np.ndarray) -> np.ndarray:
    """sRGB, uint8 [..., 3] -> CIE 1976 L*a*b* under D65, float64 [..., 3]: L* in [0, 100]; a step of 2 can be seen.

    https://en.wikipedia.org/wiki/CIELAB_color_space
    """
    share = LINEAR[image] @ TO_XYZ.T / TO_XYZ.sum(1)  # of white's X, Y and Z
    x, y, z = np.moveaxis(np.where(share > KNEE**3, np.cbrt(share), share / (3 * KNEE**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def mean_color(images: Iterable[np.ndarray]) -> np.ndarray:
    """Mean L*, a* and b* of images, uint8 [H, W, 3] each: every image counts the same."""
    return np.mean([to_lab(image).mean((0, 1)) for image in images], axis=0)


def color_shift(real: Iterable[np.ndarray], painted: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean color of the painted images less that of the real ones: L, a, b, and their norm delta_e (CIE 1976)."""
    shift = mean_color(painted) - mean_color(real)
    return dict(zip("Lab", map(float, shift), strict=True)) | {"delta_e": float(np.linalg.norm(shift))}


# --- boundary: How well the outlines of the classes agree, in counts that can be added up over images.

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
    """Pixels that two outlines in an image of (height, width) may be apart, at least 1."""
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


# --- copies: Are generated images copies of training images? Each one's nearest, beside that of real images never trained on.

PAIRS = 8  # closest ones that are shown


def nearest(features: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance of each row of [N, D] to its nearest of [T, D], and which one that is: [N], [N]."""
    found = [torch.cdist(part, train.double()).min(1) for part in features.double().split(1024)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def copying(synthetic: torch.Tensor, real: torch.Tensor, train: torch.Tensor) -> dict:
    """How close generated images [N, D] are to training images [T, D], held against real test images [M, D].

    nearer_than_real: the chance that a generated image is nearer to its training image than a real test image is to
    its own; 0.5: as new as these, near 1: copies (the statistic of Meehan et al. 2020, arXiv:2004.05675).
    """
    (near, rows), (apart, _) = (nearest(one, train) for one in (synthetic, real))
    closest = torch.argsort(near, stable=True)[:PAIRS].tolist()
    return {
        "training_images": len(train),
        "nearer_than_real": chance_of_less(near, apart),
        "median_distance": float(near.median()),
        "median_distance_of_real": float(apart.median()),
        "closest": [
            {"row": row, "training_row": int(rows[row]), "distance": float(near[row])} for row in closest
        ],
        "distances": near.tolist(),
        "distances_of_real": apart.tolist(),
    }  # fmt: skip


def chance_of_less(one: torch.Tensor, other: torch.Tensor) -> Estimate:
    """The chance that a number of the first, [N], is below one of the second, [M]; ties count half."""
    below = (one[:, None] < other).double() + 0.5 * (one[:, None] == other).double()
    blocks = zip(resamples(len(one), "synthetic"), resamples(len(other), "real"), strict=True)
    draws = torch.cat([((v @ below) * w).sum(1) for v, w in blocks]) / below.numel()
    return Estimate(float(below.mean()), draws)


# --- distance: How far apart two sets of features are: Fréchet and kernel distance, precision, recall, density and coverage.

FRECHET_WORK = 2e11  # multiplications that its bootstrap may take, about
FRECHET_DRAWS = (20, 200)  # at least, at most
COMPARED = 5000  # images at most for what looks at every pair
NEIGHBOURS = 5
NEEDED = 5  # images a feature, below which a Fréchet distance is mostly bias: 10,000 for Inception's 2048
SIDES = ("real", "synthetic")  # resampled apart from each other


def frechet_distance(real: torch.Tensor, synthetic: torch.Tensor) -> float:
    """Between Gaussians fitted to two sets of features, each [N, D]; biased upwards while N is small.

    Heusel et al. 2017, arXiv:1706.08500: an FID where the features are Inception's.
    """
    return float(_frechet(*(_moments(one.double(), torch.ones(len(one)).double()) for one in (real, synthetic))))


def frechet_estimate(real: torch.Tensor, synthetic: torch.Tensor) -> Estimate:
    """Of two sets of features [N, D], with bootstrap draws.

    They are moved so that their mean is the value: repeated images add a bias of their own.
    """
    sets = real.double(), synthetic.double()
    count, work = min(map(len, sets)), max(map(len, sets)) * real.shape[1] * min(*map(len, sets), real.shape[1])
    least, most = FRECHET_DRAWS
    draws = max(least, min(most, int(FRECHET_WORK / max(1, work))))
    value, found = frechet_distance(real, synthetic), []
    for near, far in zip(*(resamples(len(one), name, draws) for one, name in zip(sets, SIDES, strict=True)),
                         strict=True):  # fmt: skip
        found += [_frechet(_moments(sets[0], v), _moments(sets[1], w)) for v, w in zip(near, far, strict=True)]
    drawn = torch.stack(found)
    return Estimate(value, (drawn - drawn.mean() + value).clamp(min=0) if count > 1 else drawn)


def _moments(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D], and R [min(N, D), D] with R'R the covariance, of features [N, D] that are there `weights` times."""
    features, weights = features[weights > 0], weights[weights > 0, None]
    total = weights.sum()
    centre = (weights * features).sum(0) / total
    rows = (features - centre) * (weights / (total - 1)).sqrt()
    return centre, torch.linalg.qr(rows, mode="r").R


def _frechet(one: tuple, other: tuple) -> torch.Tensor:
    """tr sqrt(R'R S'S) is the sum of the singular values of R S': no root of a singular matrix is needed."""
    (centre, root), (far_centre, far_root) = one, other
    shared = torch.linalg.svdvals(root @ far_root.T).sum()
    return ((centre - far_centre) ** 2).sum() + (root**2).sum() + (far_root**2).sum() - 2 * shared


def kernel_distance(real: torch.Tensor, synthetic: torch.Tensor) -> Estimate:
    """Unbiased squared MMD of all images of two sets of features [N, D], at most 5000 each; below 0 by chance.

    Bińkowski et al. 2018, arXiv:1801.01401, with their kernel (x y / D + 1)^3: a KID, with one subset of all images,
    where the features are Inception's. An image is left out of its own company, in its own set however often it was
    drawn, and in the other if it is there.
    """
    near, far = (compared(one.double(), name) for one, name in zip((real, synthetic), SIDES, strict=True))
    within = [(_kernel(one, one).fill_diagonal_(0)) for one in (near, far)]
    across, (rows, columns) = _kernel(near, far), _shared(near, far)
    across[rows, columns] = 0

    def distance(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        same = [((x @ k) * x).sum(1) / (x.sum(1) ** 2 - (x**2).sum(1)) for x, k in zip((v, w), within, strict=True)]
        pairs = v.sum(1) * w.sum(1) - (v[:, rows] * w[:, columns]).sum(1)
        return sum(same) - 2 * ((v @ across) * w).sum(1) / pairs

    blocks = zip(resamples(len(near), SIDES[0]), resamples(len(far), SIDES[1]), strict=True)
    value = distance(*(torch.ones(1, len(one)).double() for one in (near, far)))[0]
    return estimate(value, torch.cat([distance(v, w) for v, w in blocks]))


def compared(features: torch.Tensor, name: str) -> torch.Tensor:
    """At most 5000 rows of a set, the same ones each time."""
    if len(features) <= COMPARED:
        return features
    return features[rng.permutation(len(features), "compared", name)[:COMPARED]]


def _kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _shared(near: torch.Tensor, far: torch.Tensor) -> tuple[list[int], list[int]]:
    """The rows of the first set, and those of the second, that hold the same image."""
    places: dict[bytes, list[int]] = {}
    for column, row in enumerate(far.numpy()):
        places.setdefault(row.tobytes(), []).append(column)
    pairs = [(number, column) for number, row in enumerate(near.numpy()) for column in places.get(row.tobytes(), ())]
    return [row for row, _ in pairs], [column for _, column in pairs]


def neighbourhoods(real: torch.Tensor, synthetic: torch.Tensor) -> dict[str, Estimate]:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797), k = 5, of features [N, D].

    A ball round each image reaches to its 5th neighbour in its own set. Precision: share of the generated images in a
    real ball; density: in how many, over k; recall: share of the real images in a generated ball; coverage: share of
    the real balls that hold a generated image. Draws resample the images that are counted; the balls stay.
    """
    near, far = (compared(one.double(), name) for one, name in zip((real, synthetic), SIDES, strict=True))
    apart, radius, far_radius = torch.cdist(near, far), _radius(near), _radius(far)
    inside = apart < radius[:, None]  # [N, M]
    counted = {
        "precision": inside.any(0), "recall": (apart < far_radius).any(1),
        "density": inside.sum(0) / NEIGHBOURS, "coverage": apart.min(1).values < radius,
    }  # fmt: skip
    return {name: mean(hits) for name, hits in counted.items()}


def _radius(features: torch.Tensor) -> torch.Tensor:
    """The distance of each row to its 5th neighbour (the last one, where there are fewer), [N]."""
    return torch.cdist(features, features).kthvalue(min(NEIGHBOURS + 1, len(features)), 1).values


def few_images(count: int, features: int, extractor: str) -> str | None:
    """What to say of a Fréchet distance of too few images, or None."""
    if count >= NEEDED * features:
        return None
    return (
        f"The Fréchet distance is taken between {features} features ({extractor}) of {count} images: below "
        f"{NEEDED * features} images it is mostly bias. Compare it only with one of the same number of images; the "
        "kernel distance has no such bias."
    )


# --- faithfulness: Does an image obey its mask? Pixels and outlines that a segmenter finds, counted image by image and added up.

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
