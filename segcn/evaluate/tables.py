"""The metrics of an evaluation as plain text, at most 100 columns wide."""

import json
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from segcn.evaluate.bootstrap import Estimate, difference
from segcn.evaluate.evaluator import DRAWS, METRICS, ROWS
from segcn.utils.errors import UserError

# --- metrics_table: The metrics of an evaluation as plain text, at most 100 columns wide.

WIDEST = 100  # characters a line
SPREAD = ("precision", "recall", "density", "coverage")


def table(metrics: dict) -> str:
    """Faithfulness by set and class, then the distances with their extractor, text, copies, color, and warnings."""
    measured = metrics["faithfulness"]
    names = [name for name in ROWS if name in measured]
    columns = [["", *(ROWS[name] for name in names)]]
    columns.append(["images", *(str(measured[name]["images"]) for name in names)])
    columns.append(["mIoU", *(within(metrics, "faithfulness", name, "miou") for name in names)])
    columns.append(["of ceiling", "1", *(within(metrics, "shares_of_ceiling", name, "miou") for name in names[1:])])
    columns.append(["boundary F", *(within(metrics, "faithfulness", name, "boundary_f") for name in names)])
    classes = [columns[0]]
    for label in measured["real"]["per_class"]:
        classes.append([label[:12], *(number(measured[name]["per_class"][label]) for name in names)])
    told = ["\n".join(map(wrapped, lines(metrics)))]
    return "\n\n".join([*_blocks(columns), *_blocks(classes), *told, *map(wrapped, metrics["warnings"])]) + "\n"


def lines(metrics: dict) -> Iterator[str]:
    """Everything but faithfulness, a line each."""
    found = metrics["distance"]
    for title, key in zip(found["names"], ("frechet_distance", "kernel_distance"), strict=True):
        yield f"{title} ({found['extractor']}): {within(metrics, 'distance', key, digits=4)}"
    yield ", ".join(f"{key} {within(metrics, 'distance', key)}" for key in SPREAD[:2])
    yield ", ".join(f"{key} {within(metrics, 'distance', key)}" for key in SPREAD[2:])
    counts = f"{found['images_real']} real and {found['images_synthetic']} generated images"
    yield f"({found['extractor']} of {counts}, {found['resolution']} px)"
    for name, told in metrics["text"].items():
        for title in told:
            yield f"{title}, {ROWS[name]}: {within(metrics, 'text', name, title)}"
    shift = metrics["color"]
    told = f"lighter {shift['L']:+.2f}, redder {shift['a']:+.2f}, yellower {shift['b']:+.2f}"
    yield f"color: {told} (CIE L*a*b*), delta E {within(metrics, 'color', 'delta_e', digits=3)}"
    if metrics["copies"]:
        chance = within(metrics, "copies", "nearer_than_real")
        yield f"nearer to a training image than real test images are: {chance} (0.5: as new)"


def within(metrics: dict, *place: str, digits: int = 0) -> str:
    """A number with its 95 % interval, "0.612 [0.598, 0.627]"; digits: significant ones, or 3 decimals."""
    value, interval = lookup(metrics, place), lookup(metrics["intervals"], place)
    if value is None or interval is None:
        return number(value, digits)
    return f"{number(value, digits)} [{', '.join(number(end, digits) for end in interval)}]"


def lookup(nest: dict | None, place: tuple[str, ...]):
    """What stands at a place of a nest of dictionaries, or None."""
    for key in place:
        nest = nest.get(key) if isinstance(nest, dict) else None
    return nest


def number(value: float | None, digits: int = 0) -> str:
    """Three decimals, or so many significant digits; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}g}" if digits else f"{value:.3f}"


def wrapped(text: str) -> str:
    """In lines of that width."""
    return textwrap.fill(text, WIDEST)


def _blocks(columns: list[list[str]]) -> list[str]:
    """Columns of cells side by side, in as many blocks as the width asks for; the first column leads each."""
    lead, *rest = [_aligned(column, str.rjust if index else str.ljust) for index, column in enumerate(columns)]
    blocks, block = [], [lead]
    for column in rest:
        if sum(len(cells[0]) + 1 for cells in [*block, column]) > WIDEST + 1:
            blocks.append(block)
            block = [lead]
        block.append(column)
    return ["\n".join(" ".join(cells).rstrip() for cells in zip(*block, strict=True)) for block in [*blocks, block]]


def _aligned(column: list[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [justify(cell, width) for cell in column]


# --- compare: Two evaluations side by side: each number, and their difference with its interval.

SETS = tuple(name for name in ROWS if name != "real")


def compare(one: str | Path, other: str | Path) -> str:
    """What two runs' metrics.json and draws say, as text: `segcn evaluate compare RUN RUN`.

    Where both saw the same rows their draws are paired, image by image. UserError where a folder holds no evaluation.
    """
    runs = [read_run(folder) for folder in (one, other)]
    lines = [f"A: {one}", f"B: {other}", *map(wrapped, cautions(runs[0][0], runs[1][0])), ""]
    lines.append(f"{'':44}{'A':>9}{'B':>9}   B - A [95 %]")
    for title, place in places(runs[0][0], runs[1][0]):
        numbers = [Estimate(lookup(metrics, place), draws["/".join(place)]) for metrics, draws in runs]
        apart = difference(numbers[1], numbers[0])
        low, high = apart.interval() or (float("nan"), float("nan"))
        mark = "  *" if low > 0 or high < 0 else ""
        digits = 3 if place[0] in ("crops", "color") or place[-1].endswith("_distance") else 0
        shown = [number(value, digits) for value in (*(one.value for one in numbers), apart.value)]
        ends = [number(end, digits) for end in (low, high)]
        lines.append(f"{title[:43]:44}{shown[0]:>9}{shown[1]:>9}   {shown[2]} [{', '.join(ends)}]{mark}")
    return "\n".join([*lines, "", "* the interval excludes zero"]) + "\n"


def read_run(folder: str | Path) -> tuple[dict, dict]:
    """The metrics and draws of an evaluation, by its folder or its metrics.json; UserError if it is not whole."""
    folder = Path(folder)
    folder = folder.parent if folder.name == METRICS else folder
    try:
        return json.loads((folder / METRICS).read_text(encoding="utf-8")), load_file(folder / DRAWS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: expected {METRICS} and {DRAWS}, as segcn evaluate writes them, found: {error}"
        ) from None


def places(one: dict, other: dict) -> list[tuple[str, tuple[str, ...]]]:
    """(title, place in the metrics) of every number that both runs tell, the means before the classes."""
    extractor = one["distance"]["extractor"]
    wanted: list[tuple[str, tuple[str, ...]]]
    wanted = [(f"{title} of ceiling, {ROWS[name]}", ("shares_of_ceiling", name, key))
              for key, title in (("miou", "mIoU"), ("boundary_f", "boundary F")) for name in SETS]  # fmt: skip
    wanted += [(f"{title}, {ROWS[name]}", ("faithfulness", name, key))
               for key, title in (("miou", "mIoU"), ("boundary_f", "boundary F")) for name in ROWS]  # fmt: skip
    if extractor == other["distance"]["extractor"]:
        names = zip(one["distance"]["names"], ("frechet_distance", "kernel_distance"), strict=True)
        wanted += [(f"{title} ({extractor})", ("distance", key)) for title, key in names]
        wanted += [(key, ("distance", key)) for key in ("precision", "recall", "density", "coverage")]
        wanted.append(("nearer to training than real", ("copies", "nearer_than_real")))
    wanted += [
        (f"{title}, {ROWS[name]}", ("text", name, title)) for name, told in one["text"].items() for title in told
    ]
    if extractor == other["distance"]["extractor"]:
        wanted += [
            (f"{one['distance']['names'][1]} of {label}, cut out", ("crops", "kernel_distance", label))
            for label in one["classes"]
        ]
    wanted.append(("color shift, delta E", ("color", "delta_e")))
    wanted += [(f"IoU of {label}, with mask", ("faithfulness", "synthetic", "per_class", label))
               for label in one["classes"]]  # fmt: skip
    return [(title, place) for title, place in wanted if lookup(one, place) is not None
            and lookup(other, place) is not None]  # fmt: skip


def cautions(one: dict, other: dict) -> list[str]:
    """What makes two evaluations hard to compare."""
    found = []
    if one["sets"]["real"]["fingerprint"] != other["sets"]["real"]["fingerprint"]:
        found.append("The real images differ: so do the ceilings and the distances.")
    if one["segmenter"] != other["segmenter"]:
        found.append("The segmenters differ: compare the shares of the ceiling, not the IoU.")
    if one["distance"]["extractor"] != other["distance"]["extractor"]:
        found.append("The extractors differ: no distance is compared.")
    elif one["distance"]["images_synthetic"] != other["distance"]["images_synthetic"]:
        found.append("The sets have other sizes, and a Fréchet distance falls with more images.")
    return found
