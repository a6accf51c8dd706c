"""The metrics of an evaluation as plain text, at most 100 columns wide."""

import math
import textwrap
from collections.abc import Callable, Iterator

from segcn.evaluate import ROWS

WIDEST = 100  # characters a line
SPREAD = ("precision", "recall", "density", "coverage")


def table(metrics: dict) -> str:
    """Faithfulness by set and class, then the distances with their extractor, text, copies, colour, and warnings."""
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
    shift = metrics["colour"]
    told = f"lighter {shift['L']:+.2f}, redder {shift['a']:+.2f}, yellower {shift['b']:+.2f}"
    yield f"colour: {told} (CIE L*a*b*), delta E {within(metrics, 'colour', 'delta_e', digits=3)}"
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
