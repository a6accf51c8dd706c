"""`segcn bench train`: training beside the baseline's, in turns: speed and memory as ratios, time until masks act."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from segcn.bench.config import VARIANTS, BenchTrainConfig
from segcn.bench.timing import BUSY, Timed, machine, run_timed
from segcn.data.metadata import find_splits, read_split
from segcn.data.visualize import TONES
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline
from segcn.models.base import WIDE, base_fingerprint, latent_factor, load_base, pick_device
from segcn.models.controlnet import load_controlnet
from segcn.samples.landscapes.scene import sample_landscapes
from segcn.train import checkpoint
from segcn.train.config import TrainConfig
from segcn.train.validation import GENERATED_AT_ONCE, generate_rows, held_out_rows, open_scorer, score_rows
from segcn.utils.args import check_values, make
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import WEIGHTS

OURS = [sys.executable, "-m", "segcn.train"]
PACKAGES = ("segcn", "torch", "diffusers", "transformers", "accelerate", "datasets", "bitsandbytes")
SIDES = ("baseline", "ours")
MEASURES = {  # of an entry: its title in the table
    "samples_per_second": "samples/s",
    "samples_per_second_with_start": "with start-up",
    "peak_gib": "peak GiB",
}
PANELS = {"samples_per_second": "samples per second, after start-up", "peak_gib": "peak of resident memory, GiB"}
HALF = 0.5  # share of the ceiling that has to be reached


def bench_train(config: BenchTrainConfig, log: Callable[[str], None] = print) -> list[dict]:
    """Run what is not in output_dir/train.json yet, write it there and the table to train.txt; returns all its entries.

    An interruption ends the training that runs; rerun the same command to resume after the last finished one.
    """
    check_bench(config)
    config = dataclasses.replace(config, dataset_name=config.dataset_name or str(sample_landscapes()))
    rows = len(read_split(config.dataset, "train"))
    if rows < (config.max_train_samples or 0):
        raise UserError(f"--max_train_samples {config.max_train_samples}: {config.dataset_name} has {rows} rows")
    config.folder.mkdir(parents=True, exist_ok=True)
    book, entries = Book(config, log), []
    for number in range(1, config.rounds + 1):  # another side first in every other round
        for variant in config.chosen:
            for side in SIDES if number % 2 else reversed(SIDES):
                entries.append(bench_once(config, book, variant, side, number))
    lines = [*train_table(config, entries), *train_remarks(config, entries)] if entries else []
    if config.until_faithful:
        lines += ["", *faithful_lines(config, bench_faithful(config, book))]
    write_text(config.folder / "train.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote train.json and train.txt to {config.folder}."]))
    return book.entries


def check_bench(config: BenchTrainConfig) -> None:
    """UserError for what would fail only after hours."""
    check_values(config)
    unknown = [name for name in config.chosen if name not in VARIANTS]
    if unknown or not (config.chosen or config.until_faithful):
        raise UserError(f"--variants {config.variants}: expected some of {', '.join(VARIANTS)}")
    if config.peer and not Path(config.peer).is_file():
        raise UserError(
            f"--peer {config.peer}: no such file; it is examples/controlnet/train_controlnet.py of diffusers"
        )
    if config.until_faithful and config.faithful_steps < config.checkpointing_steps:
        raise UserError(
            f"--faithful_steps {config.faithful_steps}: expected at least --checkpointing_steps,"
            f" {config.checkpointing_steps}: checkpoints are what is scored"
        )
    latent_factor(config.pretrained_model_name_or_path)


def bench_once(config: BenchTrainConfig, book: "Book", variant: str, side: str, number: int) -> dict:
    """The entry of one run, from the book or run now; its weights and caches are deleted."""
    where = config.folder / "runs" / f"{variant}-{side}-{number}"
    words = command(config, side, where, config.steps, config.steps, variant_words(config, variant, side))
    title = f"round {number}, {variant}, {config.names[side]}"
    entry = book.find(words)
    if entry is None:
        entry, timed = book.run(words, where, config.steps, title)
        last, batch = config.warmup_steps + config.measured_steps, config.train_batch_size
        pace = timed.seconds_per_step(config.warmup_steps, last)
        entry |= {
            "variant": variant,
            "side": side,
            "round": number,
            "settings": config.settings,
            "seconds_per_step": pace,
            "samples_per_second": batch / pace,
            "samples_per_second_with_start": last * batch / timed.step_ends[last],
            "first_step": timed.step_ends[1],
            "peak_gib": timed.peak_gib(),  # the last step, which waits for a checkpoint, counts here alone
            "peak_gib_without_saving": timed.peak_gib(until=timed.step_ends[last]),
        }
        book.add(entry)
        shutil.rmtree(where)
    peak = "-" if entry["peak_gib"] is None else f"{entry['peak_gib']:.3g}"
    book.log(
        f"{title}: {entry['samples_per_second']:.3g} samples/s, {peak} GiB, first step after"
        f" {entry['first_step']:.0f} s"
    )
    return entry


def command(config: BenchTrainConfig, side: str, where: Path, steps: int, save_every: int, more: tuple) -> list[str]:
    """The command line of one side, writing below the folder `where`: the same flags, and `more`."""
    data = config.dataset.absolute()
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": Path(config.pretrained_model_name_or_path).absolute(),
        "dataset_name": data.parent if data.is_file() else data,
        "output_dir": where / "out",
        "cache_dir": where / "cache",  # of this run alone: each run pays for its cache
        "resolution": config.resolution,
        "train_batch_size": config.train_batch_size,
        "max_train_steps": steps,
        "checkpointing_steps": save_every,
        "seed": config.seed,
        "report_to": "tensorboard",
    } | ({"max_train_samples": config.max_train_samples} if config.max_train_samples else {})
    words = [str(word) for name, value in shared.items() for word in (f"--{name}", value)]
    if side == "baseline" and config.peer:
        return [sys.executable, str(Path(config.peer).absolute()), *words, *more]
    alone = ("--cache", "none") if side == "baseline" else ()
    return [*OURS, *words, "--logging_steps", "1", "--augment", "none", *alone, *more]


def variant_words(config: BenchTrainConfig, name: str, side: str) -> tuple[str, ...]:
    """The flags that a variant adds for a side; without diffusers' script, both sides differ in the cache alone."""
    variant = VARIANTS[name]
    own = variant.peer if side == "baseline" and config.peer else variant.ours
    start = shared_start(config)
    return (*own, *(("--controlnet_model_name_or_path", str(start)) if start else ()))


def shared_start(config: BenchTrainConfig) -> Path | None:
    """A ControlNet as diffusers starts it, where segcn would start a smaller one: both sides must train the same."""
    base = config.pretrained_model_name_or_path
    if UNet2DConditionModel.load_config(base, subfolder="unet")["block_out_channels"][0] >= WIDE:
        return None
    folder = config.folder / f"start-{base_fingerprint(base)}-{config.seed}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(config.seed)
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
        ControlNetModel.from_unet(unet).save_pretrained(folder)
    return folder


class Book:
    """output_dir/train.json: every finished run; one of the same command, versions and machine is not run again."""

    def __init__(self, config: BenchTrainConfig, log: Callable[[str], None]):
        self.config, self.log = config, log
        self.path = config.folder / "train.json"
        self.entries = json.loads(self.path.read_text()) if self.path.is_file() else []

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        """What a number depends on besides the command."""
        script = hashlib.sha256(Path(self.config.peer).read_bytes()).hexdigest()[:16] if self.config.peer else None
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {"versions": versions | {"python": platform.python_version(), "script": script}, "machine": machine()}

    def find(self, words: list[str]) -> dict | None:
        """The finished run of this command."""
        wanted = self.circumstances | {"command": words}
        return next((entry for entry in self.entries if wanted.items() <= entry.items()), None)

    def run(self, words: list[str], where: Path, steps: int, title: str) -> tuple[dict, Timed]:
        """Run a command now; returns a new entry, which `add` keeps."""
        shutil.rmtree(where, ignore_errors=True)  # of a run that was interrupted
        where.mkdir(parents=True)
        self.log(f"{title}: {steps} steps, see {where}.log")
        timed = run_timed(words, where.with_name(f"{where.name}.log"), where / "out", steps)
        entry = self.circumstances | {"command": words, "other_load": timed.other_load, "began": timed.began}
        return entry | {"seconds": timed.seconds, "step_ends": list(timed.step_ends.values())}, timed

    def add(self, entry: dict) -> None:
        """Keep an entry, in place of an earlier one of the same command."""
        self.entries = [old for old in self.entries if old is not self.find(entry["command"])] + [entry]
        write_text(self.path, json.dumps(self.entries, indent=1) + "\n")


# What was measured, as text and as a chart


def pairs_of(entries: list[dict], variant: str) -> list[tuple[dict, dict]]:
    """(the baseline's entry, ours) of each finished round."""
    found = {(entry["side"], entry["round"]): entry for entry in entries if entry.get("variant") == variant}
    rounds = sorted({number for _, number in found})
    return [tuple(found[side, number] for side in SIDES) for number in rounds
            if all((side, number) in found for side in SIDES)]  # fmt: skip


def ratios(entries: list[dict], variant: str, measure: str) -> list[float]:
    """Ours / the baseline's in each round; none where it was not measured."""
    pairs = [(baseline[measure], ours[measure]) for baseline, ours in pairs_of(entries, variant)]
    return [ours / baseline for baseline, ours in pairs if baseline and ours]


def medians(entries: list[dict], variant: str, measure: str) -> list[float]:
    """The median of the rounds of the baseline, and of ours."""
    sides = zip(*pairs_of(entries, variant), strict=True)
    return [statistics.median(entry[measure] for entry in side) for side in sides]


def train_table(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line a variant: of each measure the baseline's median, ours, and the median of the rounds' ratios."""
    rows = {}
    for variant in config.chosen:
        cells: list[str] = []
        for measure in MEASURES:
            shares = ratios(entries, variant, measure)
            values = [f"{value:.3g}" for value in medians(entries, variant, measure)] if shares else ["-", "-"]
            cells += [*values, f"{statistics.median(shares):.2f}x" if shares else "not measured"]
        rows[VARIANTS[variant].text] = cells
    heads = ("diffusers" if config.peer else "no cache", "segcn", "ratio")
    columns = pd.MultiIndex.from_product([MEASURES.values(), heads])
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).to_string().splitlines()


def train_remarks(config: BenchTrainConfig, entries: list[dict]) -> Iterator[str]:
    """What the numbers are of, when the cache has paid off, and whether the machine was idle."""
    yield ""
    yield f"Medians of {config.rounds} round(s); ratio: segcn / {config.names['baseline']}, taken in each round."
    yield (
        f"samples/s: steps {config.warmup_steps + 1} to {config.warmup_steps + config.measured_steps}, batch "
        f"{config.train_batch_size}, {config.resolution} pixels."
    )
    yield "with start-up: from the start of the process, cache building included."
    yield "peak GiB: peak of resident memory, a checkpoint included."
    for variant in config.chosen:
        pairs = pairs_of(entries, variant)
        start = statistics.median(ours["first_step"] - other["first_step"] for other, ours in pairs)
        gain = statistics.median(other["seconds_per_step"] - ours["seconds_per_step"] for other, ours in pairs)
        begins = f"segcn's first step ends {abs(start):.1f} s {'later' if start > 0 else 'earlier'}"
        if start > 0:
            begins += f", it is ahead after {1 + start / gain:.0f} steps" if gain > 0 else ", it is never ahead"
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios(entries, variant, "samples_per_second"))
        yield f"{variant}: samples/s {listed} in the rounds; {begins}."
    yield entries[0]["machine"]
    yield ", ".join(f"{name} {value}" for name, value in entries[0]["versions"].items() if value)
    load = max(entry["other_load"] for entry in entries)
    if load > BUSY:
        yield f"Other programs used up to {load:.1f} cores during a run: do not trust its times."


def measured(config: BenchTrainConfig) -> tuple[BenchTrainConfig, list[dict]]:
    """The newest runs of one machine and their settings; run now where diffusers' script is named or there are none."""

    def newest() -> list[dict]:
        path = config.folder / "train.json"
        entries = json.loads(path.read_text()) if path.is_file() else []
        entries = [entry for entry in entries if entry.get("side") in SIDES and "variant" in entry]
        last = max(entries, key=lambda entry: entry["began"], default={})
        same = [entry for entry in entries if all(entry[k] == last[k] for k in ("settings", "machine", "versions"))]
        return sorted(same, key=lambda entry: (list(VARIANTS).index(entry["variant"]), entry["round"]))

    if config.peer or not newest():
        bench_train(config, log=lambda text: None if "\n" in text else print(text))  # the table has its own cell
    entries = newest()
    variants = dict.fromkeys(entry["variant"] for entry in entries)
    rounds = max(entry["round"] for entry in entries)
    return dataclasses.replace(config, **entries[0]["settings"], variants=",".join(variants), rounds=rounds), entries


def bars(config: BenchTrainConfig, entries: list[dict], limit: float) -> Figure:
    """Both sides of each variant; in ours its ratio to the other; dashes: the baseline's speed times `limit`."""
    shown = [name for name in config.chosen if pairs_of(entries, name)]
    figure = Figure(figsize=(max(8, 3.2 * len(shown)), 3.6))
    for axes, (measure, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for place, variant in enumerate(name for name in shown if ratios(entries, name, measure)):
            values = medians(entries, variant, measure)
            share = statistics.median(ratios(entries, variant, measure))
            for at, value, tone, ink in zip((-0.2, 0.2), values, TONES[1::-1], ("black", "white"), strict=True):
                axes.bar(place + at, value, 0.38, color=tone)
                style = {"textcoords": "offset points", "ha": "center", "color": ink}
                axes.annotate(f"{value:.3g}", (place + at, 0), (0, 6), **style)
            axes.annotate(f"{share:.2f}x", (place + 0.2, 0), (0, 22), weight="bold", fontsize=13, **style)
            if measure == "samples_per_second":
                ends = (place - 0.4, place + 0.4)
                axes.hlines(values[0] * limit, *ends, colors="black", linestyles="dashed", linewidth=1)
        axes.set_title(title)
        axes.set_xticks(range(len(shown)), [fill(VARIANTS[name].text, 17) for name in shown], fontsize=8)
        axes.margins(y=0.06)
    axes = figure.axes[0]
    handles: list[Any] = [axes.bar(0, 0, color=tone) for tone in TONES[1::-1]]
    handles.append(axes.hlines([], 0, 0, colors="black", linestyles="dashed"))
    names = [*config.names.values(), f"the most that caching the encoders can give by arithmetic: {limit:.2f}x"]
    figure.legend(handles, names, loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    return figure


def step_tflop(base: str | Path, resolution: int, batch: int = 1) -> dict[str, float]:
    """TFLOP of each part of a training step, counted on the shapes alone: no weights are loaded.

    vae: encoding; text; train: U-Net and ControlNet forward and backward. A multiplication with its addition counts as
    two operations; what is no matrix product or convolution counts as none.
    """
    side = resolution // latent_factor(base)
    text_config = CLIPTextConfig.from_pretrained(base, subfolder="text_encoder")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base, subfolder="vae"))
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet"))
        controlnet, text_encoder = ControlNetModel.from_unet(unet), CLIPTextModel(text_config)
        image = torch.zeros(batch, 3, resolution, resolution)
        latents = torch.zeros(batch, unet.config.in_channels, side, side)
        tokens = torch.zeros(batch, text_config.max_position_embeddings, dtype=torch.long)
        embeddings = torch.zeros(*tokens.shape, unet.config.cross_attention_dim)
        timestep = torch.zeros(batch, dtype=torch.long)
    for frozen in (vae, unet, text_encoder):
        frozen.requires_grad_(False)

    def train() -> None:
        down, middle = controlnet(latents, timestep, embeddings, controlnet_cond=image, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        unet(latents, timestep, embeddings, **residuals).sample.sum().backward()

    counted = {}
    for name, work in (("vae", lambda: vae.encode(image)), ("text", lambda: text_encoder(tokens)), ("train", train)):
        with FlopCounterMode(display=False) as counter:
            work()
        counted[name] = counter.get_total_flops() / 1e12
    return counted


def caching_limit(counted: dict[str, float]) -> float:
    """How many times faster steps can get without the frozen encoders, by arithmetic alone."""
    return sum(counted.values()) / counted["train"]


# The time until masks have an effect: both sides' checkpoints, scored after the run


def bench_faithful(config: BenchTrainConfig, book: Book) -> list[dict]:
    """An entry for the baseline at each learning rate and for ours: which checkpoint reached half of the ceiling, when.

    The time runs from the start of the process, cache building included, to the checkpoint's weights on disk. Scoring
    is not counted. It stops at the first checkpoint that reaches it.
    """
    if "test" not in find_splits(config.dataset):
        raise UserError(f"--until_faithful: {config.dataset_name} has no test/ with masks that are held out")
    entries = [train_contender(config, book, *contender) for contender in contenders(config)]
    scorer = None
    for entry in entries:
        if "reached" not in entry:
            scorer = scorer or Scorer(config, book.log)
            scorer.score(entry, partial(book.add, entry))
            shutil.rmtree(entry["where"])
    return entries


def contenders(config: BenchTrainConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """(title, side, words) of each run; the baseline gets our share of empty captions too, as guidance needs them."""
    ours = ("--preset", config.preset, "--checkpoints_total_limit", str(config.faithful_steps))
    found: list[tuple[str, str, tuple[str, ...]]] = [("segcn at its defaults", "ours", ours)]
    if not config.peer:
        return [("segcn --cache none at its defaults", "baseline", ours), *found]
    empty = str(make(TrainConfig, config.preset).proportion_empty_prompts)
    rates = [("--learning_rate", str(rate), "--proportion_empty_prompts", empty) for rate in config.peer_learning_rates]
    return [(f"diffusers at {float(words[1]):g}", "baseline", words) for words in rates] + found


def train_contender(config: BenchTrainConfig, book: Book, title: str, side: str, words: tuple[str, ...]) -> dict:
    """The entry of a finished run, from the book or run now; its checkpoints are scored later."""
    where = config.folder / "runs" / f"faithful-{title.replace(' ', '_')}"
    line = command(config, side, where, config.faithful_steps, config.checkpointing_steps, words)
    scored = {"rows": config.faithfulness_rows, "share": HALF}
    entry = book.find(line)
    if entry is None or entry["scored"] != scored or ("reached" not in entry and not where.is_dir()):
        entry, timed = book.run(line, where, config.faithful_steps, title)
        written = {str(step): path.stat().st_mtime - timed.began for step, path in saved_weights(where).items()}
        entry |= {"title": title, "side": side, "where": str(where), "scored": scored}
        entry |= {"written": written, "peak_gib": timed.peak_gib()}
        book.add(entry)
    return entry


def saved_weights(where: Path) -> dict[int, Path]:
    """The ControlNet's weights in each checkpoint of a run by step; both sides lay them out alike."""
    return {step: folder / "controlnet" / WEIGHTS for step, folder in checkpoint.steps(where / "out").items()}


class Scorer:
    """Base, held-out rows and segmenter of segcn's own validation: they score the checkpoints of both sides."""

    def __init__(self, config: BenchTrainConfig, log: Callable[[str], None]):
        self.log, self.device = log, pick_device()
        shared = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path, "seed": config.seed}
        self.settings = make(SampleConfig, config.preset, **shared)
        training = make(
            TrainConfig, config.preset, **shared, dataset_name=config.dataset_name, resolution=config.resolution,
            faithfulness_rows=config.faithfulness_rows,
        )  # fmt: skip
        split = read_split(config.dataset, "train")
        held_out = held_out_rows(training, split)
        assert held_out is not None
        self.validation = open_scorer(training, held_out, split, config.folder, self.device, log)
        self.ceiling = self.validation.ceiling["miou"]
        self.base = load_base(config.pretrained_model_name_or_path, self.device)

    def score(self, entry: dict, keep: Callable[[], None]) -> None:
        """Generate from each checkpoint in turn until one reaches half of the ceiling; then `keep` is called."""
        entry |= {"ceiling": self.ceiling, "scores": {}, "reached": None}
        for step, weights in saved_weights(Path(entry["where"])).items():
            miou = entry["scores"][str(step)] = self.miou_of(weights.parent)
            self.log(f"{entry['title']}, step {step}: mIoU {miou:.3f}, of the ceiling {self.ceiling:.3f}")
            if miou >= HALF * self.ceiling:
                entry["reached"] = step
                break
        keep()

    def miou_of(self, folder: Path) -> float:
        """mIoU of images that this ControlNet generates for the held-out masks."""
        controlnet = load_controlnet(folder, self.device).eval()
        pipeline = Pipeline(self.base, controlnet, self.validation.rows.palette, str(folder))
        images = generate_rows(self.validation, pipeline, self.settings, GENERATED_AT_ONCE, lambda *_: False)
        return score_rows(self.validation, images)["miou"]


def faithful_lines(config: BenchTrainConfig, entries: list[dict]) -> Iterator[str]:
    """A line a run, and ours against the quickest of the baseline's."""

    def seconds(entry: dict) -> float:
        return entry["written"][str(entry["reached"])] if entry["reached"] else float("inf")

    yield (
        f"Until images of {config.faithfulness_rows} held-out masks reach mIoU {HALF * entries[0]['ceiling']:.3f}, half"
        f" of that of real images, start-up and cache included, scored every {config.checkpointing_steps} steps:"
    )
    for entry in entries:
        best = max(entry["scores"].values())
        reached = f"{seconds(entry):7.0f} s, step {entry['reached']} (mIoU {best:.3f})"
        never = f"not within {config.faithful_steps} steps (best mIoU {best:.3f})"
        yield f"  {entry['title']:36} {reached if entry['reached'] else never}"
    baseline, ours = (min(seconds(entry) for entry in entries if entry["side"] == side) for side in SIDES)
    if max(ours, baseline) < float("inf"):
        yield f"  the quickest of the others / segcn: {baseline / ours:.2f}x the time"
