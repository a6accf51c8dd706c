"""What a study of usefulness found: metrics.json, tables and verdicts in words, and the plot over the real rows."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segcn.data import visualize
from segcn.data.metadata import Split
from segcn.evaluate.bootstrap import Estimate, bootstrap, difference
from segcn.evaluate.metrics import iou_of_counts
from segcn.study.config import UtilityConfig
from segcn.study.plan import Arm
from segcn.utils.io import write_text

REAL, MIXED = "#555555", "#2f6db3"
DIGITS = 5  # of every number in metrics.json
NO_LEAK = (
    "Of each fraction the ControlNet, the segmenter that filters its images, and the masks and captions that they are"
    " generated from come from the rows of that fraction alone (rows.json names them); the ControlNet of a larger"
    " fraction starts from that of the next smaller one, whose rows it holds. The exceptions are the base model,"
    " which has seen images without masks, maybe of the same kind as those tested on, and words given by --vary or"
    " --prompt."
)
METHOD = (
    "95 % percentile intervals of a bootstrap that draws test images and, independently, seeds, each with replacement"
    " (the pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1(2), 386-411); of differences the"
    " same images and seeds are drawn for both sides. They show what another sample of test images and other seeds of"
    " the segmenter might have given; which rows were drawn, and the one ControlNet of each fraction, are taken as they"
    " are."
)
WITHOUT_EFFECT = ("dataset_name", "output_dir", "pretrained_model_name_or_path", "lora", "allow_symlinks")


def metrics_of(
    config: UtilityConfig, rows: dict[float, Split], images: dict[float, dict], counts: dict[Arm, np.ndarray]
) -> dict[str, Any]:
    """Everything that was measured, fit for JSON and the same whenever asked for.

    counts: of each arm int [seeds, images, K, 3]: `metrics.class_counts` of each test image.
    """
    palette = next(iter(rows.values())).palette
    there = next(iter(counts.values()))[0, :, :, 0].sum(0)  # pixels of each class in the test masks
    present = [label for label in palette.labels if not label.ignore and there[label.id]]
    names, ids = [label.name for label in present], [label.id for label in present]
    scores = {arm: iou_over_seeds(found[..., ids, :], names, config.resamples) for arm, found in counts.items()}
    arms = []
    for arm, found in counts.items():
        real = scores[Arm(arm.fraction, 0.0)]
        entry = {"fraction": arm.fraction, "rows": len(rows[arm.fraction]), "name": arm.name, "ratio": arm.ratio}
        of_each_seed = (iou_over_seeds(one[None][..., ids, :], names, 1)["miou"].value for one in found)
        entry |= _figures(scores[arm]) | {"of_each_seed": [round(value or 0.0, DIGITS) for value in of_each_seed]}
        if arm.ratio != 0:
            entry["above_real"] = _figures({name: difference(one, real[name]) for name, one in scores[arm].items()})
        arms.append(entry)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in WITHOUT_EFFECT}
    return {
        "settings": settings, "test_images": next(iter(counts.values())).shape[1], "intervals": METHOD,
        "classes": [{"name": label.name, "color": label.color} for label in present],
        "synthetic": {f"{fraction:g}": made for fraction, made in images.items()}, "arms": arms,
        "verdicts": [verdict(arm) for arm in arms if arm["ratio"] == config.few_real_ratio],
    }  # fmt: skip


def iou_over_seeds(counts: np.ndarray, names: list[str], draws: int) -> dict[str, Estimate]:
    """IoU of each class over all test images, and "miou", their mean, averaged over seeds; draws resample both.

    counts: `metrics.class_counts`, int [seeds, images, K, 3]. Arms of as many seeds and images have paired draws.
    """
    pixels = torch.from_numpy(counts).double()

    def averaged(rows: torch.Tensor, seeds: torch.Tensor) -> dict[str, torch.Tensor]:
        each = iou_of_counts(torch.einsum("bn,snkc->bskc", rows, pixels))
        each = torch.cat([each, each.nanmean(-1, keepdim=True)], -1)  # [b, S, K + 1]
        means = torch.einsum("bs,bsk->bk", seeds / len(counts), each)
        return dict(zip([*names, "miou"], means.unbind(1), strict=True))

    return bootstrap(averaged, draws, rows=counts.shape[1], seeds=counts.shape[0])


def verdict(arm: dict[str, Any]) -> str:
    """One plain sentence: what synthetic images did to the mIoU of an arm."""
    found, (low, high) = arm["above_real"]["miou"], arm["above_real"]["miou_interval"]
    rows = f"{100 * arm['fraction']:.3g} % of the real rows ({arm['rows']})" if arm["fraction"] < 1 else "all real rows"
    change = f"{arm['miou'] - found:.3f} to {arm['miou']:.3f} ({found:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
    if low > 0 or high < 0:
        return f"With {rows}, synthetic images {'raise' if low > 0 else 'lower'} the test mIoU from {change}."
    return f"With {rows}, no effect of synthetic images on the test mIoU is shown: from {change}, which holds zero."


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """utility.md, utility.png and, last, metrics.json."""
    with matplotlib.rc_context(visualize.STYLE):
        plot(metrics).savefig(folder / "utility.png", dpi=110)
    write_text(folder / "utility.md", report(metrics))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")


def read_study(folder: str | Path, dataset_name: str | Path = "DATA") -> dict[str, Any] | None:
    """The metrics of the study in a folder; where there is none, the command that makes one is printed."""
    path, command = Path(folder) / "metrics.json", f"--dataset_name {dataset_name} --output_dir {folder}"
    if path.is_file():
        return json.loads(path.read_text())
    print(f"no study here yet; this makes it:\nsegcn evaluate utility {command}")
    return None


def report(metrics: dict[str, Any]) -> str:
    """Markdown: the verdicts, the plot, the tables, and what was done."""
    settings = metrics["settings"]
    done = (
        f"Every segmenter took {settings['segmenter_steps']} steps of {settings['segmenter_batch_size']} images, real"
        f" and synthetic together, with the same augmentation and a learning rate that falls to zero;"
        f" where both are mixed, the last {settings['real_last']:.0%} of the steps are the real images' alone;"
        f" {settings['seeds']} seeds each, all tested on the same {metrics['test_images']} held-out real images."
        f" In the last tenth of the steps the training loss of an arm fell by {metrics['last_fall']:.1%} at most."
        " A class's IoU is that of all test images together, and mIoU the mean over the classes."
    )
    lines = [f"- The words {group} were exchanged for one another in the captions, as drawn for each image."
             for group in settings["vary"]]  # fmt: skip
    for fraction, made in metrics["synthetic"].items():
        count = made.get("generated", made.get("painted"))  # as it was called once
        lines.append(
            f"- {fraction} of the rows: {made['kept']} of {count} images kept; the segmenter that filters them found"
            f" their masks with an mIoU of {made['miou']:.2f} on average, and {made['ignored']:.1%} of their pixels"
            " do not count."
        )
    parts = ["# Are the synthetic images worth training on?", *metrics["verdicts"], "![test mIoU](utility.png)",
             "```\n" + table(metrics) + "\n```", "## What was done", done, NO_LEAK, f"Intervals: {METHOD}",
             "\n".join(lines)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def table(metrics: dict[str, Any]) -> str:
    """A line for each arm: mIoU and what it is above real alone, then the IoU of each class; with their intervals."""
    index = [("-" if arm["name"] == "synthetic" else str(arm["rows"]), arm["name"]) for arm in metrics["arms"]]
    columns: dict[str, list[str]] = {"mIoU": [], "above real alone": []}
    for arm in metrics["arms"]:
        above = arm.get("above_real")
        columns["mIoU"].append(_with_interval(arm["miou"], arm["miou_interval"]))
        columns["above real alone"].append(_with_interval(above["miou"], above["miou_interval"], "+") if above else "")
    for one in metrics["classes"]:
        name = one["name"]
        columns[name] = [_with_interval(arm["per_class"][name], arm["intervals"][name]) for arm in metrics["arms"]]
    names = pandas.MultiIndex.from_tuples(index, names=["real rows", "trained on"])
    return pandas.DataFrame(columns, index=names).to_string(line_width=120, sparsify=False)


def _with_interval(value: float, ends: list[float], sign: str = "") -> str:
    return f"{value:{sign}.3f} [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def plot(metrics: dict[str, Any], most: int = 12) -> Figure:
    """Test mIoU over the number of real rows, with and without synthetic images, and below it each class's IoU.

    Bands and bars are the 95 % intervals; most: classes shown, those first that gained or lost the most.
    """
    gains = [arm["above_real"]["per_class"] for arm in metrics["arms"]
             if arm["ratio"] == metrics["settings"]["few_real_ratio"]]  # fmt: skip
    names = [one["name"] for one in metrics["classes"]]
    classes = sorted(names, key=lambda name: -max(abs(gain[name]) for gain in gains))[:most]
    columns = min(3, max(1, len(classes)))
    below = -(-len(classes) // columns)
    figure = Figure(figsize=(7.5, 4 + 1.7 * below), layout="constrained")
    above, *rest = figure.subfigures(2 if below else 1, 1, height_ratios=[4, 1.7 * below][: 1 + bool(below)],
                                     squeeze=False)[:, 0]  # fmt: skip
    axes = above.add_subplot()
    _curves(axes, metrics, lambda entry: (entry["miou"], entry["miou_interval"]))
    title = "IoU on held-out real images, mean over the classes"
    axes.set(title=title, xlabel="real rows trained on", ylabel="test mIoU")
    axes.legend(loc="lower right")
    for place, name in enumerate(classes):
        small = rest[0].add_subplot(below, columns, place + 1)
        _curves(small, metrics, partial(_class_values, name))
        small.set_title(name, fontsize=9)
        small.tick_params(labelsize=7)
    return figure


def _curves(axes: Axes, metrics: dict, read: Callable[[dict], tuple[float, list[float]]]) -> None:
    """Both curves of what `read` takes from an arm: a value and the ends of its interval."""
    ratio = metrics["settings"]["few_real_ratio"]
    mixed = f"real and {ratio:g} x as many synthetic"
    for wanted, color, label in ((0.0, REAL, "real alone"), (ratio, MIXED, mixed)):
        arms = [arm for arm in metrics["arms"] if arm["ratio"] == wanted]
        rows = [arm["rows"] for arm in arms]
        values, ends = zip(*map(read, arms), strict=True)
        low, high = np.array(ends).T
        axes.fill_between(rows, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(rows, values, "o-", color=color, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.minorticks_off()


def _class_values(name: str, arm: dict) -> tuple[float, list[float]]:
    return arm["per_class"][name], arm["intervals"][name]


def _figures(scores: dict[str, Estimate]) -> dict[str, Any]:
    """IoU or difference of each class and their mean, with intervals."""
    values = {name: round(one.value or 0.0, DIGITS) for name, one in scores.items()}
    ends = {name: [round(end, DIGITS) for end in one.interval() or ()] for name, one in scores.items()}
    return {"miou": values.pop("miou"), "miou_interval": ends.pop("miou"), "per_class": values, "intervals": ends}
