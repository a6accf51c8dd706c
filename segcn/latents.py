"""The cache of everything frozen: VAE moments and masks of K augmented draws a row, and text embeddings.

Encoding once instead of in every step follows EDM2 (Karras et al. 2024, arXiv:2312.02696): moments are stored, latents
are sampled from them just in time. The files are plain .npy, memory-mapped, filled by all processes and resumable.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from segcn import seeds
from segcn.balance import Stream
from segcn.checkpoint import write_text
from segcn.dataset import PairedDataset, to_control
from segcn.errors import UserError
from segcn.loss import valid_cells
from segcn.models import Base, encode_moments, encode_text
from segcn.progress import Progress

COMPLETE = "complete.json"
LAYOUT = 2  # of the files; another number makes other folders
BATCH = 16  # pictures encoded at once


class LatentCache:
    """Memory-mapped arrays of a data set's draws; `open` it after `build`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.moments = np.load(folder / "moments.npy", mmap_mode="r")  # float16 [K,N,2C,h,w]
        self.masks = np.load(folder / "masks.npy", mmap_mode="r")  # uint8 [K,N,R,R], class ids
        self.frames = np.load(folder / "frames.npy", mmap_mode="r")  # uint8 [K,N,R*R/8], packed valid pixels
        self.text = np.load(folder / "text.npy", mmap_mode="r")  # float16 [M,L,D], one for each of captions.json
        hashes = np.array([seeds.seed_of(caption) for caption in json.loads((folder / "captions.json").read_text())])
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]  # 16 bytes a caption stay in memory, not the captions

    def __reduce__(self):
        return LatentCache, (self.folder,)  # a process that reads data opens the files itself

    def text_of(self, caption: str) -> np.ndarray:
        """float16 [L,D]; KeyError for a caption that was not embedded."""
        key = seeds.seed_of(caption)
        place = np.searchsorted(self._hashes, key)
        if place == len(self._hashes) or self._hashes[place] != key:
            raise KeyError(caption)
        return self.text[self._order[place]]


class Examples(Dataset):
    """What a training step needs of (visit, row): moments or image, control, valid cells, text, noise, timestep.

    The visits of a row are numbered from 0; without class balance its visit in each epoch is the epoch.
    """

    def __init__(self, dataset: PairedDataset, cache: LatentCache | None, factor: int, latent_shape, settings):
        self.dataset = dataset
        self.cache = cache
        self.factor = factor
        self.latent_shape = latent_shape  # (C,h,w)
        self.settings = settings  # seed, empty_prompts (share), timesteps (number of), draws (K)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | str | int]:
        visit, row = key
        seed = self.settings["seed"]
        dropped = seeds.uniform("caption drop", seed, visit, row) < self.settings["empty_prompts"]
        example = self._uncached(row, visit, dropped) if self.cache is None else self._cached(row, visit, dropped)
        return example | {
            "posterior": seeds.normal(self.latent_shape, "posterior", seed, visit, row),
            "noise": seeds.normal(self.latent_shape, "noise", seed, visit, row),
            "timestep": seeds.integer(self.settings["timesteps"], "timestep", seed, visit, row),
            "row": row,
        }

    def _uncached(self, row: int, visit: int, dropped: bool) -> dict:
        sample = self.dataset.sample(row, visit)
        cells = valid_cells(sample.valid[None], self.factor)[0]
        caption = "" if dropped else sample.caption
        return {"image": sample.image, "control": sample.control, "cells": cells, "caption": caption}

    def _cached(self, row: int, visit: int, dropped: bool) -> dict:
        cache, draw = self.cache, visit % self.settings["draws"]
        side = self.dataset.resolution
        valid = torch.from_numpy(np.unpackbits(cache.frames[draw, row], count=side * side)).bool().view(side, side)
        caption = "" if dropped else self.dataset.caption(row, visit, self.dataset.draw(row, draw).flip)
        return {
            "moments": torch.from_numpy(cache.moments[draw, row].astype(np.float32)),
            "control": to_control(np.array(cache.masks[draw, row]), self.dataset.split.palette) * valid,
            "cells": valid_cells(valid[None], self.factor)[0],
            "text": torch.from_numpy(cache.text_of(caption).astype(np.float32)),
        }


def cache_key(dataset: PairedDataset, base_fingerprint: str, draws: int) -> str:
    """16 hexadecimal digits that change with data, augmentation, seed, resolution, fit, base or K."""
    parts = [
        LAYOUT,
        dataset.split.fingerprint,
        len(dataset),
        asdict(dataset.augment),
        dataset.seed,
        dataset.resolution,
        dataset.fit,
    ]
    return hashlib.sha256(json.dumps([*parts, base_fingerprint, draws]).encode()).hexdigest()[:16]


def cache_bytes(rows: int, draws: int, latent_shape, resolution: int) -> int:
    """Disk space of the draws of a data set, text not counted."""
    channels, height, width = latent_shape
    return rows * draws * (2 * 2 * channels * height * width + resolution**2 + resolution**2 // 8)


def build(
    folder: Path, dataset: PairedDataset, base: Base, draws: int, latent_shape, accelerator, log: Callable
) -> LatentCache:
    """Fill the cache in `folder`, each process its share of the rows; picks up where a killed build stopped."""
    if (folder / COMPLETE).is_file():
        log(f"Reusing the latent cache {folder}.")
        return LatentCache(folder)
    size = cache_bytes(len(dataset), draws, latent_shape, dataset.resolution)
    log(f"Encoding {draws} draws of {len(dataset)} rows once: {size / 2**20:.0f} MiB in {folder}.")
    if accelerator.is_main_process:
        _allocate(folder, len(dataset), draws, latent_shape, dataset.resolution)
        _write_text_embeddings(folder, dataset, base)
    accelerator.wait_for_everyone()
    _fill(folder, dataset, base, draws, accelerator, log)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(folder / COMPLETE, json.dumps({"rows": len(dataset), "draws": draws}))
    accelerator.wait_for_everyone()
    return LatentCache(folder)


def _allocate(folder: Path, rows: int, draws: int, latent_shape, resolution: int) -> None:
    """Make the files, unless an unfinished build left them."""
    folder.mkdir(parents=True, exist_ok=True)
    channels, height, width = latent_shape
    shapes = {
        "moments": (np.float16, (draws, rows, 2 * channels, height, width)),
        "masks": (np.uint8, (draws, rows, resolution, resolution)),
        "frames": (np.uint8, (draws, rows, -(-(resolution**2) // 8))),
        "done": (np.uint8, (draws, rows)),  # last: it says which of the others are filled
    }
    for name, (dtype, shape) in shapes.items():
        if not (folder / "done.npy").is_file():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()


def _write_text_embeddings(folder: Path, dataset: PairedDataset, base: Base) -> None:
    """captions.json, the empty one first, and text.npy, 64 of them at a time: it may be larger than the memory."""
    if (folder / "text.npy").is_file():
        return
    captions = list(dict.fromkeys(["", *dataset.captions()]))
    write_text(folder / "captions.json", json.dumps(captions, indent=0))
    aside, text = folder / "text.staged.npy", None
    for first in range(0, len(captions), 64):
        embedded = encode_text(base, captions[first : first + 64]).cpu().half().numpy()
        if text is None:
            text = np.lib.format.open_memmap(aside, "w+", np.float16, (len(captions), *embedded.shape[1:]))
        text[first : first + len(embedded)] = embedded
    text.flush()
    os.replace(aside, folder / "text.npy")


def _fill(folder: Path, dataset: PairedDataset, base: Base, draws: int, accelerator, log: Callable) -> None:
    """Encode what is not done yet of this process's share."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("moments", "masks", "frames", "done")}
    rank, world = accelerator.process_index, accelerator.num_processes
    keys = [(d, r) for d in range(draws) for r in range(rank, len(dataset), world) if not arrays["done"][d, r]]
    told = Progress("encoded", len(keys), log)
    for first in range(0, len(keys), BATCH):
        chunk = keys[first : first + BATCH]
        samples = [dataset.sample(row, draw) for draw, row in chunk]
        moments = encode_moments(base.vae, torch.stack([sample.image for sample in samples])).cpu()
        for (draw, row), sample, moment in zip(chunk, samples, moments, strict=True):
            arrays["moments"][draw, row] = moment.to(torch.float16).numpy()
            arrays["masks"][draw, row] = sample.mask.numpy()
            arrays["frames"][draw, row] = np.packbits(sample.valid.numpy())
        for name in ("moments", "masks", "frames"):
            arrays[name].flush()
        for draw, row in chunk:
            arrays["done"][draw, row] = 1
        told(first + len(chunk))
    for array in arrays.values():
        array.flush()


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
