"""What a training step needs of each sample, and which samples each step sees."""

import numpy as np
import torch
from torch.utils.data import Dataset

from segcn import seeds
from segcn.bad_samples import first_good
from segcn.balance import Stream
from segcn.class_weights import cell_weights
from segcn.dataset import PairedDataset, to_control
from segcn.errors import UserError
from segcn.latent_files import LatentCache
from segcn.loss import valid_cells

DEFAULTS = {
    "empty_prompts": 0.0,  # share of captions replaced by the empty one
    "empty_controls": 0.0,  # share of controls replaced by black
    "class_weights": None,  # float32 [256] by class id; none: no weights
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
        if seeds.uniform("control drop", seed, visit, row) < settings["empty_controls"]:
            example["control"] = torch.zeros_like(example["control"])
        if settings["class_weights"] is not None:
            example["weights"] = cell_weights(mask, settings["class_weights"], self.factor)
        return example | {
            "posterior": seeds.normal(self.latent_shape, "posterior", seed, visit, row),
            "noise": seeds.normal(self.latent_shape, "noise", seed, visit, row),
            "timestep": seeds.integer(settings["timesteps"], "timestep", seed, visit, row),
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
        dropped = seeds.uniform("caption drop", self.settings["seed"], visit, row) < self.settings["empty_prompts"]
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
