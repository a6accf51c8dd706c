"""The fitting of a segmenter: its settings, the weights of its classes, the loss, and the steps down it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from segcn.errors import UserError
from segcn.labels import IGNORE
from segcn.masks import read_mask
from segcn.records import Split

COUNTED_ROWS = 1000  # masks read for the class frequencies


@dataclass(frozen=True)
class SegmenterConfig:
    """What the trained weights depend on, besides the data."""

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 5e-3  # peak of the one-cycle schedule
    weight_decay: float = 1e-2
    width: int = 32  # channels at half resolution
    resolution: int = 128  # px, the side of the square training images
    seed: int = 0
    fit: str = "crop"  # how images become square: crop, pad or stretch

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.width, self.resolution) < 1:
            raise UserError(f"segmenter: expected counts and sizes of at least 1, found {self}")


def fit(
    segmenter: nn.Module,
    batches: Iterable[tuple[torch.Tensor, ...]],
    class_weights: torch.Tensor,
    config: SegmenterConfig,
    log: Callable[[str], None],
) -> torch.Tensor:
    """One optimizer step a batch, under a schedule that ends at the last one; then the class weights are undone.

    Returns the loss of each step.

    batches: `config.steps` of (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R]) and, where pictures do not count
    alike, of their weights [B] too; class_weights [K].
    """
    device = next(segmenter.parameters()).device
    class_weights = class_weights.to(device)
    optimizer = torch.optim.AdamW(segmenter.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    segmenter.train()
    losses = []
    for step, (image, *labels) in enumerate(batches, start=1):
        image, labels = image.to(device, memory_format=torch.channels_last), [label.to(device) for label in labels]
        loss = segmentation_loss(segmenter(image), labels[0], class_weights, *labels[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 25 == 0 or step == config.steps:
            log(f"segmenter: step {step}/{config.steps}, loss {loss.item():.3f}")
    _undo_weights(segmenter, class_weights)
    segmenter.eval()
    return torch.stack(losses).cpu()


def segmentation_loss(
    logits: torch.Tensor, mask: torch.Tensor, class_weights: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy, weighted by class, averaged over the labelled pixels (0 where none is).

    logits [B, K, H, W]; mask uint8 [B, H, W], 255 unlabelled; class_weights [K]; weights [B] in [0, 1], how much the
    pixels of each picture count: one of weight 0 might as well not be there.
    """
    per_pixel = F.cross_entropy(logits, mask.long(), class_weights, ignore_index=IGNORE, reduction="none")
    labelled = mask != IGNORE
    if weights is None:
        return per_pixel.sum() / labelled.sum().clamp(min=1)
    weights = weights[:, None, None]
    return (per_pixel * weights).sum() / (labelled * weights).sum().clamp(min=1)


def class_weights(split: Split) -> torch.Tensor:
    """1 / sqrt(share of the pixels) of every class, [K], scaled to average 1 over the pixels; absent: 0."""
    counts = torch.zeros(256, dtype=torch.long)
    for record in split.records[:COUNTED_ROWS]:
        mask = torch.from_numpy(read_mask(record.mask, split.palette))
        counts += torch.bincount(mask.flatten(), minlength=256)
    share = counts[: split.palette.num_classes] / counts[:IGNORE].sum().clamp(min=1)
    weights = torch.where(share > 0, share.rsqrt(), 0.0)
    return weights / (weights * share).sum().clamp(min=1e-12)


@torch.no_grad()
def _undo_weights(segmenter: nn.Module, weights: torch.Tensor) -> None:
    """Divide the classes' probabilities by the weights they were trained with (arXiv:2007.07314).

    The weights make rare classes learn soon but also spill over their boundaries: undone, mIoU gains 0.015.
    """
    shift = torch.where(weights > 0, weights, 1.0).log()
    bias: torch.Tensor = segmenter.get_parameter("head.bias")
    bias -= shift.repeat_interleave(4)  # the pixel shuffle's four places of each class
