"""Segmentation networks: a small one of our own, or any that transformers opens; each can be trained on rows.

They find out whether generated images follow their masks."""

import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, islice, pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from segcn.data.config import SMALL
from segcn.data.dataset import PairedDataset
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette
from segcn.data.sampler import COUNTED_ROWS, class_pixels, class_weights
from segcn.data.transforms import AugmentConfig
from segcn.models.base import encode_mean, folder_digest, load_vae, pick_device, weights_digest
from segcn.utils import io, rng
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS
from segcn.utils.progress import Progress

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import PreTrainedModel

# Colors vary more than in the ControlNet's training, as generated images are a little off in tone. No affine: it costs
# a third of the step, and blurs the boundaries that are to be found.
SEGMENTER_AUGMENT = replace(AugmentConfig.none(), hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
DRAWING = threading.Lock()  # PyTorch draws initial weights and dropout from one generator of the whole process
RATES = {True: 5e-3, False: 3e-4}  # learning rate of ours, and of a network of transformers
PROCESSOR = "preprocessor_config.json"
REWARD_SEGMENTER = "reward_segmenter.json"  # in a ControlNet's folder: which segmenter rewarded its training
REWARD_FOLDER = "reward_segmenter"  # beside it: that segmenter, where it is one of ours
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # where a folder says nothing
SAID_EVERY = 5.0  # seconds at most between two lines of a training: a signal acts there
NEVER = -1e4  # logit of a class that the network does not know


@dataclass(frozen=True)
class SegmenterConfig:
    """What the trained weights depend on, besides the data."""

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 0.0  # peak of the one-cycle schedule; 0: what fits the architecture
    weight_decay: float = 1e-2
    width: int = 32  # channels at half resolution
    resolution: int = 128  # px, the side of the square training images
    seed: int = 0
    fit: str = "crop"  # how images become square: crop, pad or stretch
    architecture: str = SMALL  # or a folder of AutoModelForSemanticSegmentation, with or without weights

    def __post_init__(self):
        object.__setattr__(self, "learning_rate", self.learning_rate or RATES[self.architecture == SMALL])
        if min(self.steps, self.batch_size, self.width, self.resolution) < 1:
            raise UserError(f"segmenter: expected counts and sizes of at least 1, found {self}")

    @property
    def content(self) -> dict[str, Any]:
        """The settings, with the digest of an architecture's folder in place of its path."""
        found = asdict(self)
        if found.pop("architecture") == SMALL:
            return found
        del found["width"]
        return found | {"architecture": folder_digest(_architecture_folder(self.architecture))}


class AnySegmenter(nn.Module, ABC):
    """Ours or somebody else's: images [B, 3, H, W] in [-1, 1] to logits [B, num_classes, H, W]."""

    num_classes: int
    settings: dict[str, Any]  # how it was trained, or how it wants to see: resolution, fit

    @abstractmethod
    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> features that images are compared by [B, D]."""

    @abstractmethod
    def lower(self, amounts: torch.Tensor) -> None:
        """Lower the logit of each class for good, by amounts [num_classes]."""


class Segmenter(AnySegmenter):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) that works at half resolution and below.

    The stem is space-to-depth, the head a pixel shuffle (Shi et al. 2016, arXiv:1609.05158); skips are added,
    as in LinkNet (Chaurasia and Culurciello 2017, arXiv:1707.03718), which halves the decoder's work. On latents
    (`LatentSegmenter`) it works at their resolution: channels C, a cell of 1 in and of the autoencoder's factor out.
    """

    def __init__(self, num_classes: int, width: int, channels: int = 3, cell_in: int = 2, cell_out: int = 2):
        super().__init__()
        self.num_classes, self.width, self.cell_in, self.cell_out = num_classes, width, cell_in, cell_out
        widths = [width, width * 3 // 2, width * 2, width * 3]
        pairs = list(pairwise(widths))
        self.stride = cell_in * 2 ** len(pairs)  # px; the bottleneck's step
        self.stem = _convolution(channels * cell_in**2, width)
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(fine, coarse, stride=2), _convolution(coarse, coarse)) for fine, coarse in pairs
        )
        self.lateral = nn.ModuleList(nn.Conv2d(coarse, fine, 1, bias=False) for fine, coarse in pairs)
        self.up = nn.ModuleList(_convolution(fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(width, cell_out**2 * num_classes, 1)
        self.settings = {}  # how it was trained, as stored in config.json

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1], any size -> logits [B, num_classes, H, W]."""
        height, width = (side * self.cell_out // self.cell_in for side in image.shape[-2:])
        *skips, hidden = self._encode(image)
        for skip, lateral, up in reversed(list(zip(skips, self.lateral, self.up, strict=True))):
            hidden = up(skip + F.interpolate(lateral(hidden), scale_factor=2))
        return F.pixel_shuffle(self.head(hidden), self.cell_out)[..., :height, :width]

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> mean over the bottleneck's places [B, 3 * width]."""
        return self._encode(image)[-1].mean((-2, -1))

    @torch.no_grad()
    def lower(self, amounts: torch.Tensor) -> None:
        """Lower the logit of each class for good, by amounts [num_classes]."""
        assert self.head.bias is not None
        self.head.bias -= amounts.repeat_interleave(self.cell_out**2)  # the pixel shuffle's places of each class

    def _encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states at 1/2 to 1/16 of the size; the last row and column repeat up to the stride."""
        missing_rows, missing_columns = -image.shape[-2] % self.stride, -image.shape[-1] % self.stride
        if missing_rows or missing_columns:
            image = F.pad(image, (0, missing_columns, 0, missing_rows), mode="replicate")
        hidden = [self.stem(F.pixel_unshuffle(image, self.cell_in))]
        for down in self.down:
            hidden.append(down(hidden[-1]))
        return hidden


class LatentSegmenter(AnySegmenter):
    """Looks at scaled latents of an autoencoder, [B, C, h, w]: for a reward without a decoder in between.

    An image is encoded first, by `vae`, which stays the base's: it is not among the weights. None: no images.
    """

    def __init__(self, num_classes: int, width: int, channels: int, factor: int, vae: "AutoencoderKL | None" = None):
        super().__init__()
        self.network = Segmenter(num_classes, width, channels, 1, factor)
        self.num_classes, self.settings, self.encoder = num_classes, {}, (vae,)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1], of whole latent cells -> logits [B, num_classes, H, W]."""
        return self.network(self._encode(image))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> mean over the bottleneck's places [B, 3 * width]."""
        return self.network.features(self._encode(image))

    def lower(self, amounts: torch.Tensor) -> None:
        """Lower the logit of each class for good, by amounts [num_classes]."""
        self.network.lower(amounts)

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        assert self.encoder[0] is not None
        return encode_mean(self.encoder[0], image).float()


def _convolution(fan_in: int, fan_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)
    )


def build_segmenter(
    num_classes: int, width: int = SegmenterConfig.width, seed: int = 0, architecture: str = SMALL
) -> AnySegmenter:
    """A fresh segmenter in evaluation mode whose weights depend on the arguments alone.

    architecture: small, or a folder; where it holds weights these are taken, with another head where its classes are
    not as many. UserError where transformers cannot open it.
    """
    with DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("segmenter", seed, "weights"))
        if architecture == SMALL:
            return Segmenter(num_classes, width).to(memory_format=torch.channels_last).eval()
        return _build_foreign(num_classes, _architecture_folder(architecture))


def load_segmenter(folder: str | Path, device: str | None = None) -> AnySegmenter:
    """Read a folder that `train_segmenter` wrote, in evaluation mode; UserError if it is not complete."""
    folder = Path(folder)
    problem = io.problem(folder)
    if problem:
        raise UserError(
            f"--segmenter {folder}: expected a trained segmenter, but the folder {problem}. Without the flag one is "
            "trained."
        )
    settings = json.loads((folder / "config.json").read_text())
    if "model_type" in settings:  # of transformers; how it was trained is in its config.json
        return open_segmenter(folder, Palette.load(folder / "palette.json"), 0, "", device)
    if "latents" in settings:
        raise UserError(f"--segmenter {folder}: expected one that looks at images, found a reward's, of latents")
    segmenter = build_segmenter(settings["num_classes"], settings["width"])
    segmenter.load_state_dict(load_file(folder / "model.safetensors"))
    segmenter.settings = settings
    return segmenter.to(pick_device(device))


def load_latent_segmenter(
    folder: str | Path, vae: "AutoencoderKL | None", device: str | None = None
) -> LatentSegmenter:
    """Read the folder of a whole one that `write_segmenter` wrote, in evaluation mode."""
    settings = json.loads((Path(folder) / "config.json").read_text())
    channels, factor = settings["latents"]
    segmenter = LatentSegmenter(settings["num_classes"], settings["width"], channels, factor, vae).eval()
    segmenter.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    segmenter.settings = settings
    return segmenter.to(pick_device(device))


def shipped_segmenter(base: str | Path, palette: Palette) -> AnySegmenter | None:
    """The one in a base's folder, where its classes are those of the palette, whatever their colors; else None."""
    folder = Path(base) / "segmenter"
    if not (folder / "config.json").is_file():
        return None
    own = [(label.id, label.name, label.ignore) for label in Palette.load(folder / "palette.json").labels]
    same = own == [(label.id, label.name, label.ignore) for label in palette.labels]
    return load_segmenter(folder) if same else None


def write_segmenter(segmenter: AnySegmenter, palette: Palette, folder: Path) -> None:
    """Write what `load_segmenter` reads into the staging folder of `utils.io.commit`.

    A network of transformers is written as it writes itself, so that it opens there, too.
    """
    if isinstance(segmenter, ForeignSegmenter):
        segmenter.model.config.segcn = segmenter.settings
        segmenter.model.save_pretrained(folder)
        look = {name: getattr(segmenter, name).flatten().tolist() for name in IMAGENET} | {"do_resize": False}
        (folder / PROCESSOR).write_text(json.dumps(look, indent=1) + "\n")
    else:
        weights = {name: tensor.cpu().contiguous() for name, tensor in segmenter.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(segmenter.settings, indent=1) + "\n")
    palette.save(folder / "palette.json")


@torch.no_grad()
def predict(segmenter: AnySegmenter, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """images [N, 3, H, W] in [-1, 1] -> class ids, uint8 [N, H, W] on the CPU."""
    device = next(segmenter.parameters()).device
    segmenter.eval()
    return torch.cat([segmenter(batch.to(device)).argmax(1).byte().cpu() for batch in images.split(batch_size)])


def segmenter_of(
    split: Split,
    settings: SegmenterConfig,
    cache: str | Path | None = None,
    log: Callable[[str], None] = print,
    device: str | None = None,
) -> AnySegmenter:
    """The segmenter of these rows and settings: from `cache` where it has been trained before, else trained now.

    cache: the folder that holds segmenter-KEY, the key a digest of rows and settings; none: outputs/cache. One process
    trains it while others that ask for it wait. device: none: a GPU where there is one.
    """
    folder = shared_folder(cache or OUTPUTS / "cache", split, settings)
    with io.one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        problem = io.problem(folder) if folder.exists() else "is missing"
        if problem is None:
            log(f"segmenter: reused {folder}, trained on the same rows with the same settings")
            return load_segmenter(folder, device)
        if folder.exists():
            log(f"segmenter: {folder} {problem}; training it again")
        return train_segmenter(split, settings, folder, log, device)


def shared_folder(root: str | Path, split: Split, config: SegmenterConfig) -> Path:
    """Where below `root` the segmenter of these rows and settings is kept."""
    return Path(root) / f"segmenter-{_fingerprint(split, config)}"


def reward_record(controlnet: str | Path) -> tuple[Path, dict] | None:
    """The run folder of a ControlNet, and what it says of the segmenter that rewarded its training; None: none did.

    controlnet: the run folder itself, or its checkpoint-N/controlnet. The record is {"weights": digest, "weight": of
    the reward, "folder": --reward_segmenter or None}.
    """
    folder = Path(controlnet).absolute()
    run = folder.parents[1] if re.fullmatch(io.CHECKPOINT, folder.parent.name) else folder
    found = _read_json(run / REWARD_SEGMENTER)
    return None if found is None else (run, found)


def open_rewarding(
    controlnet: str | Path, base: str | Path, palette: Palette, resolution: int, fit: str
) -> AnySegmenter | None:
    """The segmenter that rewarded a ControlNet's training; None where it is not at hand any more, as it was then.

    base: whose autoencoder encodes images for one that looks at latents; resolution, fit: as of `open_segmenter`.
    """
    record = reward_record(controlnet)
    if record is None:
        return None
    for folder in (record[0] / REWARD_FOLDER, record[1].get("folder")):
        if folder and Path(folder).is_dir():
            with suppress(UserError, OSError):
                if "latents" in (_read_json(Path(folder) / "config.json") or {}) and io.problem(Path(folder)) is None:
                    segmenter: AnySegmenter = load_latent_segmenter(folder, load_vae(base, pick_device()))
                else:
                    segmenter = open_segmenter(folder, palette, resolution, fit)
                if weights_digest(segmenter) == record[1]["weights"]:
                    return segmenter
    return None


def _fingerprint(split: Split, config: SegmenterConfig) -> str:
    text = json.dumps([split.fingerprint, config.content, asdict(SEGMENTER_AUGMENT)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_segmenter(
    split: Split,
    config: SegmenterConfig,
    output_dir: str | Path,
    log: Callable[[str], None] = print,
    device: str | None = None,
) -> AnySegmenter:
    """Train on the rows of `split` for a fixed number of steps, store it in the folder `output_dir` and return it.

    The same arguments give the same bytes on the same CPU. A committed folder is replaced, any other one set aside.
    """
    segmenter = build_segmenter(split.palette.num_classes, config.width, config.seed, config.architecture)
    segmenter, weights = segmenter.to(pick_device(device)), class_weights(class_pixels(split.first(COUNTED_ROWS)))
    fit(segmenter, _batches(split, config), weights, config, log)
    found = {"num_classes": segmenter.num_classes, "rows": len(split), "fingerprint": _fingerprint(split, config)}
    segmenter.settings, folder = segmenter.settings | config.content | found, Path(output_dir)
    io.commit(folder.parent, folder.name, lambda staged: write_segmenter(segmenter, split.palette, staged))
    log(f"segmenter: stored in {folder}")
    return segmenter


def _batches(split: Split, config: SegmenterConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R]) of every step, each epoch reordered."""
    pairs = PairedDataset(split, config.resolution, SEGMENTER_AUGMENT, config.seed, config.fit)
    samples = (
        pairs.sample(row, epoch)
        for epoch in count()
        for row in rng.permutation(len(split), "segmenter", config.seed, "rows", epoch)
    )
    for _ in range(config.steps):
        batch = list(islice(samples, config.batch_size))
        yield torch.stack([sample.image for sample in batch]), torch.stack([sample.mask for sample in batch])


def fit(
    segmenter: AnySegmenter,
    batches: Iterable[tuple[torch.Tensor, ...]],
    class_weights: torch.Tensor,
    config: SegmenterConfig,
    log: Callable[[str], None],
    rates: Iterator[float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> int:
    """One optimizer step a batch; the number of steps, of which `first` were made before.

    batches: (image [B, 3, R, R] in [-1, 1], mask uint8 [B, R, R]) and, where images do not count alike, their weights
    [B]; class_weights [K]. rates: the learning rate of each step, which is asked for when the one before is done; the
    training ends with them. None: `config.steps` of a one-cycle schedule, which falls to zero. optimizer: none: a new
    one.
    """
    device = next(segmenter.parameters()).device
    class_weights = class_weights.to(device)
    optimizer = optimizer or build_optimizer(segmenter, config)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = None if rates else cycle(optimizer, config.learning_rate, total_steps=config.steps + 1)
    segmenter.train()
    progress, step = Progress("segmenter: steps", 0 if rates else config.steps, log, SAID_EVERY), first
    every: Iterator[float | None] = rates or repeat(None, config.steps)
    for rate, (image, *labels) in zip(every, batches, strict=False):
        step += 1
        if rate is not None:
            optimizer.param_groups[0].update(lr=rate, betas=(0.9, 0.999))
        image, labels = image.to(device, memory_format=torch.channels_last), [label.to(device) for label in labels]
        loss = segmentation_loss(_logits(segmenter, image, config.seed, step), labels[0], class_weights, *labels[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        progress(step, partial(_said, loss))
    if step > first:
        log(f"segmenter: {step} steps, {_said(loss)}")
    segmenter.lower(log_weights(class_weights))
    segmenter.eval()
    return step


def build_optimizer(segmenter: AnySegmenter, config: SegmenterConfig) -> torch.optim.Optimizer:
    """That of `fit`, which has made no step yet."""
    return torch.optim.AdamW(segmenter.parameters(), config.learning_rate, weight_decay=config.weight_decay)


def _said(loss: torch.Tensor) -> str:
    return f"loss {loss.item():.3f}"


def log_weights(class_weights: torch.Tensor) -> torch.Tensor:
    """By what the logits of a network that learned with class weights are too high, [K]; 0 of a class without weight.

    Class weights make rare classes learn soon, but also spill over their boundaries. Dividing the probabilities by them
    afterwards (logit adjustment, arXiv:2007.07314) raises mIoU by 0.015.
    """
    return torch.where(class_weights > 0, class_weights, 1.0).log()


def _logits(segmenter: AnySegmenter, image: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Those of a training step; what a network of transformers drops is drawn by the seed and the step."""
    if isinstance(segmenter, Segmenter):
        return segmenter(image)
    with DRAWING, torch.random.fork_rng():
        torch.manual_seed(rng.seed_of("segmenter", seed, "dropout", step))
        return segmenter(image)


def segmentation_loss(
    logits: torch.Tensor, mask: torch.Tensor, class_weights: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy, weighted by class, averaged over the labelled pixels (0 where none is).

    logits [B, K, H, W]; mask uint8 [B, H, W], 255 unlabelled; class_weights [K]; weights [B] in [0, 1]: how much the
    pixels of each image count.
    """
    per_pixel = F.cross_entropy(logits, mask.long(), class_weights, ignore_index=IGNORE, reduction="none")
    labelled = mask != IGNORE
    if weights is None:
        return per_pixel.sum() / labelled.sum().clamp(min=1)
    weights = weights[:, None, None]
    return (per_pixel * weights).sum() / (labelled * weights).sum().clamp(min=1)


class ForeignSegmenter(AnySegmenter):
    """A network of transformers with the same interface: images in [-1, 1] in, logits of the palette's classes out.

    ids: the class of each of its labels; look: size, image_mean and image_std of its image processor.
    """

    ids: torch.Tensor
    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(self, model: "PreTrainedModel", ids: list[int], num_classes: int, look: dict, settings: dict):
        super().__init__()
        self.model, self.num_classes, self.settings, self.size = model, num_classes, settings, look.get("size")
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        for name in IMAGENET:
            self.register_buffer(name, torch.tensor(look[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> logits [B, num_classes, H, W]."""
        logits = F.interpolate(self.model(self.normalize(image)).logits, image.shape[-2:], mode="bilinear")
        every = logits.new_full((len(logits), self.num_classes, *logits.shape[2:]), NEVER)
        return every.index_copy(1, self.ids, logits)

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> mean over the places of the encoder's last hidden state [B, D]."""
        hidden = self.model(self.normalize(image), output_hidden_states=True).hidden_states[-1]
        return hidden.mean(tuple(range(2, hidden.dim()))) if hidden.dim() == 4 else hidden.mean(1)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, 3, H, W] in [-1, 1] -> the size and range that the network was trained with."""
        if self.size:
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True)
        return ((image + 1) / 2 - self.image_mean) / self.image_std

    @torch.no_grad()
    def lower(self, amounts: torch.Tensor) -> None:
        """Lower the logit of each class for good, by amounts [num_classes]: in the bias of each head's last layer."""
        for name, part in self.model.named_children():
            ends = [one for one in part.modules() if isinstance(one, nn.Conv2d) and one.out_channels == len(self.ids)]
            if "head" in name and ends and ends[-1].bias is not None:
                ends[-1].bias -= amounts[self.ids]


def _architecture_folder(architecture: str) -> Path:
    if not (Path(architecture) / "config.json").is_file():
        raise UserError(
            f"--segmenter_architecture {architecture}: expected small, or a folder with the config.json of a network of"
            " AutoModelForSemanticSegmentation, such as SegFormer; found none"
        )
    return Path(architecture)


def _build_foreign(num_classes: int, folder: Path) -> ForeignSegmenter:
    """A network of transformers to train: by the folder's config.json, with its weights where it has some."""
    from transformers import AutoConfig, AutoModelForSemanticSegmentation

    given: dict[str, Any] = {"num_labels": num_classes, "local_files_only": True}
    try:
        if any(folder.glob("*.safetensors")):
            model = AutoModelForSemanticSegmentation.from_pretrained(
                folder, use_safetensors=True, ignore_mismatched_sizes=True, **given
            )
        else:
            model = AutoModelForSemanticSegmentation.from_config(AutoConfig.from_pretrained(folder, **given))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"--segmenter_architecture {folder}: cannot be opened as a semantic segmenter: {error}"
        ) from None
    look = _read_look(folder) | {"size": None}  # it learns at the size of the images
    settings = {"name": f"{model.config.model_type} ({folder.absolute().name})"}
    return ForeignSegmenter(model, list(range(num_classes)), num_classes, look, settings).eval()


def _read_look(folder: Path) -> dict[str, Any]:
    """size, image_mean and image_std of a folder's image processor, or what is usual."""
    processor = _read_json(folder / PROCESSOR) or {}
    size = processor.get("size") if processor.get("do_resize", True) else None
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
    return {name: processor.get(name, usual) for name, usual in IMAGENET.items()} | {"size": size}


def open_segmenter(
    folder: str | Path, palette: Palette, resolution: int, fit: str, device: str | None = None
) -> AnySegmenter:
    """Ours, or any folder of AutoModelForSemanticSegmentation.

    resolution, fit: how images are prepared for a network of transformers that was not trained here. UserError where
    the folder is neither, or its number of classes is another one.
    """
    folder = Path(folder)
    stored = _read_json(folder / "config.json")
    if stored is None:
        raise UserError(
            f"--segmenter {folder}: expected a folder with config.json, segcn's cache/segmenter-... or of"
            " AutoModelForSemanticSegmentation.save_pretrained, found none; without the flag one is trained"
        )
    if "model_type" not in stored:
        return load_segmenter(folder, device)
    from transformers import AutoModelForSemanticSegmentation

    try:
        model = AutoModelForSemanticSegmentation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--segmenter {folder}: cannot be opened as a semantic segmenter: {error}") from None
    ids = classes_of_labels(palette, model.config.num_labels, folder)
    name = f"{stored['model_type']} ({folder.absolute().name})"
    settings = stored.get("segcn") or {"name": name, "resolution": resolution, "fit": fit}  # the former: trained here
    segmenter = ForeignSegmenter(model, ids, palette.num_classes, _read_look(folder), settings)
    return segmenter.eval().to(pick_device(device))


def classes_of_labels(palette: Palette, count: int, folder: str | Path) -> list[int]:
    """The class id of each of a network's `count` labels: the same number, or the classes without ignored ones."""
    classes = [label.id for label in palette.labels if not label.ignore]
    if count == palette.num_classes:
        return list(range(count))
    if count == len(classes):
        return sorted(classes)
    expected = " or ".join(str(number) for number in sorted({palette.num_classes, len(classes)}))
    raise UserError(
        f"--segmenter {folder}: expected {expected} labels, as many as palette.json has classes, found {count}. Give "
        "one that was trained on these classes, or none: then one is trained on the real images."
    )


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from None
