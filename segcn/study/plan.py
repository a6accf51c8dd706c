"""What a study of usefulness consists of: its settings, the rows of each fraction, the runs, and how long they take."""

import functools
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from segcn.data.metadata import Split, find_splits, read_split, write_metadata
from segcn.data.transforms import AugmentConfig
from segcn.generate.config import GenerateConfig
from segcn.models.base import base_fingerprint
from segcn.models.segmenter import SegmenterConfig
from segcn.study.config import UtilityConfig
from segcn.study.training import AUGMENT, KEPT_DRAWS
from segcn.train.config import TrainConfig
from segcn.utils import rng
from segcn.utils.args import check_values, make, preset_defaults
from segcn.utils.errors import UserError
from segcn.utils.io import write_whole

LEARNING_STEP = 0.5  # seconds of a ControlNet's step at batch 16, 128 pixels, on two slow cores
PAINTING_STEP = 0.02  # of one image's denoising step there
FITTING_SAMPLE = 0.0017  # of one image of 64 pixels through a segmenter and back there
PAINTED = ("num_inference_steps", "controlnet_conditioning_scale", "prompt", "vary", "augment_masks", "min_miou",
           "max_attempts", "ignore_disagreement", "batch_size")  # fmt: skip


class Arm(NamedTuple):
    """What a segmenter learns from: rows of a fraction, with `ratio` synthetic images for each real one.

    ratio: 0 is real images alone, None synthetic ones alone.
    """

    fraction: float
    ratio: float | None

    @property
    def name(self) -> str:
        return "synthetic" if self.ratio is None else f"real+{self.ratio:g}x" if self.ratio else "real"

    @property
    def share(self) -> float:
        """Of the images of a batch that are synthetic."""
        return 1.0 if self.ratio is None else self.ratio / (1 + self.ratio)


def check(config: UtilityConfig) -> None:
    """UserError for settings that would fail only after a while, or mean nothing."""
    check_values(config)
    AugmentConfig.parse(config.augment)
    if not config.some or config.few_real_ratio not in config.shares:
        raise UserError(f"--few_real_ratio {config.few_real_ratio:g}: expected one of --ratios {config.ratios}")
    if not config.dataset_name:
        raise UserError("--dataset_name: expected a data set folder with train/ and test/, found nothing")
    if not {"train", "test"} <= set(find_splits(config.dataset_name)):
        raise UserError(
            f"--dataset_name {config.dataset_name}: expected train/ and test/, to test on real images that nothing was"
            f" trained on, found {', '.join(find_splits(config.dataset_name))}; move rows to test/ (data/README.md)"
        )


def arms(config: UtilityConfig) -> list[Arm]:
    """Real alone and with synthetic at every fraction; at the largest one synthetic alone and every ratio, too."""
    few = [Arm(fraction, ratio) for fraction in config.some for ratio in (0.0, config.few_real_ratio)]
    whole = config.some[-1]
    return [*few, Arm(whole, None), *(Arm(whole, ratio) for ratio in config.shares if ratio != config.few_real_ratio)]


def drawn_rows(split: Split, fraction: float, seed: int) -> list[int]:
    """The rows of a fraction, two at least, in the order drawn: those of a smaller fraction come first in a larger."""
    count = min(len(split), max(2, round(fraction * len(split))))
    return rng.permutation(len(split), "few real", seed)[:count]


def stage_rows(split: Split, rows: list[int], folder: Path) -> Split:
    """A data set of some rows of another: links to its files, or copies where the file system has no links.

    Whatever reads this folder cannot see any other row.
    """
    if not any(folder.glob("metadata.*")):
        (folder / "palette.json").unlink(missing_ok=True)
        records = [split[row] for row in rows]
        for record in records:
            for name in (record.image_name, record.mask_name):
                _link(Path(record.folder, name), folder / name)
        split.palette.save(folder / "palette.json")
        write_metadata(folder, ((one.image_name, one.mask_name, one.captions) for one in records))
    return read_split(folder)


def controlnet_config(config: UtilityConfig, rows: Split, smaller: Path | None, folder: Path) -> TrainConfig:
    """How the ControlNet of a fraction is trained: as the preset says, on its rows alone.

    smaller: that of the next smaller fraction, to go on from: its rows are among these; None: the base.
    """
    steps = config.controlnet_more_steps if smaller else config.controlnet_steps
    draws = max(1, min(16, steps * 16 // (4 * len(rows))))  # each is seen four times or more
    return make(
        TrainConfig, config.preset, dataset_name=str(rows.folder), output_dir=str(folder), seed=config.seed,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path, cache_dir=str(config.folder / "cache"),
        controlnet_model_name_or_path=str(smaller) if smaller else None, resolution=config.resolution, fit=config.fit,
        augment=config.augment, max_train_steps=steps, cache_draws=draws, checkpointing_steps=100,
        checkpoints_total_limit=1, logging_steps=50, report_to="none",
    )  # fmt: skip


def generation_config(
    config: UtilityConfig, rows: Split, controlnet: Path, segmenter: Path, folder: Path
) -> GenerateConfig:
    """How the synthetic images of a fraction are painted and vetted: from its rows, by what learned from its rows."""
    return make(
        GenerateConfig, config.preset, controls=str(rows.folder), split="train", output_dir=str(folder),
        pretrained_model_name_or_path=config.pretrained_model_name_or_path, seed=config.seed,
        controlnet_model_name_or_path=str(controlnet), segmenter=str(segmenter), resolution=config.resolution,
        fit=config.fit, limit=min(config.images, len(rows)), replicates=-(-config.images // len(rows)),
        **{name: getattr(config, name) for name in PAINTED if getattr(config, name) != ""},
    )  # fmt: skip


def segmenter_config(config: UtilityConfig, seed: int) -> SegmenterConfig:
    """How every segmenter is trained, whatever it is trained on."""
    return SegmenterConfig(
        steps=config.segmenter_steps, batch_size=config.segmenter_batch_size, width=config.segmenter_width,
        resolution=config.segmenter_resolution, seed=seed, fit=config.fit, learning_rate=config.segmenter_learning_rate,
    )  # fmt: skip


def key_of(config: UtilityConfig, rows: Split, kind: str, *more: Any) -> str:
    """10 hexadecimal digits that change with whatever the ControlNet, the images or a segmenter depends on."""
    relevant = {
        "controlnet": ("preset", "resolution", "fit", "seed", "controlnet_steps", "augment"),
        "synthetic": ("images", *PAINTED),
        "segmenter": ("segmenter_resolution", "fit", "segmenter_steps", "segmenter_batch_size", "segmenter_width",
                      "segmenter_learning_rate"),
    }[kind]  # fmt: skip
    told = {name: getattr(config, name) for name in relevant} | {"rows": rows.fingerprint, "more": more}
    if kind == "segmenter":
        told |= {"augment": asdict(AUGMENT), "draws": KEPT_DRAWS}
    elif kind == "synthetic":
        told |= {"defaults": preset_defaults(GenerateConfig, config.preset)}
    else:
        base = _fingerprint_once(config.pretrained_model_name_or_path)
        told |= {"base": base, "defaults": preset_defaults(TrainConfig, config.preset)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def estimate(config: UtilityConfig, kind: str) -> float:
    """Seconds of a ControlNet, of one that goes on, of a synthetic set or of a segmenter, on two slow cores."""
    area, crop = (config.resolution / 128) ** 2, (config.segmenter_resolution / 64) ** 2
    return {
        "controlnet": config.controlnet_steps * LEARNING_STEP * area + 20,
        "larger controlnet": config.controlnet_more_steps * LEARNING_STEP * area + 20,
        "synthetic": config.images * config.num_inference_steps * PAINTING_STEP * area * 1.3 + 10,
        "segmenter": config.segmenter_steps * config.segmenter_batch_size * FITTING_SAMPLE * crop + 2,
    }[kind]


@functools.cache
def _fingerprint_once(base: str) -> str:
    return base_fingerprint(base)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            write_whole(target, lambda aside: shutil.copy2(source, aside))
