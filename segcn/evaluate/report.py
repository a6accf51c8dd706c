"""Figures of an evaluation: classes, confidence, confusion, crops, copies, and the best and worst images."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segcn.data.dataset import to_uint8
from segcn.data.masks import colorize
from segcn.data.palette import Palette
from segcn.data.visualize import ACCENT, grid, heat_map, legend, name_classes, side_by_side
from segcn.evaluate.bootstrap import LEVEL
from segcn.evaluate.evaluator import LEAST_CROP, ROWS, Evaluation
from segcn.evaluate.metrics import COMPARED, NEIGHBORS
from segcn.evaluate.tables import lookup, number, within
from segcn.models.base import one_core
from segcn.utils.html import as_table, head, plot
from segcn.utils.io import write_text

# --- evaluate_charts: Figures of an evaluation: classes, confidence, confusion, crops, copies, and the best and worst images.

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
        for at, name in enumerate(names):
            values = [measured[name][key][label] for label in labels]
            ends = [lookup(metrics["intervals"], ("faithfulness", name, key, label)) for label in labels]
            places = np.arange(len(labels)) + (at - (len(names) - 1) / 2) * 0.7 / len(names)
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
    return side_by_side(picture, colorize(mask, palette), colorize(found, palette))


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


# --- evaluate_page: An evaluation as one HTML page for somebody who was not there: what was asked, what was found, what it means.

REPORT = "report.html"
ABOUT = {
    "real": "held-out real images: what the segmenter reaches at best",
    "reconstructions": "the same through the base model's autoencoder and back",
    "synthetic": "painted from the masks: the images that are judged here",
    "floor": "painted from the captions alone, held against masks that they were not shown",
}
SPREAD = {
    "precision": "share of the generated images that lie among real ones",
    "recall": "share of the real images that lie among generated ones",
    "density": "how densely real images lie around a generated one; 1: as around a real one",
    "coverage": "share of the real images with a generated one near",
}


def write_report(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write report.html, whole or not at all; its path."""
    path = Path(folder) / REPORT
    write_text(path, as_html(evaluation))
    return path


def as_html(evaluation: Evaluation) -> str:
    """One page that needs no other file; whatever comes from the data sets is escaped."""
    metrics = evaluation.metrics
    parts = [
        summary_html,
        faithfulness_html,
        extremes_html,
        confidence_html,
        distances_html,
        text_html,
        copies_html,
        color_html,
        settings_html,
    ]
    body = [line for part in parts for line in part(evaluation)]
    title = f"Evaluation of {Path(metrics['sets']['synthetic']['folder']).name}"
    return "\n".join([*head(title), *body, "</html>\n"])


def summary_html(evaluation: Evaluation) -> Iterator[str]:
    """The answer in a few sentences, and what to mind."""
    metrics = evaluation.metrics
    count, folder = metrics["sets"]["synthetic"]["images"], metrics["sets"]["synthetic"]["folder"]
    real = metrics["sets"]["real"]
    yield f'<p class="grey">{count} generated images in {escape(folder)}, held against {real["images"]} real ones in '
    yield f"{escape(real['folder'])}. Brackets hold {LEVEL:.0%} bootstrap intervals: how far a number would move with "
    yield "other images of the same kind.</p>"
    yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in sentences(metrics))}</ul>"
    yield from (f'<p class="warning">{escape(warning)}</p>' for warning in metrics["warnings"])


def sentences(metrics: dict) -> Iterator[str]:
    """What was found, in words."""
    share = within(metrics, "shares_of_ceiling", "synthetic", "miou")
    found, ceiling = (number(metrics["faithfulness"][name]["miou"]) for name in ("synthetic", "real"))
    floor = metrics["shares_of_ceiling"].get("floor")
    yield f"Masks are obeyed to {share} of what real images reach (mIoU {found} of {ceiling})" + (
        f"; images painted without the mask reach {number(floor['miou'])}." if floor else "."
    )
    apart = (metrics["intervals"]["distance"]["kernel_distance"] or [0])[0] > 0
    verdict = "they can be told from real images" if apart else "no difference from real images is seen"
    title = f"{metrics['distance']['names'][1]} ({metrics['distance']['extractor']})"
    yield f"{title}: {within(metrics, 'distance', 'kernel_distance', digits=3)}, {verdict} by these features."
    if metrics["copies"]:
        low, high = metrics["intervals"]["copies"]["nearer_than_real"]
        verdict = "nearer (look at the pairs below)" if low > 0.5 else "not nearer"
        yield f"They are {verdict} to training images than real test images are: {low:.2f} to {high:.2f}; 0.5: same."
    for name in metrics["text"].get("synthetic", {}):
        real = number(metrics["text"]["real"][name])
        yield f"{name}: {within(metrics, 'text', 'synthetic', name)}; of real images {real}."
    yield f"Mean color off by delta E {within(metrics, 'color', 'delta_e', digits=2)}; 2 can be seen."


def faithfulness_html(evaluation: Evaluation) -> Iterator[str]:
    """How well a segmenter finds the wanted classes, by set and class."""
    metrics = evaluation.metrics
    yield "<h2>Does it obey the mask?</h2>"
    yield "<p>A segmenter that never saw these images looks for the classes of each mask. mIoU: pixels wanted and "
    yield "found, over those wanted or found, the mean over the classes. Boundary F: how well the outlines agree. "
    yield f"Judged by: {escape(str(metrics['segmenter'].get('name', 'the segmenter of this package')))}.</p>"
    heads = ["", "images", "mIoU", "of the ceiling", "boundary F", "of the ceiling", "pixels right"]
    yield as_table(heads, (_faithfulness_row(metrics, name) for name in ROWS if name in metrics["faithfulness"]))
    yield plot(class_scores(metrics), "IoU and boundary F-score of each class")
    yield plot(confusion_table(metrics, evaluation.splits["real"].palette), "which classes are taken for which")


def _faithfulness_row(metrics: dict, name: str) -> tuple:
    told = [cell(metrics, "faithfulness", name, key) for key in ("miou", "boundary_f", "accuracy")]
    shares = [
        cell(metrics, "shares_of_ceiling", name, key) if name != "real" else "1" for key in ("miou", "boundary_f")
    ]
    title = f'<b>{ROWS[name]}</b><br><span class="grey">{ABOUT[name]}</span>'
    return title, metrics["faithfulness"][name]["images"], told[0], shares[0], told[1], shares[1], told[2]


def extremes_html(evaluation: Evaluation) -> Iterator[str]:
    """The best and the worst images of each class."""
    yield "<h2>Best and worst of each class</h2>"
    yield "<p>Of the images where a class covers at least 1 % of the mask, or as much as it usually does where that is "
    yield "less. A low score is a bad image, or a segmenter that errs: look.</p>"
    yield plot(legend(evaluation.splits["real"].palette), "the colors of the classes")
    yield plot(class_extremes(evaluation), "best and worst images of each class")


def confidence_html(evaluation: Evaluation) -> Iterator[str]:
    """Whether the segmenter's confidence can be believed."""
    yield "<h2>Can the segmenter's confidence be believed?</h2>"
    yield "<p>Filtering by confidence asks for a curve on the dotted line, on generated images too. Behind each name: "
    yield "the expected calibration error (Guo et al. 2017).</p>"
    yield plot(reliability(evaluation.metrics), "confidence against accuracy")


def distances_html(evaluation: Evaluation) -> Iterator[str]:
    """How far the generated images are from the real ones."""
    metrics, found = evaluation.metrics, evaluation.metrics["distance"]
    extractor = escape(found["extractor"])
    yield "<h2>How far from real images?</h2>"
    yield f"<p>Between the {found['features']} features of each image: {extractor}. Numbers of other extractors, image "
    yield "counts or sizes do not compare.</p>"
    names = zip(found["names"], ("frechet_distance", "kernel_distance"), strict=True)
    rows = [(f"{name} ({extractor})", cell(metrics, "distance", key, digits=4), "0: the same") for name, key in names]
    rows += [(key, cell(metrics, "distance", key), about) for key, about in SPREAD.items()]
    yield as_table(["", "", ""], rows)
    if any(value is not None for value in metrics["crops"]["kernel_distance"].values()):
        yield plot(crop_bars(metrics), "kernel distance of each class")


def text_html(evaluation: Evaluation) -> Iterator[str]:
    """What captions ask for."""
    metrics = evaluation.metrics
    yield "<h2>Does it show what the caption says?</h2>"
    if not metrics["text"]:
        yield "<p>Not measured: give a folder of CLIP's weights by --clip.</p>"
        return
    titles = list(metrics["text"]["synthetic"])
    rows = ((ROWS[name], *(cell(metrics, "text", name, title) for title in titles)) for name in metrics["text"])
    yield as_table(["", *map(escape, titles)], rows)


def copies_html(evaluation: Evaluation) -> Iterator[str]:
    """Whether training images come back."""
    metrics = evaluation.metrics
    yield "<h2>Are they copies of training images?</h2>"
    if not metrics["copies"]:
        yield "<p>Not measured: the real data set has no train split beside the one it is compared with.</p>"
        return
    yield "<p>A generated image is nearer to a training image than a real test image is, with a chance of "
    yield f"<b>{within(metrics, 'copies', 'nearer_than_real')}</b> (0.5: as new as these; near 1: copies; Meehan et "
    yield f"al. 2020), among {metrics['copies']['training_images']} training images.</p>"
    yield plot(nearest_distances(metrics), "distances to the nearest training image")
    yield plot(closest_pairs(evaluation), "the closest pairs")


def color_html(evaluation: Evaluation) -> Iterator[str]:
    """Whether the generated images are lighter, redder or yellower."""
    metrics = evaluation.metrics
    masks = "of the same masks" if metrics["color"]["same_masks"] else "of all masks"
    yield "<h2>Are colors and brightness right?</h2>"
    yield f"<p>Mean color (CIE 1976 L*a*b*) of the generated images less that of the real ones {masks}.</p>"
    about = {"L": "lighter", "a": "redder", "b": "yellower", "delta_e": "altogether (delta E; 2 can be seen)"}
    rows = ((title, cell(metrics, "color", key, digits=3)) for key, title in about.items())
    yield as_table(["", ""], rows)


def settings_html(evaluation: Evaluation) -> Iterator[str]:
    """Everything that the numbers depend on."""
    metrics = evaluation.metrics
    told = metrics["settings"] | {f"segmenter: {key}": value for key, value in metrics["segmenter"].items()}
    told |= {"neighbors (precision to coverage)": NEIGHBORS, "images compared in pairs, at most": COMPARED}
    yield "<h2>Settings</h2>"
    rows = (
        (name, escape(one["folder"]), str(one["images"]), one["fingerprint"]) for name, one in metrics["sets"].items()
    )
    yield as_table(["set", "folder", "images", "fingerprint"], rows)
    yield as_table(["", ""], ((escape(key), escape(str(value))) for key, value in told.items() if value is not None))


def cell(metrics: dict, *place: str, digits: int = 0) -> str:
    """A number, and its interval in grey below it."""
    value, _, interval = within(metrics, *place, digits=digits).partition(" ")
    return f'{value}<br><span class="grey nowrap">{interval}</span>'
