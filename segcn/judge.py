"""The judge of a training: held-out rows to paint, and a segmenter that says how well the pictures obey their masks."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from segcn.augment import AUGMENTS
from segcn.config import SampleConfig
from segcn.dataset import PairedDataset, to_image
from segcn.errors import UserError
from segcn.evaluate import check_classes, measure
from segcn.pipeline import Painter, generate
from segcn.records import Split, find_splits, read_split
from segcn.segmenter import Segmenter, SegmenterConfig, load_segmenter, shared_folder, train_segmenter
from segcn.train_config import TrainConfig

PAINTED_AT_ONCE = 16  # pictures at most


@dataclass
class Judge:
    """What stays the same from validation to validation."""

    segmenter: Segmenter
    rows: Split  # held out
    masks: np.ndarray  # uint8 [N, R, R], class ids
    ceiling: dict  # what `evaluate.measure` says of the real images


def held_out_rows(config: TrainConfig, split: Split) -> Split | None:
    """The rows that --faithfulness_rows asks for: the first of the test split, or else those after --max_train_samples.

    split: the rows to train on. UserError where there are none, or where --segmenter cannot judge them.
    """
    if not config.faithfulness_rows:
        return None
    if "test" in find_splits(config.dataset):
        found = read_split(config.dataset, "test")
    else:
        found = read_split(config.dataset, "train")
        found = dataclasses.replace(found, records=found.records[len(split) :])
    if not found.records:
        raise UserError(
            f"--faithfulness_rows {config.faithfulness_rows}: expected held-out rows, found no test split in "
            f"{config.dataset_name} and none after the {len(split)} rows to train on. Move rows to a folder test/ with "
            "its own metadata.csv (data/README.md), hold some back by --max_train_samples N, or measure nothing while "
            "training by --faithfulness_rows 0."
        )
    if config.segmenter:
        check_segmenter(load_segmenter(config.segmenter), found, split, config)
    return found.first(config.faithfulness_rows)


def check_segmenter(segmenter: Segmenter, held_out: Split, split: Split, config: TrainConfig) -> None:
    """UserError where a segmenter that was given knows other classes or another resolution."""
    check_classes(held_out, split.palette, segmenter)
    trained = segmenter.settings["resolution"]
    if trained != config.resolution:
        raise UserError(
            f"--segmenter {config.segmenter}: expected one trained at {config.resolution} pixels a side, as "
            f"--resolution says, found {trained}; without --segmenter one is trained"
        )


def open_judge(config: TrainConfig, held_out: Split, split: Split, cache: Path, device, log: Callable) -> Judge:
    """Load the segmenter, or train it on the rows of `split` and leave it in the cache; score the real images."""
    if config.segmenter:
        segmenter = load_segmenter(config.segmenter, device)
    else:
        settings = SegmenterConfig(resolution=config.resolution, seed=config.seed, fit=config.fit)
        segmenter = train_segmenter(split, settings, shared_folder(cache, split, settings), log, device)
    pairs = PairedDataset(held_out, config.resolution, AUGMENTS["none"], 0, config.fit)
    masks = torch.stack([sample.mask for sample in pairs])
    real = ((sample.image[None], sample.mask[None]) for sample in pairs)
    return Judge(segmenter, held_out, masks.numpy(), measure(real, segmenter, held_out.palette))


def paint(judge: Judge, painter: Painter, settings: SampleConfig, at_once: int, on_step: Callable) -> np.ndarray:
    """Every held-out row painted, uint8 [N, R, R, 3]: the noise of a picture depends on (settings.seed, row) alone.

    at_once: pictures, 16 at most. `on_step` is called before each group and after each denoising step; True leaves off.
    """
    size, captions = min(at_once, PAINTED_AT_ONCE), [record.caption for record in judge.rows.records]
    groups = [range(first, min(first + size, len(captions))) for first in range(0, len(captions), size)]
    painted = [np.empty((0, *judge.masks.shape[1:], 3), np.uint8)]
    for rows in groups:
        if on_step(0):
            break
        shown = judge.masks[list(rows)], [captions[row] for row in rows], list(rows)
        painted.append(generate(painter, *shown, settings, None, on_step))
    return np.concatenate(painted)


def score(judge: Judge, painted: np.ndarray) -> dict:
    """miou, of_ceiling (its share of the real images' mIoU) and the IoU of each class, of painted rows."""
    images = to_image(torch.from_numpy(painted).permute(0, 3, 1, 2))
    pairs = zip(images.split(PAINTED_AT_ONCE), torch.from_numpy(judge.masks).split(PAINTED_AT_ONCE), strict=True)
    found = measure(pairs, judge.segmenter, judge.rows.palette)
    miou, ceiling = found["miou"] or 0.0, judge.ceiling["miou"]
    return {
        "miou": round(miou, 4),
        "of_ceiling": round(miou / ceiling, 4) if ceiling else 0.0,
        "per_class": {name: value and round(value, 4) for name, value in found["per_class"].items()},
    }
