"""Figures of a data set: grids and sheets of images, overlays, and charts of its classes and captions."""

import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from segcn.data.captions import common_words
from segcn.data.config import BUCKET
from segcn.data.dataset import PairedDataset, to_uint8
from segcn.data.files import read_image
from segcn.data.masks import colorize, count_ids, read_mask
from segcn.data.metadata import Split
from segcn.data.palette import Label, Palette
from segcn.data.sampler import COUNTED_ROWS, class_pixels
from segcn.data.transforms import AUGMENTS

STYLE: dict[Any, Any] = {  # of matplotlib; a caption may hold dollar signs, which are no formula
    "figure.dpi": 100, "savefig.dpi": 100, "font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.titlesize": 10,
    "axes.titlelocation": "left", "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
}  # fmt: skip
LINE = 0.15  # inches a line of text
LETTERS = 16  # letters an inch
GAP = 0.1  # inches between images
ACCENT = "#2f6db3"
TONES = (ACCENT, "#a8a8a8", "#e8a04c")
SHEET_GAP = 4  # px
SHEET_COLUMNS = 8  # at most; more images go on below
WIDEST = 2048  # px


def quiet() -> None:
    """Set the figures' style and silence progress bars, notices and warnings about the future.

    A running IPython shows a Figure as PNG from then on; pyplot and its global state are not used.
    """
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for library in ("transformers", "diffusers"):
        os.environ[f"{library.upper()}_VERBOSITY"] = "error"  # for when it is imported later
        library_logging = sys.modules.get(f"{library}.utils.logging")
        if library_logging is not None:
            library_logging.set_verbosity_error()
            library_logging.disable_progress_bar()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    matplotlib.rcParams.update(STYLE)
    if (shell := get_ipython()) is not None:
        select_figure_formats(shell, {"png"}, bbox_inches="tight")


# --- Pairs as images, uint8 [H, W, 3]


def read_pair(
    split: Split, row: int, resolution: int | None = None, fit: str = "crop"
) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and class ids uint8 [H, W] of a row; with a resolution R the square that `fit` makes."""
    if resolution is None:
        return read_image(split[row].image), read_mask(split[row].mask, split.palette)
    sample = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit).sample(row, 0)
    return to_uint8(sample.image), sample.mask.numpy()


def overlay(image: np.ndarray, mask: np.ndarray, palette: Palette, strength: float = 0.5) -> np.ndarray:
    """The palette's colors over the image, both uint8 [H, W, 3]; unlabelled pixels stay the image's."""
    mixed = ((1 - strength) * image + strength * colorize(mask, palette)).round().astype(np.uint8)
    return np.where((mask == 255)[..., None], image, mixed)


def outlined(image: np.ndarray, mask: np.ndarray, color: Sequence[int] = (255, 0, 255)) -> np.ndarray:
    """The image with the borders between classes drawn one pixel wide, uint8 [H, W, 3]."""
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    return np.where(border[..., None], np.array(color, np.uint8), image)


def side_by_side(*images: np.ndarray, gap: int = 3) -> np.ndarray:
    """Images of one height in a strip with thin white gaps, uint8 [H, sum of W, 3]."""
    space = np.full((images[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, space)][:-1], axis=1)


def checkerboard(image: np.ndarray, colors: np.ndarray, squares: int = 8) -> np.ndarray:
    """Image and mask colors in alternating squares, uint8 [H, W, 3]: edges run on wherever the two are aligned."""
    height, width = image.shape[:2]
    down, across = np.arange(height) * squares // height, np.arange(width) * squares // width
    return np.where(((down[:, None] + across) % 2 == 0)[..., None], image, colors)


def hatched(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The image, uint8 [H, W, 3], with grey stripes where `valid`, bool [H, W], is False."""
    down, across = np.indices(valid.shape)
    period = max(4, valid.shape[0] // 16)
    stripes = np.where((down + across) % period < period / 2, 200, 150).astype(np.uint8)[..., None]
    return np.where(valid[..., None], image, stripes)


# --- Grids of images


def grid(
    rows: Sequence[Sequence[np.ndarray | None] | np.ndarray],
    heads: Sequence[str] = (),
    left: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
    width: float = 1.5,
) -> Figure:
    """Images (uint8 [H, W, 3], or None for a gap) in rows and columns of `width` inches, with texts around them.

    heads: above each column; left: beside each row; below: under each image.
    """
    first = next(image for row in rows for image in row if image is not None)
    height, columns = width * first.shape[0] / first.shape[1], max(map(len, rows))
    notes = [[_wrap(text, width) for text in line] for line in below]
    under = LINE * max([text.count("\n") + 1 for line in notes for text in line], default=0) + GAP
    letters = max((len(line) for text in left for line in text.split("\n")), default=-1)
    above, beside = (1.6 * LINE if heads else 0), min(1.6, (letters + 1) / LETTERS + (GAP if left else 0))
    full_width, full_height = beside + columns * (width + GAP), above + len(rows) * (height + under)
    figure = Figure(figsize=(full_width, full_height))
    for column, head in enumerate(heads):
        center = beside + column * (width + GAP) + width / 2
        at = (center / full_width, 1 - 0.3 * above / full_height)
        figure.text(*at, head, ha="center", va="top", weight="bold")
    for number, row in enumerate(rows):
        top = above + number * (height + under)
        if left:
            text = _wrap(left[number], beside - GAP)
            figure.text(0, 1 - (top + height / 2) / full_height, text, va="center", fontsize=8)
        for column, image in enumerate(row):
            if image is None:
                continue
            x, y = (beside + column * (width + GAP)) / full_width, full_height - top - height
            axes = figure.add_axes((x, y / full_height, width / full_width, height / full_height))
            axes.imshow(image, interpolation="antialiased")
            axes.set_anchor("N")
            axes.axis("off")
            if notes:
                style: dict[str, Any] = {"fontsize": 8, "color": "#333333", "linespacing": 1.1}
                figure.text(x, (y - GAP / 2) / full_height, notes[number][column], va="top", **style)
    return figure


def _wrap(text: str, width: float) -> str:
    """Text in lines that fit `width` inches; its own line breaks stay."""
    letters = max(8, int(width * LETTERS))
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""])


def sheet(strips: list[np.ndarray], texts: Sequence[str], columns: int, width: float = 4.2) -> Figure:
    """Strips in columns, each with its text beneath."""
    lines = [slice(at, at + columns) for at in range(0, len(strips), columns)]
    texts = texts[: len(strips)]
    return grid([strips[line] for line in lines], below=[texts[line] for line in lines], width=width)


def contact_sheet(split: Split, rows: int = 8) -> Figure:
    """The first rows of a split: image, mask colors and both overlaid, with the caption beneath."""
    strips = []
    for row in range(min(rows, len(split))):
        image, mask = read_pair(split, row)
        strips.append(side_by_side(image, colorize(mask, split.palette), overlay(image, mask, split.palette)))
    return sheet(strips, [record.caption for record in split.records], columns=2)


def compare(real: Split, generated: Split, rows: int = 8, fit: str = "crop") -> Figure:
    """The first rows: mask, real image, of the shape that generation gave it, and generated image, captions beneath."""
    strips = []
    for row in range(min(rows, len(real), len(generated))):
        image, mask = read_pair(generated, row)
        height, width = mask.shape
        side = max(height, width) if fit == "pad" or height == width else None
        original = read_pair(real, row, side, fit)[0]
        if fit == BUCKET:
            original = np.asarray(ImageOps.fit(Image.fromarray(original), (width, height)))
        top, left = (original.shape[0] - height) // 2, (original.shape[1] - width) // 2
        original = original[top : top + height, left : left + width]
        strips.append(side_by_side(colorize(mask, real.palette), original, image))
    return sheet(strips, [record.caption for record in real.records], columns=2)


def legend(palette: Palette, columns: int = 5) -> Figure:
    """Each label's color, id and name."""
    lines = -(-len(palette.labels) // columns)
    figure = Figure(figsize=(1.7 * columns, 0.32 * lines))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, columns), ylim=(lines, 0))
    axes.axis("off")
    for place, label in enumerate(palette.labels):
        line, column = divmod(place, columns)
        swatch: dict[str, Any] = {"facecolor": np.array(label.color) / 255, "edgecolor": "#888888", "linewidth": 0.5}
        axes.add_patch(matplotlib.patches.Rectangle((column + 0.02, line + 0.2), 0.16, 0.6, **swatch))
        text = f"{label.id}  {label.name}" + (" (ignored)" if label.ignore else "")
        axes.text(column + 0.24, line + 0.52, text, va="center")
    return figure


# --- Sheets: PNG files of images of one size with white gaps, which can be cut out again


def write_sheet(path: Path, lines: Sequence[Sequence[np.ndarray] | np.ndarray]) -> np.ndarray:
    """Write lines of N images, each uint8 [R, R, 3], one below the other as PNG, and return it: uint8 [H, W, 3].

    Images of other shapes, the same in all lines, are in the middle of such squares. It is at most 2048 pixels wide.
    The first line holds masks: where images are made smaller, its colors stay the palette's. More than eight columns go
    on below the last line, all lines again. The file knows its columns.
    """
    count, longest = len(lines[0]), max(max(image.shape[:2]) for image in lines[0])
    columns = min(count, SHEET_COLUMNS)
    side = min(longest, (WIDEST - SHEET_GAP * (columns - 1)) // columns)
    rows = [
        (line[start : start + columns], Image.Resampling.LANCZOS if number else Image.Resampling.NEAREST)
        for start in range(0, count, columns)
        for number, line in enumerate(lines)
    ]
    step = side + SHEET_GAP
    pixels = np.full((len(rows) * step - SHEET_GAP, columns * step - SHEET_GAP, 3), 255, np.uint8)
    for row, (images, method) in enumerate(rows):
        for column, image in enumerate(images):
            height, width = (max(1, round(side * length / longest)) for length in image.shape[:2])
            top, left = row * step + (side - height) // 2, column * step + (side - width) // 2
            small = np.asarray(Image.fromarray(image).resize((width, height), method))
            pixels[top : top + height, left : left + width] = small
    info = PngInfo()
    info.add_text("columns", str(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, pnginfo=info)
    return pixels


def read_sheet(path: Path) -> list[list[np.ndarray]]:
    """The images of each line of a sheet, uint8 [R, R, 3]."""
    with Image.open(path) as file:
        pixels, columns = np.asarray(file), int(file.info["columns"])
    step = (pixels.shape[1] + SHEET_GAP) // columns
    side, rows = step - SHEET_GAP, (pixels.shape[0] + SHEET_GAP) // step
    return [[pixels[top : top + side, left : left + side] for left in range(0, columns * step, step)]
            for top in range(0, rows * step, step)]  # fmt: skip


# --- Charts of classes and captions


def class_shares(split: Split) -> np.ndarray:
    """Each class's share of the labelled pixels of each mask, float [N, K], of at most the first 1000 rows."""
    pixels = class_pixels(split.first(COUNTED_ROWS))
    return pixels / pixels.sum(axis=1, keepdims=True).clip(min=1)


def augmented_pixels(pairs: PairedDataset) -> np.ndarray:
    """How many pixels of each class each row's mask shows in epoch 0, uint32 [N, K]."""
    counts = [count_ids(pairs.sample(row, 0).mask.numpy()) for row in range(len(pairs))]
    return np.stack(counts)[:, : pairs.split.palette.num_classes].astype(np.uint32)


def class_frequencies(palette: Palette, measured: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Of the 24 rarest classes the share of the rows that show it and of the pixels, for each set by name.

    measured: what `sampler.frequencies` gives, by name.
    """
    rarity = next(iter(measured.values()))[0]
    labels = sorted(_classes(palette), key=lambda label: rarity[label.id])[:24]
    figure = Figure(figsize=(9, 0.9 + 0.17 * len(labels) * len(measured)))
    left, right = figure.subplots(1, 2)
    titles = "share of the rows that show it", "share of the pixels"
    for side, (axes, title) in enumerate(zip((left, right), titles, strict=True)):
        values = {name: [shares[side][label.id] for label in labels] for name, shares in measured.items()}
        names = [label.name for label in labels] if axes is left else [""] * len(labels)
        _share_bars(axes, names, values, [TONES[number % len(TONES)] for number in range(len(values))])
        axes.set_title(title)
    figure.legend(*left.get_legend_handles_labels(), loc="upper right", ncols=len(measured))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def class_bars(palette: Palette, shares: dict[str, np.ndarray]) -> Figure:
    """The mean share of each class, in its color; of several sets the later ones are paler.

    shares: what `class_shares` gives, by the set's name.
    """
    labels = _classes(palette)
    figure = Figure(figsize=(6.5, 0.6 + len(labels) * max(0.28, 0.2 * len(shares))))
    axes = figure.add_subplot()
    strengths = 1 - 0.55 * np.arange(len(shares)) / len(shares)
    colors = [[(*(np.array(label.color) / 255), strength) for label in labels] for strength in strengths]
    values = {name: [share[:, label.id].mean() for label in labels] for name, share in shares.items()}
    _share_bars(axes, [label.name for label in labels], values, colors, named=len(shares) > 1)
    axes.set_title("share of the labelled pixels")
    return figure


def word_bars(captions: Sequence[str]) -> Figure:
    """The most frequent words and the share of captions that hold them."""
    words = common_words(captions)
    figure = Figure(figsize=(6.5, 0.6 + 0.22 * len(words)))
    axes = figure.add_subplot()
    _share_bars(axes, [word for word, _ in words], {"": [number / len(captions) for _, number in words]}, [ACCENT])
    axes.set_title(f"words, by the share of {len(captions)} captions that hold them")
    return figure


def area_per_class(palette: Palette, shares: np.ndarray) -> Figure:
    """How much of an image each class covers where it occurs, and in how many images that is."""
    labels = _classes(palette)
    found = [share[share > 0] for share in (shares[:, label.id] for label in labels)]
    figure = Figure(figsize=(6.5, 0.7 + 0.3 * len(labels)))
    axes = figure.add_subplot()
    boxes = axes.boxplot(found, orientation="horizontal", positions=range(len(labels)), widths=0.6, whis=(0, 100),
                         patch_artist=True, medianprops={"color": "black"})  # fmt: skip
    for box, label in zip(boxes["boxes"], labels, strict=True):
        box.set(facecolor=np.array(label.color) / 255, edgecolor="#555555", linewidth=0.8)
    name_classes(axes, [f"{label.name}, {len(f) / len(shares):.0%}" for label, f in zip(labels, found, strict=True)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("class, share of the images it occurs in; area it covers there")
    return figure


def co_occurrence(palette: Palette, shares: np.ndarray) -> Figure:
    """Of the images that show one class (row), the share that shows another (column), as a table of colors."""
    labels = [label for label in _classes(palette) if (shares[:, label.id] > 0).any()]
    shown = (shares[:, [label.id for label in labels]] > 0).astype(float)
    side = 1.6 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 0.6, side))
    axes = figure.add_subplot()
    together = shown.T @ shown / shown.sum(0)[:, None]
    heat_map(axes, together, [label.name for label in labels], 0 if len(labels) <= 20 else math.inf)
    axes.set_xlabel("of the images with the class on the left, the share that also shows the one below", fontsize=9)
    return figure


def heat_map(axes, shares: np.ndarray, names: Sequence[str], least: float) -> None:
    """Shares [N, N] as a table of colors; those of at least `least` are written out."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    for row, column in np.argwhere(shares >= least):
        tone = "white" if shares[row, column] > 0.5 else "#333333"
        axes.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", fontsize=7, color=tone)
    axes.spines[:].set_visible(False)


def name_classes(axes, names: Sequence[str]) -> None:
    """The names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _share_bars(
    axes, names: Sequence[str], sets: Mapping[str, Sequence[float]], colors: Sequence[Any], named: bool = False
) -> None:
    """Horizontal bars, for each name one of every set, with its value; colors: of each set; named: and its name."""
    thick = 0.84 / len(sets)
    for number, (name, values) in enumerate(sets.items()):
        places = np.arange(len(names)) + (number - (len(sets) - 1) / 2) * thick
        bars = axes.barh(places, values, 0.92 * thick, color=colors[number], label=name, edgecolor="#888888",
                         linewidth=0.5)  # fmt: skip
        texts = [f"{value:.1%}  {name}" if named else f"{value:.1%}" for value in values]
        axes.bar_label(bars, texts, padding=3, fontsize=8 if len(sets) == 1 else 7)
    name_classes(axes, names)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.14, y=0.01)


def _classes(palette: Palette) -> list[Label]:
    return [label for label in palette.labels if not label.ignore]
