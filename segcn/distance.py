"""How far apart two sets of images are: Fréchet and kernel distance between their features."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

from segcn import seeds
from segcn.errors import UserError

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 50


class _Given(nn.Identity):
    """Lets torchmetrics work on features that were extracted already."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.num_features = features.shape[1]


def frechet_distance(real: torch.Tensor, synthetic: torch.Tensor) -> float:
    """Between Gaussians fitted to two sets of features, each [N, D]; biased upwards while N is small.

    Heusel et al. 2017, arXiv:1706.08500: an FID where the features are Inception's.
    """
    metric = FrechetInceptionDistance(_Given(real))
    metric.update(real.double(), real=True)
    metric.update(synthetic.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: torch.Tensor, synthetic: torch.Tensor) -> tuple[float, float, int]:
    """(mean, standard deviation, images a subset) over seeded random subsets of features [N, D].

    Bińkowski et al. 2018, arXiv:1801.01401: a KID where the features are Inception's.
    """
    subset_size = min(KERNEL_SUBSET_SIZE, len(real), len(synthetic))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it keeps the features, which are here already
        metric = KernelInceptionDistance(_Given(real), subsets=KERNEL_SUBSETS, subset_size=subset_size)
    metric.update(real.double(), real=True)
    metric.update(synthetic.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.seed_of("evaluate", "kernel distance"))
        mean, deviation = metric.compute()
    return float(mean), float(deviation), subset_size


def find_inception(path: str | Path | None = None) -> Path | None:
    """Inception's weights: the file given (UserError if missing), else torch.hub's copy, else None."""
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"{path}: expected Inception's weights ({INCEPTION_WEIGHTS}), found no file")
        return Path(path)
    home = os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")
    stored = Path(home) / "hub" / "checkpoints" / INCEPTION_WEIGHTS
    return stored if stored.is_file() else None


def inception_features(weights: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """image [B, 3, H, W] in [-1, 1] -> [B, 2048], resized to 299 px with antialias, torchmetrics' default."""
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    except ModuleNotFoundError:
        raise UserError(
            f"{weights}: Inception's weights are here, but FID and KID also need: pip install torch-fidelity"
        ) from None
    return lambda image: network(((image + 1) * 127.5).round().clamp(0, 255).byte())[0].flatten(1)
