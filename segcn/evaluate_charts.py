"""Figures of an evaluation: classes, confidence, confusion, crops, copies, and the best and worst images."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segcn.charts import ACCENT, heat_map, name_classes
from segcn.dataset import to_uint8
from segcn.devices import one_core
from segcn.evaluate import ROWS, Evaluation
from segcn.labels import Palette
from segcn.masks import colourise
from segcn.metrics_table import lookup
from segcn.observe import LEAST_CROP
from segcn.show import grid, side_by_side

MOST = 20  # classes shown at most: those with the lowest IoU
SHARE = 0.01  # of the pixels, which a class covers in an image that is shown for it
TONES = {"real": "#4d4d4d", "reconstructions": "#a8a8a8", "synthetic": ACCENT, "floor": "#e8a04c"}
EACH = 2  # best and worst images of a class


def class_scores(metrics: dict) -> Figure:
    """IoU and boundary F-score of each class with its interval, for every set of images that was measured."""
    measured, labels = metrics["faithfulness"], worst_classes(metrics)
    names = [name for name in ROWS if name in measured]
    figure = Figure(figsize=(9, 1.1 + 0.17 * len(labels) * len(names)))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, title in ((left, "per_class", "IoU"), (right, "per_class_boundary_f", "boundary F-score")):
        for number, name in enumerate(names):
            values = [measured[name][key][label] for label in labels]
            ends = [lookup(metrics["intervals"], ("faithfulness", name, key, label)) for label in labels]
            places = np.arange(len(labels)) + (number - (len(names) - 1) / 2) * 0.7 / len(names)
            _dots(axes, values, ends, places, TONES[name], ROWS[name])
        axes.set(title=title, xlim=(-0.02, 1.02))
        axes.grid(axis="x", color="#e4e4e4")
    name_classes(left, labels)
    _legend_above(figure, left)
    return figure


def worst_classes(metrics: dict) -> list[str]:
    """The classes that occur, at most 20: those with the lowest IoU, in the order of their ids."""
    found = {label: value for label, value in metrics["faithfulness"]["synthetic"]["per_class"].items()
             if value is not None}  # fmt: skip
    kept = sorted(found, key=lambda label: found[label])[:MOST]
    return [label for label in found if label in kept]


def reliability(metrics: dict) -> Figure:
    """How often the segmenter is right where it is so sure: on the dotted line its confidence can be believed."""
    figure = Figure(figsize=(4.6, 4))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
    for name, told in metrics["reliability"].items():
        label = f"{ROWS[name]}, off by {told['expected_calibration_error']:.3f}"
        points = told["confidence"], told["accuracy"]
        axes.plot(*points, color=TONES[name], linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="confidence of the segmenter", ylabel="share of such pixels right")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def confusion_table(metrics: dict, palette: Palette) -> Figure:
    """Of the pixels of each wanted class, the share that was found as each class."""
    confused = np.array(metrics["confusion"]["synthetic"], float)
    shown = set(worst_classes(metrics))
    labels = [label for label in palette.labels if label.name in shown]
    ids = [label.id for label in labels]
    shares = (confused / confused.sum(1, keepdims=True).clip(min=1))[np.ix_(ids, ids)]
    side = 1.4 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 0.4, side))
    axes = figure.add_subplot()
    heat_map(axes, shares, [label.name for label in labels], least=0.005)
    axes.set(ylabel="wanted by the mask", xlabel=f"found, {ROWS['synthetic']}")
    return figure


def crop_bars(metrics: dict) -> Figure:
    """The kernel distance between real and generated images of each class alone, with its interval."""
    found = metrics["crops"]["kernel_distance"]
    labels = sorted((label for label in found if found[label] is not None), key=lambda label: -found[label])[:MOST]
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
    """How far generated images, and real ones never trained on, are from their nearest training image."""
    copies = metrics["copies"]
    sets = {
        "with mask": (copies["distances"], ACCENT),
        "real test images": (copies["distances_of_real"], TONES["real"]),
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
    """The generated images that are nearest to a training image, and below each the latter."""
    closest = evaluation.metrics["copies"]["closest"]
    pairs = [(_image(evaluation, "synthetic", one["row"])[0], _image(evaluation, "train", one["training_row"])[0])
             for one in closest]  # fmt: skip
    below = [[f"row {one['row']}" for one in closest],
             [f"row {one['training_row']}\n{one['distance']:.3g} away" for one in closest]]  # fmt: skip
    return grid(list(zip(*pairs, strict=True)), left=["generated", "nearest\ntraining image"], below=below, width=1.25)


def class_extremes(evaluation: Evaluation) -> Figure:
    """Of each class the two generated images where it is found best and worst: image, wanted and found classes."""
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
    heads = [f"{word}: image, wanted, found" for word in ("best", "second best", "second worst", "worst")]
    return grid(rows, heads, left, below, width=2.9)


def extremes(evaluation: Evaluation, label: int) -> list[tuple[int, float]]:
    """(row, IoU) of the two images where a class is found best and the two where it is found worst, best first."""
    wanted, found, both = evaluation.seen["synthetic"]["pixels"][:, label].double().unbind(1)
    least = max(LEAST_CROP, SHARE * evaluation.metrics["distance"]["resolution"] ** 2)
    usual = wanted[wanted > 0].median()  # nan where no mask wants it: then no row does
    rows = torch.where(wanted >= usual.clamp(max=least))[0]
    scores = (both / (wanted + found - both))[rows]
    order = torch.argsort(-scores, stable=True).tolist()
    chosen = order if len(order) <= 2 * EACH else [*order[:EACH], *order[-EACH:]]
    return [(int(rows[place]), float(scores[place])) for place in chosen]


def strip(evaluation: Evaluation, row: int) -> np.ndarray:
    """A generated image, the wanted classes and those that the segmenter found, uint8 [R, 3 R + 6, 3]."""
    palette, (picture, image, mask) = evaluation.splits["real"].palette, _image(evaluation, "synthetic", row)
    with torch.no_grad(), one_core():
        found = evaluation.observer.predict(image[None])[0].numpy()
    return side_by_side(picture, colourise(mask, palette), colourise(found, palette))


def _image(evaluation: Evaluation, name: str, row: int) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """A row as it was seen: uint8 [R, R, 3], the same in [-1, 1], and its class ids."""
    sample = evaluation.observer.pairs(evaluation.splits[name]).sample(row, 0)
    return to_uint8(sample.image), sample.image, sample.mask.numpy()


def _dots(axes: Axes, values: list, ends: list, places: np.ndarray, tone: str, name: str) -> None:
    """Values with their intervals as lines through them; those that are None are left out."""
    known = [number for number, value in enumerate(values) if value is not None]
    axes.plot([values[k] for k in known], [places[k] for k in known], "o", color=tone, markersize=4, label=name)
    for k in known:
        if ends[k]:
            axes.plot(ends[k], [places[k]] * 2, color=tone, linewidth=1.4)


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="upper left", bbox_to_anchor=(0.02, 1), ncols=len(handles[0]))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
