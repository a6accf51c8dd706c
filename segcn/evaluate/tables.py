"""The metrics of an evaluation, and of two side by side, as plain text of at most 100 columns."""

import json
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from segcn.evaluate.bootstrap import Estimate, difference
from segcn.evaluate.evaluator import DRAWS_FILE, METRICS_FILE, ROWS
from segcn.utils.errors import UserError

WIDTH = 100  # characters a line
SPREADS = ("precision", "recall", "density", "coverage")
DISTANCES = ("frechet_distance", "kernel_distance")


def metrics_table(metrics: dict) -> str:
    """Faithfulness by set and class, then distances with their extractor, text, color, copies, and warnings."""
    scored = metrics["faithfulness"]
    names = [name for name in ROWS if name in scored]
    columns = [
        ["", *(ROWS[name] for name in names)],
        ["images", *(str(scored[name]["images"]) for name in names)],
        ["mIoU", *(within(metrics, "faithfulness", name, "miou") for name in names)],
        ["of ceiling", "1", *(within(metrics, "shares_of_ceiling", name, "miou") for name in names[1:])],
        ["boundary F", *(within(metrics, "faithfulness", name, "boundary_f") for name in names)],
    ]
    classes = [columns[0]]
    for label in scored["real"]["per_class"]:
        classes.append([label[:12], *(number(scored[name]["per_class"][label]) for name in names)])
    lines = "\n".join(textwrap.fill(line, WIDTH) for line in _lines(metrics))
    warnings = [textwrap.fill(warning, WIDTH) for warning in metrics["warnings"]]
    return "\n\n".join([*_side_by_side(columns), *_side_by_side(classes), lines, *warnings]) + "\n"


def _lines(metrics: dict) -> Iterator[str]:
    """Everything but faithfulness, a line each."""
    found = metrics["distance"]
    for title, key in zip(found["names"], DISTANCES, strict=True):
        yield f"{title} ({found['extractor']}): {within(metrics, 'distance', key, digits=4)}"
    for pair in (SPREADS[:2], SPREADS[2:]):
        yield ", ".join(f"{key} {within(metrics, 'distance', key)}" for key in pair)
    counts = f"{found['images_real']} real and {found['images_synthetic']} generated images"
    yield f"({found['extractor']} of {counts}, {found['resolution']} px)"
    for kind in ("text", "custom"):
        for name, scores in metrics.get(kind, {}).items():
            for title in scores:
                yield f"{title}, {ROWS[name]}: {within(metrics, kind, name, title)}"
    shift = metrics.get("color")  # "colour" in older files
    if shift:
        channels = f"dL {shift['L']:+.2f}, da {shift['a']:+.2f}, db {shift['b']:+.2f}"
        delta = within(metrics, "color", "delta_e", digits=3)
        yield f"mean color shift (CIE L*a*b*): {channels}, delta E {delta}"
    if metrics["copies"]:
        yield f"memorization test: {within(metrics, 'copies', 'nearer_than_real')} (0.5 = none)"


def _side_by_side(columns: list[list[str]]) -> list[str]:
    """Columns of cells, in as many blocks as the width asks for; the first column leads each block."""
    widths = [max(map(len, column)) for column in columns]
    lead, *rest = [[cell.rjust(width) if place else cell.ljust(width) for cell in column]
                   for place, (column, width) in enumerate(zip(columns, widths, strict=True))]  # fmt: skip
    blocks = [[lead]]
    for column in rest:
        if sum(len(cells[0]) + 1 for cells in [*blocks[-1], column]) > WIDTH + 1:
            blocks.append([lead])
        blocks[-1].append(column)
    return ["\n".join(" ".join(cells).rstrip() for cells in zip(*block, strict=True)) for block in blocks]


def within(metrics: dict, *place: str, digits: int = 0) -> str:
    """A number with its 95 % interval, "0.612 [0.598, 0.627]"; digits: significant ones, or 3 decimals."""
    value, interval = lookup(metrics, place), lookup(metrics["intervals"], place)
    if value is None or interval is None:
        return number(value, digits)
    return f"{number(value, digits)} [{', '.join(number(end, digits) for end in interval)}]"


def lookup(nest: dict | None, place: tuple[str, ...]):
    """The value at a place in nested dictionaries, or None."""
    for key in place:
        nest = nest.get(key) if isinstance(nest, dict) else None
    return nest


def number(value: float | None, digits: int = 0) -> str:
    """Three decimals, or so many significant digits; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{digits}g}" if digits else f"{value:.3f}"


# Two evaluations side by side


def comparison(one: str | Path, other: str | Path) -> str:
    """Each number of two evaluations and their difference with its interval, as text.

    Where both saw the same rows their draws are paired, image by image. UserError where a folder holds no evaluation.
    """
    runs = [read_run(folder) for folder in (one, other)]
    cautions = [textwrap.fill(line, WIDTH) for line in _cautions(runs[0][0], runs[1][0])]
    lines = [f"A: {one}", f"B: {other}", *cautions, "", f"{'':44}{'A':>9}{'B':>9}   B - A [95 %]"]
    for title, place in _places(runs[0][0], runs[1][0]):
        a, b = [Estimate(lookup(metrics, place), draws["/".join(place)]) for metrics, draws in runs]
        apart = difference(b, a)
        low, high = apart.interval() or (float("nan"), float("nan"))
        mark = "  *" if low > 0 or high < 0 else ""
        digits = 3 if place[0] in ("crops", "color") or place[-1].endswith("_distance") else 0
        cells = [number(value, digits) for value in (a.value, b.value, apart.value, low, high)]
        lines.append("{:44}{:>9}{:>9}   {} [{}, {}]{}".format(title[:43], *cells, mark))
    return "\n".join([*lines, "", "* the interval excludes zero"])


def read_run(folder: str | Path) -> tuple[dict, dict]:
    """The metrics and draws of an evaluation, by its folder or its metrics.json; UserError if it is not complete."""
    folder = Path(folder)
    folder = folder.parent if folder.name == METRICS_FILE else folder
    try:
        return json.loads((folder / METRICS_FILE).read_text(encoding="utf-8")), load_file(folder / DRAWS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: expected {METRICS_FILE} and {DRAWS_FILE}, as segcn evaluate writes them, found: {error}"
        ) from None


def _places(one: dict, other: dict) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(title, place in the metrics) of every number that both runs have, the means before the classes."""
    scores, sets = {"miou": "mIoU", "boundary_f": "boundary F"}, [name for name in ROWS if name != "real"]
    places: list[tuple[str, tuple[str, ...]]]
    places = [(f"{title} of ceiling, {ROWS[name]}", ("shares_of_ceiling", name, key))
              for key, title in scores.items() for name in sets]  # fmt: skip
    places += [(f"{title}, {ROWS[name]}", ("faithfulness", name, key))
               for key, title in scores.items() for name in ROWS]  # fmt: skip
    names, extractor = one["distance"]["names"], one["distance"]["extractor"]
    comparable = extractor == other["distance"]["extractor"]
    if comparable:
        places += [(f"{title} ({extractor})", ("distance", key)) for title, key in zip(names, DISTANCES, strict=True)]
        places += [(key, ("distance", key)) for key in SPREADS]
        places.append(("memorization test", ("copies", "nearer_than_real")))
    places += [(f"{title}, {ROWS[name]}", (kind, name, title)) for kind in ("text", "custom")
               for name, each in one.get(kind, {}).items() for title in each]  # fmt: skip
    if comparable:
        places += [(f"{names[1]} of {label}, cut out", ("crops", "kernel_distance", label)) for label in one["classes"]]
    places.append(("color shift, delta E", ("color", "delta_e")))
    places += [(f"IoU of {label}, with mask", ("faithfulness", "synthetic", "per_class", label))
               for label in one["classes"]]  # fmt: skip
    for title, place in places:
        if lookup(one, place) is not None and lookup(other, place) is not None:
            yield title, place


def _cautions(one: dict, other: dict) -> Iterator[str]:
    """What makes two evaluations hard to compare."""
    if one["sets"]["real"]["fingerprint"] != other["sets"]["real"]["fingerprint"]:
        yield "The real images differ: so do the ceilings and the distances."
    if one["segmenter"] != other["segmenter"]:
        yield "The segmenters differ: compare the shares of the ceiling, not the IoU."
    if one["distance"]["extractor"] != other["distance"]["extractor"]:
        yield "The extractors differ: no distance is compared."
    elif one["distance"]["images_synthetic"] != other["distance"]["images_synthetic"]:
        yield "The sets have other sizes, and a Fréchet distance falls with more images."
