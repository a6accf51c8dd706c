"""report.html: images first, then an answer to each question, then tables and figures; one file with all it shows."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from segcn.data.dataset import to_uint8
from segcn.data.masks import colorize
from segcn.data.palette import Palette
from segcn.data.visualize import ACCENT, grid, heat_map, legend, name_classes, outlined, side_by_side
from segcn.evaluate.bootstrap import LEVEL
from segcn.evaluate.evaluator import LEAST_CROP, ROWS, Evaluation
from segcn.evaluate.metrics import COMPARED, NEIGHBORS, VISIBLE
from segcn.evaluate.report import DISTANCES, answers, lookup, number, within
from segcn.models.base import one_core
from segcn.utils.html import figure_img, render
from segcn.utils.io import write_text

MOST_CLASSES = 20  # classes shown at most: those with the lowest IoU
SHOWN_COVER = 0.01  # of the pixels, which a class covers in an image that is shown for it
SET_COLORS = {"real": "#4d4d4d", "reconstructions": "#a8a8a8", "synthetic": ACCENT, "without_classes": "#5aa469",
              "other_captions": "#9a6fb0", "floor": "#e8a04c"}  # fmt: skip
AT_TOP = 2  # best, median and worst images at the top
TILE = 320  # px of an image at the top of the page


def examples(evaluation: Evaluation) -> Figure:
    """The best, the median and the worst images: the mask, and the image with the mask's outlines."""
    scores = image_scores(evaluation)
    order = np.argsort(-scores, kind="stable").tolist()
    middle = (len(order) - AT_TOP) // 2
    columns = [order[:AT_TOP], order[middle : middle + AT_TOP], order[-AT_TOP:][::-1]]
    if len(order) < 3 * AT_TOP:
        columns = [order[:1], [order[len(order) // 2]], order[-1:]]
    rows = [list(row) for row in zip(*columns, strict=True)]
    captions = evaluation.splits["synthetic"].records
    below = [[f"row {row}, mIoU {scores[row]:.3f}: {captions[row].caption}" for row in each] for each in rows]
    heads = [f"{word}: mask, image with its outlines" for word in ("best", "median", "worst")]
    return grid([[_outlined(evaluation, row) for row in each] for each in rows], heads, below=below, width=3.2)


def image_scores(evaluation: Evaluation) -> np.ndarray:
    """mIoU of each generated image over the classes in its mask, float [N]; 0 where its mask is all unlabelled."""
    in_mask, predicted, both = evaluation.seen["synthetic"]["pixels"].double().unbind(2)
    scores = torch.where(in_mask > 0, both / (in_mask + predicted - both), torch.nan).nanmean(1)
    return scores.nan_to_num(0.0).numpy()


def _outlined(evaluation: Evaluation, row: int) -> np.ndarray:
    """The mask and the generated image with the mask's outlines, as large as a page shows them."""
    pixels, _, mask = _image(evaluation, "synthetic", row)
    image = np.asarray(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS))
    mask = np.asarray(Image.fromarray(mask).resize((TILE, TILE), Image.Resampling.NEAREST))
    return side_by_side(colorize(mask, evaluation.splits["real"].palette), outlined(image, mask), gap=8)


def class_scores(metrics: dict) -> Figure:
    """IoU and boundary F-score of each class with its interval, for every set of images."""
    measured, labels = metrics["faithfulness"], worst_classes(metrics)
    names = [name for name in ROWS if name in measured]
    figure = Figure(figsize=(9, 1.1 + 0.09 * len(labels) * len(names)))
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
             [f"row {one['training_row']}\n{number(one['distance'], 3)} away" for one in closest]]  # fmt: skip
    return grid(list(zip(*pairs, strict=True)), left=["generated", "nearest\ntraining image"], below=below, width=1.25)


def class_extremes(evaluation: Evaluation) -> Figure:
    """Of each class the generated images with its best and worst IoU: image, mask and prediction."""
    palette = evaluation.splits["real"].palette
    ids = {label.name: label.id for label in palette.labels}
    rows, below, left = [], [], []
    for name in worst_classes(evaluation.metrics):
        chosen = extremes(evaluation, ids[name])
        if chosen:
            rows.append([strip(evaluation, row) for row, _ in chosen])
            below.append(["row {}, IoU {:.3f}".format(*cell) for cell in chosen])
            left.append(name)
    return grid(rows, [f"{word}: image, mask, predicted" for word in ("best", "worst")], left, below, width=4.8)


def extremes(evaluation: Evaluation, label: int) -> list[tuple[int, float]]:
    """(row, IoU) of the image with the best IoU of a class and of the one with the worst, where there are two."""
    in_mask, predicted, both = evaluation.seen["synthetic"]["pixels"][:, label].double().unbind(1)
    least = max(LEAST_CROP, SHOWN_COVER * evaluation.metrics["distance"]["resolution"] ** 2)
    usual = in_mask[in_mask > 0].median()  # nan where no mask holds it: then no row is chosen
    rows = torch.where(in_mask >= usual.clamp(max=least))[0]
    scores = (both / (in_mask + predicted - both))[rows]
    order = torch.argsort(-scores, stable=True).tolist()
    return [(int(rows[place]), float(scores[place])) for place in [*order[:1], *order[1:][-1:]]]


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
SPREAD_ABOUT = {
    "precision": "share of the generated images that lie among real ones",
    "recall": "share of the real images that lie among generated ones",
    "density": "how densely real images lie around a generated one; 1: as around a real one",
    "coverage": "share of the real images with a generated one near",
}


def write_evaluation_report(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write report.html, completely or not at all, and return its path."""
    path = Path(folder) / REPORT
    write_text(path, report_html(evaluation, path.parent))
    return path


def report_html(evaluation: Evaluation, folder: Path) -> str:
    """One page that needs no other file; whatever comes from the data sets is escaped.

    folder: where the page lies; the folders that it names are given from there.
    """
    metrics, palette = evaluation.metrics, evaluation.splits["real"].palette

    def placed(value: object) -> str:
        return os.path.relpath(value, folder) if isinstance(value, str) and os.path.isabs(value) else str(value)

    def cell(*place: str, digits: int = 0) -> Markup:
        value, _, interval = within(metrics, *place, digits=digits).partition(" ")
        return Markup('{}<br><span class="grey nowrap">{}</span>').format(value, interval)

    plots = {
        "examples": figure_img(examples(evaluation), "the best, the median and the worst images beside their masks"),
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
    distances = [(f"{name} ({extractor})", cell("distance", key, digits=3), "0: the same") for name, key in names]
    distances += [(key, cell("distance", key), about) for key, about in SPREAD_ABOUT.items()]
    for name, title in [(name, title) for name, each in metrics["distances"].items() for title in each]:
        about = SPREAD_ABOUT.get(title, "0: the same")
        distances.append((f"{title} ({name})", cell("distances", name, title, digits=3), about))
    settings = metrics["settings"] | {f"segmenter: {key}": value for key, value in metrics["segmenter"].items()}
    settings = {key: value for key, value in settings.items() if key not in metrics["sets"]}
    settings |= {"neighbors (precision to coverage)": NEIGHBORS, "images compared in pairs, at most": COMPARED}
    return render(
        "evaluate/templates/report.html",
        title=f"Evaluation of {Path(metrics['sets']['synthetic']['folder']).name}",
        metrics=metrics,
        level=f"{LEVEL:.0%}",
        answers=list(answers(metrics)),
        folders={name: placed(each["folder"]) for name, each in metrics["sets"].items()},
        visible=VISIBLE,
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
        settings=[(key, placed(value)) for key, value in settings.items() if value is not None],
    )  # fmt: skip
