"""Images of one size in a sheet: laid out with white gaps, and cut out again."""

import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segcn.data.captions import common_words
from segcn.data.dataset import PairedDataset, to_uint8
from segcn.data.masks import colorize, read_mask
from segcn.data.metadata import Split, read_image
from segcn.data.palette import IGNORE, Palette
from segcn.data.transforms import AUGMENTS

# --- sheets: Images of one size in a sheet: laid out with white gaps, and cut out again.

SHEET_GAP = 4  # px
COLUMNS = 8  # at most; more images go on below
WIDEST = 2048  # px


def lay_out(lines: Sequence[np.ndarray]) -> np.ndarray:
    """Lines of N images each, uint8 [N, R, R, 3], one below the other: uint8 [H, W, 3], at most 2048 pixels wide.

    The first line holds masks: where images are made smaller, its colors stay the palette's. More than eight columns
    go on below the last line, all lines again.
    """
    count, side = lines[0].shape[:2]
    columns = min(count, COLUMNS)
    side = min(side, (WIDEST - SHEET_GAP * (columns - 1)) // columns)
    blocks = [slice(start, start + columns) for start in range(0, count, columns)]
    rows = [(line[block], number == 0) for block in blocks for number, line in enumerate(lines)]
    sheet = np.full(
        (len(rows) * (side + SHEET_GAP) - SHEET_GAP, columns * (side + SHEET_GAP) - SHEET_GAP, 3), 255, np.uint8
    )
    for row, (pictures, masks) in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (side + SHEET_GAP), column * (side + SHEET_GAP)
            sheet[top : top + side, left : left + side] = _resized(picture, side, masks)
    return sheet


def write_sheet(path: Path, lines: Sequence[np.ndarray]) -> np.ndarray:
    """Lay out lines of images, write them as PNG and return the sheet; the file knows the number of its columns."""
    sheet, known = lay_out(lines), PngInfo()
    known.add_text("columns", str(min(len(lines[0]), COLUMNS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, pnginfo=known)
    return sheet


def read_sheet(path: Path) -> list[list[np.ndarray]]:
    """The images of each line of a sheet, uint8 [R, R, 3]."""
    with Image.open(path) as image:
        return cut_out(np.asarray(image), int(image.info["columns"]))


def cut_out(sheet: np.ndarray, columns: int) -> list[list[np.ndarray]]:
    """The images of each line of a sheet, uint8 [R, R, 3], by the number of its columns."""
    step = (sheet.shape[1] + SHEET_GAP) // columns
    rows = (sheet.shape[0] + SHEET_GAP) // step
    tops, lefts = (range(0, number * step, step) for number in (rows, columns))
    return [[sheet[top : top + step - SHEET_GAP, left : left + step - SHEET_GAP] for left in lefts] for top in tops]


def _resized(picture: np.ndarray, side: int, mask: bool) -> np.ndarray:
    if picture.shape[0] == side:
        return picture
    method = Image.Resampling.NEAREST if mask else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize((side, side), method))


# --- show: Images of pairs: grids, overlays, outlines, sheets of rows.

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType
STYLE: dict["RcKeyType", Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "text.parse_math": False,  # a caption may hold dollar signs
}
LINE = 0.15  # inches a line of text
LETTERS = 16  # letters an inch
GAP = 0.1  # inches between images


def quiet() -> None:
    """Set the figures' style and silence progress bars, notices and warnings about the future."""
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
    _show_figures_in_notebooks()


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
    first = next(picture for row in rows for picture in row if picture is not None)
    height, columns = width * first.shape[0] / first.shape[1], max(map(len, rows))
    notes = [[_wrap(text, width) for text in line] for line in below]
    under = LINE * max([text.count("\n") + 1 for line in notes for text in line], default=0) + GAP
    above, beside = (1.6 * LINE if heads else 0), _beside(left)
    total = (beside + columns * (width + GAP), above + len(rows) * (height + under))
    figure = Figure(figsize=total)
    for column, head in enumerate(heads):
        centre = beside + column * (width + GAP) + width / 2
        figure.text(centre / total[0], 1 - 0.3 * above / total[1], head, ha="center", va="top", weight="bold")
    for number, row in enumerate(rows):
        top = above + number * (height + under)
        if left:
            text = _wrap(left[number], beside - GAP)
            figure.text(0, 1 - (top + height / 2) / total[1], text, va="center", fontsize=8)
        for column, picture in enumerate(row):
            box = (beside + column * (width + GAP), total[1] - top - height, width, height)
            _place(figure, picture, (box[0] / total[0], box[1] / total[1], box[2] / total[0], box[3] / total[1]))
            if notes and picture is not None:
                at = (box[0] / total[0], (box[1] - GAP / 2) / total[1])
                figure.text(*at, notes[number][column], va="top", fontsize=8, color="#333333", linespacing=1.1)
    return figure


def overlay(image: np.ndarray, mask: np.ndarray, palette: Palette, strength: float = 0.5) -> np.ndarray:
    """The palette's colors over the image, both uint8 [H, W, 3]; unlabelled pixels stay the image's."""
    mixed = ((1 - strength) * image + strength * colorize(mask, palette)).round().astype(np.uint8)
    return np.where((mask == 255)[..., None], image, mixed)


def outlined(image: np.ndarray, mask: np.ndarray, color: Sequence[int] = (255, 0, 255)) -> np.ndarray:
    """The image with the borders between classes drawn one pixel wide, uint8 [H, W, 3]."""
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    drawn = image.copy()
    drawn[border] = color
    return drawn


def side_by_side(*pictures: np.ndarray, gap: int = 3) -> np.ndarray:
    """Images of one height in a strip with thin white gaps, uint8 [H, sum of W, 3]."""
    space = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, space)]
    return np.concatenate(parts[:-1], axis=1)


def read_pair(
    split: Split, row: int, resolution: int | None = None, fit: str = "crop"
) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and class ids uint8 [H, W] of a row; with a resolution R the square that `fit` makes."""
    if resolution is None:
        return read_image(split[row].image), read_mask(split[row].mask, split.palette)
    sample = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit).sample(row, 0)
    return to_uint8(sample.image), sample.mask.numpy()


def compare(real: Split, painted: Split, rows: int = 8, columns: int = 2, fit: str = "crop") -> Figure:
    """The first rows: mask, real image, made square as for painting, and painted image, with the caption beneath."""
    strips = []
    for row in range(min(rows, len(real), len(painted))):
        picture, mask = read_pair(painted, row)
        height, width = mask.shape
        side = max(height, width) if fit == "pad" or height == width else None
        image = read_pair(real, row, side, fit)[0]
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[top : top + height, left : left + width]
        strips.append(side_by_side(colorize(mask, real.palette), image, picture))
    return sheet(strips, [record.caption for record in real.records], columns)


def contact_sheet(split: Split, rows: int = 8, columns: int = 2) -> Figure:
    """The first rows of a split: image, mask colors and both overlaid, with the caption beneath."""
    strips = []
    for row in range(min(rows, len(split))):
        image, mask = read_pair(split, row)
        strips.append(side_by_side(image, colorize(mask, split.palette), overlay(image, mask, split.palette)))
    return sheet(strips, [record.caption for record in split.records], columns)


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


def checkerboard(image: np.ndarray, colors: np.ndarray, squares: int = 8) -> np.ndarray:
    """Image and mask colors in alternating squares, uint8 [H, W, 3]: edges run on wherever the two are aligned."""
    height, width = image.shape[:2]
    down, across = np.arange(height) * squares // height, np.arange(width) * squares // width
    return np.where(((down[:, None] + across) % 2 == 0)[..., None], image, colors)


def hatched(picture: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The image, uint8 [H, W, 3], with grey stripes where `valid`, bool [H, W], is False."""
    down, across = np.indices(valid.shape)
    period = max(4, valid.shape[0] // 16)
    stripes = np.where((down + across) % period < period / 2, 200, 150).astype(np.uint8)[..., None]
    return np.where(valid[..., None], picture, stripes)


def sheet(strips: list[np.ndarray], texts: Sequence[str], columns: int, width: float = 4.2) -> Figure:
    """Strips in columns, each with its text beneath."""
    lines = [slice(at, at + columns) for at in range(0, len(strips), columns)]
    texts = texts[: len(strips)]
    return grid([strips[line] for line in lines], below=[texts[line] for line in lines], width=width)


def _wrap(text: str, width: float) -> str:
    """Text in lines that fit `width` inches; lines that are there already stay."""
    letters = max(8, int(width * LETTERS))
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""])


def _beside(texts: Sequence[str], most: float = 1.6) -> float:
    """Inches for texts at the left: as wide as the longest line, up to `most`."""
    longest = max((len(line) for text in texts for line in text.split("\n")), default=-1)
    return min(most, (longest + 1) / LETTERS + (GAP if texts else 0))


def _place(figure: Figure, picture: np.ndarray | None, box: tuple[float, float, float, float]) -> None:
    if picture is None:
        return
    axes = figure.add_axes(box)
    axes.imshow(picture, interpolation="antialiased")
    axes.set_anchor("N")
    axes.axis("off")


def _show_figures_in_notebooks() -> None:
    """Teach a running IPython to show a Figure as PNG; pyplot and its global state are not used."""
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    shell = get_ipython()
    if shell is not None:
        select_figure_formats(shell, {"png"}, bbox_inches="tight")


ACCENT = "#2f6db3"
TONES = (ACCENT, "#a8a8a8", "#e8a04c")
COUNTED_ROWS = 1000  # masks read for a chart


def class_shares(split: Split) -> np.ndarray:
    """Each class's share of the labelled pixels of each mask, float [N, 256], of at most the first 1000 rows."""
    return np.stack([_shares(read_mask(record.mask, split.palette)) for record in split.records[:COUNTED_ROWS]])


def augmented_pixels(pairs: PairedDataset) -> np.ndarray:
    """How many pixels of each class each row's mask shows in epoch 0, uint32 [N, classes]."""
    classes = min(pairs.split.palette.num_classes, IGNORE)
    masks = (pairs.sample(row, 0).mask.numpy() for row in range(len(pairs)))
    return np.stack([np.bincount(mask.ravel(), minlength=256)[:classes] for mask in masks]).astype(np.uint32)


def class_frequencies(palette: Palette, measured: dict[str, tuple[np.ndarray, np.ndarray]], most: int = 24) -> Figure:
    """Of each class the share of the rows that show it and of the pixels, the rarest first, for each set by name.

    measured: what `balance.frequencies` gives, by name; most: classes shown.
    """
    first = next(iter(measured.values()))[0]
    labels = sorted((label for label in palette.labels if not label.ignore), key=lambda label: first[label.id])[:most]
    figure = Figure(figsize=(9, 0.9 + 0.17 * len(labels) * len(measured)))
    thick = 0.84 / len(measured)
    for side, (axes, title) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), ("share of the rows that show it", "share of the pixels"), strict=True)
    ):
        for number, (name, shares) in enumerate(measured.items()):
            values = [shares[side][label.id] for label in labels]
            places = np.arange(len(labels)) + (number - (len(measured) - 1) / 2) * thick
            bars = axes.barh(places, values, thick * 0.92, color=TONES[number % len(TONES)], label=name)
            axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=7)
        axes.set(title=title, xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.14, y=0.01)
        axes.tick_params(axis="y", length=0)
    name_classes(axes, [label.name for label in labels])  # of both: they share it
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=len(measured))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def class_bars(palette: Palette, shares: dict[str, np.ndarray]) -> Figure:
    """The mean share of each class, in its color; of several sets the later ones are paler."""
    labels = [label for label in palette.labels if not label.ignore]
    thick = 0.8 / len(shares)
    figure = Figure(figsize=(6.5, 0.6 + len(labels) * max(0.28, 0.2 * len(shares))))
    axes = figure.add_subplot()
    for number, (name, share) in enumerate(shares.items()):
        values = [share[:, label.id].mean() for label in labels]
        places = np.arange(len(labels)) + (number - (len(shares) - 1) / 2) * thick
        colors = [(*(np.array(label.color) / 255), 1 - 0.55 * number / len(shares)) for label in labels]
        bars = axes.barh(places, values, thick, color=colors, edgecolor="#888888", linewidth=0.5)
        suffix = f"  {name}" if len(shares) > 1 else ""
        axes.bar_label(bars, [f"{value:.1%}{suffix}" for value in values], padding=4, fontsize=8)
    name_classes(axes, [label.name for label in labels])
    axes.set(title="share of the labelled pixels", xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.15)
    return figure


def area_per_class(palette: Palette, shares: np.ndarray) -> Figure:
    """How much of an image each class covers where it occurs, and in how many images that is."""
    labels = [label for label in palette.labels if not label.ignore]
    found = [share[share > 0] for share in (shares[:, label.id] for label in labels)]
    figure = Figure(figsize=(6.5, 0.7 + 0.3 * len(labels)))
    axes = figure.add_subplot()
    boxes = axes.boxplot(found, orientation="horizontal", positions=range(len(labels)), widths=0.6, whis=(0, 100),
                         patch_artist=True, medianprops={"color": "black"})  # fmt: skip
    for box, label in zip(boxes["boxes"], labels, strict=True):
        box.set(facecolor=np.array(label.color) / 255, edgecolor="#555555", linewidth=0.8)
    name_classes(axes, [f"{label.name}, {len(f) / len(shares):.0%}" for label, f in zip(labels, found, strict=True)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(title="class, share of the images it occurs in; area it covers there")
    return figure


def co_occurrence(palette: Palette, shares: np.ndarray) -> Figure:
    """Of the images that show one class (row), the share that shows another (column), as a table of colors."""
    labels = [label for label in palette.labels if not label.ignore and (shares[:, label.id] > 0).any()]
    shown = (shares[:, [label.id for label in labels]] > 0).astype(float)
    together = shown.T @ shown / shown.sum(0)[:, None]
    side = 1.6 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 0.6, side))
    axes = figure.add_subplot()
    heat_map(axes, together, [label.name for label in labels], 0 if len(labels) <= 20 else math.inf)
    axes.set_xlabel(
        "of the images that show the class on the left, the share that also shows the one above", fontsize=9
    )
    return figure


def word_bars(captions: Sequence[str], count: int = 20) -> Figure:
    """The commonest words and the share of captions that hold them."""
    words = common_words(captions, count)
    figure = Figure(figsize=(6.5, 0.6 + 0.22 * len(words)))
    axes = figure.add_subplot()
    shares = [number / len(captions) for _, number in words]
    bars = axes.barh(range(len(words)), shares, 0.7, color=ACCENT)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize=8)
    name_classes(axes, [word for word, _ in words])
    axes.set(title=f"words, by the share of {len(captions)} captions that hold them", xticks=[])
    axes.spines["bottom"].set_visible(False)
    return figure


def heat_map(axes, shares: np.ndarray, names: Sequence[str], least: float) -> None:
    """Shares [N, N] as a table of colors; those of at least `least` are written out."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="left")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for row, column in np.argwhere(shares >= least):
        tone = "white" if shares[row, column] > 0.5 else "#333333"
        axes.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", fontsize=7, color=tone)
    axes.spines[:].set_visible(False)


def name_classes(axes, names: Sequence[str]) -> None:
    """The names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _shares(mask: np.ndarray) -> np.ndarray:
    counts = np.bincount(mask.ravel(), minlength=256).astype(float)
    counts[IGNORE] = 0
    return counts / max(1, counts.sum())
