"""What the captions of a sample set say, season, time of day or style: recognised in images, one at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from segcn.models import weights_digest
from segcn.records import Split
from segcn.samples.recogniser import OF_EARTH, OF_LANDSCAPES, said, train_recogniser
from segcn.samples.writing import RECORD
from segcn.text_scores import Reader

HEADS = {"landscapes": OF_LANDSCAPES, "earth": OF_EARTH}


def caption_reader(dataset: Path, train: Split, cache: Path, log: Callable[[str], None] = print) -> Reader | None:
    """1 where an image shows what its caption says and 0 where it does not, for each head; None but for sample sets.

    The network that reads is trained on the rows of `train` and kept in `cache`.
    """
    heads = HEADS.get(_kind(dataset) or "")
    if heads is None:
        return None
    recogniser = train_recogniser(train, heads, cache / "recogniser", log=log)

    @torch.no_grad()
    def read(image: torch.Tensor, caption: str) -> list[float]:
        if not all(any(word in caption for word in words) for words in heads.values()):
            return [float("nan")] * len(heads)  # a caption of the user's own
        found = [int(logits.argmax(1)) for logits in recogniser(image)]
        return [float(one == wanted) for one, wanted in zip(found, said(caption, heads), strict=True)]

    return Reader(tuple(f"{name} recognised" for name in heads), weights_digest(recogniser), read)


def _kind(dataset: Path) -> str | None:
    """Which sample set a folder holds, or None."""
    path = dataset / RECORD
    return json.loads(path.read_text()).get("kind") if path.is_file() else None
