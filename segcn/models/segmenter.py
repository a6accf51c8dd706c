"""The fitting of a segmenter: its settings, the weights of its classes, the loss, and the steps down it."""

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from segcn.data.dataset import PairedDataset
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette
from segcn.data.sampler import COUNTED_ROWS, class_pixels, class_weights
from segcn.data.transforms import AugmentConfig
from segcn.models.base import pick_device
from segcn.utils import io, rng
from segcn.utils.errors import UserError

# --- segmenter_fit: The fitting of a segmenter: its settings, the weights of its classes, the loss, and the steps down it.


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

    batches: `config.steps` of (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R]) and, where images do not count
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
    pixels of each image count: one of weight 0 might as well not be there.
    """
    per_pixel = F.cross_entropy(logits, mask.long(), class_weights, ignore_index=IGNORE, reduction="none")
    labelled = mask != IGNORE
    if weights is None:
        return per_pixel.sum() / labelled.sum().clamp(min=1)
    weights = weights[:, None, None]
    return (per_pixel * weights).sum() / (labelled * weights).sum().clamp(min=1)


@torch.no_grad()
def _undo_weights(segmenter: nn.Module, weights: torch.Tensor) -> None:
    """Divide the classes' probabilities by the weights they were trained with (arXiv:2007.07314).

    The weights make rare classes learn soon but also spill over their boundaries: undone, mIoU gains 0.015.
    """
    shift = torch.where(weights > 0, weights, 1.0).log()
    bias: torch.Tensor = segmenter.get_parameter("head.bias")
    bias -= shift.repeat_interleave(4)  # the pixel shuffle's four places of each class


# --- segmenter: A small segmentation network: trained on real images, it judges whether generated ones obey their masks.

# Colors vary more than when the painter is trained, as generated images are a little off in tone. No affine:
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
        torch.manual_seed(rng.seed_of("segmenter", seed, "weights"))
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
    fit(segmenter, _batches(split, config), class_weights(class_pixels(split.first(COUNTED_ROWS))), config, log)
    segmenter.settings = {
        **asdict(config), "num_classes": segmenter.num_classes, "rows": len(split), "fingerprint": fingerprint
    }  # fmt: skip
    io.commit(output_dir.parent, output_dir.name, lambda folder: write_segmenter(segmenter, split.palette, folder))
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
    wrong = io.problem(folder)
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
        yield from ((epoch, row) for row in rng.permutation(count, "segmenter", config.seed, "rows", epoch))
        epoch += 1


def _fingerprint(split: Split, config: SegmenterConfig) -> str:
    text = json.dumps([split.fingerprint, asdict(config), asdict(AUGMENT)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stands(output_dir: Path, fingerprint: str, log: Callable[[str], None]) -> bool:
    """Whether that very segmenter is there; UserError where replacing it would delete something else."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return False
    if not (output_dir / io.MANIFEST).is_file() or not (output_dir / "model.safetensors").is_file():
        raise UserError(f"{output_dir}: holds something else than a segmenter; choose another folder")
    if io.problem(output_dir):
        log(f"segmenter: {output_dir} {io.problem(output_dir)}; training it again")
        return False
    if json.loads((output_dir / "config.json").read_text())["fingerprint"] != fingerprint:
        log(f"segmenter: {output_dir} was trained on other rows or with other settings; training it again")
        return False
    log(f"segmenter: reused the one in {output_dir}, trained on the same rows with the same settings")
    return True


# --- foreign: A segmentation network of somebody else's: any folder that transformers' AutoModelForSemanticSegmentation opens.

if TYPE_CHECKING:
    from transformers import PreTrainedModel
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # where a folder says nothing
NEVER = -1e4  # logit of an id that the network does not know


class ForeignSegmenter(AnySegmenter):
    """Takes and gives what our own segmenter does: images in [-1, 1], logits of the palette's ids at their size."""

    ids: torch.Tensor
    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(self, model: "PreTrainedModel", ids: list[int], num_classes: int, look: dict, settings: dict):
        super().__init__()
        self.model, self.num_classes, self.settings = model, num_classes, settings
        self.side = look.get("size")
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        for name in IMAGENET:
            self.register_buffer(name, torch.tensor(look[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> logits [B, num_classes, H, W]."""
        logits = F.interpolate(self.model(self._seen(image)).logits, image.shape[-2:], mode="bilinear")
        every = logits.new_full((len(logits), self.num_classes, *logits.shape[2:]), NEVER)
        return every.index_copy(1, self.ids, logits)

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> mean over the places of the encoder's last hidden state [B, D]."""
        hidden = self.model(self._seen(image), output_hidden_states=True).hidden_states[-1]
        return hidden.mean(tuple(range(2, hidden.dim()))) if hidden.dim() == 4 else hidden.mean(1)

    def _seen(self, image: torch.Tensor) -> torch.Tensor:
        if self.side:
            image = F.interpolate(image, self.side, mode="bilinear", antialias=True)
        return ((image + 1) / 2 - self.image_mean) / self.image_std


def open_segmenter(
    folder: str | Path, palette: Palette, resolution: int, fit: str, device: str | None = None
) -> AnySegmenter:
    """Ours, or one of transformers'; UserError where it is neither, or knows another number of classes.

    resolution, fit: how a network of transformers' sees the images; ours remembers that.
    """
    told = _told(Path(folder) / "config.json")
    if told is not None and "model_type" not in told:
        return load_segmenter(folder, device)
    if told is None:
        raise UserError(
            f"--segmenter {folder}: expected a folder with config.json, segcn's cache/segmenter-... or of"
            " AutoModelForSemanticSegmentation.save_pretrained, found none; without the flag one is trained"
        )
    model, look = _load(Path(folder))
    ids = ids_of(palette, model.config.num_labels, folder)
    settings = {"name": f"{told['model_type']} ({Path(folder).absolute().name})", "resolution": resolution, "fit": fit}
    return ForeignSegmenter(model, ids, palette.num_classes, look, settings).eval().to(pick_device(device))


def ids_of(palette: Palette, count: int, folder: str | Path) -> list[int]:
    """The palette's id of each of a network's `count` labels: the same number, or the classes without ignored ones."""
    classes = [label.id for label in palette.labels if not label.ignore]
    if count == palette.num_classes:
        return list(range(count))
    if count == len(classes):
        return sorted(classes)
    expected = " or ".join(str(number) for number in sorted({palette.num_classes, len(classes)}))
    raise UserError(
        f"--segmenter {folder}: expected {expected} labels, as many as palette.json has classes, found {count}; give "
        "one that was trained on these classes, or none: then one is trained on the real images"
    )


def _load(folder: Path) -> tuple["PreTrainedModel", dict]:
    from transformers import AutoModelForSemanticSegmentation

    look = IMAGENET | {name: value for name, value in (_told(folder / "preprocessor_config.json") or {}).items()
                       if name in (*IMAGENET, "size", "do_resize")}  # fmt: skip
    size = look.get("size") if look.get("do_resize", True) else None
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
    try:
        model = AutoModelForSemanticSegmentation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--segmenter {folder}: cannot be opened as a semantic segmenter: {error}") from None
    return model, look | {"size": size}


def _told(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from None
