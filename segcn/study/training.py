"""Segmenters that learn from real and synthetic images mixed in each batch, and what they find in test images."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count

import numpy as np
import torch

from segcn.data.dataset import PairedDataset, to_image, to_uint8
from segcn.data.metadata import Split
from segcn.data.sampler import COUNTED_ROWS, class_pixels, class_weights
from segcn.data.transforms import AUGMENTS, AugmentConfig
from segcn.evaluate.metrics import class_counts, confusion_matrix
from segcn.models.base import pick_device
from segcn.models.segmenter import Segmenter, SegmenterConfig, build_segmenter, fit, predict
from segcn.utils import rng

# As strong for real images as for synthetic ones, whose layouts were moved by affine draws, too: synthetic images
# shall not win by a lack of augmentation.
AUGMENT = replace(AugmentConfig(), scale_min=0.75, scale_max=1.5)
KEPT_DRAWS = 4096  # augmented images of a data set, at most, that stay in memory; of more rows none do


@dataclass
class Mixture:
    """What a segmenter learns from; one of both may be None."""

    real: Split | None
    synthetic: Split | None
    share: float = 0.0  # of the images of a batch, on average, that are synthetic
    weight: float = 1.0  # of a synthetic image's pixels in the loss, 0 to 1
    real_last: float = 0.0  # of the steps, the last ones, without synthetic images, where there are both

    # Of the real (False) and the synthetic images (True), for every segmenter that learns from this mixture:
    draws: dict[bool, "Draws"] = field(init=False)

    def __post_init__(self):
        both = {False: self.real, True: self.synthetic}
        self.draws = {synthetic: Draws(split) for synthetic, split in both.items() if split is not None}


class Draws:
    """The images of a data set, each augmented in a few ways, once: epoch e takes draw e modulo their number.

    As with the latent cache, the draws are the same whatever learns from them; a segmenter's seed orders the rows. Of a
    data set with more rows than can be kept every epoch has draws of its own.
    """

    def __init__(self, split: Split):
        self.split, self.number = split, KEPT_DRAWS // len(split)
        self.kept: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def sample(self, row: int, epoch: int, config: SegmenterConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Image float32 [3, R, R] in [-1, 1] and class ids uint8 [R, R]."""
        place = row, epoch % self.number if self.number else epoch
        key = *place, config.resolution, config.fit
        found = self.kept.get(key)
        if found is None:
            drawn = PairedDataset(self.split, config.resolution, AUGMENT, 0, config.fit).sample(*place)
            found = torch.from_numpy(to_uint8(drawn.image)), drawn.mask.clone()  # a quarter of the size of floats
            if self.number:
                self.kept[key] = found
        return to_image(found[0].permute(2, 0, 1)), found[1]

    def stream(self, synthetic: bool, config: SegmenterConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Epoch after epoch, each in an order of its own."""
        for epoch in count():
            kind = "synthetic" if synthetic else "real"
            order = rng.permutation(len(self.split), "mixing", config.seed, kind, epoch)
            yield from (self.sample(row, epoch, config) for row in order)


def train_mixed(mixture: Mixture, config: SegmenterConfig, log: Callable[[str], None] = print) -> Segmenter:
    """A segmenter after `config.steps` batches of a mixture, whatever it is made of.

    All segmenters that are compared take the same steps with the same number of images in each, under a learning rate
    that falls to zero, with the same augmentation and, of a seed, the same initial weights: those with synthetic
    images see fewer real ones, never more of anything.
    """
    split = mixture.real or mixture.synthetic
    assert split is not None
    segmenter = build_segmenter(split.palette.num_classes, config.width, config.seed).to(pick_device())
    weights = class_weights(class_pixels(split.first(COUNTED_ROWS)))
    losses = fit(segmenter, mixed_batches(mixture, config), weights, config, log)
    segmenter.settings = asdict(config) | {"num_classes": segmenter.num_classes, "last_fall": last_fall(losses)}
    return segmenter


def last_fall(losses: torch.Tensor) -> float:
    """By which share the mean loss fell from the last tenth but one of the steps to the last one: converged is about 0.

    losses [steps].
    """
    tenth = max(1, len(losses) // 10)
    before, last = losses[-2 * tenth : -tenth].mean().item(), losses[-tenth:].mean().item()
    return round(1 - last / before, 4) if before else 0.0


def mixed_batches(
    mixture: Mixture, config: SegmenterConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R], weights [B]) of every step.

    The real images of a seed come in the same order and with the same draws, whatever they are mixed with.
    """
    streams = {synthetic: draws.stream(synthetic, config) for synthetic, draws in mixture.draws.items()}
    mixed = round(config.steps * (1 - mixture.real_last))
    for step in range(config.steps):
        share = mixture.share if step < mixed else 0.0
        which = [synthetic if len(streams) == 2 else next(iter(streams))
                 for synthetic in synthetic_places(step, config.batch_size, share)]  # fmt: skip
        samples = [next(streams[synthetic]) for synthetic in which]
        weights = torch.tensor([mixture.weight if synthetic and len(streams) == 2 else 1.0 for synthetic in which])
        images, masks = zip(*samples, strict=True)
        yield torch.stack(images), torch.stack(masks), weights


def synthetic_places(step: int, batch_size: int, share: float) -> list[bool]:
    """Which places of a batch are synthetic: over the steps exactly `share` of all places."""
    before, after = (int((step + more) * batch_size * share + 1e-6) for more in (0, 1))
    return [place >= batch_size - (after - before) for place in range(batch_size)]


@torch.no_grad()
def count_pixels(segmenter: Segmenter, split: Split) -> np.ndarray:
    """`class_counts` of each test image, int64 [images, K, 3]: pixels in the mask, in the prediction, and in both."""
    settings, found = segmenter.settings, []
    pairs = PairedDataset(split, settings["resolution"], AUGMENTS["none"], 0, settings["fit"])
    for first in range(0, len(pairs), 32):
        samples = [pairs.sample(row, 0) for row in range(first, min(first + 32, len(pairs)))]
        predicted = predict(segmenter, torch.stack([sample.image for sample in samples]))
        for ids, sample in zip(predicted, samples, strict=True):
            found.append(class_counts(confusion_matrix(ids, sample.mask, segmenter.num_classes)))
    return torch.stack(found).numpy()
