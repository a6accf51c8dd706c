"""Generation beside one call of diffusers' pipeline for each image (the baseline): pace, faithfulness, distance.

Each side generates from the same masks in turns, into a data set of its own that is kept.
"""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas
import torch
from PIL import Image

from segcn.bench.config import BenchGenerateConfig
from segcn.bench.timing import BUSY, OtherLoad, machine
from segcn.data.dataset import read_framed_mask
from segcn.data.masks import colorize
from segcn.data.metadata import Split, finish_dataset, read_named_split, read_split, write_pair
from segcn.data.visualize import quiet
from segcn.evaluate.bootstrap import Estimate, difference, intervals_of, values_of
from segcn.evaluate.evaluator import Observer
from segcn.evaluate.metrics import color_estimate, kernel_distance, mask_scores
from segcn.generate.config import MODELS, SampleConfig
from segcn.generate.pipeline import Pipeline, check_sampling, diffusers_pipeline, first_noise, generate, load_pipeline
from segcn.models.features import open_extractor
from segcn.models.segmenter import SegmenterConfig, load_segmenter, segmenter_of
from segcn.samples.landscapes.scene import held_out_landscapes, sample_landscapes
from segcn.utils.args import check_values
from segcn.utils.errors import UserError
from segcn.utils.io import write_text

FIXED = {*MODELS, "preset", "resolution", "fit", "mixed_precision", "torch_compile"}  # all sides share these
SHARED = ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "palette", "resolution", "fit",
          "negative_prompt", "seed", "mixed_precision")  # fmt: skip
HELD_OUT_ROWS = 1000  # landscapes at least
Log = Callable[[str], None]


def bench_generate(config: BenchGenerateConfig, log: Log = print) -> dict:
    """Generate what is missing, score all of it, and write bench_generate.json and .txt; returns the figures."""
    quiet()
    check_values(config)
    if not config.without_plain and not config.plain_guidance_scales:
        raise UserError("--plain_guidance_scales: expected some above 1, found none")
    for words in config.variants:
        check_sampling(variant(config, words))
    if config.dataset_name is None and config.split == "test":
        held_out = held_out_landscapes(max(HELD_OUT_ROWS, config.limit))
        train, real = read_split(sample_landscapes(), "train"), read_split(held_out)
    else:
        data = config.dataset_name or sample_landscapes()
        train, real = read_split(data, "train"), read_named_split(data, config.split)
    real = real.first(config.limit)
    masks = read_masks(real, config)
    sides = sides_of(config, load_pipeline(config, real.palette), real)
    log(f"Generating from {len(masks)} masks of {real.folder} in {len(sides)} ways.")
    turns = take_turns(sides, masks, real, config.rows_a_turn, log)
    found = figures(config, sides, turns, train, real, min(masks.shape[1:]), log)
    lines = [*generate_table(found), "", *generate_remarks(found)]
    write_text(config.out / "bench_generate.json", json.dumps(found, indent=1) + "\n")
    write_text(config.out / "bench_generate.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote bench_generate.json and .txt to {config.out}."]))
    return found


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


def read_masks(split: Split, settings: SampleConfig) -> np.ndarray:
    """Class ids uint8 [N, H, W] of a split, made square where --resolution says so; UserError for two sizes."""
    ids = [read_framed_mask(row.mask, split.palette, settings.resolution, settings.fit)[0] for row in split.records]
    sizes = len({mask.shape for mask in ids})
    if sizes > 1:
        raise UserError(f"{split.metadata}: expected masks of one size, found {sizes}: --resolution makes them one")
    return np.stack(ids)


@dataclass
class Side:
    """A way to generate, and the folder of its images."""

    title: str
    settings: SampleConfig
    plain: bool  # the baseline: calls of diffusers' pipeline
    batch_size: int  # images at once
    pipeline: Pipeline
    folder: Path  # below which its own is
    data: str  # a digest of the rows

    @cached_property
    def out(self) -> Path:
        """Named after everything that its images and times depend on."""
        key = dataclasses.asdict(self.settings) | {"threads": torch.get_num_threads()}
        key |= {"plain": self.plain, "batch_size": self.batch_size}
        key |= {"base": self.pipeline.base.fingerprint, "controlnet": self.pipeline.controlnet_digest}
        key |= {"data": self.data, "torch": torch.__version__, "diffusers": diffusers.__version__}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        name = "".join(letter if letter.isalnum() or letter in ".-=" else "_" for letter in self.title)
        return self.folder / f"{name[:60]}-{digest}"

    @property
    def turns(self) -> dict[str, dict]:
        """By its rows, the record of each finished turn."""
        path = self.out / "turns.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def diffusers_pipeline(self):
        return diffusers_pipeline(self.pipeline.base, self.settings, self.pipeline.controlnet)

    def generate(self, masks: np.ndarray, captions: list[str], rows: list[int]) -> np.ndarray:
        """uint8 [N, H, W, 3] from class ids uint8 [N, H, W]; all sides begin with the same noise."""
        one_call, images = self.call_diffusers if self.plain else self.call_segcn, []
        for first in range(0, len(rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            images.append(one_call(masks[part], captions[part], rows[part]))
        return np.concatenate(images)

    def call_segcn(self, masks: np.ndarray, captions: list[str], rows: list[int]) -> np.ndarray:
        return generate(self.pipeline, masks, captions, rows, self.settings)

    def call_diffusers(self, masks: np.ndarray, captions: list[str], rows: list[int]) -> np.ndarray:
        base, settings, (height, width) = self.pipeline.base, self.settings, masks.shape[1:]
        noise, negative = first_noise(base, rows, settings, (height, width)).to(base.dtype), settings.negative_prompt
        images = self.diffusers_pipeline(
            prompt=captions, image=[Image.fromarray(colorize(mask, self.pipeline.palette)) for mask in masks],
            height=height, width=width, negative_prompt=[negative] * len(rows) if negative else None, latents=noise,
            num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale, output_type="np",
        ).images  # fmt: skip
        return (images * 255).round().astype(np.uint8)


def sides_of(config: BenchGenerateConfig, pipeline: Pipeline, real: Split) -> list[Side]:
    """The baseline at each of its guidance scales, then segcn, once or once for each variant."""
    own = SampleConfig(**{field.name: getattr(config, field.name) for field in fields(SampleConfig)})
    shared = {name: getattr(config, name) for name in SHARED} | {"scheduler": "unipc"}
    place = (pipeline, config.out / "sides", hashlib.sha256(real.metadata.read_bytes()).hexdigest())
    sides = []
    for scale in () if config.without_plain else config.plain_guidance_scales:
        plain = SampleConfig(**shared, num_inference_steps=config.plain_steps, guidance_scale=scale)
        sides.append(Side(f"diffusers, guidance {scale:g}", plain, True, 1, *place))
    for words in config.variants or [""]:
        settings = variant(own, words) if words else own
        sides.append(Side(f"segcn {words}".strip(), settings, False, config.batch_size, *place))
    return sides


def take_turns(sides: list[Side], masks: np.ndarray, real: Split, rows_a_turn: int, log: Log) -> list[str]:
    """Each side generates some rows, then the next one the same; another one first in every other turn.

    Finished turns are kept. Returns the names of the turns, the keys of each side's `turns`.
    """
    began, warm, names = time.time(), set(), []
    captions = [row.caption for row in real.records]
    pairs = [(f"images/{row:06d}.png", f"masks/{row:06d}.png") for row in range(len(masks))]
    for number, first in enumerate(range(0, len(masks), rows_a_turn)):
        rows = list(range(first, min(first + rows_a_turn, len(masks))))
        name = f"{rows[0]}-{rows[-1]}"
        names.append(name)
        for side in sides if number % 2 == 0 else reversed(sides):
            if name in side.turns:
                continue
            if side.title not in warm:
                few = rows[: side.batch_size]
                side.generate(masks[few], [captions[row] for row in few], few)
                warm.add(side.title)
            load, cpu, start = OtherLoad(), time.process_time(), time.monotonic()
            images = side.generate(masks[rows], [captions[row] for row in rows], rows)
            turn = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu, "run": began}
            turn["other_load"] = load.cores()
            for row, image in zip(rows, images, strict=True):
                write_pair(side.out, pairs[row], image, masks[row], real.palette)
            write_text(side.out / "turns.json", json.dumps(side.turns | {name: turn}, indent=1) + "\n")
            log(f"rows {name} of {len(masks)}, {side.title}: {len(rows) / turn['seconds']:.2f} images/s")
    for side in sides:
        finish_dataset(side.out, [(*pairs[row], text) for row, text in enumerate(captions)], real.palette)
    return names


def figures(
    config: BenchGenerateConfig, sides: list[Side], turns: list[str], train: Split, real: Split, size: int, log: Log
) -> dict:
    """The numbers of each side, and of segcn's against the baseline's best in each respect."""
    if config.segmenter:
        segmenter = load_segmenter(config.segmenter)
    else:
        settings = SegmenterConfig(resolution=size, seed=config.seed, fit=config.fit)
        segmenter = segmenter_of(train, settings, config.out / "cache", log)
    observer = Observer(segmenter, open_extractor(segmenter, config.inception_weights), cache=config.out / "cache")
    looked_for, entries, scores = ("faithfulness", "features"), {}, {}
    truth = observer.observe(real, looked_for, log)
    for side in sides:
        seen = observer.observe(read_split(side.out), looked_for, log)
        scores[side.title] = nest = {
            "miou": mask_scores(seen["pixels"], seen["edges"], real.palette)["miou"],
            "kernel_distance": kernel_distance(truth["features"], seen["features"]),
            "color_shift": color_estimate(truth["color"], seen["color"], list(range(len(real)))),
        }
        taken = [side.turns[name] for name in turns]
        entries[side.title] = {
            "plain": side.plain, "settings": dataclasses.asdict(side.settings),
            "batch_size": side.batch_size, "folder": str(side.out), "turns": [turn["seconds"] for turn in taken],
            "images_per_second": len(real) / sum(turn["seconds"] for turn in taken),
            "images_per_cpu_second": len(real) / sum(turn["cpu_seconds"] for turn in taken),
        } | values_of(nest) | {"intervals": intervals_of(nest)}  # fmt: skip
    assert observer.extractor is not None
    plain, ours = ([title for title, entry in entries.items() if entry["plain"] is plain] for plain in (True, False))
    runs = [[side.turns[name] for side in sides] for name in turns]
    return {
        "images": len(real), "machine": machine(), "extractor": observer.extractor.name,
        "ceiling": mask_scores(truth["pixels"], truth["edges"], real.palette)["miou"].value,
        "turns": len(turns), "turns_in_one_run": sum(len({turn["run"] for turn in row}) == 1 for row in runs),
        "other_load": max(turn["other_load"] for row in runs for turn in row), "sides": entries,
        "against": {title: against(title, plain, entries, scores) for title in ours} if plain else {},
    }  # fmt: skip


def against(title: str, plain: list[str], entries: dict, scores: dict[str, dict[str, Estimate]]) -> dict:
    """Ours against the baseline's fastest, its most faithful and its closest: these need not be the same one."""
    fastest = [min(seconds) for seconds in zip(*(entries[name]["turns"] for name in plain), strict=True)]
    ratios = [other / own for other, own in zip(fastest, entries[title]["turns"], strict=True)]
    faithful = max(plain, key=lambda name: entries[name]["miou"] or 0)
    closest = min(plain, key=lambda name: entries[name]["kernel_distance"])
    nest = {
        "miou_less_best": difference(scores[title]["miou"], scores[faithful]["miou"]),
        "kernel_distance_less_best": difference(scores[title]["kernel_distance"], scores[closest]["kernel_distance"]),
    }
    times = {"times_faster": statistics.median(ratios), "times_faster_range": [min(ratios), max(ratios)]}
    return times | values_of(nest) | {"intervals": intervals_of(nest)}


def generate_table(found: dict) -> list[str]:
    """A line for each side, and below it one for each of segcn's against the best of the baseline in each respect."""
    lines = {}
    for title, one in found["sides"].items():
        shift, (low, high) = one["color_shift"], one["intervals"]["kernel_distance"]
        lines[title] = {
            "images/s": f"{one['images_per_second']:.3f}", "img/CPU s": f"{one['images_per_cpu_second']:.3f}",
            "mIoU": f"{one['miou']:.3f}", "kernel distance": f"{one['kernel_distance']:.2e} [{low:.1e}, {high:.1e}]",
            "dE (dL, da, db)": "{delta_e:.2f} ({L:+.2f}, {a:+.2f}, {b:+.2f})".format(**shift),
        }  # fmt: skip
    text = pandas.DataFrame.from_dict(lines, orient="index").to_string().splitlines()
    for title, one in found["against"].items():
        low, high = one["times_faster_range"]
        text += ["", f"{title}, against the best of the baseline in each respect:"]
        text.append(f"  {one['times_faster']:.2f} times the images a second (turns: {low:.2f} to {high:.2f})")
        for shown, form in (("mIoU", "+.3f"), ("kernel distance", "+.2e")):
            name = f"{shown.lower().replace(' ', '_')}_less_best"
            low, high = one["intervals"][name]
            text.append(f"  {shown} {one[name]:{form}} [{low:{form}}, {high:{form}}]")
    return text


def generate_remarks(found: dict) -> list[str]:
    """What the numbers are of, and whether the times can be compared."""
    lines = [
        f"{found['images']} images for each side, the same masks, captions and noise, in memory before and after; the "
        "same weights in the same memory layout. [95 % intervals]",
        f"The segmenter finds mIoU {found['ceiling']:.3f} in the real images.",
        f"Kernel distance between features of real and generated images: {found['extractor']}.",
        f"Color: mean CIELAB of the images less that of the real ones. {found['machine']}.",
    ]
    if found["other_load"] > BUSY:
        lines.append(f"Other programs kept up to {found['other_load']:.1f} cores busy in a turn: times mean little.")
    if apart := found["turns"] - found["turns_in_one_run"]:
        lines.append(f"{apart} of {found['turns']} turns were not generated in one run by all sides.")
    return lines
