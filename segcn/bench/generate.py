"""`segcn bench generate`: our generation and one pipeline call an image (the baseline), in turns, both scored."""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from PIL import Image

from segcn.bench.config import BenchGenerateConfig
from segcn.bench.timing import BUSY, busy_seconds, machine
from segcn.data.dataset import read_framed_mask
from segcn.data.masks import colorize
from segcn.data.metadata import Split, finish_dataset, read_named_split, read_split, write_pair
from segcn.evaluate.bootstrap import LEVEL
from segcn.evaluate.evaluator import Evaluation, Observer, evaluate
from segcn.generate.config import MODELS, SampleConfig
from segcn.generate.pipeline import Pipeline, check_sampling, diffusers_pipeline, first_noise, generate, load_pipeline
from segcn.models.features import open_extractor
from segcn.models.segmenter import Segmenter, SegmenterConfig, load_segmenter, segmenter_of
from segcn.samples.landscapes.scene import held_out_landscapes, sample_landscapes
from segcn.utils.args import check_values
from segcn.utils.errors import UserError
from segcn.utils.io import write_text

TURNS = "turns.json"
FIXED = {*MODELS, "preset", "resolution", "fit", "mixed_precision", "torch_compile"}  # all sides share these
SHARED = ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "palette", "resolution", "fit",
          "negative_prompt", "seed", "mixed_precision")  # fmt: skip
HELD_OUT_ROWS = 1000  # landscapes at least
FASTER, LESS_FAITHFUL = 4.0, 0.02  # what segcn promises against the baseline
Log = Callable[[str], None]


def bench_generate(config: BenchGenerateConfig, log: Log = print) -> dict:
    """Generate what is missing, score all of it, write bench_generate.json and .txt; returns the figures."""
    check_values(config)
    if not config.without_plain and not config.plain_guidance_scales:
        raise UserError("--plain_guidance_scales: expected some above 1, found none")
    for words in config.variants:
        check_sampling(variant(config, words))
    data = config.dataset_name or sample_landscapes()
    train = read_split(data, "train")
    if config.dataset_name is None and config.split == "test":
        real = read_split(held_out_landscapes(max(HELD_OUT_ROWS, config.limit)))
    else:
        real = read_named_split(data, config.split)
    pipeline = load_pipeline(config, real.palette)
    masks = read_bench_masks(real.first(config.limit), config)
    sides = sides_of(config, pipeline, masks.real)
    log(f"Generating from {len(masks.ids)} masks of {real.folder} in {len(sides)} ways.")
    turns = take_turns(sides, masks, config.rows_a_turn, log)
    observer = open_bench_observer(config, train, masks, log)
    found = figures(sides, turns, masks, observer, log)
    lines = [*generate_table(found), "", *generate_remarks(found), *promises(found)]
    write_text(config.out / "bench_generate.json", json.dumps(found, indent=1) + "\n")
    write_text(config.out / "bench_generate.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote bench_generate.json and .txt to {config.out}."]))
    return found


# The sides, and their turns


@dataclass(frozen=True)
class BenchMasks:
    """What all sides generate from: class ids uint8 [N, H, W], a caption each, and the real rows that they are of."""

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
    """A way of generating, and the folder of its images."""

    title: str
    settings: SampleConfig
    batch_size: int  # 0: the baseline, a call of diffusers' pipeline an image
    pipeline: Pipeline
    parent: Path
    data: str  # which masks

    @property
    def plain(self) -> bool:
        return self.batch_size == 0

    @cached_property
    def folder(self) -> Path:
        """Named after everything that its images and times depend on."""
        parts = dataclasses.asdict(self.settings) | {"batch_size": self.batch_size, "threads": torch.get_num_threads()}
        parts |= {"base": self.pipeline.base.fingerprint, "controlnet": self.pipeline.controlnet_digest}
        parts |= {"data": self.data, "torch": torch.__version__, "diffusers": diffusers.__version__}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        name = "".join(letter if letter.isalnum() or letter in ".-=" else "_" for letter in self.title)
        return self.parent / f"{name[:60]}-{digest}"

    @cached_property
    def baseline(self) -> Any:
        return diffusers_pipeline(self.pipeline.base, self.settings, self.pipeline.controlnet)

    @property
    def turns(self) -> dict[str, dict]:
        """What is known of each finished turn, by its rows."""
        path = self.folder / TURNS
        return json.loads(path.read_text()) if path.is_file() else {}

    def generate(self, masks: np.ndarray, captions: Sequence[str], rows: list[int]) -> np.ndarray:
        """uint8 [N, H, W, 3] from class ids uint8 [N, H, W]; all sides begin with the same noise."""
        if self.plain:
            return np.stack([self._one(*row) for row in zip(masks, captions, rows, strict=True)])
        parts = [slice(first, first + self.batch_size) for first in range(0, len(rows), self.batch_size)]
        made = (generate(self.pipeline, masks[one], list(captions[one]), rows[one], self.settings) for one in parts)
        return np.concatenate(list(made))

    def _one(self, mask: np.ndarray, caption: str, row: int) -> np.ndarray:
        noise = first_noise(self.pipeline.base, [row], self.settings, mask.shape).to(self.pipeline.base.dtype)
        result = self.baseline(
            prompt=caption,
            image=Image.fromarray(colorize(mask, self.pipeline.palette)),
            negative_prompt=self.settings.negative_prompt or None,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            latents=noise,
        )
        return np.asarray(result.images[0])


def sides_of(config: BenchGenerateConfig, pipeline: Pipeline, real: Split) -> list[Side]:
    """The baseline at each of its guidance scales, then ours, once or once a variant."""
    own = SampleConfig(**{field.name: getattr(config, field.name) for field in fields(SampleConfig)})
    shared = {name: getattr(config, name) for name in SHARED}
    place = (pipeline, config.out / "sides", hashlib.sha256(real.metadata.read_bytes()).hexdigest())
    sides = []
    for scale in () if config.without_plain else config.plain_guidance_scales:
        plain = SampleConfig(**shared, scheduler="unipc", num_inference_steps=config.plain_steps, guidance_scale=scale)
        sides.append(Side(f"diffusers, guidance {scale:g}", plain, 0, *place))
    for words in config.variants or [""]:
        settings = variant(own, words) if words else own
        sides.append(Side(f"segcn {words}".strip(), settings, config.batch_size, *place))
    return sides


def variant(settings: SampleConfig, words: str) -> SampleConfig:
    """The settings changed by "name=value,name=value"; UserError for a name or value that they do not have."""
    known: dict[str, Any] = {field.name: field.default for field in fields(SampleConfig)}
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


def take_turns(sides: list[Side], masks: BenchMasks, rows_a_turn: int, log: Log) -> list[str]:
    """Each side generates some rows, then the next side the same rows; another side first in every other turn.

    Finished turns are kept. Returns the names of the turns, one entry in each side's `turns`.
    """
    run, warm, names = time.time(), set(), []
    for number, first in enumerate(range(0, len(masks.ids), rows_a_turn)):
        rows = list(range(first, min(first + rows_a_turn, len(masks.ids))))
        name = f"{rows[0]}-{rows[-1]}"
        names.append(name)
        for side in sides if number % 2 == 0 else reversed(sides):
            if name in side.turns:
                continue
            if side.title not in warm:
                few = rows[: max(1, side.batch_size)]
                side.generate(masks.ids[few], [masks.captions[row] for row in few], few)
                warm.add(side.title)
            busy, cpu, began = busy_seconds(), time.process_time(), time.monotonic()
            images = side.generate(masks.ids[rows], [masks.captions[row] for row in rows], rows)
            seconds, own = time.monotonic() - began, time.process_time() - cpu
            other = max(0.0, busy_seconds() - busy - own) / seconds
            for row, image in zip(rows, images, strict=True):
                write_pair(side.folder, pair_names(row), image, masks.ids[row], masks.real.palette)
            entry = {"seconds": seconds, "cpu_seconds": own, "other_load": other, "run": run}
            write_text(side.folder / TURNS, json.dumps(side.turns | {name: entry}, indent=1) + "\n")
            log(f"rows {name} of {len(masks.ids)}, {side.title}: {len(rows) / seconds:.2f} images/s")
    for side in sides:
        finish_dataset(
            side.folder, [(*pair_names(row), text) for row, text in enumerate(masks.captions)], masks.real.palette
        )
    return names


def pair_names(row: int) -> tuple[str, str]:
    """The files of a row's image and mask."""
    return f"images/{row:06d}.png", f"masks/{row:06d}.png"


# The figures


def open_bench_observer(config: BenchGenerateConfig, train: Split, masks: BenchMasks, log: Log) -> Observer:
    """The segmenter given, or one trained on the real train rows at the size of the masks, and the extractor."""
    if config.segmenter:
        segmenter: Segmenter = load_segmenter(config.segmenter)
    else:
        settings = SegmenterConfig(resolution=min(masks.ids.shape[1:]), seed=config.seed, fit=config.fit)
        segmenter = segmenter_of(train, settings, config.out / "cache", log)
    return Observer(segmenter, open_extractor(segmenter, config.inception_weights), (), config.out / "cache")


def figures(sides: list[Side], turns: list[str], masks: BenchMasks, observer: Observer, log: Log) -> dict:
    """The figures of each side, and those of ours against the baseline's best in each respect."""
    found = {}
    for side in sides:
        found[side.title] = evaluate(masks.real, read_split(side.folder), observer, log=lambda line: None)
        log(f"{side.title}: mIoU {found[side.title].metrics['faithfulness']['synthetic']['miou'] or 0.0:.3f}")
    entries = {side.title: side_figures(side, turns, len(masks.ids), found[side.title]) for side in sides}
    plain, ours = ([side.title for side in sides if side.plain is plain] for plain in (True, False))
    taken = [[side.turns[name] for side in sides] for name in turns]
    first = next(iter(found.values())).metrics
    return {
        "images": len(masks.ids),
        "machine": machine(),
        "extractor": first["distance"]["extractor"],
        "ceiling": first["faithfulness"]["real"]["miou"],
        "other_load": max(turn["other_load"] for row in taken for turn in row),
        "turns": len(turns),
        "turns_in_one_run": sum(len({turn["run"] for turn in row}) == 1 for row in taken),
        "sides": entries,
        "against": {title: against(title, plain, entries, found) for title in ours} if plain else {},
    }


def side_figures(side: Side, turns: list[str], images: int, found: Evaluation) -> dict:
    """Speed, faithfulness, kernel distance and mean color shift of a side."""
    taken = [side.turns[name] for name in turns]
    return {
        "plain": side.plain,
        "settings": dataclasses.asdict(side.settings),
        "batch_size": side.batch_size,
        "folder": str(side.folder),
        "images_per_second": images / sum(turn["seconds"] for turn in taken),
        "images_per_cpu_second": images / sum(turn["cpu_seconds"] for turn in taken),
        "turns": [turn["seconds"] for turn in taken],
        "miou": found.metrics["faithfulness"]["synthetic"]["miou"] or 0.0,
        "kernel_distance": found.metrics["distance"]["kernel_distance"],
        "kernel_distance_interval": found.metrics["intervals"]["distance"]["kernel_distance"],
        "color_shift": {name: found.metrics["color"][name] for name in ("L", "a", "b", "delta_e")},
    }


def against(title: str, plain: list[str], entries: dict, found: dict[str, Evaluation]) -> dict:
    """Ours against the baseline's fastest, its most faithful and its closest setting, which can be three."""
    ours, theirs = entries[title], [entries[name] for name in plain]
    quickest = [min(seconds) for seconds in zip(*(entry["turns"] for entry in theirs), strict=True)]
    ratios = [other / own for other, own in zip(quickest, ours["turns"], strict=True)]
    closest = min(plain, key=lambda name: entries[name]["kernel_distance"])
    draws = [found[name].draws["distance/kernel_distance"].double() for name in (title, closest)]  # of the same images
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return {
        "times_faster": statistics.median(ratios),
        "times_faster_range": [min(ratios), max(ratios)],
        "miou_less_best": ours["miou"] - max(entry["miou"] for entry in theirs),
        "kernel_distance_less_best": ours["kernel_distance"] - entries[closest]["kernel_distance"],
        "kernel_distance_less_best_interval": torch.quantile(draws[0] - draws[1], ends).tolist(),
    }


def generate_table(found: dict) -> list[str]:
    """A line a side."""
    rows = {}
    for title, one in found["sides"].items():
        shift, (low, high) = one["color_shift"], one["kernel_distance_interval"]
        rows[title] = {
            "images/s": f"{one['images_per_second']:.3f}",
            "img/CPU s": f"{one['images_per_cpu_second']:.3f}",
            "mIoU": f"{one['miou']:.3f}",
            "kernel distance": f"{one['kernel_distance']:.2e} [{low:.1e}, {high:.1e}]",
            "color shift": f"{shift['delta_e']:.2f}",
            "dL, da, db": ", ".join(f"{shift[name]:+.2f}" for name in "Lab"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").to_string().splitlines()


def generate_remarks(found: dict) -> Iterator[str]:
    """What the numbers are of, and whether the times can be trusted."""
    yield (
        f"{found['images']} images a side, the same masks, captions and noise, in memory before and after; the same "
        "weights in the same memory layout."
    )
    yield f"The segmenter finds mIoU {found['ceiling']:.3f} in the real images."
    yield f"Kernel distance between features of real and generated images, with 95 % intervals: {found['extractor']}."
    yield f"Color: mean CIELAB of the images less that of the real ones. {found['machine']}."
    if found["other_load"] > BUSY:
        yield f"Other programs used up to {found['other_load']:.1f} cores during a turn: do not trust its times."
    if found["turns_in_one_run"] < found["turns"]:
        missing = found["turns"] - found["turns_in_one_run"]
        yield f"{missing} of {found['turns']} turns were not generated in one run by all sides."


def promises(found: dict) -> Iterator[str]:
    """Each promise with what was found and whether it is met, against the baseline's best in each respect."""
    for title, one in found["against"].items():
        low, high = one["times_faster_range"]
        excess, (least, most) = one["kernel_distance_less_best"], one["kernel_distance_less_best_interval"]
        yield f"{title}, against the baseline's best in each respect:"
        for text, met in (
            (f"{one['times_faster']:.2f} times the images a second (turns: {low:.2f} to {high:.2f})  >= {FASTER:g}",
             one["times_faster"] >= FASTER),
            (f"mIoU {one['miou_less_best']:+.3f}  >= -{LESS_FAITHFUL}", one["miou_less_best"] >= -LESS_FAITHFUL),
            (f"kernel distance {excess:+.2e} [{least:.1e}, {most:.1e}]  not above 0 beyond its interval", least <= 0),
        ):  # fmt: skip
            yield f"  {text}  {'met' if met else 'MISSED'}"
