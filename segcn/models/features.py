"""Features that images are compared by (Inception's, the segmenter's, any backbone's), and scores by CLIP."""

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchmetrics.image.fid import NoTrainInceptionV3

from segcn.data.dataset import to_uint8
from segcn.models.base import pick_device, weights_digest
from segcn.models.segmenter import AnySegmenter
from segcn.utils.errors import UserError

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = Path(INCEPTION_WEIGHTS).stem.rpartition("-")[2]  # the beginning of the SHA-256 of those of 2015
INCEPTION = "Inception v3, 2015-12-05"


class Reader(NamedTuple):
    """(image [1, 3, H, W] in [-1, 1], caption) -> a number for each of `names`; nan where a caption says nothing."""

    names: tuple[str, ...]
    key: str  # changes with anything that the numbers depend on
    read: Callable[[torch.Tensor, str], list[float]]


def clip_reader(folder: str | Path, device: str | None = None) -> Reader:
    """CLIPScore (Hessel et al. 2021, arXiv:2104.08718), 100 x the cosine, at least 0, by a folder of CLIP's.

    What a caption says after CLIP's 77th token is not read. UserError where the folder holds no CLIP.
    """
    model, tokenizer, processor = _open_clip(folder, pick_device(device))
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def read(image: torch.Tensor, caption: str) -> list[float]:
        words = tokenizer(caption, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        pixels = processor(Image.fromarray(to_uint8(image[0])), return_tensors="pt")["pixel_values"].to(model.device)
        both = model.get_text_features(**words), model.get_image_features(pixels)
        text, view = (getattr(one, "pooler_output", one) for one in both)  # transformers 5 returns more than the vector
        return [max(0.0, 100 * torch.cosine_similarity(text, view).item())]

    return Reader((f"CLIPScore ({Path(folder).absolute().name})",), weights_digest(model), read)


@cache
def _open_clip(folder: str | Path, device: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--clip {folder}: expected a folder of CLIPModel with its tokenizer and image processor: {error}"
        ) from None
    return model.eval().to(device), tokenizer, processor


class Extractor(NamedTuple):
    """image [B, 3, H, W] in [-1, 1] -> features [B, D]; `name` is reported with each number computed from them."""

    name: str
    key: str  # changes with any weight
    extract: Callable[[torch.Tensor], torch.Tensor]
    of_clip: bool = False  # CLIP's: the distance between these is CMMD

    @property
    def names(self) -> tuple[str, str]:
        """The names of the Fréchet and the kernel distance between these features."""
        return ("FID", "KID") if self.name == INCEPTION else ("Fréchet distance", "kernel distance")


def open_extractor(segmenter: AnySegmenter, inception: str | Path | None = None) -> Extractor:
    """Inception where its weights are given or found, else the segmenter's own features.

    These fit this data set, but compare with no published number. UserError where a file that is given is missing.
    """
    weights, device = find_inception(inception), next(segmenter.parameters()).device
    if weights:
        with weights.open("rb") as file:
            published = hashlib.file_digest(file, "sha256").hexdigest().startswith(INCEPTION_HASH)
        name = INCEPTION if published else f"Inception v3 with other weights ({weights.name})"
        return Extractor(name, *inception_features(weights, device))
    name = segmenter.settings.get("name", "segmenter")
    return Extractor(f"{name} features", weights_digest(segmenter), lambda image: segmenter.features(image.to(device)))


def backbone_extractor(folder: str | Path, device: str | None = None) -> Extractor:
    """Features by a vision backbone of transformers, such as DINOv2: its class token, or else the mean of its places.

    Stein et al. 2023, arXiv:2306.04675. Images are resized and normalized as its image processor says. UserError where
    the folder cannot be opened.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise UserError(
            f"--features {folder}: expected a folder of a vision backbone of transformers, such as DINOv2, with its"
            f" image processor: {error}"
        ) from None
    model = getattr(model, "vision_model", model).eval().to(pick_device(device))
    token = any(name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in model.named_parameters())

    @torch.no_grad()
    def extract(image: torch.Tensor) -> torch.Tensor:
        hidden = model(_prepared(processor, image, model.device)).last_hidden_state
        return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden[:, 0] if token else hidden.mean(1)

    return Extractor(Path(folder).absolute().name, weights_digest(model), extract)


def clip_extractor(folder: str | Path, device: str | None = None) -> Extractor:
    """CLIP's projected image vectors, for CMMD; UserError where the folder holds no CLIP."""
    model, _, processor = _open_clip(folder, pick_device(device))

    @torch.no_grad()
    def extract(image: torch.Tensor) -> torch.Tensor:
        found = model.get_image_features(_prepared(processor, image, model.device))
        return getattr(found, "pooler_output", found)

    return Extractor(f"CLIP ({Path(folder).absolute().name})", weights_digest(model), extract, of_clip=True)


def _prepared(processor: Any, image: torch.Tensor, device: torch.device) -> torch.Tensor:
    """image [B, 3, H, W] in [-1, 1] -> what a network of transformers takes."""
    pixels = [Image.fromarray(to_uint8(one)) for one in image.cpu()]
    return processor(pixels, return_tensors="pt")["pixel_values"].to(device)


def find_inception(path: str | Path | None = None) -> Path | None:
    """Inception's weights: the file given (UserError if missing), else torch.hub's copy, else None."""
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"{path}: expected Inception's weights ({INCEPTION_WEIGHTS}), found no file")
        return Path(path)
    home = os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")
    stored = Path(home) / "hub" / "checkpoints" / INCEPTION_WEIGHTS
    return stored if stored.is_file() else None


def inception_features(weights: Path, device: torch.device | str = "cpu") -> tuple[str, Callable]:
    """(key, image [B, 3, H, W] in [-1, 1] -> [B, 2048]), resized to 299 px with antialias, torchmetrics' default."""
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle holds
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except ModuleNotFoundError:
        raise UserError(
            f"{weights}: Inception's weights are here, but FID and KID also need: pip install torch-fidelity"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(f"{weights}: expected Inception's weights ({INCEPTION_WEIGHTS}): {error}") from None
    pixels = lambda image: ((image.to(device) + 1) * 127.5).round().clamp(0, 255).byte()  # noqa: E731
    return weights_digest(network), lambda image: network(pixels(image))
