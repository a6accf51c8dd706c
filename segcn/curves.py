"""A training as it goes: the curves of its log, its validation pictures, and one figure of both while it runs."""

import contextlib
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from segcn.arguments import arguments_of, make
from segcn.best import fractions, read_best, scores
from segcn.charts import ACCENT, name_classes
from segcn.convergence import convergence_step
from segcn.labels import Palette
from segcn.launch import training_command, training_lines
from segcn.sheets import read_sheet
from segcn.show import grid
from segcn.train_config import TrainConfig
from segcn.watch import LOG, read_log

MARK = "#c2451e"  # of the step of convergence


def loss_curve(entries: list[dict]) -> Figure:
    """The loss of a log.jsonl over the steps, as logged and smoothed."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    draw_loss(figure.add_subplot(), entries)
    return figure


def draw_loss(axes: Axes, entries: list[dict]) -> None:
    """The loss, as logged and smoothed, from 0 up."""
    entries = [entry for entry in entries if "loss" in entry]
    axes.set(title="training loss", xlabel="step")
    if not entries:
        return _nothing(axes, "no step yet")
    steps, losses = ([entry[name] for entry in entries] for name in ("step", "loss"))
    axes.plot(steps, losses, color="#b9cbe0", linewidth=1, marker="." if len(steps) < 5 else "", label="logged")
    axes.plot(steps, smooth(losses), color=ACCENT, linewidth=1.8, label="smoothed")
    axes.set_ylim(0, 1.3 * max(losses))
    axes.legend(ncols=2, loc="upper right")


def faithfulness_curve(entries: list[dict]) -> Figure:
    """How well the pictures obey their masks over the steps, as a share of what real images reach."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    draw_faithfulness(figure.add_subplot(), entries)
    return figure


def draw_faithfulness(axes: Axes, entries: list[dict]) -> None:
    """The share of the ceiling, the step at which the ControlNet began to obey, and the best step."""
    axes.set(title="faithfulness on held-out masks, share of the ceiling", xlabel="step")
    steps, values = fractions(entries)
    if not steps:
        return _nothing(axes, "not measured (--faithfulness_rows)")
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
    axes.plot(steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=4)
    best, began = int(np.argmax(values)), convergence_step(steps, values)
    note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "annotation_clip": False}
    if best > 0:
        at = (steps[best], values[best])
        axes.plot(*at, marker="o", markersize=7, color=ACCENT)
        axes.annotate(f"best: {values[best]:.0%}", at, (0, 7), ha="center", color=ACCENT, **note)
    if began is not None:
        axes.axvline(began, color=MARK, linewidth=1.2, linestyle="--")
        axes.annotate(f"begins to obey\nat step {began}", (began, 0.04), (5, 0), color=MARK, **note)
    axes.set_ylim(0, max(1.1, 1.15 * max(values)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def class_faithfulness(entries: list[dict], palette: Palette) -> Figure:
    """IoU of each class at the best step, in its colour; a line marks the real images, a dot the start."""
    found, real = scores(entries), [entry["ceiling"] for entry in entries if "ceiling" in entry]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    if not found or not real:
        _nothing(axes, "not measured (--faithfulness_rows)")
        return figure
    best = max(found, key=lambda step: found[step]["of_ceiling"])
    labels = [label for label in palette.labels if found[best]["per_class"].get(label.name) is not None]
    figure.set_figheight(1 + 0.26 * len(labels))
    started, reached, ceiling = (
        [told["per_class"].get(label.name) or 0 for label in labels]
        for told in (found[min(found)], found[best], real[-1])
    )
    colours, places = [np.array(label.colour) / 255 for label in labels], np.arange(len(labels))
    bars = axes.barh(places, reached, 0.72, color=colours, edgecolor="#888888", linewidth=0.5)
    axes.plot(started, places, "o", color="white", markeredgecolor="#222222", markersize=5, label=f"step {min(found)}")
    axes.plot(ceiling, places, "|", color="#222222", markersize=13, markeredgewidth=2, label="real images")
    for bar, value in zip(bars, reached, strict=True):
        axes.text(1.09, bar.get_y() + 0.36, f"{value:.2f}", va="center", ha="right", fontsize=8)
    name_classes(axes, [label.name for label in labels])
    axes.set(xlim=(0, 1.1), title=f"IoU of each class at step {best}")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    return figure


def best_line(folder: str | Path) -> str:
    """Which checkpoint of a run folder is the best, in words."""
    best = read_best(folder)
    if best is None:
        return "no checkpoint was scored: the newest one is the best guess"
    weights = [Path(folder) / best["checkpoint"] / name for name in ("controlnet_ema", "controlnet")]
    where = next(path for path in weights if path.is_dir())  # scored with the average, where there is one
    return (
        f"step {best['step']} is the best: {best['of_ceiling']:.0%} of the ceiling (mIoU {best['miou']:.3f}); {where}"
    )


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
    handle = display(progress(folder), display_id=True)
    with contextlib.closing(training_lines(config, num_processes)) as lines:
        for line in lines:
            print_seldom(line)
            if time.monotonic() - shown_at > every:
                handle.update(progress(folder))
                shown_at = time.monotonic()
    handle.update(progress(folder))


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


def validation_over_time(folder: str | Path, most: int = 6) -> Figure:
    """The masks, and below them the pictures of `most` steps of a training, the last one among them."""
    sheets = validation_sheets(folder)
    if not sheets:
        figure = Figure(figsize=(7, 1))
        _nothing(figure.add_subplot(), "nothing painted (--faithfulness_rows, --validation_image)")
        return figure
    chosen = [sheets[place] for place in np.unique(np.linspace(0, len(sheets) - 1, most).round().astype(int))]
    rows = [read_sheet(path) for path in chosen]
    names = ["mask", *(f"step {_step(path)}" for path in chosen)]
    return grid([rows[0][0], *(row[1] for row in rows)], left=names)


def progress(folder: Path) -> Figure:
    """The curves so far, and under them the newest validation sheet."""
    entries, sheets = read_log(folder / LOG), validation_sheets(folder)
    picture = np.asarray(Image.open(sheets[-1])) if sheets else None
    height = 9 * picture.shape[0] / picture.shape[1] + 0.3 if picture is not None else 0
    figure = Figure(figsize=(9, 2.6 + height), layout="constrained")
    curves, *below = figure.subfigures(
        1 + bool(sheets), 1, height_ratios=[2.6, height][: 1 + bool(sheets)], squeeze=False
    )[:, 0]
    loss, faithfulness = curves.subplots(1, 2)
    draw_loss(loss, entries)
    draw_faithfulness(faithfulness, entries)
    if sheets:
        axes = below[0].add_subplot()
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


def _nothing(axes: Axes, text: str) -> None:
    """Axes with a word in place of a curve."""
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes, color="#888888")
    axes.set(xticks=[], yticks=[], xlabel="")
