"""What notebooks 02 to 07 draw: augmentation, a training while it runs, everything in one image, and a sweep."""

import contextlib
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from segcn.data.captions import mirrored, says_a_side
from segcn.data.config import FITS
from segcn.data.dataset import PairedDataset, Sample, to_uint8
from segcn.data.masks import colorize
from segcn.data.metadata import Split, read_split
from segcn.data.palette import Palette
from segcn.data.sampler import class_pixels
from segcn.data.transforms import Draw, apply, to_output, to_source
from segcn.data.visualize import (
    ACCENT,
    checkerboard,
    grid,
    hatched,
    name_classes,
    outlined,
    overlay,
    read_pair,
    read_sheet,
    sheet,
    side_by_side,
)
from segcn.evaluate.evaluator import faithfulness
from segcn.models.segmenter import Segmenter
from segcn.train.checkpoint import read_best
from segcn.train.config import TrainConfig
from segcn.train.log import LOG, fractions, read_log, training_command, training_lines, validation_scores
from segcn.train.loss import valid_cells
from segcn.train.validation import convergence_step
from segcn.utils.args import arguments_of, make
from segcn.utils.errors import UserError
from segcn.utils.io import write_whole

MARK = "#c2451e"  # color of the step of convergence
FAINT = 0.3  # strength of the mask's colors over an image


def loss_curve(entries: list[dict], axes: Axes | None = None) -> Figure | SubFigure:
    """The loss of a log.jsonl over the steps, as logged and smoothed, from 0 up."""
    axes = axes or Figure(figsize=(7, 2.6), layout="constrained").add_subplot()
    entries = [entry for entry in entries if "loss" in entry]
    axes.set(title="training loss", xlabel="step")
    if not entries:
        return _only_text(axes, "no step yet")
    steps, losses = ([entry[name] for entry in entries] for name in ("step", "loss"))
    axes.plot(steps, losses, color="#b9cbe0", linewidth=1, marker="." if len(steps) < 5 else "", label="logged")
    axes.plot(steps, smooth(losses), color=ACCENT, linewidth=1.8, label="smoothed")
    axes.set_ylim(0, 1.3 * max(losses))
    axes.legend(ncols=2, loc="upper right")
    return axes.figure


def faithfulness_curve(entries: list[dict], axes: Axes | None = None) -> Figure | SubFigure:
    """How well images obey their masks over the steps, as a share of the ceiling; where that begins and is best."""
    axes = axes or Figure(figsize=(7, 3), layout="constrained").add_subplot()
    axes.set(title="faithfulness on held-out masks, share of the ceiling", xlabel="step")
    steps, values = fractions(entries)
    if not steps:
        return _only_text(axes, "not measured (--faithfulness_rows)")
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
    return axes.figure


def class_faithfulness(entries: list[dict], palette: Palette) -> Figure | SubFigure:
    """IoU of each class at the best step, in its color; a line marks the real images, a dot the start."""
    found, real = validation_scores(entries), [entry["ceiling"] for entry in entries if "ceiling" in entry]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    if not found or not real:
        return _only_text(axes, "not measured (--faithfulness_rows)")
    start, best = min(found), max(found, key=lambda step: found[step]["of_ceiling"])
    labels = [label for label in palette.labels if found[best]["per_class"].get(label.name) is not None]
    figure.set_figheight(1 + 0.26 * len(labels))
    started, reached, ceiling = (
        [scores["per_class"].get(label.name) or 0 for label in labels]
        for scores in (found[start], found[best], real[-1])
    )
    places, colors = np.arange(len(labels)), [np.array(label.color) / 255 for label in labels]
    axes.barh(places, reached, 0.72, color=colors, edgecolor="#888888", linewidth=0.5)
    axes.plot(started, places, "o", color="white", markeredgecolor="#222222", markersize=5, label=f"step {start}")
    axes.plot(ceiling, places, "|", color="#222222", markersize=13, markeredgewidth=2, label="real images")
    for place, value in zip(places, reached, strict=True):
        axes.text(1.09, float(place), f"{value:.2f}", va="center", ha="right", fontsize=8)
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
    share, miou = best["of_ceiling"], best["miou"]
    return f"step {best['step']} is the best: {share:.0%} of the ceiling (mIoU {miou:.3f}); {where}"


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average whose start is not biased (as Adam's: Kingma and Ba 2015, arXiv:1412.6980)."""
    weight, mean, smoothed = 0.8, 0.0, []
    for step, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**step))
    return smoothed


def train_and_show(config: TrainConfig, num_processes: int = 1) -> None:
    """Train in other processes; print what they say and keep one figure of the loss and newest images current.

    When the training is done the figure goes: the notebook shows its parts below. UserError if training fails.
    """
    from IPython.display import Markdown, display

    folder, shown_at = Path(config.output_dir), time.monotonic()
    handle = display(progress(folder), display_id=True)
    with contextlib.closing(training_lines(config, num_processes)) as lines:
        for line in lines:
            print_seldom(line)
            if time.monotonic() - shown_at > 5:  # seconds
                handle.update(progress(folder))
                shown_at = time.monotonic()
    handle.update(Markdown("Done: the curves and images are below."))


def print_seldom(line: str) -> None:
    """Print a line of a training's output; of the step lines only each 50th step and the last."""
    found = re.search(r"\bstep (\d+)/(\d+)", line)
    if found and int(found[1]) % 50 and found[1] != found[2]:
        return
    if line.strip() and "%|" not in line and "Warning" not in line:
        print(line, flush=True)


def command_text(config: TrainConfig, num_processes: int = 1) -> str:
    """The command that `train_and_show` starts, ready for a shell, without the settings of the preset itself."""
    words = training_command(config, num_processes)
    start = words[: words.index("segcn.train") + 1]
    usual, options = (_options(arguments_of(one)) for one in (make(TrainConfig, config.preset), config))
    lines = [option for option in options if option not in usual]
    return " \\\n  ".join([shlex.join(start), f"--preset {config.preset}", *lines])


def _options(words: list[str]) -> list[str]:
    """Each option with its values as one shell text."""
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    return [shlex.join(words[start:end]) for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]


def validation_sheets(folder: str | Path) -> dict[int, Path]:
    """The validation/step-N.png of a run folder by their step, oldest first."""
    sheets = sorted((Path(folder) / "validation").glob("step-*.png"))
    return {int(path.stem.removeprefix("step-")): path for path in sheets}


def validation_over_time(folder: str | Path, most: int = 6) -> Figure | SubFigure:
    """The masks, and below them the images of `most` steps of a training, the last one among them."""
    sheets = validation_sheets(folder)
    if not sheets:
        text = "no images yet (--faithfulness_rows, --validation_image)"
        return _only_text(Figure(figsize=(7, 1)).add_subplot(), text)
    steps = [list(sheets)[place] for place in np.unique(np.linspace(0, len(sheets) - 1, most).round().astype(int))]
    rows = [read_sheet(sheets[step]) for step in steps]
    return grid([rows[0][0], *(row[1] for row in rows)], left=["mask", *(f"step {step}" for step in steps)])


def progress(folder: Path) -> Figure:
    """The curves so far, and under them the newest validation images."""
    entries, sheets = read_log(folder / LOG), validation_sheets(folder)
    newest = np.asarray(Image.open(list(sheets.values())[-1])) if sheets else np.zeros((0, 1, 3))
    heights = [2.6, 9 * newest.shape[0] / newest.shape[1] + 0.3][: 1 + bool(sheets)]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    curves, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    loss, obeyed = curves.subplots(1, 2)
    loss_curve(entries, loss)
    faithfulness_curve(entries, obeyed)
    for part in below:
        axes = part.add_subplot()
        axes.imshow(newest, interpolation="antialiased")
        axes.set_title(f"step {max(sheets)}: masks, and the images generated from them")
        axes.axis("off")
    return figure


def _only_text(axes: Axes, text: str) -> Figure | SubFigure:
    """A text in place of a curve."""
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes, color="#888888")
    axes.set(xticks=[], yticks=[], xlabel="")
    return axes.figure


def augmented(pairs: PairedDataset, row: int, draws: int = 10) -> Figure:
    """One row as the first epochs see it, the mask's colors and borders over the image; out of frame is hatched."""
    samples, notes = [pairs.sample(row, epoch) for epoch in range(draws)], []
    for draw in (sample.draw for sample in samples):
        notes.append(
            f"turn {round(draw.angle):+d}°, scale {draw.scale:.2f}\n"
            f"shift {round(100 * draw.translate_x):+d}%, {round(100 * draw.translate_y):+d}%\n"
            f"shear {round(draw.shear_x):+d}°, {round(draw.shear_y):+d}°{', flipped' if draw.flip else ''}"
        )
    return sheet([_overlaid(sample, pairs.split.palette) for sample in samples], notes, columns=5, width=1.8)


def network_view(sample: Sample, factor: int) -> Figure:
    """What a training step gets: image, control, and the latent cells that count in the loss."""
    control = (sample.control.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    cells = valid_cells(sample.valid[None], factor)[0].numpy()
    tones = (
        np.where(cells, 240, 110).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    )  # white counts, grey does not
    tones[::factor] = tones[:, ::factor] = 90
    image, shown_cells = to_uint8(sample.image), np.repeat(tones[..., None], 3, axis=2)
    notes = [f"{part.min():.2f} to {part.max():.2f}, {' x '.join(map(str, part.shape))}"
             for part in (sample.image, sample.control)]  # fmt: skip
    notes += ["edges run on: aligned", f"{cells.sum()} of {cells.shape[0]} x {cells.shape[1]} cells"]
    heads = ["image", "control", "checkerboard", "cells in the loss"]
    return grid([[image, control, checkerboard(image, control), shown_cells]], heads, below=[notes], width=2.2)


def least_in_frame(pairs: PairedDataset, row: int, epochs: int = 16) -> Sample:
    """Of a row's first draws the one that moves most of the image out of frame."""
    return min((pairs.sample(row, epoch) for epoch in range(epochs)), key=lambda sample: sample.valid.sum().item())


def landings(pairs: PairedDataset, row: int, draw: Draw) -> Figure:
    """Points on the borders of the mask, numbered, and where `to_output` says that the draw puts them."""
    image, mask = read_pair(pairs.split, row)
    size, side = mask.shape, pairs.resolution
    moved, moved_mask, valid = apply(*_tensors(image, mask), draw, side)
    points = _landmarks(mask)
    figure = Figure(figsize=(8.2, 4.2 * max(1, min(1.6, size[0] / size[1]))))
    drawn = _outlined(moved.permute(1, 2, 0).numpy(), moved_mask[0].numpy(), valid[0].numpy())
    sides = [(outlined(image, mask), points, size, "on disk"),
             (drawn, to_output(points, draw, size, side), (side, side), "where they land")]  # fmt: skip
    for axes, (shown, places, (height, width), title) in zip(figure.subplots(1, 2), sides, strict=True):
        axes.imshow(shown, interpolation="antialiased")
        axes.set_title(f"{title}, {width} x {height}")
        axes.axis("off")
        for number, (x, y) in enumerate(places, 1):
            if 0 <= x < width and 0 <= y < height:
                axes.plot(x, y, "+", color="white", markersize=13, markeredgewidth=4)
                axes.plot(x, y, "+", color="black", markersize=12, markeredgewidth=1.8)
                frame = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
                axes.annotate(str(number), (x, y), (5, 5), textcoords="offset points", weight="bold", bbox=frame)
    figure.tight_layout()
    return figure


def _landmarks(mask: np.ndarray) -> np.ndarray:
    """In each of 3 x 3 fields the border pixel nearest to its middle, or else the middle: (x, y) [N, 2]."""
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    sides, points = np.array(mask.shape) / 3, []
    for field in np.ndindex(3, 3):
        middle = (np.array(field) + 0.5) * sides
        near = np.argwhere(border)
        near = near[(np.abs(near - middle) < sides / 2).all(1)]
        points.append((near[np.abs(near - middle).sum(1).argmin()] if len(near) else middle)[::-1])
    return np.array(points, np.float64)


def misplaced(draw: Draw, size: tuple[int, int], resolution: int) -> tuple[float, float]:
    """How far image and mask lie from where `to_source` says, at most, in pixels of an image of `size`.

    The image's colors are its coordinates (so 255 a side at most), as are the classes of two masks. Its rim, where
    there is nothing to blend with, is left out.
    """
    y, x = np.mgrid[: size[0], : size[1]].astype(np.uint8)
    draw = replace(draw, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0)
    image, across, valid = apply(*_tensors(np.stack([x, y, x], -1), x), draw, resolution)
    down = apply(*_tensors(np.stack([x, y, x], -1), y), draw, resolution)[1]
    rows, columns = np.nonzero(valid[0].numpy())
    source = to_source(np.stack([columns, rows], -1), draw, size, resolution)
    inner = ((source > 2) & (source < np.array(size[::-1]) - 3)).all(-1)
    found = [torch.stack(pair)[:, rows, columns].T.numpy() for pair in ((image[0], image[1]), (across[0], down[0]))]
    of_image, of_mask = (float(np.abs(places - source)[inner].max()) for places in found)
    return of_image, of_mask


def covered(pairs: PairedDataset, row: int, draws: int = 5) -> Figure:
    """The draws that leave most empty with fill=ignore, and below them the same with fill=cover."""
    ignoring, covering = (
        PairedDataset(pairs.split, pairs.resolution, replace(pairs.augment, fill=fill), pairs.seed, pairs.fit)
        for fill in ("ignore", "cover")
    )
    in_frame = {epoch: ignoring.sample(row, epoch).valid.sum().item() for epoch in range(4 * draws)}
    epochs = sorted(in_frame, key=lambda epoch: in_frame[epoch])[:draws]
    samples = [[source.sample(row, epoch) for epoch in epochs] for source in (ignoring, covering)]
    images = [[_overlaid(sample, pairs.split.palette) for sample in line] for line in samples]
    notes = [[f"scale {s.draw.scale:.2f}, {s.valid.float().mean():.0%} in frame" for s in line] for line in samples]
    return grid(images, left=["fill=\nignore", "fill=\ncover"], below=notes, width=1.7)


def fits(pairs: PairedDataset, row: int) -> Figure:
    """An image that is not square, and the square that each fit makes of it.

    A square one is cut to 2:1 first, where most borders between classes are seen.
    """
    image, mask = read_pair(pairs.split, row)
    side = image.shape[0]
    if side == image.shape[1]:
        borders = (mask[:, 1:] != mask[:, :-1]).sum(1)  # of each line
        top = max(range(side // 2 + 1), key=lambda top: borders[top : top + side // 2].sum())
        image, mask = (pixels[top : top + side // 2] for pixels in (image, mask))
    images = []
    for fit in FITS:
        square, ids, valid = apply(*_tensors(image, mask), Draw(fit=fit), pairs.resolution)
        shown = overlay(square.permute(1, 2, 0).numpy(), ids[0].numpy(), pairs.split.palette, FAINT)
        images.append(hatched(shown, valid[0].numpy()))
    whole = np.full((max(image.shape), max(image.shape), 3), 255, np.uint8)
    top, left = ((whole.shape[0] - side) // 2 for side in mask.shape)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = image
    return grid([[whole, *images]], [f"{mask.shape[1]} x {mask.shape[0]} pixels", *FITS], width=2.1)


def with_a_rare_class(split: Split, share: float = 0.2, kept: int = 10) -> Split:
    """The rows; where more than `share` of them show each class, every `kept`-th of those with the rarest alone."""
    shows = class_pixels(split) > 0
    counts = np.where(shows.any(0), shows.sum(0), len(split) + 1)
    rarest = int(counts.argmin())
    if counts[rarest] <= share * len(split):
        return split
    left_out = {row for number, row in enumerate(np.flatnonzero(shows[:, rarest])) if number % kept}
    return replace(split, records=tuple(record for row, record in enumerate(split.records) if row not in left_out))


def mirrored_caption(pairs: PairedDataset, row: int) -> Figure:
    """An image with a caption that says a side, flipped with the caption kept (wrong) and with it rewritten."""
    image, mask = read_pair(pairs.split, row, pairs.resolution, pairs.fit)
    caption = sided_caption(pairs.split[row].caption, mask, pairs.split.palette)
    shown, turned = (
        overlay(*pair, pairs.split.palette, FAINT) for pair in ((image, mask), (image[:, ::-1], mask[:, ::-1]))
    )
    heads = ["as it is", "flipped, caption kept: wrong", "flipped and rewritten"]
    return grid([[shown, turned, turned]], heads, below=[[caption, caption, mirrored(caption)]], width=2.6)


def sided_caption(caption: str, mask: np.ndarray, palette: Palette) -> str:
    """The caption, if it says a side; else with the class whose middle is farthest from the mask's, and its side."""
    if says_a_side(caption):
        return caption
    reach = {}
    for label in palette.labels:
        columns = np.nonzero(mask == label.id)[1]
        if not label.ignore and len(columns) > mask.size / 200:
            reach[label.name] = columns.mean() / (mask.shape[1] - 1) - 0.5
    if not reach:
        return f"{caption}, seen from the left"
    name = max(reach, key=lambda name: abs(reach[name]))
    return f"{caption}, more {name} on the {'left' if reach[name] < 0 else 'right'}"


def overlaid(image: torch.Tensor, mask: torch.Tensor, valid: torch.Tensor, palette: Palette) -> np.ndarray:
    """Image uint8 [3, H, W], the mask's colors faintly over it and its borders drawn; hatched where not valid."""
    return _outlined(overlay(image.permute(1, 2, 0).numpy(), mask.numpy(), palette, FAINT), mask.numpy(), valid.numpy())


def _overlaid(sample: Sample, palette: Palette) -> np.ndarray:
    return overlaid(torch.from_numpy(to_uint8(sample.image)).permute(2, 0, 1), sample.mask, sample.valid, palette)


def _outlined(image: np.ndarray, mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Image with the borders between classes, but not the one of the frame; hatched where out of frame."""
    drawn, rim = outlined(image, mask), np.zeros(valid.shape, bool)
    rim[:, 1:] |= ~valid[:, :-1]
    rim[1:] |= ~valid[:-1]
    drawn[rim] = image[rim]
    return hatched(drawn, valid)


def _tensors(image: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [H, W, 3] and [H, W] -> uint8 [3, H, W] and [1, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(mask)[None]


def write_story(
    path: Path,
    real: Split,
    generated: Split,
    floor: Split,
    recaptioned: Sequence[np.ndarray],
    captions: Sequence[str],
    resolution: int,
    fit="crop",
) -> Figure:
    """Draw rows of mask, real image and three generated ones, with both captions, and write them as one PNG.

    recaptioned: uint8 [H, W, 3] each, image k generated from mask k and captions[k]; as many rows are shown, all images
    as large as in training.
    """
    rows = []
    for row, other in enumerate(recaptioned):
        image, mask = read_pair(real, row, resolution, fit)
        others = (read_pair(split, row, resolution, fit)[0] for split in (generated, floor))
        rows.append([colorize(mask, real.palette), image, *others, other])
    heads = ["mask", "real image", "with the mask", "without the mask", "another caption"]
    below = [["", real[row].caption, "", "", text] for row, text in enumerate(captions)]
    figure = grid(rows, heads, below=below, width=1.8)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=160, bbox_inches="tight"))
    return figure


@dataclass(frozen=True)
class Point:
    """One setting of notebook 04 in a sweep, and the folder of its images."""

    guidance_scale: float
    controlnet_conditioning_scale: float
    folder: Path

    @property
    def parameters(self) -> dict[str, float | str]:
        """As notebook 04 takes them."""
        weights = {name: getattr(self, name) for name in ("guidance_scale", "controlnet_conditioning_scale")}
        return weights | {"output_dir": str(self.folder)}

    def generated(self, limit: int) -> Split:
        """Its first images."""
        return read_split(self.folder / "generated").first(limit)


def points(guidance_scales: str, controlnet_conditioning_scales: str, folder: Path) -> list[Point]:
    """Every pair of two lists such as "1,1.5,4", the guidance first; UserError for what is no number above 0."""
    lists = {"guidance_scales": guidance_scales, "controlnet_conditioning_scales": controlnet_conditioning_scales}
    numbers = []
    for name, text in lists.items():
        try:
            numbers.append([float(part) for part in text.split(",")])
        except ValueError:
            numbers.append([0.0])
        if min(numbers[-1]) <= 0:
            raise UserError(f"{name}: expected numbers above 0 as in 1,1.5,4, found {text!r}")
    guidances, weights = numbers
    return [Point(one, other, folder / f"guidance-{one:g}-mask-{other:g}") for one in guidances for other in weights]


def scores(swept: Sequence[Point], segmenter: Segmenter, limit: int) -> list[float]:
    """mIoU of each point's images and their masks."""
    return [faithfulness(point.generated(limit), segmenter)["miou"] for point in swept]


def sweep_figure(swept: Sequence[Point], found: Sequence[float], row: int = 0) -> Figure:
    """The same row at every point, guidance downward and the weight of the mask to the right, each with its mIoU."""
    columns = len({point.controlnet_conditioning_scale for point in swept})
    lines = [slice(at, at + columns) for at in range(0, len(swept), columns)]
    cells = [read_pair(point.generated(row + 1), row)[0] for point in swept]
    texts = [f"mIoU {value:.3f}" + (", the highest" if value == max(found) else "") for value in found]
    heads = [f"mask weight {point.controlnet_conditioning_scale:g}" for point in swept[:columns]]
    left = [f"guidance {point.guidance_scale:g}" for point in swept[::columns]]
    return grid([cells[line] for line in lines], heads, left, [texts[line] for line in lines], 1.9)


def wanted(real: Split, resolution: int, fit: str) -> Figure:
    """Mask and real image of the first row, the one that `sweep_figure` shows."""
    image, mask = read_pair(real, 0, resolution, fit)
    return grid([[side_by_side(colorize(mask, real.palette), image)]], below=[[real[0].caption]], width=3.8)
