"""A training in a process of its own, watched from outside: when each step ended, and how much memory it held.

Both instruments work on any training that keeps TensorBoard files, so a peer's script is measured unchanged and the
same way as ours: every logged value carries the time at which it was written."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from segcn.bench.config import VARIANTS, BenchTrainConfig
from segcn.data.metadata import find_splits, read_split
from segcn.data.visualize import TONES
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline
from segcn.models.base import WIDE, base_fingerprint, latent_factor, load_base, pick_device
from segcn.models.controlnet import load_controlnet
from segcn.samples.landscapes.scene import sample_landscapes
from segcn.train import checkpoint
from segcn.train.config import TrainConfig
from segcn.train.validation import AT_ONCE, generate_rows, held_out_rows, open_scorer, score_rows
from segcn.utils.args import check_values, make
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import WEIGHTS

# --- timed: A training in a process of its own, watched from outside: when each step ended, and how much memory it held.
#
# Both instruments work on any training that keeps TensorBoard files, so a peer's script is measured unchanged and the
# same way as ours: every logged value carries the time at which it was written.

LOSS = "loss"  # the tag that is written once a step, by diffusers' scripts and by ours
PATIENCE = 30  # seconds that a process has to end before it is killed


@dataclass(frozen=True)
class Timed:
    """What was seen; all times but `began` in seconds from the start of the process."""

    began: float  # in seconds since 1970
    seconds: float  # until the process ended
    step_ends: dict[int, float]  # when the loss of a step was written
    memory: list[tuple[float, float]]  # (time, most GiB resident until then), as it grew; empty without /proc
    other_load: float | None  # cores that other programs kept busy meanwhile; None without /proc

    def seconds_per_step(self, first: int, last: int) -> float:
        """Mean of the steps after `first`, up to `last`."""
        return (self.step_ends[last] - self.step_ends[first]) / (last - first)

    def peak_gib(self, until: float = float("inf")) -> float | None:
        """The most resident memory up to a time."""
        return max((gib for when, gib in self.memory if when <= until), default=None)


def run_timed(command: list[str], log: Path, events: Path, steps: int, every: float = 0.1) -> Timed:
    """Run the command, its output going to the file `log`, and read its TensorBoard files below `events`.

    It runs in a session of its own; whatever interrupts the waiting ends all its processes. UserError if it fails, or
    does not write the loss of each of its `steps`.
    """
    with log.open("w") as file:
        began, busy, own = time.time(), busy_seconds(), children_seconds()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        memory: list[tuple[float, float]] = []
        try:
            while process.poll() is None:
                gib = resident_gib(process.pid)
                if gib and (not memory or gib > memory[-1][1]):
                    memory.append((time.time() - began, gib))
                time.sleep(every)
        finally:
            end(process)
    seconds = time.time() - began
    if process.returncode:
        raise UserError(f"{log.stem}: exit code {process.returncode}: {last_line(log)}\nAll it said: {log}")
    step_ends = {step: wall - began for step, wall in read_steps(events).items()}
    missing = [step for step in range(1, steps + 1) if step not in step_ends]
    if missing:
        raise UserError(f"{events}: expected the loss of steps 1 to {steps} in TensorBoard files, found none of step "
                        f"{missing[0]}; see {log}")  # fmt: skip
    now = busy_seconds()
    other = None if busy is None or now is None else (now - busy - (children_seconds() - own)) / seconds
    return Timed(began, seconds, step_ends, memory, other)


def environment() -> dict[str, str]:
    """Ours without accelerate's own settings, so that the flags alone count; nothing is fetched."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return kept | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def end(process: subprocess.Popen) -> None:
    """Ask every process of its session to end, and kill what does not."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def resident_gib(process: int | str) -> float | None:
    """The most memory that a process, or "self", held so far (VmHWM), in GiB; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None


def busy_seconds() -> float | None:
    """Seconds that the machine's cores have worked since it started, those lost to its host included."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """The same of the processes that this one started and saw end."""
    times = os.times()
    return times.children_user + times.children_system


def read_steps(folder: Path) -> dict[int, float]:
    """When the loss of each step was written, in seconds since 1970, from the TensorBoard files below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if any(value.tag == LOSS for value in event.summary.value):
                found[event.step] = event.wall_time
    return dict(sorted(found.items()))


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# --- bench_plan: What a benchmark of training runs: the settings, the command lines of both sides, and the book of finished runs.

OURS = [sys.executable, "-m", "segcn.train"]
PACKAGES = ("segcn", "torch", "diffusers", "transformers", "accelerate", "datasets", "bitsandbytes")
SIDES = ("peer", "ours")


def check(config: BenchTrainConfig) -> None:
    """UserError for what would fail only after hours."""
    unknown = [name for name in config.chosen if name not in VARIANTS]
    if unknown or not (config.chosen or config.until_faithful):
        raise UserError(f"--variants {config.variants}: expected some of {', '.join(VARIANTS)}")
    if config.peer and not Path(config.peer).is_file():
        raise UserError(
            f"--peer {config.peer}: no such file; it is examples/controlnet/train_controlnet.py of diffusers"
        )
    check_values(config)
    if config.until_faithful and config.faithful_steps < config.checkpointing_steps:
        raise UserError(
            f"--faithful_steps {config.faithful_steps}: expected at least --checkpointing_steps,"
            f" {config.checkpointing_steps}: checkpoints are what is scored"
        )
    latent_factor(config.pretrained_model_name_or_path)


def command(config: BenchTrainConfig, side: str, where: Path, steps: int, save_every: int, more: tuple) -> list[str]:
    """The command line of one side, writing below the folder `where`: the same flags by the same names, and `more`."""
    data = config.dataset.absolute()
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": Path(config.pretrained_model_name_or_path).absolute(),
        "dataset_name": data.parent if data.is_file() else data,
        "output_dir": where / "out",
        "cache_dir": where / "cache",  # of this run alone: what is cached is paid for in each
        "resolution": config.resolution,
        "train_batch_size": config.train_batch_size,
        "max_train_steps": steps,
        "checkpointing_steps": save_every,
        "seed": config.seed,
        "report_to": "tensorboard",
    }
    if config.max_train_samples:
        shared["max_train_samples"] = config.max_train_samples
    words = [str(word) for name, value in shared.items() for word in (f"--{name}", value)]
    if side == "peer" and config.peer:
        return [sys.executable, str(Path(config.peer).absolute()), *words, *more]
    alone = ("--cache", "none") if side == "peer" else ()
    return [*OURS, *words, "--logging_steps", "1", "--augment", "none", *alone, *more]


def variant_words(config: BenchTrainConfig, name: str, side: str) -> tuple[str, ...]:
    """What a variant adds for a side; without a peer, both differ in the cache alone."""
    variant = VARIANTS[name]
    own = variant.peer if side == "peer" and config.peer else variant.ours
    start = shared_start(config)
    return (*own, *(("--controlnet_model_name_or_path", str(start)) if start else ()))


def shared_start(config: BenchTrainConfig) -> Path | None:
    """A ControlNet as diffusers starts it, where segcn would start a lighter one: both sides must train the same."""
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
        script = Path(self.config.peer).read_bytes() if self.config.peer else b""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        peer = hashlib.sha256(script).hexdigest()[:16] if script else None
        return {"versions": versions | {"python": platform.python_version(), "peer": peer}, "machine": machine()}

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


def machine() -> str:
    """The processor, its cores, and the GPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    name = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


# --- flops: What a training step costs in arithmetic, counted on the shapes alone: no weights are loaded.


def step_tflop(base: str | Path, resolution: int, batch: int = 1) -> dict[str, float]:
    """TFLOP of each part of a step: vae (encoding), text, and train, which is U-Net and ControlNet there and back.

    A multiplication with its addition counts as two operations; what is no matrix product or convolution, as none.
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
    for frozen in (vae, unet, text_encoder):
        frozen.requires_grad_(False)
    return {
        "vae": tflop(lambda: vae.encode(image)),
        "text": tflop(lambda: text_encoder(tokens)),
        "train": tflop(lambda: there_and_back(unet, controlnet, latents, embeddings, image)),
    }


def there_and_back(unet, controlnet, latents, embeddings, image) -> None:
    """A prediction from the mask's colors, and its gradient in the ControlNet."""
    step = torch.zeros(len(latents), dtype=torch.long, device="meta")
    down, middle = controlnet(latents, step, embeddings, controlnet_cond=image, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    unet(latents, step, embeddings, **residuals).sample.sum().backward()


def tflop(work) -> float:
    """10^12 operations of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def caching_limit(counted: dict[str, float]) -> float:
    """How many times faster steps can get when the frozen encoders leave them, by arithmetic alone."""
    return sum(counted.values()) / counted["train"]


# --- bench_faithful: How long a training takes until what it paints obeys masks: both sides' checkpoints, scored after the run.

SHARE = 0.5  # of the ceiling, which has to be reached


def bench_faithful(config: BenchTrainConfig, book: Book) -> list[dict]:
    """An entry for the peer at each learning rate and for ours: at which checkpoint it obeyed, and when that stood.

    The time runs from the start of the process, cache building included, to the checkpoint's weights on disk. Scoring
    is not counted. It stops at the first checkpoint that obeys.
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
    """(title, side, words) of each run; the peer gets our share of empty captions too, as guidance needs them."""
    ours = ("--preset", config.preset, "--checkpoints_total_limit", str(config.faithful_steps))
    found: list[tuple[str, str, tuple[str, ...]]] = [("segcn at its defaults", "ours", ours)]
    if not config.peer:
        return [("segcn --cache none at its defaults", "peer", ours), *found]
    empty = str(make(TrainConfig, config.preset).proportion_empty_prompts)
    for rate in reversed(config.peer_learning_rates):
        words = ("--learning_rate", str(rate), "--proportion_empty_prompts", empty)
        found.insert(0, (f"diffusers at {rate:g}", "peer", words))
    return found


def train_contender(config: BenchTrainConfig, book: Book, title: str, side: str, words: tuple[str, ...]) -> dict:
    """The entry of a finished run, from the book or run now; its checkpoints wait to be scored."""
    where = config.folder / "runs" / f"faithful-{title.replace(' ', '_')}"
    line = command(config, side, where, config.faithful_steps, config.checkpointing_steps, words)
    scored = {"rows": config.faithfulness_rows, "share": SHARE}
    entry = book.find(line)
    if entry is None or entry["scored"] != scored or ("reached" not in entry and not where.is_dir()):
        entry, timed = book.run(line, where, config.faithful_steps, title)
        stood = {str(step): weights.stat().st_mtime - timed.began for step, weights in saved(where).items()}
        entry |= {"title": title, "side": side, "where": str(where), "scored": scored}
        entry |= {"stood": stood, "peak_gib": timed.peak_gib()}
        book.add(entry)
    return entry


def saved(where: Path) -> dict[int, Path]:
    """The ControlNet's weights in each checkpoint of a run by step; both sides lay them out alike."""
    return {step: folder / "controlnet" / WEIGHTS for step, folder in checkpoint.steps(where / "out").items()}


class Scorer:
    """The judge of segcn's own validation and the base: what scores the checkpoints of both sides."""

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
        self.judge = open_scorer(training, held_out, split, config.folder, self.device, log)
        self.ceiling = self.judge.ceiling["miou"]
        self.base = load_base(config.pretrained_model_name_or_path, self.device)

    def score(self, entry: dict, keep: Callable[[], None]) -> None:
        """Paint from each checkpoint in turn until one obeys; `keep` is called when it is known which."""
        entry |= {"ceiling": self.ceiling, "scores": {}}
        reached = None
        for step, weights in saved(Path(entry["where"])).items():
            miou = self.faithfulness_of(weights.parent)
            entry["scores"][str(step)] = miou
            self.log(f"{entry['title']}, step {step}: mIoU {miou:.3f}, of the ceiling {self.ceiling:.3f}")
            if miou >= SHARE * self.ceiling:
                reached = step
                break
        entry["reached"] = reached
        keep()

    def faithfulness_of(self, folder: Path) -> float:
        """mIoU of the held-out masks, painted with this ControlNet."""
        controlnet = load_controlnet(folder, self.device).eval()
        painter = Pipeline(self.base, controlnet, self.judge.rows.palette, str(folder))
        return score_rows(self.judge, generate_rows(self.judge, painter, self.settings, AT_ONCE, lambda *_: False))[
            "miou"
        ]


def faithful_lines(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line a run, and ours against the quickest of the peer's."""
    ceiling = entries[0]["ceiling"]
    lines = [
        f"Until {config.faithfulness_rows} held-out masks are obeyed (mIoU {SHARE * ceiling:.3f}, half of what real "
        f"images reach), start-up and cache building included, looked at every {config.checkpointing_steps} steps:"
    ]
    lines += [f"  {entry['title']:36} {faithful_line(config, entry)}" for entry in entries]
    peers, ours = ([seconds(entry) for entry in entries if entry["side"] == side] for side in ("peer", "ours"))
    if min(ours) < float("inf") and min(peers) < float("inf"):
        lines.append(f"  the quickest of the others / segcn: {min(peers) / min(ours):.2f}x the time")
    return lines


def seconds(entry: dict) -> float:
    """Until its masks were obeyed; infinity where they never were."""
    return entry["stood"][str(entry["reached"])] if entry["reached"] else float("inf")


def faithful_line(config: BenchTrainConfig, entry: dict) -> str:
    """When a run began to obey, or how far it came."""
    best = max(entry["scores"].values())
    if entry["reached"]:
        return f"{seconds(entry):7.0f} s, step {entry['reached']} (mIoU {best:.3f})"
    return f"not within {config.faithful_steps} steps (best mIoU {best:.3f})"


# --- bench_train: Our training against a peer's in turns: samples per second and memory as ratios, then the time to obey masks.

MEASURES = {  # of an entry: its head in the table
    "samples_per_second": "samples/s",
    "samples_per_second_with_start": "with start-up",
    "peak_gib": "peak GiB",
}
BUSY = 0.2  # cores that others may use before the times are doubted


def bench_train(config: BenchTrainConfig, log: Callable[[str], None] = print) -> list[dict]:
    """Run what is not in output_dir/train.json yet, write it there and the table to train.txt; returns all its entries.

    Interrupted, it ends the training that runs; the same command goes on after the last finished one.
    """
    check(config)
    config = dataclasses.replace(config, dataset_name=config.dataset_name or str(sample_landscapes()))
    rows = len(read_split(config.dataset, "train"))
    if rows < (config.max_train_samples or 0):
        raise UserError(f"--max_train_samples {config.max_train_samples}: {config.dataset_name} has {rows} rows")
    config.folder.mkdir(parents=True, exist_ok=True)
    book = Book(config, log)
    pairs = bench_pairs(config, book)
    lines = [*table(config, pairs), *remarks(config, pairs)] if pairs else []
    if config.until_faithful:
        lines += ["", *faithful_lines(config, bench_faithful(config, book))]
    write_text(config.folder / "train.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote train.json and train.txt to {config.folder}."]))
    return book.entries


def bench_pairs(config: BenchTrainConfig, book: Book) -> list[dict]:
    """Each variant once by both sides in every round, another one first in every other round."""
    entries = []
    for number in range(1, config.rounds + 1):
        for variant in config.chosen:
            for side in SIDES if number % 2 else reversed(SIDES):
                entries.append(bench_once(config, book, variant, side, number))
    return entries


def bench_once(config: BenchTrainConfig, book: Book, variant: str, side: str, number: int) -> dict:
    """The entry of one run, from the book or run now; its weights and caches do not stay."""
    where = config.folder / "runs" / f"{variant}-{side}-{number}"
    words = command(config, side, where, config.steps, config.steps, variant_words(config, variant, side))
    title = f"round {number}, {variant}, {config.names[side]}"
    entry = book.find(words)
    if entry is None:
        entry, timed = book.run(words, where, config.steps, title)
        entry |= {"variant": variant, "side": side, "round": number, "settings": config.settings}
        entry |= measures(config, timed)
        book.add(entry)
        shutil.rmtree(where)
    book.log(
        f"{title}: {entry['samples_per_second']:.3g} samples/s, {number_of(entry['peak_gib'])} GiB, "
        f"first step after {entry['first_step']:.0f} s"
    )
    return entry


def measures(config: BenchTrainConfig, timed: Timed) -> dict[str, float | None]:
    """The numbers of a run; the last step, which waits for a checkpoint, counts in the memory alone."""
    last, batch = config.warmup_steps + config.measured_steps, config.train_batch_size
    pace = timed.seconds_per_step(config.warmup_steps, last)
    return {
        "seconds_per_step": pace,
        "samples_per_second": batch / pace,
        "samples_per_second_with_start": last * batch / timed.step_ends[last],
        "first_step": timed.step_ends[1],
        "peak_gib": timed.peak_gib(),
        "peak_gib_without_saving": timed.peak_gib(until=timed.step_ends[last]),
    }


def pairs_of(entries: list[dict], variant: str) -> Iterator[tuple[dict, dict]]:
    """(peer's entry, ours) of each finished round."""
    found = {(entry["side"], entry["round"]): entry for entry in entries if entry.get("variant") == variant}
    for number in sorted({number for _, number in found}):
        if all((side, number) in found for side in SIDES):
            peer, ours = (found[side, number] for side in SIDES)
            yield peer, ours


def ratios(entries: list[dict], variant: str, measure: str) -> list[float]:
    """Ours / the peer's in each round; none where it was not measured."""
    pairs = [(peer[measure], ours[measure]) for peer, ours in pairs_of(entries, variant)]
    return [ours / peer for peer, ours in pairs if peer and ours]


def table(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line a variant: of each measure the other side's median, ours, and the median of the rounds' ratios."""
    width = max(len(VARIANTS[name].text) for name in config.chosen)
    heads = f" {'diffusers' if config.peer else 'no cache':>9}{'segcn':>7}{'ratio':>7}"
    lines = [" " * width + "".join(f" |{head:^24}" for head in MEASURES.values())]
    lines.append(" " * width + f" |{heads}" * len(MEASURES))
    for variant in config.chosen:
        cells = "".join(f" |{cell(entries, variant, measure)}" for measure in MEASURES)
        lines.append(f"{VARIANTS[variant].text:{width}}{cells}")
    return [line.rstrip() for line in lines]


def cell(entries: list[dict], variant: str, measure: str) -> str:
    """The three numbers of a variant and measure."""
    shares = ratios(entries, variant, measure)
    if not shares:
        return f"{'not measured':^24}"
    sides = zip(*pairs_of(entries, variant), strict=True)
    peer, ours = (statistics.median(entry[measure] for entry in side) for side in sides)
    return f" {peer:9.3g}{ours:7.3g}{statistics.median(shares):6.2f}x"


def remarks(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """What the numbers are of, when the cache is paid back, and whether the machine was idle."""
    first = entries[0]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items() if value)
    lines = [
        "",
        f"Medians of {config.rounds} round(s); ratio: segcn / {config.names['peer']}, taken in each round.",
        f"samples/s: steps {config.warmup_steps + 1} to {config.warmup_steps + config.measured_steps}, batch "
        f"{config.train_batch_size}, {config.resolution} pixels.",
        "with start-up: from the start of the process, cache building included.",
        "peak GiB: VmHWM of the process, a checkpoint included.",
        *(line for variant in config.chosen for line in paid_back(entries, variant)),
        first["machine"],
        versions,
    ]
    load = max(entry["other_load"] or 0 for entry in entries)
    if load > BUSY:
        lines.append(f"Other programs kept up to {load:.1f} cores busy during a run: its times mean little.")
    return lines


def paid_back(entries: list[dict], variant: str) -> Iterator[str]:
    """The rounds' ratios, and the step at which ours has caught up with the other, its longer start included."""
    pairs = list(pairs_of(entries, variant))
    if pairs:
        start = statistics.median(ours["first_step"] - peer["first_step"] for peer, ours in pairs)
        gain = statistics.median(peer["seconds_per_step"] - ours["seconds_per_step"] for peer, ours in pairs)
        begins = f"segcn's first step ends {abs(start):.1f} s {'later' if start > 0 else 'earlier'}"
        if start > 0:
            begins += f", it is ahead after {1 + start / gain:.0f} steps" if gain > 0 else ", it is never ahead"
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios(entries, variant, "samples_per_second"))
        yield f"{variant}: samples/s {listed} in the rounds; {begins}."


def number_of(value: float | None) -> str:
    """Three digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


# --- bench_charts: The benchmark of training in a notebook: what was measured last, as bars, with the limit that arithmetic sets.

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
