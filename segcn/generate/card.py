"""The card of a generated data set, README.md in its folder: what painted it, from what, and how it was vetted."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segcn.data.palette import Palette, palette_table
from segcn.generate.config import MODELS, GenerateConfig, SampleConfig
from segcn.generate.filtering import Verdict
from segcn.generate.manifest import WORK
from segcn.utils.html import table
from segcn.utils.io import write_whole
from segcn.utils.paths import public_name

MARK = "<!-- segcn generate writes this file; it leaves one without this line alone. -->"
# The files by name: with few images `datasets` takes a folder with several .json files for text.
FRONT = """---
tags: [synthetic, segmentation, controlnet, segcn]
task_categories: [image-segmentation, text-to-image]
configs:
- config_name: default
  data_files:
  - split: train
    path: [metadata.csv, "images/**", "masks/**"]
---"""
USE = """```python
from datasets import load_dataset
rows = load_dataset("path/of/this/folder", split="train")  # image, conditioning_image, text
```"""
ELSEWHERE = MODELS | {"seed"}
FILTER = ("min_miou", "max_attempts", "ignore_disagreement")


def write_card(
    out: Path, config: GenerateConfig, settings: dict[str, Any], figures: Sequence[tuple[str, str]], palette: Palette
) -> bool:
    """Write README.md to a finished set, with `figures` of its images; False where the user's own stands there."""
    path = out / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    text = card_text(config, settings, figures, palette, (out / "vetting.png").is_file())
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"), out / WORK)
    return True


def card_text(
    config: GenerateConfig,
    settings: dict[str, Any],
    figures: Sequence[tuple[str, str]],
    palette: Palette,
    pictured: bool,
) -> str:
    """The card; of paths only the last folder's name, and nothing that a prompt holds is read as Markdown or HTML."""
    parts = [
        FRONT,
        MARK,
        f"# Synthetic pairs painted from {plain(public_name(config.controls))}",
        "Every image was painted by a diffusion model from the mask and the text beside it: none is a photo."
        " `manifest.jsonl` has a line for each image, with its row, its attempts and their scores.",
        "![Best, median and rejected images](vetting.png)" if pictured else "",
        USE,
        "## How it was made",
        table(made_rows(config, settings)),
        "## Settings",
        table(setting_rows(config)),
        "## Filter and figures",
        table(figures),
        "## Classes",
        palette_table(palette),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def made_rows(config: GenerateConfig, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What painted, from what, with which seeds."""
    base, controlnet = public_name(config.pretrained_model_name_or_path), settings.get("controlnet")
    text = "one caption of each row" if config.prompt is None else plain(config.prompt)
    return [
        ("base", f"{plain(base)} (fingerprint {settings['base_fingerprint']})"),
        ("ControlNet", f"{plain(public_name(controlnet))} (weights {settings['controlnet_weights']})"
                       if controlnet else "none: the masks were not shown"),
        ("masks", f"{plain(public_name(config.controls))}, {plain(config.split)}"),
        ("augmentation of the masks", plain(config.augment_masks or "none")),
        ("texts", "captions dealt out between the rows" if config.mix_prompts else text),
        ("words varied", plain(", ".join(config.vary) or "none")),
        ("seed", f"{config.seed}; noise by row, replicate and attempt"),
        ("images a row", str(config.replicates)),
    ]  # fmt: skip


def setting_rows(config: GenerateConfig) -> list[tuple[str, str]]:
    """Every setting of the sampler."""
    names = [field.name for field in dataclasses.fields(SampleConfig) if field.name not in ELSEWHERE]
    return [(name, plain(getattr(config, name))) for name in names]


def figure_rows(config: GenerateConfig, kept: int, verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """How many images are in the set, and what the segmenter says of them where it was asked."""
    rows = [("images", f"{kept:,}")]
    if not verdicts:
        return [*rows, ("filter", "none")]
    rows += [(f"--{name}", plain(getattr(config, name))) for name in FILTER]
    scores = [verdict.miou for verdict in verdicts if verdict.kept]
    rows += [
        ("dropped", f"{len(verdicts) - len(scores):,}"),
        ("attempts an image", f"{statistics.fmean(verdict.attempts for verdict in verdicts):.2f}"),
        ("mIoU by the segmenter: least, median, best",
         f"{min(scores):.3f}, {statistics.median(scores):.3f}, {max(scores):.3f}"),
    ]  # fmt: skip
    if config.ignore_disagreement:
        rows.append(("pixels ignored", f"{statistics.fmean(verdict.ignored for verdict in verdicts):.2%}"))
    return rows


def plain(value: Any) -> str:
    """A value in one line, in which no letter means anything to Markdown or HTML."""
    line = " ".join(str(value).split())
    return "".join(sign if sign.isalnum() or sign in " ,.-/" else f"&#{ord(sign)};" for sign in line)
