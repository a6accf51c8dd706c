"""The sides of a benchmark of painting: each paints the same masks in turns, into a data set of its own that stays."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torchmetrics.image.kid import poly_mmd

from segcn.bench.config import BenchGenerateConfig
from segcn.bench.train import BUSY, busy_seconds, environment, machine
from segcn.data.dataset import PairedDataset, read_framed_mask, to_uint8
from segcn.data.masks import colorize
from segcn.data.metadata import Split, finish_dataset, read_named_split, read_split, write_pair
from segcn.data.transforms import AUGMENTS
from segcn.evaluate.evaluator import faithfulness, features
from segcn.evaluate.metrics import color_shift
from segcn.generate.config import MODELS, GenerateConfig, SampleConfig
from segcn.generate.pipeline import Pipeline, check_sampling, diffusers_pipeline, first_noise, generate, load_pipeline
from segcn.generate.writer import generate_dataset
from segcn.models.base import pick_device
from segcn.models.features import Extractor, open_extractor
from segcn.models.segmenter import Segmenter, SegmenterConfig, load_segmenter, segmenter_of
from segcn.samples.landscapes.scene import held_out_landscapes, sample_landscapes
from segcn.train.memory import peak_bytes
from segcn.utils.args import arguments_of, check_values, parse
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import OUTPUTS

# --- bench_sides: The sides of a benchmark of painting: each paints the same masks in turns, into a data set of its own that stays.

TURNS = "turns.json"
FIXED = {
    *MODELS,
    "preset",
    "resolution",
    "fit",
    "mixed_precision",
    "torch_compile",
}  # all sides share these


@dataclass(frozen=True)
class BenchMasks:
    """What all sides paint: framed class ids uint8 [N, H, W], a caption each, and the real rows that they are of."""

    ids: np.ndarray
    captions: Sequence[str]
    real: Split


def read_bench_masks(split: Split, settings: SampleConfig) -> BenchMasks:
    """The masks of a split, made square where --resolution says so; UserError where they differ in size."""
    ids = [read_framed_mask(row.mask, split.palette, settings.resolution, settings.fit)[0] for row in split.records]
    sizes = {mask.shape for mask in ids}
    if len(sizes) > 1:
        raise UserError(
            f"{split.metadata}: expected masks of one size, found {len(sizes)}: --resolution makes them one"
        )
    return BenchMasks(np.stack(ids), [row.caption for row in split.records], split)


@dataclass
class Side:
    """A way of painting, and the folder of what it painted."""

    title: str
    settings: SampleConfig
    batch_size: int  # 0: the plain way, a call of diffusers' pipeline an image
    painter: Pipeline
    folder: Path = OUTPUTS  # below which its own stands
    data: str = ""  # which masks

    @property
    def plain(self) -> bool:
        return self.batch_size == 0

    @cached_property
    def out(self) -> Path:
        """Named after everything that its images and times depend on."""
        told = dataclasses.asdict(self.settings) | {"batch_size": self.batch_size, "threads": torch.get_num_threads()}
        told |= {"base": self.painter.base.fingerprint, "controlnet": self.painter.controlnet_digest}
        told |= {"data": self.data, "torch": torch.__version__, "diffusers": diffusers.__version__}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        name = "".join(letter if letter.isalnum() or letter in ".-=" else "_" for letter in self.title)
        return self.folder / f"{name[:60]}-{digest}"

    @cached_property
    def pipe(self):
        return diffusers_pipeline(self.painter.base, self.settings, self.painter.controlnet)

    def paint(self, masks: np.ndarray, captions: Sequence[str], rows: list[int]) -> np.ndarray:
        """uint8 [N, H, W, 3] from class ids uint8 [N, H, W]; both ways begin with the same noise."""
        if self.plain:
            return np.stack([self._plainly(*row) for row in zip(masks, captions, rows, strict=True)])
        painted = []
        for first in range(0, len(rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            painted.append(generate(self.painter, masks[part], list(captions[part]), rows[part], self.settings))
        return np.concatenate(painted)

    def _plainly(self, mask: np.ndarray, caption: str, row: int) -> np.ndarray:
        noise = first_noise(self.painter.base, [row], self.settings, mask.shape).to(self.painter.base.dtype)
        image = self.pipe(
            prompt=caption,
            image=Image.fromarray(colorize(mask, self.painter.palette)),
            negative_prompt=self.settings.negative_prompt or None,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            latents=noise,
        )
        return np.asarray(image.images[0])

    @property
    def turns(self) -> dict[str, dict]:
        """By its rows, what is known of each finished turn."""
        path = self.out / TURNS
        return json.loads(path.read_text()) if path.is_file() else {}

    def painted(self) -> Split:
        """What stands, as a data set."""
        return read_split(self.out)


def take_turns(sides: list[Side], masks: BenchMasks, rows_a_turn: int, log: Callable[[str], None]) -> list[str]:
    """Each side paints some rows, then the next one the same; another one first in every other turn.

    Turns that stand are kept. Returns the names of the turns, one entry in each side's `turns`.
    """
    began, warm, names = time.time(), set(), []
    for number, first in enumerate(range(0, len(masks.ids), rows_a_turn)):
        rows = list(range(first, min(first + rows_a_turn, len(masks.ids))))
        names.append(f"{rows[0]}-{rows[-1]}")
        for side in sides if number % 2 == 0 else reversed(sides):
            if names[-1] in side.turns:
                continue
            if side.title not in warm:
                few = rows[: max(1, side.batch_size)]
                side.paint(masks.ids[few], [masks.captions[row] for row in few], few)
                warm.add(side.title)
            take_turn(side, masks, rows, names[-1], began)
            pace = len(rows) / side.turns[names[-1]]["seconds"]
            log(f"rows {names[-1]} of {len(masks.ids)}, {side.title}: {pace:.2f} images/s")
    for side in sides:
        finish(side, masks)
    return names


def take_turn(side: Side, masks: BenchMasks, rows: list[int], name: str, run: float) -> None:
    """Paint the rows against the clock, write them, then the entry that says so."""
    busy, cpu, began = busy_seconds(), time.process_time(), time.monotonic()
    images = side.paint(masks.ids[rows], [masks.captions[row] for row in rows], rows)
    seconds, own = time.monotonic() - began, time.process_time() - cpu
    now = busy_seconds()
    other = None if busy is None or now is None else max(0.0, now - busy - own) / seconds
    for row, image in zip(rows, images, strict=True):
        write_pair(side.out, pair_of(row), image, masks.ids[row], masks.real.palette)
    entry = {"seconds": seconds, "cpu_seconds": own, "other_load": other, "run": run}
    write_text(side.out / TURNS, json.dumps(side.turns | {name: entry}, indent=1) + "\n")


def finish(side: Side, masks: BenchMasks) -> None:
    """What makes the folder a data set of the rows painted in this run or an earlier one."""
    rows = [(*pair_of(row), text) for row, text in enumerate(masks.captions)]
    finish_dataset(side.out, rows, masks.real.palette)


def pair_of(row: int) -> tuple[str, str]:
    """The names of its image and mask."""
    return f"images/{row:06d}.png", f"masks/{row:06d}.png"


def variant(settings: SampleConfig, words: str) -> SampleConfig:
    """The settings changed by "name=value,name=value"; UserError for a name or value that they do not have."""
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SampleConfig)}
    changes: dict[str, Any] = {}
    for word in words.split(","):
        name, _, value = word.partition("=")
        if name in FIXED:
            raise UserError(f"--variants {words}: {name} is the same for all of them; give it as --{name}")
        if name not in known:
            raise UserError(f"--variants {words}: expected name=value,name=value with flags' names, found {word!r}")
        kind = str if known[name] is None else type(known[name])
        try:
            changes[name] = kind(value)
        except ValueError:
            raise UserError(f"--variants {words}: expected {name}={kind.__name__}, found {value!r}") from None
    return dataclasses.replace(settings, **changes)


# --- bench_scores: How good are painted images? Faithfulness, kernel distance with its interval, and color, one way against another.

GROUPS = 20  # of rows that a jackknife leaves out in turn
CONFIDENCE = 1.96  # standard errors to either side: 95 %


@dataclass(frozen=True)
class Scores:
    """Of a set of images."""

    miou: float
    features: torch.Tensor  # [N, D], row by row
    color: dict[str, float]  # `color_shift` from the real ones


def score(images: Split, real: Split, segmenter: Segmenter, extractor: Extractor) -> Scores:
    """Of images painted for the masks of real ones, row by row."""
    found = faithfulness(images, segmenter)["miou"] or 0.0
    shift = color_shift(score_images(real, segmenter), score_images(images, segmenter))
    return Scores(found, features(images, segmenter, extractor), shift)


def score_images(split: Split, segmenter: Segmenter) -> Iterator[np.ndarray]:
    """Every image as the judge sees it, uint8 [R, R, 3]."""
    resolution, fit = segmenter.settings["resolution"], segmenter.settings["fit"]
    return (to_uint8(sample.image) for sample in PairedDataset(split, resolution, AUGMENTS["none"], 0, fit))


def kernel_distance(real: torch.Tensor, painted: torch.Tensor) -> float:
    """The squared maximum mean discrepancy of features [N, D], unbiased, under a cubic kernel, from all rows at once.

    Bińkowski et al. 2018, arXiv:1801.01401: a KID where the features are Inception's.
    """
    return float(poly_mmd(real, painted))


def distance_interval(real: torch.Tensor, painted: torch.Tensor) -> tuple[float, float]:
    """(kernel distance, half of its 95 % interval)."""
    return jackknife(lambda rows: kernel_distance(real[rows], painted[rows]), len(real))


def excess_interval(real: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(our kernel distance less theirs, half of its 95 % interval); the same rows leave all three together."""
    return jackknife(
        lambda rows: kernel_distance(real[rows], ours[rows]) - kernel_distance(real[rows], theirs[rows]), len(real)
    )


def jackknife(statistic: Callable[[torch.Tensor], float], count: int) -> tuple[float, float]:
    """A statistic of all rows, and half of its 95 % interval, from leaving out one group of rows after the other.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11. A bootstrap would repeat rows, whose
    likeness to themselves an unbiased kernel distance must not count.
    """
    rows, groups = torch.arange(count), min(GROUPS, count // 2)
    if groups < 2:
        return statistic(rows), math.inf
    left = torch.tensor([statistic(rows[rows % groups != group]) for group in range(groups)], dtype=torch.float64)
    error = ((groups - 1) / groups * (left - left.mean()).square().sum()).sqrt()
    return statistic(rows), CONFIDENCE * float(error)


# --- bench_peaks: How much memory painting takes, in processes of their own: `segcn generate` at two sizes, and the plain way.

COMMAND = "import sys; from segcn.bench_peaks import tell; tell(sys.argv[1:])"


def peaks(config: GenerateConfig, counts: tuple[int, ...]) -> dict[str, float]:
    """The most memory in GiB after so many masks, ascending, of one process that goes on with them."""
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier measurement that was interrupted
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", COMMAND, json.dumps(counts), *arguments_of(config)]
    told = subprocess.run(words, capture_output=True, text=True, env=environment())
    shutil.rmtree(folder, ignore_errors=True)
    if told.returncode:
        raise UserError(f"painting {counts[-1]} masks failed: {told.stderr.strip().splitlines()[-1]}")
    return json.loads(told.stdout.splitlines()[-1])


def tell(words: list[str]) -> None:
    """Paint the first masks, then more of them, and print the peak after each; --batch_size 0: the plain way."""
    counts, config = json.loads(words[0]), parse(GenerateConfig, words[1:], "segcn bench generate")
    paint = paint_plainly if config.batch_size == 0 else generate_dataset
    found, device = {}, torch.device(pick_device())
    for count in counts:
        with contextlib.redirect_stdout(sys.stderr):
            paint(dataclasses.replace(config, limit=count))
        found[str(count)] = peak_bytes(device) / 2**30
    print(json.dumps(found))


def paint_plainly(config: GenerateConfig) -> None:
    """A call of diffusers' pipeline for each mask; nothing is written."""
    split = read_named_split(config.controls, config.split).first(config.limit)
    masks = read_bench_masks(split, config)
    side = Side("", config, 0, load_pipeline(config, split.palette))
    for row, caption in enumerate(masks.captions):
        side.paint(masks.ids[row : row + 1], [caption], [row])


# --- bench_verdicts: What a benchmark of painting says: a line a side, what the numbers are of, and whether each promise is met.

FASTER, LESS_FAITHFUL, MORE_MEMORY = 4.0, 0.02, 1.05  # what segcn promises against the plain way


def table(found: dict) -> list[str]:
    """A line a side."""
    width = max(map(len, found["sides"]))
    lines = [f"{'':{width}}  images/s  img/CPU s   mIoU   kernel distance     color shift (L, a, b)   peak GiB"]
    for title, one in found["sides"].items():
        shift, peak = one["color_shift"], one.get("peak_gib")
        most = f"{max(peak.values()):.2f}" if peak else "-"
        lines.append(
            f"{title:{width}} {one['images_per_second']:9.3f} {one['images_per_cpu_second']:10.3f} {one['miou']:6.3f} "
            f"{one['kernel_distance']:9.2e} +-{one['kernel_distance_interval']:8.1e} {shift['delta_e']:6.2f} "
            f"({shift['L']:+5.2f}, {shift['a']:+5.2f}, {shift['b']:+5.2f}) {most:>9}"
        )
    return lines


def remarks(found: dict) -> Iterator[str]:
    """What the numbers are of."""
    yield (
        f"{found['images']} images a side, the same masks, captions and noise, in memory before and after; the same "
        "weights in the same memory layout."
    )
    yield f"The judge finds mIoU {found['ceiling']:.3f} in the real images."
    yield f"Kernel distance between features of real and painted images, +- its 95 % interval: {found['extractor']}."
    yield f"Color: mean CIELAB of the images less that of the real ones. {found['machine']}."
    seen = found["undisturbed"]
    if seen["other_load"] > BUSY:
        yield f"Other programs kept up to {seen['other_load']:.1f} cores busy during a turn: its times mean little."
    if seen["together"] < seen["turns"]:
        yield f"{seen['turns'] - seen['together']} of {seen['turns']} turns were not painted in one run by all sides."


def verdicts(found: dict) -> Iterator[str]:
    """Each promise, with what was found and whether it is met, against the plain way's best in each respect."""
    for title, one in found["against"].items():
        low, high = one["times_faster_range"]
        yield f"{title}, against the best of the plain way in each respect:"
        yield verdict(
            f"{one['times_faster']:.2f} times the images a second (turns: {low:.2f} to {high:.2f})",
            f">= {FASTER:g}", one["times_faster"] >= FASTER,
        )  # fmt: skip
        yield verdict(
            f"mIoU {one['miou_less_best']:+.3f}", f">= -{LESS_FAITHFUL}", one["miou_less_best"] >= -LESS_FAITHFUL
        )
        excess, interval = one["kernel_distance_less_best"], one["kernel_distance_less_best_interval"]
        yield verdict(f"kernel distance {excess:+.2e}", f"<= {interval:.1e}, its interval", excess <= interval)
        peak = list(found["sides"][title].get("peak_gib", {}).items())
        if len(peak) == 2:
            grown = peak[1][1] / peak[0][1]
            yield verdict(
                f"peak memory from {peak[0][0]} to {peak[1][0]} masks: {grown:.2f} times", f"<= {MORE_MEMORY}",
                grown <= MORE_MEMORY,
            )  # fmt: skip


def verdict(found: str, wanted: str, met: bool) -> str:
    """A line that ends with met or MISSED."""
    return f"  {found}  {wanted}  {'met' if met else 'MISSED'}"


# --- bench_generate: Our painting against one call of diffusers' pipeline an image: pace, faithfulness, distance, color and memory.

SHARED = ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "palette", "resolution", "fit",
          "negative_prompt", "seed", "mixed_precision")  # fmt: skip
HELD_OUT_ROWS = 1000  # landscapes at least
PLAIN_MEMORY_MASKS = 8  # it holds one image at a time
Log = Callable[[str], None]


def bench_generate(config: BenchGenerateConfig, log: Log = print) -> dict:
    """Paint what does not stand yet, score all of it, and write bench_generate.json and .txt; returns the figures."""
    check(config)
    train, real = rows_of(config)
    painter = load_pipeline(config, real.palette)
    masks = read_bench_masks(real.first(config.limit), config)
    sides = sides_of(config, painter, masks.real)
    log(f"Painting {len(masks.ids)} masks of {real.folder} in {len(sides)} ways.")
    turns = take_turns(sides, masks, config.rows_a_turn, log)
    judge = open_bench_segmenter(config, train, masks, log)
    extractor = open_extractor(judge, config.inception_weights)
    found = figures(sides, turns, masks, judge, extractor, log)
    if config.memory_masks:
        add_memory(config, found, sides, real, log)
    lines = [*table(found), "", *remarks(found), *verdicts(found)]
    write_text(config.out / "bench_generate.json", json.dumps(found, indent=1) + "\n")
    write_text(config.out / "bench_generate.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote bench_generate.json and .txt to {config.out}."]))
    return found


def check(config: BenchGenerateConfig) -> None:
    """UserError for what would fail only after hours."""
    check_values(config)
    if not config.without_plain and not config.plain_guidance_scales:
        raise UserError("--plain_guidance_scales: expected some above 1, found none")
    for words in config.variants:
        check_sampling(variant(config, words))


def rows_of(config: BenchGenerateConfig) -> tuple[Split, Split]:
    """(rows that teach the judge, rows to paint)."""
    if config.dataset_name is None and config.split == "test":
        held_out = held_out_landscapes(max(HELD_OUT_ROWS, config.limit, config.memory_masks))
        return read_split(sample_landscapes(), "train"), read_split(held_out)
    data = config.dataset_name or sample_landscapes()
    return read_split(data, "train"), read_named_split(data, config.split)


def sides_of(config: BenchGenerateConfig, painter: Pipeline, real: Split) -> list[Side]:
    """The plain way at each of its guidance scales, then ours, once or once a variant."""
    own = SampleConfig(**{name.name: getattr(config, name.name) for name in fields(SampleConfig)})
    shared = {name: getattr(config, name) for name in SHARED}
    data = hashlib.sha256(real.metadata.read_bytes()).hexdigest()
    place = (painter, config.out / "sides", data)
    sides = []
    for scale in () if config.without_plain else config.plain_guidance_scales:
        plain = SampleConfig(**shared, scheduler="unipc", num_inference_steps=config.plain_steps, guidance_scale=scale)
        sides.append(Side(f"diffusers, guidance {scale:g}", plain, 0, *place))
    for words in config.variants or [""]:
        settings = variant(own, words) if words else own
        sides.append(Side(f"segcn {words}".strip(), settings, config.batch_size, *place))
    return sides


def open_bench_segmenter(config: BenchGenerateConfig, train: Split, masks: BenchMasks, log: Log) -> Segmenter:
    """The segmenter given, or one trained on the real train rows at the size of the masks."""
    if config.segmenter:
        return load_segmenter(config.segmenter)
    settings = SegmenterConfig(resolution=min(masks.ids.shape[1:]), seed=config.seed, fit=config.fit)
    return segmenter_of(train, settings, config.out / "cache", log)


def figures(
    sides: list[Side], turns: list[str], masks: BenchMasks, judge: Segmenter, extractor: Extractor, log: Log
) -> dict:
    """What is told of each side, and of ours against the plain way's best in each respect."""
    real = score(masks.real, masks.real, judge, extractor)
    scores = {}
    for side in sides:
        scores[side.title] = score(side.painted(), masks.real, judge, extractor)
        log(f"{side.title}: mIoU {scores[side.title].miou:.3f}")
    entries = {side.title: entry(side, turns, len(masks.ids), real, scores[side.title]) for side in sides}
    plain, ours = ([side.title for side in sides if side.plain is plain] for plain in (True, False))
    return {
        "images": len(masks.ids), "machine": machine(), "extractor": extractor.name, "ceiling": real.miou,
        "undisturbed": undisturbed(sides, turns), "sides": entries,
        "against": {title: against(title, plain, entries, scores, real) for title in ours} if plain else {},
    }  # fmt: skip


def entry(side: Side, turns: list[str], images: int, real: Scores, found: Scores) -> dict:
    """The numbers of a side."""
    taken = [side.turns[name] for name in turns]
    distance, interval = distance_interval(real.features, found.features)
    return {
        "plain": side.plain, "settings": dataclasses.asdict(side.settings), "batch_size": side.batch_size,
        "folder": str(side.out), "images_per_second": images / sum(turn["seconds"] for turn in taken),
        "images_per_cpu_second": images / sum(turn["cpu_seconds"] for turn in taken),
        "turns": [turn["seconds"] for turn in taken], "miou": found.miou,
        "kernel_distance": distance, "kernel_distance_interval": interval, "color_shift": found.color,
    }  # fmt: skip


def against(title: str, plain: list[str], entries: dict, scores: dict[str, Scores], real: Scores) -> dict:
    """Ours against the plain way's fastest, its most faithful and its closest: not one of these need be the same."""
    ours, theirs = entries[title], [entries[name] for name in plain]
    quickest = [min(seconds) for seconds in zip(*(entry["turns"] for entry in theirs), strict=True)]
    ratios = [other / own for other, own in zip(quickest, ours["turns"], strict=True)]
    closest = min(plain, key=lambda name: entries[name]["kernel_distance"])
    excess, interval = excess_interval(real.features, scores[title].features, scores[closest].features)
    return {
        "times_faster": statistics.median(ratios), "times_faster_range": [min(ratios), max(ratios)],
        "miou_less_best": ours["miou"] - max(entry["miou"] for entry in theirs),
        "kernel_distance_less_best": excess, "kernel_distance_less_best_interval": interval,
    }  # fmt: skip


def undisturbed(sides: list[Side], turns: list[str]) -> dict:
    """Whether the times can be compared: other programs' load, and the turns that all sides painted in one run."""
    taken = [[side.turns[name] for side in sides] for name in turns]
    load = max((turn["other_load"] or 0.0 for row in taken for turn in row), default=0.0)
    return {
        "other_load": load,
        "turns": len(turns),
        "together": sum(len({t["run"] for t in row}) == 1 for row in taken),
    }


def add_memory(config: BenchGenerateConfig, found: dict, sides: list[Side], real: Split, log: Log) -> None:
    """The peaks of our first side and of a plain one, in processes of their own."""
    count = min(config.memory_masks, len(real))
    for plain in (True, False):
        side = next((side for side in sides if side.plain is plain), None)
        if side is None:
            continue
        counts = (min(PLAIN_MEMORY_MASKS, count),) if plain else (max(1, count // 10), count)
        found["sides"][side.title]["peak_gib"] = memory_of(config, side, counts, real, log)


def memory_of(config: BenchGenerateConfig, side: Side, counts: tuple[int, ...], real: Split, log: Log) -> dict:
    """The peaks after so many masks, as they stand beside what the side painted, or measured now."""
    path = side.out / f"peak_gib-{counts[-1]}.json"
    if not path.is_file():
        log(f"Memory: {side.title} paints {counts[-1]} masks.")
        where = {"controls": str(real.metadata), "split": "train", "output_dir": str(config.out / "memory")}
        settings = dataclasses.asdict(side.settings) | where
        painting = GenerateConfig(**settings, batch_size=side.batch_size)
        write_text(path, json.dumps(peaks(painting, counts)) + "\n")
    return json.loads(path.read_text())
