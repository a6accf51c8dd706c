"""A segmentation network of somebody else's: any folder that transformers' AutoModelForSemanticSegmentation opens."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from segcn.devices import pick_device
from segcn.errors import UserError
from segcn.labels import Palette
from segcn.segmenter import AnySegmenter, load_segmenter

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
