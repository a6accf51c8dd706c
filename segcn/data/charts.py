"""Charts of a data set: its classes and its captions."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from segcn.data.captions import common_words
from segcn.data.dataset import PairedDataset
from segcn.data.masks import read_mask
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette

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
