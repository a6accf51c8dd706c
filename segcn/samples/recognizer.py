"""A small network that recognizes what only captions hold (season, time of day or style): is it in the image?"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from segcn.data.captions import SEASONS, TIMES
from segcn.data.metadata import Split, read_image
from segcn.models.base import weights_digest
from segcn.models.features import Reader
from segcn.samples.base_model.training import Learning, to_pixels
from segcn.samples.earth import STYLES
from segcn.samples.echo import PHASES, QUALITIES, VIEWS
from segcn.samples.writer import RECORD
from segcn.utils import rng

Heads = dict[str, tuple[str, ...]]  # what is recognized: the words of which each caption holds one
OF_LANDSCAPES: Heads = {"season": SEASONS, "time of day": tuple(time.removeprefix("at ") for time in TIMES.values())}
OF_EARTH: Heads = {"style": tuple(start for _, start in STYLES.values())}
OF_ECHO: Heads = {"view": VIEWS, "phase": PHASES, "quality": tuple(f"{grade} image quality" for grade in QUALITIES)}


@dataclass(frozen=True)
class RecognizerRecipe:
    """How a recognizer is trained."""

    steps: int = 300  # optimizer steps
    batch_size: int = 32
    learning_rate: float = 3e-3  # peak, after a warm-up of 100 steps and before a cosine to zero
    width: int = 16  # channels after the first convolution
    seed: int = 0  # of weights and order of rows


class Recognizer(nn.Module):
    """Works at half size: four convolutions that halve, one more, the mean over all places, a layer for each head."""

    def __init__(self, heads: Heads, width: int):
        super().__init__()
        self.heads = heads
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        strided = [
            nn.Sequential(nn.Conv2d(fine, coarse, 3, 2, 1), nn.BatchNorm2d(coarse), nn.ReLU())
            for fine, coarse in pairwise(widths)
        ]
        self.body = nn.Sequential(*strided, nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.ReLU())
        self.last = nn.ModuleList(nn.Linear(widths[-1], len(words)) for words in heads.values())

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> of each head the logits of its words, [B, W]."""
        hidden = self.body(F.avg_pool2d(image, 2)).mean((-2, -1))  # [B, D]
        return [layer(hidden) for layer in self.last]


def words_of(caption: str, heads: Heads) -> list[int]:
    """The number of the word that the caption holds, for each head."""
    return [next(number for number, word in enumerate(words) if word in caption) for words in heads.values()]


def train_recognizer(
    split: Split, heads: Heads, folder: Path, recipe: RecognizerRecipe = RecognizerRecipe(),
    log: Callable[[str], None] = print,
) -> Recognizer:  # fmt: skip
    """Train on the images and captions of a split and return it for use; one that was trained so before is reused."""
    images, wanted = read_images(split), torch.tensor([words_of(one.caption, heads) for one in split.records])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("recogniser", "weights", recipe.seed))
        model = Recognizer(heads, recipe.width).to(memory_format=torch.channels_last)
    key = hashlib.sha256(json.dumps([split.fingerprint, heads, asdict(recipe)]).encode()).hexdigest()[:16]
    learning = Learning("recognizer", model, recipe, folder / key, log)
    for step in learning.steps():
        generator = rng.generator("recogniser", recipe.seed, step)
        rows = torch.randint(len(split), (recipe.batch_size,), generator=generator)
        batch = to_pixels(images[rows])
        logits = model(batch.flip(3) if step % 2 else batch)
        losses = (F.cross_entropy(one, wanted[rows, head]) for head, one in enumerate(logits))
        learning.descend(sum(losses, start=torch.tensor(0.0)))
    return model.eval()


def read_images(split: Split) -> torch.Tensor:
    """All images of a split, uint8 [N, H, W, 3]; they have one size."""
    return torch.from_numpy(np.stack([read_image(record.image) for record in split.records]))


@torch.no_grad()
def recognized(split: Split, recognizer: Recognizer) -> dict[str, float]:
    """The share of the images in which each head finds the word of the caption."""
    wanted = torch.tensor([words_of(record.caption, recognizer.heads) for record in split.records])  # [N, heads]
    found = [torch.stack([logits.argmax(1) for logits in recognizer(to_pixels(images))], dim=1)
             for images in read_images(split).split(64)]  # fmt: skip
    return dict(zip(recognizer.heads, (torch.cat(found) == wanted).float().mean(0).tolist(), strict=True))


def caption_reader(dataset: Path, train: Split, cache: Path, log: Callable[[str], None] = print) -> Reader | None:
    """1 where an image shows what its caption says and 0 where it does not, for each head; None but for sample sets.

    The recognizer is trained on the rows of `train` and kept in `cache`.
    """
    path = dataset / RECORD
    kind = json.loads(path.read_text()).get("kind") if path.is_file() else None
    heads = {"landscapes": OF_LANDSCAPES, "earth": OF_EARTH, "echo": OF_ECHO}.get(str(kind))
    if heads is None:
        return None
    recognizer = train_recognizer(train, heads, cache / "recognizer", log=log)

    @torch.no_grad()
    def read(image: torch.Tensor, caption: str) -> list[float]:
        if not all(any(word in caption for word in words) for words in heads.values()):
            return [float("nan")] * len(heads)  # a caption of the user's own
        found = [int(logits.argmax(1)) for logits in recognizer(image)]
        return [float(one == wanted) for one, wanted in zip(found, words_of(caption, heads), strict=True)]

    return Reader(tuple(f"{name} recognized" for name in heads), weights_digest(recognizer), read)
