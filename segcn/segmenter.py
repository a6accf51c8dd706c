"""A small segmentation network: trained on real images, it judges whether generated ones obey their masks."""

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from segcn import checkpoint, seeds
from segcn.augment import AugmentConfig
from segcn.dataset import PairedDataset
from segcn.devices import pick_device
from segcn.errors import UserError
from segcn.labels import Palette
from segcn.records import Split
from segcn.segmenter_fit import SegmenterConfig, class_weights, fit

# Colours vary more than when the painter is trained, as generated pictures are a little off in tone. No affine:
# it costs a third of the step, and blurs the boundaries that are to be judged.
AUGMENT = replace(AugmentConfig.none(), hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
BUILDING = threading.Lock()  # PyTorch draws initial weights from one generator of the whole process


class AnySegmenter(nn.Module, ABC):
    """Ours or somebody else's: images [B, 3, H, W] in [-1, 1] to logits [B, num_classes, H, W]."""

    num_classes: int
    settings: dict[str, Any]  # how it was trained, or how it wants to see: resolution, fit

    @abstractmethod
    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> what tells images apart [B, D]."""


class Segmenter(AnySegmenter):
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
        self.settings = {}  # how it was trained, as stored in config.json

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
    with BUILDING, torch.random.fork_rng(devices=[]):
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
    fit(segmenter, _batches(split, config), class_weights(split), config, log)
    segmenter.settings = {
        **asdict(config), "num_classes": segmenter.num_classes, "rows": len(split), "fingerprint": fingerprint
    }  # fmt: skip
    checkpoint.commit(
        output_dir.parent, output_dir.name, lambda folder: write_segmenter(segmenter, split.palette, folder)
    )
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
        raise UserError(
            f"--segmenter {folder}: expected a trained segmenter, but the folder {wrong}; without the flag one will be"
        )
    settings = json.loads((folder / "config.json").read_text())
    segmenter = build_segmenter(settings["num_classes"], settings["width"])
    segmenter.load_state_dict(load_file(folder / "model.safetensors"))
    segmenter.settings = settings
    return segmenter.to(pick_device(device))


def write_segmenter(segmenter: Segmenter, palette: Palette, folder: Path) -> None:
    """Write what `load_segmenter` reads, but for the manifest of `checkpoint.commit`."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in segmenter.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(segmenter.settings, indent=1) + "\n")
    palette.save(folder / "palette.json")


@torch.no_grad()
def predict(segmenter: Segmenter, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """images [N, 3, H, W] in [-1, 1] -> class ids, uint8 [N, H, W] on the CPU."""
    device = next(segmenter.parameters()).device
    segmenter.eval()
    ids = [segmenter(batch.to(device)).argmax(1).byte().cpu() for batch in images.split(batch_size)]
    return torch.cat(ids)


def _convolution(fan_in: int, fan_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)
    )


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
