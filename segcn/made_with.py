"""What a picture was made with, kept in a text chunk of its PNG by `segcn infer` and the panel."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from segcn.config import SampleConfig
from segcn.errors import UserError
from segcn.files import open_image
from segcn.pipeline import Painter

CHUNK = "segcn"  # the name of the text chunk


def made_with(
    painter: Painter, settings: SampleConfig, prompts: Sequence[str], seeds: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """All that pictures of these prompts depend on but their mask; seeds: (seed, row) of each picture of a prompt."""
    names = [field.name for field in dataclasses.fields(SampleConfig)]
    return {
        "settings": {name: getattr(settings, name) for name in names},
        "prompt": list(prompts),
        "seeds": list(seeds),
        "base_fingerprint": painter.base.fingerprint,
        "controlnet": painter.controlnet_folder,
        "controlnet_weights": painter.controlnet_digest,
        "palette_fingerprint": painter.palette.fingerprint,
    }


def in_chunk(told: dict[str, Any]) -> PngInfo:
    """What Pillow writes into a PNG."""
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(told))
    return chunks


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a PNG was made with: settings (those of SampleConfig), prompt, seeds, fingerprints."""
    with open_image(path) as image:
        image.load()
        text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        raise UserError(f"{path}: expected a picture that segcn infer or the panel wrote, found no settings in it")
    return json.loads(text)
