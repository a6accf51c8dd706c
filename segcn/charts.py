"""Charts: classes, captions, and the loss and pictures of a training while it runs."""

import contextlib
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from segcn.arguments import arguments_of, make
from segcn.captions import common_words
from segcn.dataset import PairedDataset
from segcn.labels import IGNORE, Palette
from segcn.launch import training_command, training_lines
from segcn.masks import read_mask
from segcn.records import Split
from segcn.show import grid
from segcn.train_config import TrainConfig
from segcn.watch import read_log

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
    _name_classes(axes, [label.name for label in labels])  # of both: they share it
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=len(measured))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def class_bars(palette: Palette, shares: dict[str, np.ndarray]) -> Figure:
    """The mean share of each class, in its colour; of several sets the later ones are paler."""
    labels = [label for label in palette.labels if not label.ignore]
    thick = 0.8 / len(shares)
    figure = Figure(figsize=(6.5, 0.6 + len(labels) * max(0.28, 0.2 * len(shares))))
    axes = figure.add_subplot()
    for number, (name, share) in enumerate(shares.items()):
        values = [share[:, label.id].mean() for label in labels]
        places = np.arange(len(labels)) + (number - (len(shares) - 1) / 2) * thick
        colours = [(*(np.array(label.colour) / 255), 1 - 0.55 * number / len(shares)) for label in labels]
        bars = axes.barh(places, values, thick, color=colours, edgecolor="#888888", linewidth=0.5)
        suffix = f"  {name}" if len(shares) > 1 else ""
        axes.bar_label(bars, [f"{value:.1%}{suffix}" for value in values], padding=4, fontsize=8)
    _name_classes(axes, [label.name for label in labels])
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
        box.set(facecolor=np.array(label.colour) / 255, edgecolor="#555555", linewidth=0.8)
    _name_classes(axes, [f"{label.name}, {len(f) / len(shares):.0%}" for label, f in zip(labels, found, strict=True)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(title="class, share of the images it occurs in; area it covers there")
    return figure


def co_occurrence(palette: Palette, shares: np.ndarray) -> Figure:
    """Of the images that show one class (row), the share that shows another (column), as a table of colours."""
    labels = [label for label in palette.labels if not label.ignore and (shares[:, label.id] > 0).any()]
    shown = (shares[:, [label.id for label in labels]] > 0).astype(float)
    together = shown.T @ shown / shown.sum(0)[:, None]
    side = 1.6 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 0.6, side))
    axes = figure.add_subplot()
    axes.imshow(together, cmap="Blues", vmin=0, vmax=1)
    names = [label.name for label in labels]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="left")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for row, column in np.ndindex(together.shape) if len(names) <= 20 else ():
        dark = "white" if together[row, column] > 0.5 else "#333333"
        axes.text(column, row, f"{together[row, column]:.0%}", ha="center", va="center", fontsize=7, color=dark)
    axes.spines[:].set_visible(False)
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
    _name_classes(axes, [word for word, _ in words])
    axes.set(title=f"words, by the share of {len(captions)} captions that hold them", xticks=[])
    axes.spines["bottom"].set_visible(False)
    return figure


def loss_curve(entries: list[dict]) -> Figure:
    """The loss of a log.jsonl over the steps, as logged and smoothed."""
    figure = Figure(figsize=(7, 3))
    axes = figure.add_subplot()
    axes.set(title="training loss", xlabel="step")
    if not entries:
        axes.text(0.5, 0.5, "no step yet", ha="center", transform=axes.transAxes, color="#888888")
        return figure
    steps, losses = ([entry[name] for entry in entries] for name in ("step", "loss"))
    axes.plot(steps, losses, color="#b9cbe0", linewidth=1, marker="." if len(steps) < 5 else "", label="logged")
    axes.plot(steps, smooth(losses), color=ACCENT, linewidth=1.8, label="smoothed")
    axes.legend()
    return figure


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average whose start is not biased (as Adam's: Kingma and Ba 2015, arXiv:1412.6980)."""
    mean, smoothed = 0.0, []
    for step, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**step))
    return smoothed


def watch(config: TrainConfig, num_processes: int = 1, every: float = 5.0) -> None:
    """Train in processes of its own; print what they say and keep one figure of the loss and newest sheet current.

    every: least seconds between two pictures. UserError if training fails.
    """
    from IPython.display import display

    folder, shown_at = Path(config.output_dir), time.monotonic()
    handle = display(_progress(folder), display_id=True)
    with contextlib.closing(training_lines(config, num_processes)) as lines:
        for line in lines:
            print_seldom(line)
            if time.monotonic() - shown_at > every:
                handle.update(_progress(folder))
                shown_at = time.monotonic()
    handle.update(_progress(folder))


def worth_printing(line: str, every: int = 50) -> bool:
    """Whether a line of a training's output is kept: of the step lines, each 50th step and the last."""
    found = re.search(r"\bstep (\d+)/(\d+)", line)
    if found:
        return int(found[1]) % every == 0 or found[1] == found[2]
    return bool(line.strip()) and "%|" not in line and "Warning" not in line


def command_text(config: TrainConfig, num_processes: int = 1) -> str:
    """The command that `watch` starts, ready for a shell; settings that are the preset's own are left out."""
    words = training_command(config, num_processes)
    start = words[: words.index("segcn.train") + 1]
    usual = _options(arguments_of(make(TrainConfig, config.preset)))
    lines = [option for option in _options(arguments_of(config)) if option not in usual]
    return " \\\n  ".join([shlex.join(start), f"--preset {config.preset}", *lines])


def print_seldom(line: str) -> None:
    """Print a line of a training's output if `worth_printing` says so."""
    if worth_printing(line):
        print(line, flush=True)


def validation_sheets(folder: str | Path) -> list[Path]:
    """validation/step-N.png of a run folder, oldest first."""
    return sorted((Path(folder) / "validation").glob("step-*.png"))


def validation_over_time(folder: str | Path, count: int, most: int = 6) -> Figure:
    """The masks, and below them the pictures of `most` steps of a training, the last one among them.

    count: masks side by side in a sheet.
    """
    sheets = validation_sheets(folder)
    chosen = [sheets[place] for place in np.unique(np.linspace(0, len(sheets) - 1, most).round().astype(int))]
    pictures = [np.asarray(Image.open(path)) for path in chosen]
    side = pictures[0].shape[1] // count
    rows = [pictures[0][:side], *(picture[side : 2 * side] for picture in pictures)]
    names = ["mask", *(f"step {_step(path)}" for path in chosen)]
    return grid([np.split(row, count, axis=1) for row in rows], left=names)


def _progress(folder: Path) -> Figure:
    """The loss so far; under it the newest validation sheet."""
    figure, sheets = loss_curve(read_log(folder / "log.jsonl")), validation_sheets(folder)
    if sheets:
        picture = np.asarray(Image.open(sheets[-1]))
        figure.set_size_inches(7, 3 + 7 * picture.shape[0] / picture.shape[1] + 0.6)
        share = 3 / figure.get_figheight()
        figure.axes[0].set_position([0.08, 1 - share * 0.9, 0.9, share * 0.72])
        axes = figure.add_axes([0, 0, 1, 1 - share * 1.12])
        axes.imshow(picture, interpolation="antialiased")
        axes.set_title(f"step {_step(sheets[-1])}: masks, and what is painted from them")
        axes.axis("off")
    return figure


def _options(words: list[str]) -> list[str]:
    """Each option with its values as one shell text."""
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    return [shlex.join(words[start:end]) for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]


def _step(sheet: Path) -> int:
    return int(sheet.stem.removeprefix("step-"))


def _shares(mask: np.ndarray) -> np.ndarray:
    counts = np.bincount(mask.ravel(), minlength=256).astype(float)
    counts[IGNORE] = 0
    return counts / max(1, counts.sum())


def _name_classes(axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
