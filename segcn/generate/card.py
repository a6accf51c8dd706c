"""The card of a generated data set, README.md in its folder: models, masks, settings, and how it was filtered."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segcn.data.palette import Palette, palette_table
from segcn.generate.config import MODELS, GenerateConfig, SampleConfig
from segcn.utils.html import render
from segcn.utils.io import write_whole
from segcn.utils.paths import public_name

MADE_HERE = "<!-- segcn generate writes this file; it leaves one without this line alone. -->"


def write_data_card(
    out: Path,
    config: GenerateConfig,
    settings: dict[str, Any],
    kept: int,
    scored: Sequence[dict[str, Any]],
    palette: Palette,
    work: Path,
) -> bool:
    """Write README.md to a finished set; False where there is one of the user's own.

    kept: the images in the set. scored: the records of the manifest that have a score. Of paths only the last folder's
    name is written, and no value is read as Markdown or HTML.
    """
    path = out / "README.md"
    if path.exists() and MADE_HERE not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    scores = [record["miou"] for record in scored if record["kept"]]
    text = render(
        "generate/templates/card.md",
        mark=MADE_HERE,
        config=config,
        settings=settings,
        sampling=[one.name for one in dataclasses.fields(SampleConfig) if one.name not in MODELS | {"seed"}],
        classes=palette_table(palette),
        kept=kept,
        dropped=len(scored) - len(scores),
        attempts=statistics.fmean(len(record["scores"]) for record in scored) if scored else 0,
        miou=[min(scores), statistics.median(scores), max(scores)] if scores else [],
        ignored=statistics.fmean(record["ignored"] for record in scored) if scored else 0,
        plain=_plain,
        name=lambda place: _plain(public_name(place)),
    )
    write_whole(path, lambda staged: staged.write_text(text, encoding="utf-8"), work)
    return True


def _plain(value: Any) -> str:
    """A value in one line, in which no character has a meaning in Markdown or HTML."""
    line = " ".join(str(value).split())
    return "".join(sign if sign.isalnum() or sign in " ,.-/" else f"&#{ord(sign)};" for sign in line)
