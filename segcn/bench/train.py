"""segcn's training beside a baseline in turns: pace and memory as ratios, then the time until masks are followed."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from segcn.bench.config import VARIANTS, BenchTrainConfig
from segcn.bench.timing import BUSY, machine, run_timed
from segcn.data.metadata import find_splits, read_split
from segcn.data.visualize import TONES
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline
from segcn.models.base import WIDE, base_fingerprint, latent_factor, load_base, pick_device
from segcn.models.controlnet import load_controlnet, make_controlnet
from segcn.models.family import family_of
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
MEASURED_ON = ("baseline", "pretrained_model_name_or_path", "dataset_name", "warmup_steps", "measured_steps",
               "resolution", "train_batch_size", "max_train_samples", "seed")  # fmt: skip
MEASURES = {"samples_per_second": "samples/s", "samples_per_second_with_start": "with start-up", "peak_gib": "peak GiB"}
PANELS = {"samples_per_second": "samples per second, steady", "peak_gib": "most memory, GiB"}
MEMORY = {False: "resident memory of the process", True: "memory of the GPU, CUDA itself included"}
SHARE = 0.5  # of the ceiling, which images have to reach for --until_faithful


def bench_train(config: BenchTrainConfig, log: Callable[[str], None] = print) -> list[dict]:
    """Run what is not in output_dir/train.json yet, write it there and the table to train.txt; returns all its entries.

    Interrupted, it ends the training that runs; rerun the same command to resume.
    """
    check_bench(config)
    config = dataclasses.replace(config, dataset_name=config.dataset_name or str(sample_landscapes()))
    rows = len(read_split(config.dataset, "train"))
    if rows < (config.max_train_samples or 0):
        raise UserError(f"--max_train_samples {config.max_train_samples}: {config.dataset_name} has {rows} rows")
    config.folder.mkdir(parents=True, exist_ok=True)
    results = Results(config, log)
    pairs = [
        run_once(config, results, variant, side, number)
        for number in range(1, config.rounds + 1)
        for variant in config.chosen
        for side in (SIDES if number % 2 else reversed(SIDES))  # another one first in every other round
    ]
    lines = [*train_table(config, pairs), *train_remarks(config, pairs)] if pairs else []
    if config.until_faithful:
        lines += ["", *faithful_lines(config, run_until_faithful(config, results))]
    write_text(config.folder / "train.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote train.json and train.txt to {config.folder}."]))
    return results.entries


def check_bench(config: BenchTrainConfig) -> None:
    """UserError for what would fail only after hours."""
    unknown = [name for name in config.chosen if name not in VARIANTS]
    if unknown or not (config.chosen or config.until_faithful):
        raise UserError(f"--variants {config.variants}: expected some of {', '.join(VARIANTS)}")
    check_values(config)
    check_script(config.baseline, config.pretrained_model_name_or_path)
    if config.until_faithful and config.faithful_steps < config.checkpointing_steps:
        raise UserError(
            f"--faithful_steps {config.faithful_steps}: expected at least --checkpointing_steps,"
            f" {config.checkpointing_steps}: checkpoints are what is scored"
        )
    latent_factor(config.pretrained_model_name_or_path)


def check_script(script: str, base: str) -> None:
    """UserError for a script that is missing, or of another family than the base; none is fine."""
    if not script:
        return
    family = family_of(base)
    if not Path(script).is_file():
        raise UserError(f"--baseline {script}: no such file; diffusers has it in examples/controlnet")
    if (used := f"{family.name}ControlNetPipeline") not in Path(script).read_text():
        raise UserError(f"--baseline {script}: expected a script for {family.title}, which uses {used}, found none in"
                        f" it; in examples/controlnet of diffusers are those of all families")  # fmt: skip


class Results:
    """output_dir/train.json: every finished run; one of the same command, versions and machine is not run again."""

    def __init__(self, config: BenchTrainConfig, log: Callable[[str], None]):
        self.log, self.path = log, config.folder / "train.json"
        self.entries = read_entries(self.path)
        versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in PACKAGES}
        script = hashlib.sha256(Path(config.baseline).read_bytes()).hexdigest()[:16] if config.baseline else None
        versions |= {"python": platform.python_version(), "baseline": script}
        self.circumstances = {"versions": versions, "machine": machine()}

    def find(self, words: list[str], **more: Any) -> dict | None:
        """The finished run of this command; more: what else its entry says."""
        wanted = self.circumstances | {"command": words} | more
        return next((entry for entry in self.entries if wanted.items() <= entry.items()), None)

    def run(self, words: list[str], where: Path, steps: int, title: str) -> dict[str, Any]:
        """Run a command now; returns a new entry, which `add` keeps."""
        shutil.rmtree(where, ignore_errors=True)  # of a run that was interrupted
        where.mkdir(parents=True)
        self.log(f"{title}: {steps} steps, see {where}.log")
        measured = run_timed(words, where.with_name(f"{where.name}.log"), where / "out", steps)
        return self.circumstances | {"command": words} | measured

    def add(self, entry: dict) -> None:
        """Keep an entry, in place of an earlier one of the same command and variant."""
        earlier = self.find(entry["command"], **{"variant": entry["variant"]} if "variant" in entry else {})
        self.entries = [old for old in self.entries if old is not earlier] + [entry]
        write_text(self.path, json.dumps(self.entries, indent=1) + "\n")


def read_entries(path: Path) -> list[dict]:
    """The runs in a train.json."""
    return json.loads(path.read_text()) if path.is_file() else []


def command(config: BenchTrainConfig, side: str, where: Path, steps: int, save_every: int, more: tuple) -> list[str]:
    """The command line of one side, writing below the folder `where`: the same flags by the same names, and `more`."""
    data = config.dataset
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": Path(config.pretrained_model_name_or_path).absolute(),
        "dataset_name": data.parent if data.is_file() else data, "output_dir": where / "out",
        "cache_dir": where / "cache",  # of this run alone: what is cached is paid for in each
        "resolution": config.resolution, "train_batch_size": config.train_batch_size, "max_train_steps": steps,
        "checkpointing_steps": save_every, "seed": config.seed, "report_to": "tensorboard",
    }  # fmt: skip
    if config.max_train_samples:
        shared["max_train_samples"] = config.max_train_samples
    words = [str(word) for name, value in shared.items() for word in (f"--{name}", value)]
    if side == "baseline" and config.baseline:
        return [sys.executable, str(Path(config.baseline).absolute()), *words, *more]
    alone = ("--cache", "none") if side == "baseline" else ()
    return [*OURS, *words, "--logging_steps", "1", "--augment", "none", *alone, *more]


def variant_words(config: BenchTrainConfig, name: str, side: str) -> tuple[str, ...]:
    """What a variant adds for a side; without a script of diffusers', both differ in the cache alone.

    Where segcn would start a small ControlNet, both sides start from one that is as wide as diffusers starts it; one
    that is light begins with the base.
    """
    foreign = side == "baseline" and config.baseline
    own = VARIANTS[name].baseline if foreign else (*VARIANTS[name].ours, "--reward_weight", "0")  # the same work
    base = config.pretrained_model_name_or_path
    family = family_of(base)
    widths = family.denoiser.load_config(base, subfolder=family.part).get("block_out_channels", [WIDE])
    if "lora" in own or widths[0] >= WIDE:
        return own
    start = config.folder / f"start-{base_fingerprint(base)}-{config.seed}"
    if not (start / "config.json").is_file():
        torch.manual_seed(config.seed)
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
        ControlNetModel.from_unet(unet).save_pretrained(start)
    return (*own, "--controlnet_model_name_or_path", str(start))


def run_once(config: BenchTrainConfig, results: Results, variant: str, side: str, number: int) -> dict:
    """The entry of one run, an earlier one or run now; its weights and caches are not kept.

    Variants with the same command on this side share its run in each round. The last step, which waits for a
    checkpoint, counts in the memory alone.
    """
    last, batch = config.warmup_steps + config.measured_steps, config.train_batch_size
    flags = variant_words(config, variant, side)
    named = next(name for name in VARIANTS if variant_words(config, name, side) == flags)
    where = config.folder / "runs" / f"{named}-{side}-{number}"
    words = command(config, side, where, last + 1, last + 1, flags)
    title = f"round {number}, {variant}, {config.names[side]}"
    entry = results.find(words, variant=variant)
    if entry is None and (shared := results.find(words)):
        entry = shared | {"variant": variant}
        results.add(entry)
    elif entry is None:
        entry = results.run(words, where, last + 1, title)
        ends = [0.0, *entry["step_ends"]]
        pace = (ends[last] - ends[config.warmup_steps]) / config.measured_steps
        entry |= {
            "variant": variant, "side": side, "round": number,
            "settings": {name: getattr(config, name) for name in MEASURED_ON},
            "seconds_per_step": pace, "samples_per_second": batch / pace, "first_step": ends[1],
            "samples_per_second_with_start": last * batch / ends[last],
        }  # fmt: skip
        results.add(entry)
        shutil.rmtree(where)
    results.log(
        f"{title}: {entry['samples_per_second']:.3g} samples/s, {entry['peak_gib']:.3g} GiB, "
        f"first step after {entry['first_step']:.0f} s"
    )
    return entry


def by_round(entries: list[dict], variant: str, measure: str) -> pandas.DataFrame:
    """A measure of both sides, and the ratio of ours to the baseline's, in each finished round of a variant."""
    rows = [entry for entry in entries if entry.get("variant") == variant]
    frame = pandas.DataFrame({side: {entry["round"]: entry[measure] for entry in rows if entry["side"] == side}
                              for side in SIDES}, dtype=float).dropna()  # fmt: skip
    return frame.assign(ratio=frame.ours / frame.baseline)


def train_table(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line for each variant: of each measure the baseline's median, ours, and the median of the rounds' ratios."""
    heads = ("diffusers" if config.baseline else "no cache", "segcn", "ratio")
    lines: dict[str, dict] = {}
    for variant in config.chosen:
        line = lines[VARIANTS[variant].text] = {}
        for measure, title in MEASURES.items():
            medians = by_round(entries, variant, measure).median()
            texts = (f"{medians.baseline:.3g}", f"{medians.ours:.3g}", f"{medians.ratio:.2f}x")
            line |= {(title, head): text for head, text in zip(heads, texts, strict=True)}
    return pandas.DataFrame.from_dict(lines, orient="index").to_string().splitlines()


def train_remarks(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """What the numbers are of, when the cache is paid back, and whether the machine was idle."""
    first, last = entries[0], config.warmup_steps + config.measured_steps
    lines = [
        "",
        f"Medians of {config.rounds} round(s); ratio: segcn / {config.names['baseline']}, taken in each round.",
        f"samples/s: steps {config.warmup_steps + 1} to {last}, batch {config.train_batch_size}, "
        f"{config.resolution} pixels.",
        "with start-up: from the start of the process, cache building included.",
        f"peak GiB: {MEMORY[torch.cuda.is_available()]}, looked at ten times a second, a checkpoint included.",
    ]
    for variant in config.chosen:
        listed = ", ".join(f"{ratio:.2f}" for ratio in by_round(entries, variant, "samples_per_second").ratio)
        start, gain = (frame.ours.sub(frame.baseline).median() for frame in
                       (by_round(entries, variant, name) for name in ("first_step", "seconds_per_step")))  # fmt: skip
        begins = f"segcn's first step ends {abs(start):.1f} s {'later' if start > 0 else 'earlier'}"
        if start > 0:
            begins += f", it is ahead after {1 - start / gain:.0f} steps" if gain < 0 else ", it is never ahead"
        lines.append(f"{variant}: samples/s {listed} in the rounds; {begins}.")
    lines += [first["machine"], ", ".join(f"{name} {value}" for name, value in first["versions"].items() if value)]
    load = max(entry["other_load"] or 0 for entry in entries)
    if load > BUSY:
        lines.append(f"Other programs kept up to {load:.1f} cores busy during a run: its times mean little.")
    return lines


def run_until_faithful(config: BenchTrainConfig, results: Results) -> list[dict]:
    """An entry for the baseline at each learning rate and for ours: its first checkpoint that follows the masks.

    The time runs from the start of the process, cache building included, to the checkpoint's weights on disk. Scoring
    is not counted. It stops at the first checkpoint that reaches half of the ceiling.
    """
    if "test" not in find_splits(config.dataset):
        raise UserError(f"--until_faithful: {config.dataset_name} has no test/ with masks that are held out")
    ours = ("--preset", config.preset, "--checkpoints_total_limit", str(config.faithful_steps))
    empty = str(make(TrainConfig, config.preset).proportion_empty_prompts)  # as many as ours: guidance needs them
    runs = [(f"diffusers at {rate:g}", "baseline", ("--learning_rate", str(rate), "--proportion_empty_prompts", empty))
            for rate in config.baseline_learning_rates if config.baseline]  # fmt: skip
    runs += [] if config.baseline else [("segcn --cache none at its defaults", "baseline", ours)]
    entries, scorer = [], None
    for title, side, words in [*runs, ("segcn at its defaults", "ours", ours)]:
        where = config.folder / "runs" / f"faithful-{title.replace(' ', '_')}"
        line = command(config, side, where, config.faithful_steps, config.checkpointing_steps, words)
        scored = {"rows": config.faithfulness_rows, "share": SHARE}
        entry = results.find(line)
        if entry is None or entry["scored"] != scored or ("reached" not in entry and not where.is_dir()):
            entry = results.run(line, where, config.faithful_steps, title)
            saved_at = {str(step): file.stat().st_mtime - entry["began"] for step, file in saved(where).items()}
            entry |= {"title": title, "side": side, "where": str(where), "scored": scored, "saved_at": saved_at}
            results.add(entry)
        entries.append(entry)
    for entry in entries:
        if "reached" not in entry:
            scorer = scorer or CheckpointScorer(config, results.log)
            scorer.score(entry)
            results.add(entry)
            shutil.rmtree(entry["where"])
    return entries


def saved(where: Path) -> dict[int, Path]:
    """The ControlNet's weights in each checkpoint of a run by step; both sides have the same layout."""
    return {step: folder / "controlnet" / WEIGHTS for step, folder in checkpoint.steps(where / "out").items()}


class CheckpointScorer:
    """The segmenter of segcn's own validation and the base: what scores the checkpoints of both sides."""

    def __init__(self, config: BenchTrainConfig, log: Callable[[str], None]):
        self.log, self.device = log, pick_device()
        shared = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path, "seed": config.seed}
        self.settings = make(SampleConfig, config.preset, **shared)
        training = make(TrainConfig, config.preset, **shared, dataset_name=config.dataset_name,
                        resolution=config.resolution, faithfulness_rows=config.faithfulness_rows)  # fmt: skip
        split = read_split(config.dataset, "train")
        held_out = held_out_rows(training, split)
        assert held_out is not None
        self.scorer = open_scorer(training, held_out, split, config.folder, self.device, log)
        self.ceiling = self.scorer.ceiling["miou"]
        self.base = load_base(config.pretrained_model_name_or_path, self.device)

    def score(self, entry: dict) -> None:
        """Generate from each checkpoint in turn until one reaches the share of the ceiling; the entry says which."""
        entry |= {"ceiling": self.ceiling, "scores": {}, "reached": None}
        for step, weights in saved(Path(entry["where"])).items():
            miou = entry["scores"][str(step)] = self.faithfulness_of(weights.parent)
            self.log(f"{entry['title']}, step {step}: mIoU {miou:.3f}, of the ceiling {self.ceiling:.3f}")
            if miou >= SHARE * self.ceiling:
                entry["reached"] = step
                break

    def faithfulness_of(self, folder: Path) -> float:
        """mIoU of images that this ControlNet generates from the held-out masks."""
        controlnet = load_controlnet(folder, self.device).eval()
        pipeline = Pipeline(self.base, controlnet, self.scorer.rows.palette, str(folder))
        images = generate_rows(self.scorer, pipeline, self.settings, GENERATED_AT_ONCE, lambda *_: False)
        return score_rows(self.scorer, images)["miou"]


def faithful_lines(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line for each run, and ours against the fastest of the baseline's."""
    lines = [
        f"Until images of {config.faithfulness_rows} held-out masks reach mIoU {SHARE * entries[0]['ceiling']:.3f}, "
        "half of what real images reach, start-up and cache building included, scored every "
        f"{config.checkpointing_steps} steps:"
    ]
    fastest = dict.fromkeys(SIDES, float("inf"))
    for entry in entries:
        best, reached = max(entry["scores"].values()), entry["reached"]
        text = f"not within {config.faithful_steps} steps (best mIoU {best:.3f})"
        if reached:
            seconds = entry["saved_at"][str(reached)]
            fastest[entry["side"]] = min(seconds, fastest[entry["side"]])
            text = f"{seconds:7.0f} s, step {reached} (mIoU {best:.3f})"
        lines.append(f"  {entry['title']:36} {text}")
    if max(fastest.values()) < float("inf"):
        lines.append(f"  the fastest baseline / segcn: {fastest['baseline'] / fastest['ours']:.2f}x the time")
    return lines


def count_tflop(
    base: str | Path, resolution: int, batch: int = 1, parts: Sequence[str] = ("vae", "text", "train")
) -> dict[str, float]:
    """TFLOP of the parts of a step: vae (encoding), text (of CLIP), and train, network and ControlNet there and back.

    Other parts are denoise, a step of generation with guidance, and decode. Counted on the shapes alone: no weights are
    loaded. A multiplication with its addition counts as two operations; what is no matrix product or convolution, as
    none.
    """
    size, family = resolution // latent_factor(base), family_of(base)
    clips = [name for name in family.layout if name.startswith("text_encoder")]
    text_configs = [CLIPTextConfig.from_pretrained(base, subfolder=name) for name in clips]
    length = text_configs[0].max_position_embeddings
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base, subfolder="vae"))
        network = family.denoiser.from_config(family.denoiser.load_config(base, subfolder=family.part))
        controlnet, text_encoders = make_controlnet(network), [CLIPTextModel(config) for config in text_configs]
        image = torch.zeros(batch, 3, resolution, resolution)
        latents = torch.zeros(batch, network.config.in_channels, size, size)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        text, sizes = torch.zeros(batch, *family.text_shape(network, length)), torch.zeros(batch, 6)
        times = torch.zeros(batch, dtype=torch.long)
    for frozen in (vae, network, *text_encoders):
        frozen.requires_grad_(False)
    control, given = latents if family.encodes_control else image, family.conditions(network, text, sizes)

    def predict() -> torch.Tensor:
        residuals = family.residuals(controlnet, latents, times, given, control, 1.0)
        return family.predict(network, latents, times, given, residuals)

    work: dict[str, Callable[[], Any]] = {
        "vae": lambda: vae.encode(image), "text": lambda: [read(tokens) for read in text_encoders],
        "train": lambda: predict().sum().backward(), "denoise": lambda: [predict(), predict()],
        "decode": lambda: vae.decode(latents),
    }  # fmt: skip
    counted = {}
    for name in parts:
        with FlopCounterMode(display=False) as counter:
            work[name]()
        counted[name] = counter.get_total_flops() / 1e12
    return counted


def measured(config: BenchTrainConfig) -> tuple[BenchTrainConfig, list[dict]]:
    """The runs measured last, and their settings; run now where a script is named, or output_dir holds none."""
    path = config.folder / "train.json"
    if config.baseline or not newest(path):
        bench_train(config, log=lambda text: None if "\n" in text else print(text))  # the table has its own cell
    entries = newest(path)
    variants = dict.fromkeys(entry["variant"] for entry in entries)
    rounds = max(entry["round"] for entry in entries)
    return dataclasses.replace(config, **entries[0]["settings"], variants=",".join(variants), rounds=rounds), entries


def newest(path: Path) -> list[dict]:
    """Of a train.json the pairs with the settings, machine and versions of its newest run, in the table's order."""
    entries = [entry for entry in read_entries(path) if "variant" in entry]
    last: dict = max(entries, key=lambda entry: entry["began"], default={})
    same = [entry for entry in entries if all(entry[k] == last[k] for k in ("settings", "machine", "versions"))]
    return sorted(same, key=lambda entry: (list(VARIANTS).index(entry["variant"]), entry["round"]))


def bars(config: BenchTrainConfig, entries: list[dict], limit: float) -> Figure:
    """Both sides of each variant; in ours its ratio to the baseline; dashes: the baseline's pace times `limit`."""
    places, style = range(len(config.chosen)), {"textcoords": "offset points", "ha": "center"}
    figure = Figure(figsize=(max(8, 3.2 * len(places)), 3.6))
    for axes, (measure, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for place, variant in zip(places, config.chosen, strict=True):
            medians = by_round(entries, variant, measure).median()
            for x, value, tone, ink in ((place - 0.2, medians.baseline, TONES[1], "black"),
                                        (place + 0.2, medians.ours, TONES[0], "white")):  # fmt: skip
                axes.bar(x, value, 0.38, color=tone)
                axes.annotate(f"{value:.3g}", (x, 0), (0, 6), color=ink, **style)
            axes.annotate(f"{medians.ratio:.2f}x", (x, 0), (0, 22), color=ink, weight="bold", fontsize=13, **style)
            if measure == "samples_per_second":
                axes.hlines(medians.baseline * limit, place - 0.4, place + 0.4, "black", "dashed", linewidth=1)
        axes.set_title(title)
        axes.set_xticks(places, [fill(VARIANTS[name].text, 17) for name in config.chosen], fontsize=8)
        axes.margins(y=0.06)
    handles: list[Any] = [axes.bar(0, 0, color=tone) for tone in (TONES[1], TONES[0])]
    handles.append(axes.hlines([], 0, 0, colors="black", linestyles="dashed"))
    names = [*config.names.values(), f"all that leaving the encoders out can give by arithmetic: {limit:.2f}x"]
    figure.legend(handles, names, loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    return figure
