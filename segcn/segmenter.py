"""A small segmentation network: trained on real images, it judges whether generated ones obey their masks."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from segcn import checkpoint, seeds
from segcn.augment import AugmentConfig
from segcn.dataset import PairedDataset
from segcn.devices import pick_device
from segcn.errors import UserError
from segcn.labels import IGNORE
from segcn.masks import read_mask
from segcn.records import Split

# Colours vary more than when the painter is trained, as generated pictures are a little off in tone. No affine:
# it costs a third of the step, and blurs the boundaries that are to be judged.
AUGMENT = replace(AugmentConfig.none(), hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
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


class Segmenter(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) that works at half resolution and below.

    The stem is space-to-depth, the head a pixel shuffle (Shi et al. 2016, arXiv:1609.05158); skips are added,
    as in LinkNet (Chaurasia and Culurciello 2017, arXiv:1707.03718), which halves the decoder's work.
    """

    stride = 16  # px; the bottleneck's step

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes, self.width = num_classes, width
        widths = [width, width * 3 // 2, width * 2, width * 3]
        pairs = list(pairwise(widths))
        self.stem = _convolution(12, width)
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(fine, coarse, stride=2), _convolution(coarse, coarse)) for fine, coarse in pairs
        )
        self.lateral = nn.ModuleList(nn.Conv2d(coarse, fine, 1, bias=False) for fine, coarse in pairs)
        self.up = nn.ModuleList(_convolution(fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(width, 4 * num_classes, 1)
        self.settings: dict = {}  # how it was trained, as stored in config.json

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1], any size -> logits [B, num_classes, H, W]."""
        height, width = image.shape[-2:]
        *skips, hidden = self._encode(image)
        for skip, lateral, up in reversed(list(zip(skips, self.lateral, self.up, strict=True))):
            hidden = up(skip + F.interpolate(lateral(hidden), scale_factor=2))
        return F.pixel_shuffle(self.head(hidden), 2)[..., :height, :width]

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> mean over the bottleneck's places [B, 3 * width]."""
        return self._encode(image)[-1].mean((-2, -1))

    def _encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states at 1/2 to 1/16 of the size; the last row and column repeat up to the stride."""
        missing_rows, missing_columns = (-image.shape[-2] % self.stride, -image.shape[-1] % self.stride)
        if missing_rows or missing_columns:
            image = F.pad(image, (0, missing_columns, 0, missing_rows), mode="replicate")
        hidden = [self.stem(F.pixel_unshuffle(image, 2))]
        for down in self.down:
            hidden.append(down(hidden[-1]))
        return hidden


def build_segmenter(num_classes: int, width: int = SegmenterConfig.width, seed: int = 0) -> Segmenter:
    """A fresh segmenter in evaluation mode whose weights depend on the arguments alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.seed_of("segmenter", seed, "weights"))
        return Segmenter(num_classes, width).to(memory_format=torch.channels_last).eval()


def train_segmenter(
    split: Split,
    config: SegmenterConfig,
    output_dir: str | Path,
    log: Callable[[str], None] = print,
    device: str | None = None,
) -> Segmenter:
    """Train on the rows of `split` for a fixed number of steps, store it in `output_dir` and return it.

    A finished one of the same rows and settings is reused, another one replaced; `log` is told which. The
    same arguments give the same bytes on the same CPU; `device` None is a GPU where there is one. UserError if
    `output_dir` holds something else.
    """
    output_dir, fingerprint = Path(output_dir), _fingerprint(split, config)
    if _stands(output_dir, fingerprint, log):
        return load_segmenter(output_dir, device)
    segmenter = build_segmenter(split.palette.num_classes, config.width, config.seed).to(pick_device(device))
    _fit(segmenter, split, config, log)
    segmenter.settings = {
        **asdict(config), "num_classes": segmenter.num_classes, "rows": len(split), "fingerprint": fingerprint
    }  # fmt: skip
    checkpoint.commit(output_dir.parent, output_dir.name, lambda folder: _write(segmenter, split, folder))
    log(f"segmenter: stored in {output_dir}")
    return segmenter


def shared_folder(root: str | Path, split: Split, config: SegmenterConfig) -> Path:
    """The folder below `root` where the same rows and settings find each other's segmenter."""
    return Path(root) / f"segmenter-{_fingerprint(split, config)}"


def load_segmenter(folder: str | Path, device: str | None = None) -> Segmenter:
    """Read a folder that `train_segmenter` wrote, in evaluation mode; UserError if it is not whole.

    device: none: a GPU where there is one.
    """
    folder = Path(folder)
    wrong = checkpoint.problem(folder)
    if wrong:
        raise UserError(f"{folder}: expected a trained segmenter, but the folder {wrong}; train it again")
    settings = json.loads((folder / "config.json").read_text())
    segmenter = build_segmenter(settings["num_classes"], settings["width"])
    segmenter.load_state_dict(load_file(folder / "model.safetensors"))
    segmenter.settings = settings
    return segmenter.to(pick_device(device))


@torch.no_grad()
def predict(segmenter: Segmenter, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """images [N, 3, H, W] in [-1, 1] -> class ids, uint8 [N, H, W] on the CPU."""
    device = segmenter.head.weight.device
    segmenter.eval()
    ids = [segmenter(batch.to(device)).argmax(1).byte().cpu() for batch in images.split(batch_size)]
    return torch.cat(ids)


def segmentation_loss(logits: torch.Tensor, mask: torch.Tensor, class_weights: torch.Tensor) -> torch.Tensor:
    """Cross entropy, weighted by class, averaged over the labelled pixels (0 where none is).

    logits [B, K, H, W]; mask uint8 [B, H, W], 255 unlabelled; class_weights [K].
    """
    per_pixel = F.cross_entropy(logits, mask.long(), class_weights, ignore_index=IGNORE, reduction="none")
    return per_pixel.sum() / (mask != IGNORE).sum().clamp(min=1)


def class_weights(split: Split) -> torch.Tensor:
    """1 / sqrt(share of the pixels) of every class, [K], scaled to average 1 over the pixels; absent: 0."""
    counts = torch.zeros(256, dtype=torch.long)
    for record in split.records[:COUNTED_ROWS]:
        mask = torch.from_numpy(read_mask(record.mask, split.palette))
        counts += torch.bincount(mask.flatten(), minlength=256)
    share = counts[: split.palette.num_classes] / counts[:IGNORE].sum().clamp(min=1)
    weights = torch.where(share > 0, share.rsqrt(), 0.0)
    return weights / (weights * share).sum().clamp(min=1e-12)


def _convolution(fan_in: int, fan_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)
    )


def _fit(segmenter: Segmenter, split: Split, config: SegmenterConfig, log: Callable[[str], None]) -> None:
    device = segmenter.head.weight.device
    weights = class_weights(split).to(device)
    optimizer = torch.optim.AdamW(segmenter.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    segmenter.train()
    for step, (image, mask) in enumerate(_batches(split, config), start=1):
        image, mask = image.to(device, memory_format=torch.channels_last), mask.to(device)
        loss = segmentation_loss(segmenter(image), mask, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0 or step == config.steps:
            log(f"segmenter: step {step}/{config.steps}, loss {loss.item():.3f}")
    _undo_weights(segmenter, weights)
    segmenter.eval()


@torch.no_grad()
def _undo_weights(segmenter: Segmenter, weights: torch.Tensor) -> None:
    """Divide the classes' probabilities by the weights they were trained with (arXiv:2007.07314).

    The weights make rare classes learn soon but also spill over their boundaries: undone, mIoU gains 0.015.
    """
    shift = torch.where(weights > 0, weights, 1.0).log()
    segmenter.head.bias -= shift.repeat_interleave(4)  # the pixel shuffle's four places of each class


def _batches(split: Split, config: SegmenterConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R]) of every step, each epoch reordered."""
    pairs = PairedDataset(split, config.resolution, AUGMENT, config.seed, config.fit)
    samples = (pairs.sample(row, epoch) for epoch, row in _rows(len(split), config))
    for _ in range(config.steps):
        batch = [next(samples) for _ in range(config.batch_size)]
        yield torch.stack([sample.image for sample in batch]), torch.stack([sample.mask for sample in batch])


def _rows(count: int, config: SegmenterConfig) -> Iterator[tuple[int, int]]:
    epoch = 0
    while True:
        yield from ((epoch, row) for row in seeds.permutation(count, "segmenter", config.seed, "rows", epoch))
        epoch += 1


def _fingerprint(split: Split, config: SegmenterConfig) -> str:
    text = json.dumps([split.fingerprint, asdict(config), asdict(AUGMENT)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stands(output_dir: Path, fingerprint: str, log: Callable[[str], None]) -> bool:
    """Whether that very segmenter is there; UserError where replacing it would delete something else."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return False
    if not (output_dir / checkpoint.MANIFEST).is_file() or not (output_dir / "model.safetensors").is_file():
        raise UserError(f"{output_dir}: holds something else than a segmenter; choose another folder")
    if checkpoint.problem(output_dir):
        log(f"segmenter: {output_dir} {checkpoint.problem(output_dir)}; training it again")
        return False
    if json.loads((output_dir / "config.json").read_text())["fingerprint"] != fingerprint:
        log(f"segmenter: {output_dir} was trained on other rows or with other settings; training it again")
        return False
    log(f"segmenter: reused the one in {output_dir}, trained on the same rows with the same settings")
    return True


def _write(segmenter: Segmenter, split: Split, folder: Path) -> None:
    weights = {name: tensor.cpu().contiguous() for name, tensor in segmenter.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(segmenter.settings, indent=1) + "\n")
    split.palette.save(folder / "palette.json")
