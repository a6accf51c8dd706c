"""How far apart two sets of features are: Fréchet and kernel distance, precision, recall, density and coverage."""

import torch

from segcn import seeds
from segcn.bootstrap import Estimate, estimate, mean, resamples

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
    return features[seeds.permutation(len(features), "compared", name)[:COMPARED]]


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
