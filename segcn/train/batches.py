"""What a training step needs of each sample, and which samples each step sees."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Dataset

from segcn.data import sampler
from segcn.data.dataset import PairedDataset, to_control
from segcn.data.metadata import Split
from segcn.data.sampler import Stream, cell_weights, class_weights
from segcn.data.transforms import AugmentConfig
from segcn.models.base import Base
from segcn.train import latent_cache
from segcn.train.config import TrainConfig
from segcn.train.latent_cache import (
    BadRows,
    LatentCache,
    cache_folder,
    cache_root,
    first_good,
    overlook_bad,
    parse_limit,
)
from segcn.train.log import Log
from segcn.train.loss import valid_cells
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.paths import RUN_FILE

# --- examples: What a training step needs of each sample, and which samples each step sees.

DEFAULTS = {
    "empty_prompts": 0.0,  # share of captions replaced by the empty one
    "empty_controls": 0.0,  # share of controls replaced by black
    "class_weights": None,  # float32 [K] by class id; none: no weights
    "bad_limit": 0,  # bad rows one after another that another row may stand in for
}


class Examples(Dataset):
    """What a training step needs of (visit, row): moments or image, control, valid cells, text, noise, timestep.

    The visits of a row are numbered from 0; without class balance its visit in each epoch is the epoch. `row` is the
    one that is shown; if it stands in for a bad one, that is `bad_row`, else -1.
    """

    def __init__(self, dataset: PairedDataset, cache: LatentCache | None, factor: int, latent_shape, settings: dict):
        self.dataset = dataset
        self.cache = cache
        self.factor = factor
        self.latent_shape = latent_shape  # (C,h,w)
        self.settings = DEFAULTS | settings  # and seed, timesteps (number of)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | str | int]:
        visit, row = key
        seed, settings = self.settings["seed"], self.settings
        example, mask = self._uncached(visit, row) if self.cache is None else self._cached(self.cache, visit, row)
        if rng.uniform("control drop", seed, visit, row) < settings["empty_controls"]:
            example["control"] = torch.zeros_like(example["control"])
        if settings["class_weights"] is not None:
            example["weights"] = cell_weights(mask, settings["class_weights"], self.factor)
        return example | {
            "posterior": rng.normal(self.latent_shape, "posterior", seed, visit, row),
            "noise": rng.normal(self.latent_shape, "noise", seed, visit, row),
            "timestep": rng.integer(settings["timesteps"], "timestep", seed, visit, row),
            "bad_row": -1 if example["row"] == row else row,
        }

    def _uncached(self, visit: int, row: int) -> tuple[dict, torch.Tensor]:
        """The example so far, and its class ids, uint8 [R,R]."""

        def read(row: int):
            return self.dataset.sample(row, visit)

        sample, used = first_good(read, row, len(self), self.settings["bad_limit"])
        example = {"image": sample.image, "control": sample.control, "caption": self._told(visit, row, sample.caption)}
        return example | {"cells": valid_cells(sample.valid[None], self.factor)[0], "row": used}, sample.mask

    def _cached(self, cache: LatentCache, visit: int, row: int) -> tuple[dict, torch.Tensor]:
        draw, side = visit % cache.draws, self.dataset.resolution
        used = cache.good(row)
        entry = cache.entry(draw, used)
        mask = torch.from_numpy(np.array(entry["mask"]))
        valid = torch.from_numpy(np.unpackbits(entry["frame"], count=side * side)).bool().view(side, side)
        caption = self.dataset.caption(used, visit, self.dataset.draw(used, draw).flip)
        return {
            "moments": torch.from_numpy(entry["moments"].astype(np.float32)),
            "control": to_control(mask, self.dataset.split.palette) * valid,
            "cells": valid_cells(valid[None], self.factor)[0],
            "text": torch.from_numpy(cache.text_of(self._told(visit, row, caption)).astype(np.float32)),
            "row": used,
        }, mask

    def _told(self, visit: int, row: int, caption: str) -> str:
        """The caption, or the empty one where it is dropped."""
        dropped = rng.uniform("caption drop", self.settings["seed"], visit, row) < self.settings["empty_prompts"]
        return "" if dropped else caption


class Plan:
    """Batches of (visit, row) keys for one process from an optimizer step on: a batch sampler.

    Micro-batch a of step t on process r takes positions ((t A + a) W + r) B to + B of the stream of rows.
    """

    def __init__(
        self, rows: int, seed: int, start: int, stop: int, accumulate: int, batch: int, rank=0, world=1, repeats=None
    ):
        if rows < 1:
            raise UserError("the data set has no rows")
        self.stream, self.micro = Stream(rows, seed, repeats), range(start * accumulate, stop * accumulate)
        self.batch, self.rank, self.world = batch, rank, world

    def __len__(self) -> int:
        return len(self.micro)

    def __iter__(self):
        for micro in self.micro:
            first = (micro * self.world + self.rank) * self.batch
            yield [self.stream[first + i] for i in range(self.batch)]


# --- feed: What feeds a training: its data set, the latent cache and how many draws it holds, the examples, the bad rows.


def make_dataset(config: TrainConfig, split: Split, base: Base) -> PairedDataset:
    """The rows, augmented, at a resolution that the base can encode."""
    if config.resolution % base.latent_factor:
        raise UserError(f"--resolution: expected a multiple of {base.latent_factor}, found {config.resolution}")
    return PairedDataset(split, config.resolution, AugmentConfig.parse(config.augment), config.seed, config.fit)


def overlook_bad_rows(config: TrainConfig, split: Split) -> None:
    """Under --on_bad_sample skip:N a run goes on although files of some rows went bad since it began."""
    run = Path(config.output_dir) / RUN_FILE
    recorded = json.loads(run.read_text()).get("data_fingerprint") if run.is_file() else None
    if recorded:
        overlook_bad(split, recorded, cache_root(config), parse_limit(config.on_bad_sample))


def settle_draws(config: TrainConfig, dataset: PairedDataset, base: Base, accelerator, log: Log) -> TrainConfig:
    """The config with the number of draws resolved; a run that goes on keeps the number that it began with."""
    if config.cache == "none":
        return config
    folder, layout = cache_folder(config, dataset, base), latent_cache.layout_of(dataset, base)
    run, asked = Path(config.output_dir) / RUN_FILE, config.cache_draws
    if run.is_file() and asked is None:
        asked = json.loads(run.read_text()).get("cache_draws")
    assert config.max_train_steps is not None
    seen = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
    visits, captions = seen * accelerator.num_processes / len(dataset), len(latent_cache.captions_of(dataset))
    found = [0]
    if accelerator.is_main_process:
        found[0] = latent_cache.resolve_draws(
            1 if dataset.augment.still else asked,
            visits,
            layout.draw_bytes,
            layout.text_bytes(captions),
            config.cache_budget_gb * 1e9,
            latent_cache.free_bytes(folder),
            latent_cache.standing_bytes(folder),
        )
    count = broadcast_object_list(found)[0]
    log.say(latent_cache.announce(layout, captions, count, visits, config.max_train_steps, folder))
    return dataclasses.replace(config, cache_draws=count)


def make_examples(config: TrainConfig, dataset: PairedDataset, base: Base, accelerator, log: Log) -> Examples:
    """The source of training examples; with the cache, both encoders leave memory, unless the run paints with them."""
    cache, limit = None, parse_limit(config.on_bad_sample)
    if config.cache == "latents":
        assert config.cache_draws is not None
        folder = cache_folder(config, dataset, base)
        cache = latent_cache.build(folder, dataset, base, config.cache_draws, accelerator, log.say, limit)
    paints = config.validation_image or config.faithfulness_rows
    if cache is not None and not paints:
        base.vae = base.text_encoder = None
    settings = {
        "seed": config.seed,
        "empty_prompts": config.proportion_empty_prompts,
        "empty_controls": config.proportion_empty_controls,
        "timesteps": base.scheduler.config.num_train_timesteps,
        "class_weights": make_class_weights(config, dataset.split, accelerator),
        "bad_limit": limit,
    }
    side = config.resolution // base.latent_factor
    return Examples(dataset, cache, base.latent_factor, (base.unet.config.in_channels, side, side), settings)


def make_bad_rows(examples: Examples, output_dir: Path, accelerator, log: Log) -> BadRows:
    """The bad rows of this run, those of its cache among them."""
    bad = BadRows(output_dir, examples.settings["bad_limit"], examples.dataset, accelerator, log.say)
    bad.add(examples.cache.bad if examples.cache is not None else {})
    return bad


def make_class_weights(config: TrainConfig, split: Split, accelerator) -> torch.Tensor | None:
    """The weight of each class in the loss, for --class_weighting."""
    if not config.class_weighting:
        return None
    return class_weights(sampler.read_class_pixels(split, cache_root(config), accelerator), config.class_weighting)
