"""Two evaluations side by side: each number, and their difference with its interval."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from segcn.bootstrap import Estimate, difference
from segcn.errors import UserError
from segcn.evaluate import DRAWS, METRICS, ROWS
from segcn.metrics_table import lookup, number, wrapped

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
        digits = 3 if place[0] in ("crops", "colour") or place[-1].endswith("_distance") else 0
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
    wanted.append(("colour shift, delta E", ("colour", "delta_e")))
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
