"""What an evaluation says: its metrics as plain text, two evaluations side by side, figures, and report.html."""

import json
import math
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

from segcn.data.dataset import to_uint8
from segcn.data.masks import colorize
from segcn.data.palette import Palette
from segcn.data.visualize import ACCENT, grid, heat_map, legend, name_classes, side_by_side
from segcn.evaluate.bootstrap import LEVEL, Estimate, difference
from segcn.evaluate.evaluator import DRAWS_FILE, LEAST_CROP, METRICS_FILE, ROWS, Evaluation
from segcn.evaluate.metrics import COMPARED, NEIGHBORS
from segcn.evaluate.provenance import RECAPTIONED
from segcn.models.base import one_core
from segcn.utils.errors import UserError
from segcn.utils.html import figure_img, render
from segcn.utils.io import write_text

WIDTH = 100  # characters a line
FAR = 0.5  # precision or coverage, below which images are called far from the real ones
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
    for name in metrics.get("shares_of_with_mask", {}):
        yield f"{ROWS[name]}: {within(metrics, 'shares_of_with_mask', name, 'miou')} of those with captions as they are"
    for name, command in metrics.get("not_given", {}).items():
        yield not_given(name, command)
    if metrics.get("reward"):
        yield reward_line(metrics)
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
        far = far_from_real(metrics)
        yield f"memorization test: {within(metrics, 'copies', 'nearer_than_real')} ({far or '0.5 = none'})"
    if metrics.get("filtering"):
        yield filtering_line(metrics["filtering"])


def not_given(name: str, command: str) -> str:
    """How to measure a row that the evaluation does not have."""
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
    text = f"filtering: {found['asked']} images asked for, {found['kept']} kept ({again}), {dropped}"
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
    lines = [f"A: {one}", f"B: {other}", *cautions, "", f"{'':48}{'A':>9}{'B':>9}   B - A [95 %]"]
    for title, place in _places(runs[0][0], runs[1][0]):
        a, b = [Estimate(lookup(metrics, place), draws["/".join(place)]) for metrics, draws in runs]
        apart = difference(b, a)
        low, high = apart.interval() or (float("nan"), float("nan"))
        mark = "  *" if low > 0 or high < 0 else ""
        digits = 3 if place[0] in ("crops", "color") or place[-1].endswith("_distance") else 0
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


# Figures

MOST_CLASSES = 20  # classes shown at most: those with the lowest IoU
SHOWN_COVER = 0.01  # of the pixels, which a class covers in an image that is shown for it
SET_COLORS = {"real": "#4d4d4d", "reconstructions": "#a8a8a8", "synthetic": ACCENT, "without_classes": "#5aa469",
              "other_captions": "#9a6fb0", "floor": "#e8a04c"}  # fmt: skip
EACH = 2  # best and worst images of a class


def class_scores(metrics: dict) -> Figure:
    """IoU and boundary F-score of each class with its interval, for every set of images."""
    measured, labels = metrics["faithfulness"], worst_classes(metrics)
    names = [name for name in ROWS if name in measured]
    figure = Figure(figsize=(9, 1.1 + 0.17 * len(labels) * len(names)))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, title in ((left, "per_class", "IoU"), (right, "per_class_boundary_f", "boundary F-score")):
        for at, name in enumerate(names):
            values = [measured[name][key][label] for label in labels]
            ends = [lookup(metrics["intervals"], ("faithfulness", name, key, label)) for label in labels]
            places = np.arange(len(labels)) + (at - (len(names) - 1) / 2) * 0.7 / len(names)
            _dots(axes, values, ends, places, SET_COLORS[name], ROWS[name])
        axes.set(title=title, xlim=(-0.02, 1.02))
        axes.grid(axis="x", color="#e4e4e4")
    name_classes(left, labels)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="upper left", bbox_to_anchor=(0.02, 1), ncols=len(handles[0]))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def worst_classes(metrics: dict) -> list[str]:
    """The classes that occur, at most 20: those with the lowest IoU, in the order of their ids."""
    found = {label: value for label, value in metrics["faithfulness"]["synthetic"]["per_class"].items()
             if value is not None}  # fmt: skip
    kept = sorted(found, key=lambda label: found[label])[:MOST_CLASSES]
    return [label for label in found if label in kept]


def reliability(metrics: dict) -> Figure:
    """Accuracy over the segmenter's confidence: on the dotted line its confidence can be believed."""
    figure = Figure(figsize=(4.6, 4))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
    for name, curve in metrics["reliability"].items():
        label = f"{ROWS[name]}, off by {curve['expected_calibration_error']:.3f}"
        points = curve["confidence"], curve["accuracy"]
        axes.plot(*points, color=SET_COLORS[name], linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="confidence of the segmenter", ylabel="share of such pixels right")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def confusion_table(metrics: dict, palette: Palette) -> Figure:
    """Of the pixels of each class in the masks, the share that was predicted as each class."""
    confused = np.array(metrics["confusion"]["synthetic"], float)
    shown = set(worst_classes(metrics))
    labels = [label for label in palette.labels if label.name in shown]
    ids = [label.id for label in labels]
    shares = (confused / confused.sum(1, keepdims=True).clip(min=1))[np.ix_(ids, ids)]
    side = 1.4 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 0.4, side))
    axes = figure.add_subplot()
    heat_map(axes, shares, [label.name for label in labels], least=0.005)
    axes.set(ylabel="class in the mask", xlabel=f"predicted class, {ROWS['synthetic']}")
    return figure


def crop_bars(metrics: dict) -> Figure:
    """The kernel distance between real and generated images of each class alone, with its interval."""
    found = metrics["crops"]["kernel_distance"]
    labels = sorted((label for label in found if found[label] is not None), key=lambda label: -found[label])[
        :MOST_CLASSES
    ]
    figure = Figure(figsize=(6.5, 0.9 + 0.28 * len(labels)))
    axes = figure.add_subplot()
    ends = [lookup(metrics["intervals"], ("crops", "kernel_distance", label)) for label in labels]
    _dots(axes, [found[label] for label in labels], ends, np.arange(len(labels)), ACCENT, "")
    axes.axvline(0, color="#888888", linewidth=1)
    name_classes(axes, labels)
    title = "KID" if metrics["distance"]["names"][1] == "KID" else "kernel distance"
    axes.set_title(f"{title} of each class, cut out ({metrics['crops']['extractor']}); 0: like real")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#e4e4e4")
    return figure


def nearest_distances(metrics: dict) -> Figure:
    """Distances of generated images, and of real ones never trained on, to their nearest training image."""
    copies = metrics["copies"]
    sets = {
        "with mask": (copies["distances"], ACCENT),
        "real test images": (copies["distances_of_real"], SET_COLORS["real"]),
    }
    figure = Figure(figsize=(6.5, 2.6))
    axes = figure.add_subplot()
    edges = np.linspace(0, max(max(values) for values, _ in sets.values()) or 1, 31).tolist()
    for name, (values, tone) in sets.items():
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=weights, color=tone, alpha=0.22)
        axes.hist(values, edges, weights=weights, color=tone, histtype="step", linewidth=1.6, label=name)
    axes.set(xlim=(0, edges[-1]), xlabel=f"distance to the nearest training image ({copies['extractor']})")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.locator_params(axis="y", nbins=4)
    axes.set_ylabel("share of the images")
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def closest_pairs(evaluation: Evaluation) -> Figure:
    """The generated images that are closest to a training image, and below each that training image."""
    closest = evaluation.metrics["copies"]["closest"]
    pairs = [(_image(evaluation, "synthetic", one["row"])[0], _image(evaluation, "train", one["training_row"])[0])
             for one in closest]  # fmt: skip
    below = [[f"row {one['row']}" for one in closest],
             [f"row {one['training_row']}\n{one['distance']:.3g} away" for one in closest]]  # fmt: skip
    return grid(list(zip(*pairs, strict=True)), left=["generated", "nearest\ntraining image"], below=below, width=1.25)


def class_extremes(evaluation: Evaluation) -> Figure:
    """Of each class the two generated images with its best and worst IoU: image, mask and prediction."""
    palette = evaluation.splits["real"].palette
    ids = {label.name: label.id for label in palette.labels}
    rows, below, left = [], [], []
    for name in worst_classes(evaluation.metrics):
        chosen = extremes(evaluation, ids[name])
        if chosen:
            half = (len(chosen) + 1) // 2
            cells = [*chosen[:half], *[None] * (2 * EACH - len(chosen)), *chosen[half:]]
            rows.append([strip(evaluation, cell[0]) if cell else None for cell in cells])
            below.append(["row {}, IoU {:.2f}".format(*cell) if cell else "" for cell in cells])
            left.append(name)
    heads = [f"{word}: image, mask, predicted" for word in ("best", "second best", "second worst", "worst")]
    return grid(rows, heads, left, below, width=2.9)


def extremes(evaluation: Evaluation, label: int) -> list[tuple[int, float]]:
    """(row, IoU) of the two images with the best IoU of a class and the two with the worst, best first."""
    in_mask, predicted, both = evaluation.seen["synthetic"]["pixels"][:, label].double().unbind(1)
    least = max(LEAST_CROP, SHOWN_COVER * evaluation.metrics["distance"]["resolution"] ** 2)
    usual = in_mask[in_mask > 0].median()  # nan where no mask holds it: then no row is chosen
    rows = torch.where(in_mask >= usual.clamp(max=least))[0]
    scores = (both / (in_mask + predicted - both))[rows]
    order = torch.argsort(-scores, stable=True).tolist()
    chosen = order if len(order) <= 2 * EACH else [*order[:EACH], *order[-EACH:]]
    return [(int(rows[place]), float(scores[place])) for place in chosen]


def strip(evaluation: Evaluation, row: int) -> np.ndarray:
    """A generated image, its mask and what the segmenter predicts, uint8 [R, 3 R + 6, 3]."""
    palette, (pixels, image, mask) = evaluation.splits["real"].palette, _image(evaluation, "synthetic", row)
    with one_core():
        predicted = evaluation.observer.predict(image[None])[0].numpy()
    return side_by_side(pixels, colorize(mask, palette), colorize(predicted, palette))


def _image(evaluation: Evaluation, name: str, row: int) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """A row as the segmenter sees it: uint8 [R, R, 3], the same in [-1, 1], and its class ids."""
    sample = evaluation.observer.pairs(evaluation.splits[name]).sample(row, 0)
    return to_uint8(sample.image), sample.image, sample.mask.numpy()


def _dots(axes: Axes, values: list, ends: list, places: np.ndarray, tone: str, name: str) -> None:
    """Values with their intervals as lines through them; those that are None are left out."""
    known = [number for number, value in enumerate(values) if value is not None]
    axes.plot([values[k] for k in known], [places[k] for k in known], "o", color=tone, markersize=4, label=name)
    for k in known:
        if ends[k]:
            axes.plot(ends[k], [places[k]] * 2, color=tone, linewidth=1.4)


# The page

REPORT = "report.html"
ABOUT_SETS = {
    "real": "held-out real images: what the segmenter reaches at best",
    "reconstructions": "the same through the base model's autoencoder and back",
    "synthetic": "generated from the masks: the images that are evaluated here",
    "without_classes": "from the same masks, the phrases that name classes cut from the captions",
    "other_captions": "from the same masks, each with the caption of another row",
    "floor": "generated from the captions alone, compared with masks that they were not shown",
}
SUFFICES = 0.95  # of the images with captions as they are, from which on a mask is said to suffice
QUESTIONS = {
    "without_classes": "Does a mask suffice without classes in the caption?",
    "other_captions": "Is the mask followed under another row's caption?",
}
SPREAD_ABOUT = {
    "precision": "share of the generated images that lie among real ones",
    "recall": "share of the real images that lie among generated ones",
    "density": "how densely real images lie around a generated one; 1: as around a real one",
    "coverage": "share of the real images with a generated one near",
}


def write_evaluation_report(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write report.html, completely or not at all, and return its path."""
    path = Path(folder) / REPORT
    write_text(path, report_html(evaluation))
    return path


def report_html(evaluation: Evaluation) -> str:
    """One page that needs no other file; whatever comes from the data sets is escaped."""
    metrics, palette = evaluation.metrics, evaluation.splits["real"].palette

    def cell(*place: str, digits: int = 0) -> Markup:
        value, _, interval = within(metrics, *place, digits=digits).partition(" ")
        return Markup('{}<br><span class="grey nowrap">{}</span>').format(value, interval)

    plots = {
        "class_scores": figure_img(class_scores(metrics), "IoU and boundary F-score of each class"),
        "confusion": figure_img(confusion_table(metrics, palette), "which classes are taken for which"),
        "legend": figure_img(legend(palette), "the colors of the classes"),
        "class_extremes": figure_img(class_extremes(evaluation), "best and worst images of each class"),
        "reliability": figure_img(reliability(metrics), "confidence against accuracy"),
        "crops": "",
    }
    if any(value is not None for value in metrics["crops"]["kernel_distance"].values()):
        plots["crops"] = figure_img(crop_bars(metrics), "kernel distance of each class")
    if metrics["copies"]:
        plots["distances"] = figure_img(nearest_distances(metrics), "distances to the nearest training image")
        plots["closest_pairs"] = figure_img(closest_pairs(evaluation), "the closest pairs")
    extractor = metrics["distance"]["extractor"]
    names = zip(metrics["distance"]["names"], DISTANCES, strict=True)
    distances = [(f"{name} ({extractor})", cell("distance", key, digits=4), "0: the same") for name, key in names]
    distances += [(key, cell("distance", key), about) for key, about in SPREAD_ABOUT.items()]
    settings = metrics["settings"] | {f"segmenter: {key}": value for key, value in metrics["segmenter"].items()}
    settings |= {"neighbors (precision to coverage)": NEIGHBORS, "images compared in pairs, at most": COMPARED}
    return render(
        "evaluate/templates/report.html",
        title=f"Evaluation of {Path(metrics['sets']['synthetic']['folder']).name}",
        metrics=metrics,
        level=f"{LEVEL:.0%}",
        sentences=list(summary(metrics)),
        segmenter=metrics["segmenter"].get("name", "the segmenter of this package"),
        scored={name: title for name, title in ROWS.items() if name in metrics["faithfulness"]},
        about=ABOUT_SETS,
        cell=cell,
        within=partial(within, metrics),
        plots=plots,
        distances=distances,
        text=[(ROWS[name], *(cell("text", name, key) for key in each)) for name, each in metrics["text"].items()],
        custom=[(ROWS[name], *(cell("custom", name, key) for key in each)) for name, each in metrics["custom"].items()],
        colors=[(title, cell("color", key, digits=3)) for key, title in
                (("L", "dL"), ("a", "da"), ("b", "db"), ("delta_e", "delta E"))],
        settings=[(key, str(value)) for key, value in settings.items() if value is not None],
    )  # fmt: skip


def summary(metrics: dict) -> Iterator[str]:
    """The findings in a few sentences."""
    share = within(metrics, "shares_of_ceiling", "synthetic", "miou")
    found, ceiling = (number(metrics["faithfulness"][name]["miou"]) for name in ("synthetic", "real"))
    floor = metrics["shares_of_ceiling"].get("floor")
    without = f"; images generated without the mask reach {number(floor['miou'])}" if floor else ""
    yield f"Masks are followed to {share} of what real images reach (mIoU {found} of {ceiling}){without}."
    for name, question in QUESTIONS.items():
        if name in metrics["not_given"]:
            line = not_given(name, metrics["not_given"][name]).partition(": ")[2]
            yield f"{question} {line[0].upper()}{line[1:]}."
        else:
            value = metrics["shares_of_with_mask"][name]["miou"] or 0.0
            said, share = within(metrics, "shares_of_with_mask", name, "miou"), "shares_of_ceiling"
            yield (
                f"{question} {'Yes' if value >= SUFFICES else 'No'}: mIoU is {said} of that with the captions as they "
                f"are ({within(metrics, share, name, 'miou')} of the ceiling)."
            )
    if metrics["reward"]:
        line = reward_line(metrics)
        yield f"{line[0].upper()}{line[1:]}."
    apart = (metrics["intervals"]["distance"]["kernel_distance"] or [0])[0] > 0
    verdict = "they differ from real images" if apart else "no difference from real images is seen"
    if metrics["filtering"]:
        line = filtering_line(metrics["filtering"])
        yield f"{line[0].upper()}{line[1:]}."
    title = f"{metrics['distance']['names'][1]} ({metrics['distance']['extractor']})"
    yield f"{title}: {within(metrics, 'distance', 'kernel_distance', digits=3)}, {verdict} by these features."
    if metrics["copies"]:
        low, high = metrics["intervals"]["copies"]["nearer_than_real"]
        verdict = "closer to training images than real test images are: look at the pairs below" if low > 0.5 else (
            "no closer to training images than real test images are")  # fmt: skip
        far = far_from_real(metrics)
        yield f"Memorization test: {low:.2f} to {high:.2f} (0.5 = none); " + (
            f"it {far}." if far and low <= 0.5 else f"they are {verdict}."
        )
    for name in metrics["text"].get("synthetic", {}):
        real = number(metrics["text"]["real"][name])
        yield f"{name}: {within(metrics, 'text', 'synthetic', name)}; of real images {real}."
    yield f"Mean color shift: delta E {within(metrics, 'color', 'delta_e', digits=2)}; 2 is visible."
