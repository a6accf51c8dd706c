"""Segmenters that learn from real and synthetic images under one rule, and what they find in images."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.optim import Optimizer

from segcn.data.dataset import PairedDataset, to_image, to_uint8
from segcn.data.metadata import Split
from segcn.data.sampler import COUNTED_ROWS, class_pixels, class_weights
from segcn.data.transforms import AUGMENTS, AugmentConfig
from segcn.evaluate.metrics import class_counts, confusion_matrix, iou_of_counts
from segcn.models.base import pick_device
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, build_optimizer, build_segmenter, fit, log_weights
from segcn.utils import rng

KEPT_DRAWS = 4096  # augmented images of a data set, at most, that stay in memory; of more rows none do
WARM = 50  # steps in which the learning rate rises
COOLED = 4  # the last of so many parts of the steps, in which it falls to zero
BETTER = 0.001  # mIoU, by which a new best must be better
ROUNDING = 1e-6  # of a number of images


class Rule(NamedTuple):
    """When a training that has no set length is at its plateau.

    No best is taken as the last before as many steps again: slow learning is given more time, as early stopping does
    where patience grows (Prechelt 1998, doi:10.1007/3-540-49430-8_3).
    """

    every: int  # steps between two looks at the validation rows
    patience: int  # looks without a new best, at least
    longer: float = 2.0  # steps in all, as a multiple of those to the best


class Draws:
    """The images of a data set, each augmented in a few ways, once: epoch e takes draw e modulo their number.

    As with the latent cache, the draws are the same whatever learns from them; a segmenter's seed orders the rows. Of a
    data set with more rows than can be kept every epoch has draws of its own.
    """

    def __init__(self, split: Split, augment: AugmentConfig = AUGMENTS["none"]):
        self.split, self.augment, self.number = split, augment, KEPT_DRAWS // len(split)
        self.kept: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def sample(self, row: int, epoch: int, config: SegmenterConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Image float32 [3, R, R] in [-1, 1] and class ids uint8 [R, R]."""
        place = row, 0 if self.augment.still else epoch % self.number if self.number else epoch
        key = *place, config.resolution, config.fit
        found = self.kept.get(key)
        if found is None:
            drawn = PairedDataset(self.split, config.resolution, self.augment, 0, config.fit).sample(*place)
            found = torch.from_numpy(to_uint8(drawn.image)), drawn.mask.clone()  # a quarter of the size of floats
            if self.number:
                self.kept[key] = found
        return to_image(found[0].permute(2, 0, 1)), found[1]

    def stream(self, kind: str, config: SegmenterConfig, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Epoch after epoch, each in an order of its own, from the image `first` on."""
        begun, left = divmod(first, len(self.split))
        for epoch in count(begun):
            order = rng.permutation(len(self.split), "mixing", config.seed, kind, epoch)
            yield from (self.sample(row, epoch, config) for row in order[left if epoch == begun else 0 :])


@dataclass
class Mixture:
    """What segmenters learn from; one of both may be None. They share its augmented images."""

    real: Draws | None
    synthetic: Draws | None
    ratio: float = 1.0  # synthetic images for each real one, where there are both

    @property
    def share(self) -> float:
        """Of the synthetic images, in [0, 1]."""
        return self.ratio / (1 + self.ratio) if self.real and self.synthetic else float(not self.real)

    @cached_property
    def class_weights(self) -> torch.Tensor:
        """Of the real rows where there are some, float32 [K]."""
        draws = self.real or self.synthetic
        assert draws
        return class_weights(class_pixels(draws.split.first(COUNTED_ROWS)))

    def batches(self, config: SegmenterConfig, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R]) without end, from the batch `first` on.

        The real images of a seed come in the same order and with the same draws, whatever they are mixed with.
        """
        synthetic = int(first * config.batch_size * self.share + ROUNDING)
        begun = {"real": first * config.batch_size - synthetic, "synthetic": synthetic}
        streams = [draws.stream(kind, config, begun[kind]) if draws else iter(())
                   for kind, draws in (("real", self.real), ("synthetic", self.synthetic))]  # fmt: skip
        for step in count(first):
            places = synthetic_places(step, config.batch_size, self.share)
            images, masks = zip(*(next(streams[place]) for place in places), strict=True)
            yield torch.stack(images), torch.stack(masks)


def synthetic_places(step: int, batch_size: int, share: float) -> list[bool]:
    """Which places of a batch are synthetic: over the steps exactly `share` of all places."""
    before, after = (int((step + more) * batch_size * share + ROUNDING) for more in (0, 1))
    return [place >= batch_size - (after - before) for place in range(batch_size)]


def train_arm(
    mixture: Mixture,
    config: SegmenterConfig,
    validation: Draws,
    rule: Rule,
    lengths: Sequence[int | None] = (None,),
    start: AnySegmenter | None = None,
    log: Callable[[str], None] = print,
) -> list[AnySegmenter]:
    """Segmenters that learned from a mixture for each of some numbers of steps, the fewest first.

    None: until the plateau of the rule, and what follows. They are one training: a shorter one parts from it where its
    learning rate begins to fall, and has the same weights as if trained alone. start: what it begins with, and changes;
    none: the initial weights of the seed. `settings` of each hold steps_taken and validation_miou.
    """
    classes = validation.split.palette.num_classes
    segmenter = start or build_segmenter(classes, config.width, config.seed, config.architecture)
    segmenter.to(pick_device())
    optimizer = build_optimizer(segmenter, config)
    shift, finished = log_weights(mixture.class_weights), list[AnySegmenter]()

    def finish(network: AnySegmenter, optimizer: Optimizer, rates: Iterator[float], first: int = 0) -> None:
        batches, weights = mixture.batches(config, first), mixture.class_weights
        taken = fit(network, batches, weights, config, log, rates, optimizer, first)
        network.settings |= config.content | {"num_classes": classes, "steps_taken": taken}
        network.settings["validation_miou"] = mean_iou(count_pixels(network, validation, config))
        finished.append(network)

    def part(held: int, length: int) -> None:
        network, rates = deepcopy(segmenter), learning_rates(config, rule, length)
        own = build_optimizer(network, config)
        own.load_state_dict(deepcopy(optimizer.state_dict()))
        finish(network, own, islice(rates, held, None), held)

    def parting() -> Iterator[float]:
        *shorter, longest = lengths
        held = [(length - length // COOLED, length) for length in shorter if length is not None]
        look = lambda: mean_iou(count_pixels(segmenter, validation, config, shift))  # noqa: E731
        for step, rate in enumerate(learning_rates(config, rule, longest, look)):
            for place in held:
                if place[0] == step:
                    part(*place)
            yield rate

    finish(segmenter, optimizer, parting())
    return finished


def learning_rates(
    config: SegmenterConfig, rule: Rule, steps: int | None, look: Callable[[], float] = float
) -> Iterator[float]:
    """The learning rate of each step: it rises, stays, and falls to zero over the last quarter of the steps.

    So the length need not be known while it stays (Hägele et al. 2024, arXiv:2405.18392): until the validation mIoU,
    which `look` returns, has had no new best for a while, or for `config.steps` at most. steps: the whole length, where
    it is set; then nobody looks.
    """
    best, reached, step = -1.0, 0, 0
    held = config.steps if steps is None else steps - steps // COOLED
    while step < held and (steps or step < max(reached + rule.patience * rule.every, rule.longer * reached)):
        yield config.learning_rate * min(1.0, (step + 1) / WARM)
        step += 1
        if steps is None and step % rule.every == 0:
            score = look()
            best, reached = (score, step) if score > best + BETTER else (best, reached)
    falling = step // (COOLED - 1) if steps is None else steps - held
    yield from (config.learning_rate * left / (falling + 1) for left in range(falling, 0, -1))


def mean_iou(counts: np.ndarray) -> float:
    """The mIoU of `class_counts` of images, [N, K, 3], over the classes that the masks hold; 0 where none is there."""
    return round(float(iou_of_counts(torch.from_numpy(counts.sum(0))).nanmean().nan_to_num()), 5)


@torch.no_grad()
def count_pixels(
    segmenter: AnySegmenter, draws: Draws, config: SegmenterConfig, shift: torch.Tensor | None = None
) -> np.ndarray:
    """`class_counts` of each image, int64 [images, K, 3]: pixels in the mask, in the prediction, and in both.

    shift: taken off the logits, [K]. A segmenter that is in training goes on training.
    """
    training, device, found = segmenter.training, next(segmenter.parameters()).device, []
    lower = 0.0 if shift is None else shift.to(device)[:, None, None]
    segmenter.eval()
    for first in range(0, len(draws.split), 32):
        rows = range(first, min(first + 32, len(draws.split)))
        images, masks = zip(*(draws.sample(row, 0, config) for row in rows), strict=True)
        predicted = (segmenter(torch.stack(images).to(device)) - lower).argmax(1).byte().cpu()
        found += [class_counts(confusion_matrix(*pair, segmenter.num_classes))
                  for pair in zip(predicted, masks, strict=True)]  # fmt: skip
    segmenter.train(training)
    return torch.stack(found).numpy()
