"""Does an image show what its caption says? CLIP's answer, where its weights are at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from segcn.dataset import to_uint8
from segcn.devices import pick_device
from segcn.errors import UserError
from segcn.models import weights_digest


class Reader(NamedTuple):
    """(image [1, 3, H, W] in [-1, 1], caption) -> a number for each of `names`; nan where a caption says nothing."""

    names: tuple[str, ...]
    key: str  # changes with anything that the numbers depend on
    read: Callable[[torch.Tensor, str], list[float]]


def clip_reader(folder: str | Path, device: str | None = None) -> Reader:
    """CLIPScore (Hessel et al. 2021, arXiv:2104.08718), 100 x the cosine, at least 0, by a folder of CLIP's.

    What a caption says after CLIP's 77th token is not read. UserError where the folder holds no CLIP.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--clip {folder}: expected a folder of CLIPModel with its tokenizer and image processor: {error}"
        ) from None
    model = model.eval().to(pick_device(device))
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def read(image: torch.Tensor, caption: str) -> list[float]:
        words = tokenizer(caption, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        pixels = processor(Image.fromarray(to_uint8(image[0])), return_tensors="pt")["pixel_values"].to(model.device)
        both = model.get_text_features(**words), model.get_image_features(pixels)
        text, seen = (getattr(one, "pooler_output", one) for one in both)  # transformers 5 returns more than the vector
        return [max(0.0, 100 * torch.cosine_similarity(text, seen).item())]

    return Reader((f"CLIPScore ({Path(folder).absolute().name})",), weights_digest(model), read)
