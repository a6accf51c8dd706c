"""What came out: faithfulness per class, the best and worst images, and one picture that tells it all."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from segcn.augment import AUGMENTS
from segcn.charts import ACCENT
from segcn.dataset import PairedDataset, to_uint8
from segcn.evaluate import ROWS
from segcn.labels import IGNORE, Palette
from segcn.masks import colourise
from segcn.records import Split
from segcn.segmenter import Segmenter, predict
from segcn.show import grid, read_pair

SIDE, GAP, MARGIN = 192, 8, 20  # px
TEXT_WIDTH, HEAD = 270, 56  # px, of a column of captions and of the line of heads
HEADS = ("mask", "real image", "with the mask", "without the mask", "another caption")
INK = "#222222"
TONES = {"real": "#4d4d4d", "reconstructions": "#a8a8a8", "synthetic": ACCENT, "floor": "#e8a04c"}


class Judged(NamedTuple):
    """A painted image as the segmenter sees it."""

    row: int
    agreement: float  # share of the labelled pixels whose class is found where the mask wants it
    image: np.ndarray  # uint8 [R, R, 3]
    wanted: np.ndarray  # class ids, uint8 [R, R]
    found: np.ndarray


def first_rows(split: Split, limit: int) -> Split:
    """The split cut after `limit` rows."""
    return dataclasses.replace(split, records=split.records[:limit])


def judge(split: Split, segmenter: Segmenter, batch_size: int = 32) -> list[Judged]:
    """Every image of a split held against its mask, the best first."""
    seen = segmenter.settings
    pairs = PairedDataset(split, seen["resolution"], AUGMENTS["none"], 0, seen.get("fit", "crop"))
    judged = []
    for start in range(0, len(pairs), batch_size):
        samples = [pairs.sample(row, 0) for row in range(start, min(start + batch_size, len(pairs)))]
        found = predict(segmenter, torch.stack([sample.image for sample in samples]), batch_size).numpy()
        for row, (sample, ids) in enumerate(zip(samples, found, strict=True), start):
            wanted = sample.mask.numpy()
            counted = wanted != IGNORE
            agreement = float((ids == wanted)[counted].mean()) if counted.any() else 0.0
            judged.append(Judged(row, agreement, to_uint8(sample.image), wanted, ids))
    return sorted(judged, key=lambda one: -one.agreement)


def verdicts(judged: Sequence[Judged], palette: Palette, count: int = 4) -> Figure:
    """The best and the worst images with the classes found in them beside the wanted ones, and where these differ."""
    half = min(count, len(judged) // 2) or 1
    chosen = [*judged[:half], *judged[-half:]] if len(judged) > 1 else list(judged)
    rows = [[one.image, colourise(one.wanted, palette), colourise(one.found, palette), _wrong(one)] for one in chosen]
    names = ["best"] * half + ["worst"] * (len(chosen) - half)
    left = [f"{name}\nrow {one.row}\n{one.agreement:.1%} agree" for name, one in zip(names, chosen, strict=True)]
    return grid(rows, ["painted", "wanted", "found", "differs (red)"], left)


def faithfulness_bars(metrics: dict) -> Figure:
    """IoU of each class and their mean, for every set of images that was measured."""
    measured = metrics["faithfulness"]
    names = [name for name in ROWS if name in measured]
    classes = ["mean", *measured["real"]["per_class"]]
    figure = Figure(figsize=(max(7, 0.85 * len(classes)), 3.2))
    axes = figure.add_subplot()
    thick = 0.8 / len(names)
    for number, name in enumerate(names):
        values = [measured[name]["miou"], *measured[name]["per_class"].values()]
        places = np.arange(len(classes)) + (number - (len(names) - 1) / 2) * thick
        axes.bar(places, [value or 0 for value in values], thick, color=TONES[name], label=ROWS[name])
    axes.set(ylim=(0, 1), ylabel="IoU", xticks=range(len(classes)), xticklabels=classes)
    axes.tick_params(axis="x", length=0)
    axes.set_title("how well a segmenter finds the wanted classes", pad=24)
    axes.legend(ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def tell(
    real: Split, painted: Split, floor: Split, recaptioned: np.ndarray, captions: Sequence[str], fit: str = "crop"
) -> Image.Image:
    """The story: rows of mask, real image and three painted ones, captions left and right of them.

    recaptioned: uint8 [N, H, W, 3], row k painted from mask k and captions[k]; N rows are told, all
    pictures made square as in training.
    """
    columns, side = len(HEADS), None if fit == "crop" else recaptioned.shape[1]
    width = 2 * (MARGIN + TEXT_WIDTH) + columns * SIDE + (columns - 1) * GAP
    sheet = Image.new("RGB", (width, HEAD + len(recaptioned) * (SIDE + GAP) + MARGIN), "white")
    pen, left = ImageDraw.Draw(sheet), MARGIN + TEXT_WIDTH
    pen.text((MARGIN, HEAD / 2), "caption", INK, _font(17, bold=True), anchor="lm")
    for column, head in enumerate(HEADS):
        pen.text((left + column * (SIDE + GAP) + SIDE / 2, HEAD / 2), head, INK, _font(17, bold=True), anchor="mm")
    for row, other in enumerate(recaptioned):
        image, mask = read_pair(real, row, side, fit)
        others = [read_pair(split, row, side, fit)[0] for split in (painted, floor)]
        pictures = [enlarged(colourise(mask, real.palette), smooth=False)]
        pictures += [enlarged(shown) for shown in (image, *others, other)]
        top = HEAD + row * (SIDE + GAP)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (SIDE + GAP), top))
        _write(pen, real[row].caption, MARGIN, top + SIDE / 2)
        _write(pen, captions[row], width - MARGIN - TEXT_WIDTH + 16, top + SIDE / 2)
    return sheet


def enlarged(picture: np.ndarray, smooth: bool = True) -> Image.Image:
    """The centred square of a picture, uint8 [H, W, 3], at the story's size; without `smooth` pixels stay squares."""
    image = Image.fromarray(picture)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def save_story(picture: Image.Image, path: Path) -> Path:
    """Write the picture as PNG, whole or not at all."""
    staged = path.with_name(f".{path.name}")
    picture.save(staged, format="PNG", optimize=True)
    return staged.replace(path)


def _wrong(one: Judged) -> np.ndarray:
    """The image in grey, red where found and wanted class differ."""
    grey = np.repeat(one.image.mean(-1, keepdims=True).astype(np.uint8) // 2 + 100, 3, axis=2)
    grey[(one.found != one.wanted) & (one.wanted != IGNORE)] = (220, 40, 40)
    return grey


def _write(pen: ImageDraw.ImageDraw, caption: str, left: float, middle: float, most: int = 8) -> None:
    """A caption in lines of the text column's width, centred on a height."""
    font, lines = _font(22), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= TEXT_WIDTH - 24 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " …"]
    pen.multiline_text((left, middle), "\n".join(lines), INK, font, anchor="lm", spacing=7)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own DejaVu Sans, which is there on every system."""
    face = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(face), size)
