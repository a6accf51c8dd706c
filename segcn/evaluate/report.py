"""What an evaluation says in words: a table of its metrics, an answer to each question, two runs side by side."""

import json
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from segcn.evaluate.bootstrap import Estimate, difference
from segcn.evaluate.evaluator import DRAWS_FILE, METRICS_FILE, ROWS
from segcn.evaluate.metrics import VISIBLE
from segcn.evaluate.provenance import RECAPTIONED
from segcn.utils.errors import UserError

WIDTH = 100  # characters a line
FAR = 0.5  # precision or coverage, below which images are called far from the real ones
SPREADS = ("precision", "recall", "density", "coverage")
NEAR_BY_DESIGN = "they were made from real images (--from_images, --inpaint), to which they are near by design"
DISTANCES = ("frechet_distance", "kernel_distance")


def metrics_table(metrics: dict) -> str:
    """Faithfulness by set and class, then distances with their extractor, text, color, copies, and warnings."""
    scored = metrics["faithfulness"]
    names = [name for name in ROWS if name in scored]
    columns = [
        ["", *(ROWS[name] for name in names)],
        ["images", *(str(scored[name]["images"]) for name in names)],
        ["mIoU", *(within(metrics, "faithfulness", name, "miou") for name in names)],
        ["of ceiling", number(1), *(within(metrics, "shares_of_ceiling", name, "miou") for name in names[1:])],
        ["boundary F", *(within(metrics, "faithfulness", name, "boundary_f") for name in names)],
    ]
    classes = [columns[0]]
    for label in scored["real"]["per_class"]:
        classes.append([label[:12], *(number(scored[name]["per_class"][label]) for name in names)])
    lines = "\n".join(textwrap.fill(line, WIDTH) for line in _lines(metrics))
    warnings = [textwrap.fill(warning, WIDTH) for warning in metrics["warnings"]]
    return "\n\n".join([*_side_by_side(columns), *_side_by_side(classes), lines, *warnings]) + "\n"


SUFFICES, LESS_WELL = 0.95, 0.75  # of the mIoU with captions as they are: from there on "Yes", "Less well"
QUESTIONS = {
    "without_classes": "Does a mask suffice without classes in the caption?",
    "other_captions": "Is the mask followed under another row's caption?",
}


def answers(metrics: dict) -> Iterator[tuple[str, str]]:
    """(question, its answer in a sentence)."""
    share = within(metrics, "shares_of_ceiling", "synthetic", "miou")
    found, ceiling = (number(metrics["faithfulness"][name]["miou"]) for name in ("synthetic", "real"))
    floor = metrics["faithfulness"].get("floor")
    without = f"; images generated without the mask reach {number(floor['miou'])}" if floor else ""
    yield (
        "Do the images follow their masks?",
        f"To {share} of the ceiling (mIoU {found} of {ceiling}){without}.",
    )
    for name, question in QUESTIONS.items():
        if name in metrics["not_given"]:
            yield question, _sentence(not_given(name, metrics["not_given"][name]).partition(": ")[2])
        else:
            value = metrics["shares_of_with_mask"][name]["miou"] or 0.0
            said = within(metrics, "shares_of_with_mask", name, "miou")
            share = within(metrics, "shares_of_ceiling", name, "miou")
            level = "Yes" if value >= SUFFICES else "Less well" if value >= LESS_WELL else "No"
            yield (
                question,
                (
                    f"{level}: mIoU is {said} of that with the captions as they are ({share} of the ceiling). "
                    f"From {SUFFICES} on: yes; below {LESS_WELL}: no."
                ),
            )
    if metrics["reward"]:
        yield "Does the segmenter that rewarded the training agree?", _sentence(reward_line(metrics))
    if metrics["filtering"]:
        yield "What did the filter leave out?", _sentence(filtering_line(metrics["filtering"]))
    apart = (metrics["intervals"]["distance"]["kernel_distance"] or [0])[0] > 0
    yield (
        "Are they like real images?",
        (
            f"{'They differ' if apart else 'No difference is seen'}: {metrics['distance']['names'][1]} "
            f"({metrics['distance']['extractor']}) {within(metrics, 'distance', 'kernel_distance', digits=3)}."
        ),
    )
    scores = [f"{name} {within(metrics, 'text', 'synthetic', name)}, in real images {number(real)}"
              for name, real in metrics["text"].get("real", {}).items()]  # fmt: skip
    if scores:
        yield "Do they show what the captions say?", _sentence("; ".join(scores))
    if metrics["copies"]:
        low, high = metrics["intervals"]["copies"]["nearer_than_real"]
        far = far_from_real(metrics)
        verdict = "closer to them than real test images are: look at the closest pairs" if low > 0.5 else (
            "no closer to them than real test images are")  # fmt: skip
        said = f"the test {far}" if far and low <= 0.5 else f"they are {verdict}"
        said = NEAR_BY_DESIGN if metrics["copies"]["from_images"] else said
        yield "Are they copies of training images?", f"Memorization test {low:.2f} to {high:.2f} (0.5 = none): {said}."
    shift = metrics["color"]["delta_e"]
    yield (
        "Are the colors right?",
        (
            f"{'They are shifted visibly' if shift >= VISIBLE else 'Yes'}: mean color shift delta E "
            f"{within(metrics, 'color', 'delta_e', digits=3)}; {VISIBLE} is just visible."
        ),
    )


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def _lines(metrics: dict) -> Iterator[str]:
    """Everything but faithfulness, a line each."""
    found = metrics["distance"]
    for title, key in zip(found["names"], DISTANCES, strict=True):
        yield f"{title} ({found['extractor']}): {within(metrics, 'distance', key, digits=3)}"
    for pair in (SPREADS[:2], SPREADS[2:]):
        yield ", ".join(f"{key} {within(metrics, 'distance', key)}" for key in pair)
    counts = f"{found['images_real']} real and {found['images_synthetic']} generated images"
    yield f"({found['extractor']} of {counts}, {found['resolution']} px)"
    for extractor, each in metrics["distances"].items():
        shown = (f"{title} {within(metrics, 'distances', extractor, title, digits=3)}" for title in each)
        yield f"{extractor}: {', '.join(shown)}"
    for name in metrics["shares_of_with_mask"]:
        yield f"{ROWS[name]}: {within(metrics, 'shares_of_with_mask', name, 'miou')} of those with captions as they are"
    for name, command in metrics["not_given"].items():
        yield not_given(name, command)
    if metrics["reward"]:
        yield reward_line(metrics)
    for kind in ("text", "custom"):
        for name, scores in metrics[kind].items():
            for title in scores:
                yield f"{title}, {ROWS[name]}: {within(metrics, kind, name, title)}"
    shift, delta = metrics["color"], within(metrics, "color", "delta_e", digits=3)
    channels = f"dL {shift['L']:+.2f}, da {shift['a']:+.2f}, db {shift['b']:+.2f}"
    yield f"mean color shift (CIE L*a*b*): {channels}, delta E {delta}"
    if metrics["copies"]:
        far = NEAR_BY_DESIGN if metrics["copies"]["from_images"] else far_from_real(metrics)
        yield f"memorization test: {within(metrics, 'copies', 'nearer_than_real')} ({far or '0.5 = none'})"
    if metrics["filtering"]:
        yield filtering_line(metrics["filtering"])


def not_given(name: str, command: str) -> str:
    """How to measure a row that the evaluation does not have; the command names folders from the current one."""
    command = command.replace(f"{Path.cwd()}/", "")
    return f"{ROWS[name]}: not measured; {command} generates them, segcn evaluate --{name} DIR compares them"


def reward_line(metrics: dict) -> str:
    """The share of the ceiling by the segmenter that rewarded the training, beside that by the one that scores."""
    found = metrics["reward"]
    if found["weights"] == found["scored_by"]:
        return "consistency reward: the segmenter that rewarded the training scores these images, too"
    if found["of_ceiling_by_reward"] is None:
        return "consistency reward: another segmenter than the one that scores rewarded the training; it is not at hand"
    shares = [within(metrics, "reward", key) for key in ("of_ceiling_by_reward", "of_ceiling")]
    return "consistency reward: {} of the ceiling by the segmenter that rewarded, {} by the one that scores".format(
        *shares
    )


def filtering_line(found: dict) -> str:
    """How many images filtering kept and dropped, and what the dropped ones have more often than all of them."""
    again, dropped = f"{found['regenerated']} of them regenerated", f"{found['dropped']} dropped"
    text = f"filtering: {found['requested']} images requested, {found['kept']} kept ({again}), {dropped}"
    if found["segmenter_weights"] and found["segmenter_weights"] != found["scored_by"]:
        text += "; one segmenter filtered, another one scores"
    for kind, title in (("classes", "classes of the dropped"), ("words", "words of their prompts")):
        shares = [f"{name} {dropped:.0%} (of all {every:.0%})" for name, (dropped, every) in found[kind].items()]
        text += f"; {title}: {', '.join(shares)}" if shares else ""
    return text


def far_from_real(metrics: dict) -> str:
    """Why the memorization test says nothing, where images are far from all real ones: they are no copies, nor good."""
    precision, coverage = (metrics["distance"][key] for key in ("precision", "coverage"))
    if min(precision, coverage) >= FAR:
        return ""
    return f"says nothing: far from all real images, precision {precision:.2f}, coverage {coverage:.2f}"


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
    """So many significant digits, or three decimals, fewer from 10 on; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if digits:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


# Two evaluations side by side


def comparison(one: str | Path, other: str | Path) -> str:
    """Each number of two evaluations and their difference with its interval, as text.

    Where both saw the same rows their draws are paired, image by image. UserError where a folder holds no evaluation.
    """
    runs = [read_run(folder) for folder in (one, other)]
    cautions = [textwrap.fill(line, WIDTH) for line in _cautions(runs[0][0], runs[1][0])]
    lines = [f"A: {one}", f"B: {other}", *cautions, "", f"{'':48}{'A':>9}{'B':>9}   B - A [95 %]"]
    for title, place in _places(runs[0][0], runs[1][0]):
        a, b = [Estimate(lookup(metrics, place), draws["/".join(place)]) for metrics, draws in runs]
        apart = difference(b, a)
        low, high = apart.interval() or (float("nan"), float("nan"))
        mark = "  *" if low > 0 or high < 0 else ""
        digits = 3 if place[0] in ("crops", "color", "distances") or place[-1].endswith("_distance") else 0
        cells = [number(value, digits) for value in (a.value, b.value, apart.value, low, high)]
        lines.append("{:48}{:>9}{:>9}   {} [{}, {}]{}".format(title[:47], *cells, mark))
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
    places += [(f"of those with mask, {ROWS[name]}", ("shares_of_with_mask", name, "miou")) for name in RECAPTIONED]
    places.append(("mIoU of ceiling by the rewarding segmenter", ("reward", "of_ceiling_by_reward")))
    places += [(f"{title}, {ROWS[name]}", ("faithfulness", name, key))
               for key, title in scores.items() for name in ROWS]  # fmt: skip
    names, extractor = one["distance"]["names"], one["distance"]["extractor"]
    comparable = extractor == other["distance"]["extractor"]
    if comparable:
        places += [(f"{title} ({extractor})", ("distance", key)) for title, key in zip(names, DISTANCES, strict=True)]
        places += [(key, ("distance", key)) for key in SPREADS]
        places.append(("memorization test", ("copies", "nearer_than_real")))
    places += [(f"{title} ({name})", ("distances", name, title))
               for name, each in one["distances"].items() for title in each]  # fmt: skip
    places += [(f"{title}, {ROWS[name]}", (kind, name, title)) for kind in ("text", "custom")
               for name, each in one[kind].items() for title in each]  # fmt: skip
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
