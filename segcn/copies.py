"""Are generated images copies of training images? Each one's nearest, beside that of real images never trained on."""

import torch

from segcn.bootstrap import Estimate, resamples

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
