"""The benchmark of training in a notebook: what was measured last, as bars, with the limit that arithmetic sets."""

import dataclasses
import json
import statistics
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from segcn.bench_plan import VARIANTS, BenchTrainConfig
from segcn.bench_train import bench_train, pairs_of, ratios
from segcn.charts import TONES
from segcn.flops import caching_limit, step_tflop

PANELS = {"samples_per_second": "samples per second, steady", "peak_gib": "most resident memory, GiB"}


def measured(config: BenchTrainConfig) -> tuple[BenchTrainConfig, list[dict]]:
    """The runs measured last, and their settings; run now where a peer is named, or none stand in output_dir."""
    path = config.folder / "train.json"
    if config.peer or not newest(path):
        bench_train(config, log=lambda text: None if "\n" in text else print(text))  # the table has its own cell
    entries = newest(path)
    variants = dict.fromkeys(entry["variant"] for entry in entries)
    rounds = max(entry["round"] for entry in entries)
    return dataclasses.replace(config, **entries[0]["settings"], variants=",".join(variants), rounds=rounds), entries


def newest(path: Path) -> list[dict]:
    """Of a train.json the pairs with the settings, machine and versions of its newest run, in the table's order."""
    entries = [entry for entry in json.loads(path.read_text()) if "variant" in entry] if path.is_file() else []
    last: dict = max(entries, key=lambda entry: entry["began"], default={})
    same = [entry for entry in entries if all(entry[k] == last[k] for k in ("settings", "machine", "versions"))]
    return sorted(same, key=lambda entry: (list(VARIANTS).index(entry["variant"]), entry["round"]))


def bars(config: BenchTrainConfig, entries: list[dict], limit: float) -> Figure:
    """Both sides of each variant; in ours its ratio to the other; dashes: the other's pace times `limit`."""
    shown = [name for name in config.chosen if list(pairs_of(entries, name))]
    figure = Figure(figsize=(max(8, 3.2 * len(shown)), 3.6))
    for axes, (measure, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for place, variant in enumerate(shown):
            shares = ratios(entries, variant, measure)
            if shares:
                sides = zip(*pairs_of(entries, variant), strict=True)
                values = [statistics.median(entry[measure] for entry in side) for side in sides]
                _pair(axes, place, values, statistics.median(shares))
                if measure == "samples_per_second":
                    ends = (place - 0.4, place + 0.4)
                    axes.hlines(values[0] * limit, *ends, colors="black", linestyles="dashed", linewidth=1)
        axes.set_title(title)
        axes.set_xticks(range(len(shown)), [fill(VARIANTS[name].text, 17) for name in shown], fontsize=8)
        axes.margins(y=0.06)
    _legend(figure, config, limit)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    return figure


def arithmetic(config: BenchTrainConfig) -> tuple[dict[str, float], float]:
    """TFLOP of each part of a step of this benchmark, and the limit of leaving the frozen encoders out."""
    counted = step_tflop(config.pretrained_model_name_or_path, config.resolution, config.train_batch_size)
    return counted, caching_limit(counted)


def _pair(axes, place: float, values: list[float], ratio: float) -> None:
    """Two bars with their values at their feet, where no dashes are; in the second its ratio to the first, bold."""
    for side, (value, tone, ink) in enumerate(zip(values, (TONES[1], TONES[0]), ("black", "white"), strict=True)):
        middle = place + 0.4 * side - 0.2
        axes.bar(middle, value, 0.38, color=tone)
        style = {"textcoords": "offset points", "ha": "center", "color": ink}
        axes.annotate(f"{value:.3g}", (middle, 0), (0, 6), **style)
        if side:
            axes.annotate(f"{ratio:.2f}x", (middle, 0), (0, 22), weight="bold", fontsize=13, **style)


def _legend(figure: Figure, config: BenchTrainConfig, limit: float) -> None:
    """The two sides, and what the dashes are."""
    axes = figure.axes[0]
    handles: list[Any] = [axes.bar(0, 0, color=tone) for tone in (TONES[1], TONES[0])]
    handles.append(axes.hlines([], 0, 0, colors="black", linestyles="dashed"))
    names = [*config.names.values(), f"all that leaving the encoders out can give by arithmetic: {limit:.2f}x"]
    figure.legend(handles, names, loc="upper center", ncols=3)
