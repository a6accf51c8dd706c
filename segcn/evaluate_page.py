"""An evaluation as one HTML page for somebody who was not there: what was asked, what was found, what it means."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from segcn import evaluate_charts as charts
from segcn.atomic import write_text
from segcn.bootstrap import LEVEL
from segcn.distance import COMPARED, NEIGHBOURS
from segcn.evaluate import ROWS, Evaluation
from segcn.html_parts import as_table, head, plot
from segcn.metrics_table import number, within
from segcn.show import legend

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
    parts = [summary, faithfulness, extremes, confidence, distances, text, copies, colour, settings]
    body = [line for part in parts for line in part(evaluation)]
    title = f"Evaluation of {Path(metrics['sets']['synthetic']['folder']).name}"
    return "\n".join([*head(title), *body, "</html>\n"])


def summary(evaluation: Evaluation) -> Iterator[str]:
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
    yield f"Mean colour off by delta E {within(metrics, 'colour', 'delta_e', digits=2)}; 2 can be seen."


def faithfulness(evaluation: Evaluation) -> Iterator[str]:
    """How well a segmenter finds the wanted classes, by set and class."""
    metrics = evaluation.metrics
    yield "<h2>Does it obey the mask?</h2>"
    yield "<p>A segmenter that never saw these images looks for the classes of each mask. mIoU: pixels wanted and "
    yield "found, over those wanted or found, the mean over the classes. Boundary F: how well the outlines agree. "
    yield f"Judged by: {escape(str(metrics['segmenter'].get('name', 'the segmenter of this package')))}.</p>"
    heads = ["", "images", "mIoU", "of the ceiling", "boundary F", "of the ceiling", "pixels right"]
    yield as_table(heads, (_faithfulness_row(metrics, name) for name in ROWS if name in metrics["faithfulness"]))
    yield plot(charts.class_scores(metrics), "IoU and boundary F-score of each class")
    yield plot(charts.confusion_table(metrics, evaluation.splits["real"].palette), "which classes are taken for which")


def _faithfulness_row(metrics: dict, name: str) -> tuple:
    told = [cell(metrics, "faithfulness", name, key) for key in ("miou", "boundary_f", "accuracy")]
    shares = [
        cell(metrics, "shares_of_ceiling", name, key) if name != "real" else "1" for key in ("miou", "boundary_f")
    ]
    title = f'<b>{ROWS[name]}</b><br><span class="grey">{ABOUT[name]}</span>'
    return title, metrics["faithfulness"][name]["images"], told[0], shares[0], told[1], shares[1], told[2]


def extremes(evaluation: Evaluation) -> Iterator[str]:
    """The best and the worst images of each class."""
    yield "<h2>Best and worst of each class</h2>"
    yield "<p>Of the images where a class covers at least 1 % of the mask, or as much as it usually does where that is "
    yield "less. A low score is a bad image, or a segmenter that errs: look.</p>"
    yield plot(legend(evaluation.splits["real"].palette), "the colours of the classes")
    yield plot(charts.class_extremes(evaluation), "best and worst images of each class")


def confidence(evaluation: Evaluation) -> Iterator[str]:
    """Whether the segmenter's confidence can be believed."""
    yield "<h2>Can the segmenter's confidence be believed?</h2>"
    yield "<p>Filtering by confidence asks for a curve on the dotted line, on generated images too. Behind each name: "
    yield "the expected calibration error (Guo et al. 2017).</p>"
    yield plot(charts.reliability(evaluation.metrics), "confidence against accuracy")


def distances(evaluation: Evaluation) -> Iterator[str]:
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
        yield plot(charts.crop_bars(metrics), "kernel distance of each class")


def text(evaluation: Evaluation) -> Iterator[str]:
    """What captions ask for."""
    metrics = evaluation.metrics
    yield "<h2>Does it show what the caption says?</h2>"
    if not metrics["text"]:
        yield "<p>Not measured: give a folder of CLIP's weights by --clip.</p>"
        return
    titles = list(metrics["text"]["synthetic"])
    rows = ((ROWS[name], *(cell(metrics, "text", name, title) for title in titles)) for name in metrics["text"])
    yield as_table(["", *map(escape, titles)], rows)


def copies(evaluation: Evaluation) -> Iterator[str]:
    """Whether training images come back."""
    metrics = evaluation.metrics
    yield "<h2>Are they copies of training images?</h2>"
    if not metrics["copies"]:
        yield "<p>Not measured: the real data set has no train split beside the one it is compared with.</p>"
        return
    yield "<p>A generated image is nearer to a training image than a real test image is, with a chance of "
    yield f"<b>{within(metrics, 'copies', 'nearer_than_real')}</b> (0.5: as new as these; near 1: copies; Meehan et "
    yield f"al. 2020), among {metrics['copies']['training_images']} training images.</p>"
    yield plot(charts.nearest_distances(metrics), "distances to the nearest training image")
    yield plot(charts.closest_pairs(evaluation), "the closest pairs")


def colour(evaluation: Evaluation) -> Iterator[str]:
    """Whether the generated images are lighter, redder or yellower."""
    metrics = evaluation.metrics
    masks = "of the same masks" if metrics["colour"]["same_masks"] else "of all masks"
    yield "<h2>Are colours and brightness right?</h2>"
    yield f"<p>Mean colour (CIE 1976 L*a*b*) of the generated images less that of the real ones {masks}.</p>"
    about = {"L": "lighter", "a": "redder", "b": "yellower", "delta_e": "altogether (delta E; 2 can be seen)"}
    rows = ((title, cell(metrics, "colour", key, digits=3)) for key, title in about.items())
    yield as_table(["", ""], rows)


def settings(evaluation: Evaluation) -> Iterator[str]:
    """Everything that the numbers depend on."""
    metrics = evaluation.metrics
    told = metrics["settings"] | {f"segmenter: {key}": value for key, value in metrics["segmenter"].items()}
    told |= {"neighbours (precision to coverage)": NEIGHBOURS, "images compared in pairs, at most": COMPARED}
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
