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
from segcn.data.captions import listed
from segcn.evaluate.bootstrap import Estimate, bootstrap, difference
from segcn.evaluate.metrics import iou_of_counts
from segcn.study.plan import BOUND, REAL, Arm, Portion, StudyPlan
from segcn.study.training import mean_iou
from segcn.utils.io import write_text

COLORS = {"real": "#555555", "pretrained": "#2f6db3", "mixed": "#c8721b", "bound": "#3a8f4d"}
ASIDE = 1.015  # of the rows or images, by which the next curve is shifted
DIGITS = 5  # of every number in metrics.json
NO_LEAK = (
    "Of each draw and fraction the ControlNet, the segmenter that filters its images, and the masks and captions that"
    " they are generated from come from the rows of that fraction alone, without those validated on (rows.json names"
    " them); the ControlNet of a larger fraction starts from that of the next smaller one, whose rows it holds. The"
    " exceptions are the base model, which has seen images without masks, maybe of the same kind as those tested on,"
    " and words given by --vary or --prompt."
)
METHOD = (
    "Real alone and synthetic alone are trained until a plateau: until the mIoU on the validation rows, a fifth of"
    " the fraction, has had no new best for {patience} looks, one every {validation_steps} steps, and for as many"
    " steps as led to it; or for {segmenter_steps} steps at most. Then the learning rate falls to zero over a third as"
    " many. Learning rate and augmentation were chosen for real alone on these rows, and taken for all. Whatever else"
    " learns from the real rows sees exactly as many of their images as real alone did (equal real exposure), and is"
    " compared also with real alone for as many steps as it took in all (equal compute). The upper bound learns as the"
    " mixture does, from other real rows of the data set in place of the synthetic images. The test rows are looked at"
    " once, by every segmenter when it is finished. A class's IoU is that of all test images together, and mIoU the"
    " mean over the classes."
)
INTERVALS = (
    " {resamples} resamples of a hierarchical bootstrap; of differences the same images, draws and seeds are taken for"
    " both sides, and with few draws or seeds the intervals are widened as Student's t asks. They hold for each"
    " comparison alone."
)
SEVERAL = (
    "95 % intervals cover the draw of the rows with its ControlNet ({draws} draws), the seed of the segmenter ({seeds}"
    " in each draw) and the test images."
)
ONE = (
    "95 % intervals cover the seed of the segmenter ({seeds}) and the test images. They do not cover which rows were"
    " drawn, nor the ControlNet: this is one draw, and another one may say something else; --tier full draws three."
)
DROPPED = (
    " **Of {classes} more were dropped than kept**: train the ControlNet longer (--controlnet_steps), or lower"
    " --min_miou, down to 0 where that segmenter finds little in real images, too."
)
WITHOUT_EFFECT = ("dataset_name", "output_dir", "pretrained_model_name_or_path", "lora", "allow_symlinks")
CONTROLS = {"equal_exposure": "above real alone", "equal_compute": "above real for as long"}


def metrics_of(
    plan: StudyPlan, counts: dict[tuple[float, Arm], np.ndarray], made: dict[Portion, dict]
) -> dict[str, Any]:
    """Everything that was measured, fit for JSON and the same whenever asked for.

    counts: of each fraction and arm `class_counts`, int [draws, seeds, images, K, 3]; made: of each case how many
    images were generated and kept.
    """
    config = plan.config
    first = next(iter(counts.values()))
    there = first[0, 0, :, :, 0].sum(0)  # pixels of each class in the test masks
    present = [label for label in plan.test.palette.labels if not label.ignore and there[label.id]]
    names, ids = [label.name for label in present], [label.id for label in present]
    scores = {key: iou_of_networks(found[..., ids, :], names, config.resamples) for key, found in counts.items()}
    arms = []
    for (fraction, arm), found in counts.items():
        cases = [case for case in plan.rows if case.fraction == fraction]
        rows = plan.rows[cases[0]]
        results = [[plan.result(case, arm, seed) for seed in range(found.shape[1])] for case in cases]
        mean = {name: np.mean([[one[name] for one in seeds] for seeds in results])
                for name in ("steps_taken", "validation_miou")}  # fmt: skip
        images = len(rows.other) if rows.other and arm == BOUND else (arm.after or arm).images
        entry = {
            "fraction": fraction, "rows": len(rows.learned) + len(rows.validation), "name": arm.name,
            "kind": kind_of(arm), "images": images, "steps": round(mean["steps_taken"]),
            "validation_miou": round(mean["validation_miou"], DIGITS),
        } | _figures(scores[fraction, arm])  # fmt: skip
        entry["of_each_draw_and_seed"] = [[mean_iou(one[:, ids]) for one in seeds] for seeds in found]
        if arm != REAL and not arm.like:
            alike = Arm("mixed", config.amounts[-1]) if arm == BOUND else arm  # in its steps
            controls = {"equal_exposure": REAL, "equal_compute": Arm("real", like=alike)}
            amounts = [amount for amount in config.amounts if amount < images and kind_of(arm) == "pretrained"]
            fewer = {f"fewer_{amount}": Arm("real", after=Arm("synthetic", amount)) for amount in amounts}
            entry["above"], entry["above_fewer"] = (
                {name: _figures({key: difference(one, scores[fraction, other][key])
                                 for key, one in scores[fraction, arm].items()})
                 for name, other in others.items() if (fraction, other) in counts}
                for others in (controls, fewer)
            )  # fmt: skip
        arms.append(entry)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in WITHOUT_EFFECT}
    covers = ((SEVERAL if config.draws != 1 else ONE) + INTERVALS).format(**settings)
    return {
        "settings": settings, "test_images": first.shape[2], "intervals": covers,
        "classes": [{"name": label.name, "color": label.color} for label in present],
        "cases": [_case(plan, case) | made[case] for case in plan.rows], "arms": arms,
        "verdicts": [verdict([arm for arm in arms if arm["fraction"] == fraction]) for fraction in config.some],
    }  # fmt: skip


def kind_of(arm: Arm) -> str:
    """real, longer (real for as long as another one), synthetic, pretrained, mixed or bound."""
    return "longer" if arm.like else "pretrained" if arm.after else arm.learns


def _case(plan: StudyPlan, case: Portion) -> dict[str, Any]:
    rows = {name: len(split) if split else 0 for name, split in plan.rows[case]._asdict().items()}
    return {"draw": case.draw, "fraction": case.fraction} | rows | plan.chosen[case]._asdict()


def iou_of_networks(counts: np.ndarray, names: list[str], draws: int) -> dict[str, Estimate]:
    """IoU of each class over all test images, and "miou", their mean, averaged over draws of rows and seeds.

    counts: `class_counts`, int [draws of rows, seeds, images, K, 3]; `draws` resamples all three. Arms of the same
    shape have paired resamples.
    """
    pixels = torch.from_numpy(counts).double()

    def averaged(rows: torch.Tensor, networks: torch.Tensor) -> dict[str, torch.Tensor]:
        each = iou_of_counts(torch.einsum("bn,dsnkc->bdskc", rows, pixels))
        each = torch.cat([each, each.nanmean(-1, keepdim=True)], -1)  # [b, D, S, K + 1]
        means = torch.einsum("bds,bdsk->bk", networks / networks[0].numel(), each)
        return dict(zip([*names, "miou"], means.unbind(1), strict=True))

    return bootstrap(averaged, draws, rows=counts.shape[2], networks=counts.shape[:2])


def verdict(arms: list[dict[str, Any]]) -> str:
    """What to do with as many rows, in plain words: the arms of one fraction, as in metrics.json."""
    pretrained = sorted((arm for arm in arms if arm["kind"] == "pretrained"), key=lambda arm: arm["images"])
    (mixed,) = (arm for arm in arms if arm["kind"] == "mixed")
    gaining = [arm for arm in pretrained if _effect(arm) == "gain"] or pretrained[-1:]
    best = next(arm for place, arm in enumerate(gaining) if not any(
        more["above_fewer"][f"fewer_{arm['images']}"]["miou_interval"][0] > 0 for more in gaining[place + 1 :]
    ))  # the fewest images that no larger number is shown to beat  # fmt: skip
    recipes = [(f"pretrain on {best['images']:,} synthetic images, then finetune", "pretraining", best),
               (f"mix {mixed['images']:,} synthetic images in", "mixing", mixed)]  # fmt: skip
    helpful = sorted((one for one in recipes if _effect(one[2]) == "gain"), key=lambda one: -one[2]["miou"])
    advice = helpful[0] if helpful else None
    parts = [f"{advice[0]}: {_gains(advice[2])}"] if advice else ["add no synthetic images to them"]
    if advice and advice[2] is best:
        amount = f"{best['images']:,}"
        parts.append(f"don't add any beyond {amount}" if best is not pretrained[-1] else f"more than {amount} untried")
    parts += [f"{word}: {_effect(arm)}, {_gains(arm)}{_gaining_classes(arm)}"
              for _, word, arm in recipes if not advice or arm is not advice[2]]  # fmt: skip
    for bound in (arm for arm in arms if arm["kind"] == "bound"):
        parts.append(f"{bound['images']:,} other real rows in their place, the upper bound: {_gains(bound)}")
    return f"With your {arms[0]['rows']:,} rows: {'; '.join(parts)}."


def _effect(arm: dict[str, Any]) -> str:
    """gain: above both controls beyond the interval; loss: below one of them."""
    ends = [control["miou_interval"] for control in arm["above"].values()]
    if all(low > 0 for low, _ in ends):
        return "gain"
    if any(high < 0 for _, high in ends):
        exposure = arm["above"]["equal_exposure"]["miou_interval"]
        return "less than the same compute on the real rows gives" if exposure[1] >= 0 else "loss"
    return "no difference shown"


def _gains(arm: dict[str, Any]) -> str:
    shown = [f"{in_points(control)} {CONTROLS[name]}" for name, control in arm["above"].items()]
    return "mIoU " + " and ".join(shown)


def _gaining_classes(arm: dict[str, Any]) -> str:
    """The classes that are above both controls beyond their intervals, which the mean over all classes can hide."""
    found = arm["above"].values()
    names = [name for name in arm["above"]["equal_compute"]["intervals"]
             if all(control["intervals"][name][0] > 0 for control in found)]  # fmt: skip
    gains = (f"{name} {in_points(arm['above']['equal_compute'], name)}" for name in names)
    return f", but a gain of single classes, {CONTROLS['equal_compute']}: {', '.join(gains)}" if names else ""


def in_points(figures: dict[str, Any], name: str = "") -> str:
    """A difference of mIoU, or of the IoU of a class, in points of a hundred, with its interval."""
    value = figures["per_class"][name] if name else figures["miou"]
    low, high = figures["intervals"][name] if name else figures["miou_interval"]
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """study.md, study.png and, last, metrics.json."""
    with matplotlib.rc_context(visualize.STYLE):
        plot(metrics).savefig(folder / "study.png", dpi=110)
    write_text(folder / "study.md", report(metrics))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")


def read_study(folder: str | Path, dataset_name: str | Path = "DATA") -> dict[str, Any] | None:
    """The metrics of the study in a folder; where there is none, the command that makes one is printed."""
    path, command = Path(folder) / "metrics.json", f"--dataset_name {dataset_name} --output_dir {folder}"
    if path.is_file():
        return json.loads(path.read_text())
    print(f"no study here yet; this makes it:\nsegcn study {command}")
    return None


def report(metrics: dict[str, Any]) -> str:
    """Markdown: the verdicts, the plot, the tables, and what was done."""
    settings = metrics["settings"]
    lines = [f"- The words {group} were exchanged for one another in the captions, as drawn for each image."
             for group in settings["vary"]]  # fmt: skip
    for case in metrics["cases"]:
        lines.append(
            f"- Draw {case['draw'] + 1}, {case['fraction']:g} of the rows: {case['learned']} learned from,"
            f" {case['validation']} validated on; learning rate {case['learning_rate']:g}, augmentation"
            f" {case['augment']}; {case['kept']} of {case['generated']} images kept, in which the segmenter that"
            f" filters them found their masks with an mIoU of {case['miou']:.2f} on average."
            + (DROPPED.format(classes=listed(lost)) if (lost := case["mostly_dropped"]) else "")
        )
    parts = ["# Are the synthetic images worth training on?", *metrics["verdicts"], metrics["intervals"],
             "![test mIoU](study.png)", "```\n" + table(metrics) + "\n```", "## Gain of each class, in points of IoU",
             "```\n" + class_gains(metrics) + "\n```", "## What was done", METHOD.format(**settings), NO_LEAK,
             "\n".join(lines)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def table(metrics: dict[str, Any]) -> str:
    """A line for each arm: its steps, its mIoU, and what it is above both controls; with their intervals."""
    columns: dict[str, list[str]] = {"steps": [], "validation": [], "test mIoU": []}
    columns |= {words: [] for words in CONTROLS.values()}
    for arm in metrics["arms"]:
        low, high = arm["miou_interval"]
        columns["steps"].append(f"{arm['steps']:,}")
        columns["validation"].append(f"{arm['validation_miou']:.3f}")
        columns["test mIoU"].append(f"{arm['miou']:.3f} [{low:.3f}, {high:.3f}]")
        for control, words in CONTROLS.items():
            found = arm.get("above", {}).get(control)
            columns[words].append(in_points(found) if found else "")
    index = pandas.MultiIndex.from_tuples([(arm["rows"], arm["name"]) for arm in metrics["arms"]],
                                          names=["rows", "learned from"])  # fmt: skip
    return pandas.DataFrame(columns, index=index).to_string(sparsify=False)


def class_gains(metrics: dict[str, Any]) -> str:
    """The gain of each class over both controls, of every arm that adds something to the real rows."""
    found = {}
    for arm in metrics["arms"]:
        for control, words in CONTROLS.items() if arm["kind"] in ("pretrained", "mixed", "bound") else ():
            gains = arm["above"][control]
            found[arm["rows"], arm["name"], words] = {name: in_points(gains, name) for name in gains["intervals"]}
    return pandas.DataFrame(found).T.to_string(sparsify=False)


def plot(metrics: dict[str, Any], most: int = 12) -> Figure:
    """Test mIoU over the number of real rows, the gain over the number of synthetic images, and each class's gain.

    Bands are the 95 % intervals; most: classes shown, those first that gained or lost the most.
    """
    amount = max(arm["images"] for arm in metrics["arms"] if arm["kind"] == "pretrained")
    shown = [arm for arm in metrics["arms"] if arm["kind"] != "pretrained" or arm["images"] == amount]
    gained = [arm for arm in shown if arm["kind"] in ("pretrained", "mixed")]
    names = [one["name"] for one in metrics["classes"]]
    size = lambda name: -max(abs(arm["above"]["equal_exposure"]["per_class"][name]) for arm in gained)  # noqa: E731
    classes = sorted(names, key=size)[:most]
    columns = min(3, max(1, len(classes)))
    below = -(-len(classes) // columns)
    figure = Figure(figsize=(11, 4 + 1.7 * below), layout="constrained")
    above, rest = figure.subfigures(2, 1, height_ratios=[4, 1.7 * below], squeeze=False)[:, 0]
    left, right = above.subplots(1, 2, width_ratios=[3, 2])
    value = lambda arm: (arm["miou"], arm["miou_interval"])  # noqa: E731
    words = {"real": "real alone", "pretrained": f"pretrained on {amount:,} synthetic",
             "mixed": f"{amount:,} synthetic mixed in", "bound": "other real rows mixed in"}  # fmt: skip
    for place, (kind, label) in enumerate(words.items()):
        _curve(left, [arm for arm in shown if arm["kind"] == kind], "rows", value, COLORS[kind], label, place)
    longer = [arm for arm in shown if arm["kind"] == "longer" and arm["name"].startswith(f"real, as long as {amount} ")]
    left.plot([arm["rows"] for arm in longer], [arm["miou"] for arm in longer], "x:", color=COLORS["real"],
              label="real alone, as long as pretrained")  # fmt: skip
    left.set(title="IoU on held-out real images, mean over the classes", xlabel="real rows", ylabel="test mIoU")
    left.legend(loc="lower right", fontsize=8)
    for place, fraction in enumerate(sorted({arm["fraction"] for arm in shown})):
        arms = [arm for arm in metrics["arms"] if arm["kind"] == "pretrained" and arm["fraction"] == fraction]
        shade = matplotlib.colormaps["viridis"](place / 3)
        gain = partial(_gain, control="equal_exposure")
        _curve(right, arms, "images", gain, shade, f"{arms[0]['rows']} real rows", place)
    right.axhline(0, color="#999999", linewidth=0.8)
    right.set(title="Gain of pretraining over real alone", xlabel="synthetic images", ylabel="mIoU, points")
    right.legend(loc="best", fontsize=8)
    small = rest.subplots(below, columns, squeeze=False).flatten()
    for axes, name in zip(small, classes, strict=False):
        for place, kind in enumerate(("pretrained", "mixed", "bound")):
            arms = [arm for arm in shown if arm["kind"] == kind]
            gain = partial(_gain, control="equal_exposure", name=name)
            _curve(axes, arms, "rows", gain, COLORS[kind], kind, place)
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_title(f"{name}, gain in points", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in small[len(classes) :]:
        axes.set_axis_off()
    return figure


def _curve(axes: Axes, arms: list[dict], over: str, read: Callable, color: Any, label: str, place: int = 0) -> None:
    """What `read` takes from arms, a value and the ends of its interval, over their rows or images.

    place: of several curves, each a little to the right of the one before, so that intervals do not hide others.
    """
    if not arms:
        return
    ticks = [arm[over] for arm in arms]
    values, ends = zip(*map(read, arms), strict=True)
    axes.set_xscale("log")
    axes.errorbar([tick * ASIDE**place for tick in ticks], values, np.abs(np.array(ends).T - values), color=color,
                  fmt="o-", markersize=4, capsize=2, linewidth=1.2, elinewidth=0.7, label=label)  # fmt: skip
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(min(ticks) / ASIDE**6, max(ticks) * ASIDE**8)
    axes.minorticks_off()


def _gain(arm: dict, control: str, name: str = "") -> tuple[float, list[float]]:
    """In points: of the mIoU, or of a class's IoU."""
    found = arm["above"][control]
    value, ends = (
        (found["per_class"][name], found["intervals"][name]) if name else (found["miou"], found["miou_interval"])
    )
    return 100 * value, [100 * end for end in ends]


def _figures(scores: dict[str, Estimate]) -> dict[str, Any]:
    """IoU or difference of each class and their mean, with intervals."""
    values = {name: round(one.value or 0.0, DIGITS) for name, one in scores.items()}
    ends = {name: [round(end, DIGITS) for end in one.interval() or ()] for name, one in scores.items()}
    return {"miou": values.pop("miou"), "miou_interval": ends.pop("miou"), "per_class": values, "intervals": ends}
