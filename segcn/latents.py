"""Build the cache of everything frozen: VAE moments and masks of K augmented draws a row, and text embeddings.

Encoding once instead of in every step follows EDM2 (Karras et al. 2024, arXiv:2312.02696): moments are stored, latents
are sampled from them just in time. A killed build goes on with the files that are missing, more draws are added to
those that stand, and two runs that build the same cache at once write the same files.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from segcn.bad_samples import too_many
from segcn.dataset import PairedDataset, Sample
from segcn.errors import UserError
from segcn.latent_files import LAYOUT, TEXTS, LatentCache, Layout, appear, mark_path, open_block, read_marks, sweep
from segcn.models import Base, encode_moments, encode_text, weights_digest
from segcn.progress import Progress

VERSION = 3  # of the files; another number makes other folders
BATCH = 16  # pictures of 256 px, or smaller ones, encoded at once; of larger ones as many as take the same memory


def layout_of(dataset: PairedDataset, base: Base) -> Layout:
    """The shapes of the cache of a data set under a base."""
    side = dataset.resolution // base.latent_factor
    assert base.text_encoder is not None
    text_shape = base.tokenizer.model_max_length, base.text_encoder.config.hidden_size
    return Layout(len(dataset), (base.unet.config.in_channels, side, side), dataset.resolution, text_shape)


def cache_key(dataset: PairedDataset, encoders: str) -> str:
    """16 hexadecimal digits that change with data, augmentation, seed, resolution, fit or encoders, not with K."""
    settings = [asdict(dataset.augment), dataset.seed, dataset.resolution, dataset.fit]
    parts = [VERSION, dataset.split.fingerprint, len(dataset), *settings, encoders]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def encoders_fingerprint(base: Base) -> str:
    """Changes with the base, the weights and precision of its two encoders, and its tokenizer."""
    assert base.vae is not None and base.text_encoder is not None
    vocabulary = hashlib.sha256(json.dumps(sorted(base.tokenizer.get_vocab().items())).encode()).hexdigest()
    parts = [f"{weights_digest(part)} {part.dtype}" for part in (base.vae, base.text_encoder)]
    return " ".join([base.fingerprint, *parts, vocabulary])


def captions_of(dataset: PairedDataset) -> list[str]:
    """What is embedded: the empty caption, and every one that a sample may have."""
    return list(dict.fromkeys(["", *dataset.captions()]))


def build(
    folder: Path, dataset: PairedDataset, base: Base, draws: int, accelerator, log: Callable, bad_limit: int = 0
) -> LatentCache:
    """Write the files that are missing, each process its share; all processes must see `folder`.

    bad_limit: rows that may be unreadable: they are marked, and other rows stand in for them. UserError where there are
    more of them, or the disk does not take the files.
    """
    layout, captions = layout_of(dataset, base), captions_of(dataset)
    missing = _missing(folder, layout, draws, len(captions))
    log(f"Encoding {missing} missing files of the latent cache." if missing else f"Reusing the latent cache {folder}.")
    _check_marks(read_marks(folder, layout, draws), bad_limit, folder, layout.rows)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sweep(folder)
        appear(folder / LAYOUT, lambda file: file.write(json.dumps(asdict(layout)).encode()))
        appear(folder / TEXTS, lambda file: file.write(json.dumps(captions, indent=0).encode()))
    _write_text(folder, layout, captions, base, accelerator)
    _write_draws(folder, layout, dataset, base, draws, accelerator, log, bad_limit)
    accelerator.wait_for_everyone()
    cache = LatentCache(folder, draws)
    _check_marks(cache.bad, bad_limit, folder, layout.rows)
    return cache


def _missing(folder: Path, layout: Layout, draws: int, captions: int) -> int:
    """How many files are missing; UserError for one that is damaged, before hours of encoding."""
    files = [(path, len(rows), layout.entry) for path, _, rows in layout.draws(folder, draws)]
    files += [(path, len(block), layout.embedding) for path, block in layout.text(folder, captions)]
    standing = [file for file in files if file[0].exists()]
    for path, count, dtype in standing:
        open_block(path, count, dtype)
    return len(files) - len(standing)


def _check_marks(marks: dict[int, str], limit: int, folder: Path, rows: int) -> None:
    if len(marks) == rows:
        raise UserError(too_many(marks.values(), limit))
    if marks and not limit:
        listed = "\n  ".join(marks.values())
        raise UserError(
            f"{folder}: expected every row, found {len(marks)} that could not be read when it was built:\n  {listed}\n"
            f"Go on without them by --on_bad_sample skip:{len(marks)}; or mend the files and rm -r {folder}"
        )
    if len(marks) > limit:
        raise UserError(too_many(marks.values(), limit))


def _write_text(folder: Path, layout: Layout, captions: list[str], base: Base, accelerator) -> None:
    """Embed this process's share of the captions, 64 at a time."""
    for path, block in _share(layout.text(folder, len(captions)), accelerator):
        array = np.empty(len(block), layout.embedding)
        for first in range(0, len(block), 64):
            told = captions[block.start : block.stop][first : first + 64]
            array[first : first + 64] = encode_text(base, told).float().cpu().numpy()
        appear(path, partial(np.save, arr=array))


def _write_draws(folder, layout: Layout, dataset, base: Base, draws: int, accelerator, log, bad_limit: int) -> None:
    """Encode this process's share of the draws, while threads read what comes next."""
    mine = _share(layout.draws(folder, draws), accelerator)
    keys = ((draw, row) for _, draw, rows in mine for row in rows)
    told, done = Progress("encoded", sum(len(rows) for _, _, rows in mine), log), 0
    bad: dict[int, str] = {}
    at_once = max(1, min(BATCH, BATCH * 256**2 // layout.resolution**2))
    with closing(read_ahead(dataset, keys)) as samples:  # an error must not leave its threads to the garbage collector
        for path, _, rows in mine:
            array = np.zeros(len(rows), layout.entry)
            marks: dict[int, str] = {}
            for first in range(0, len(rows), at_once):
                chunk = array[first : first + at_once]
                found = list(islice(samples, len(chunk)))
                marks |= {rows[first + i]: str(each) for i, each in enumerate(found) if isinstance(each, UserError)}
                _encode(chunk, found, base)
                bad |= marks
                if len(bad) > bad_limit:
                    raise UserError(too_many(bad.values(), bad_limit))
                done += len(chunk)
                told(done)
            if marks:  # before the file: a file that stands has its marks
                _write_marks(mark_path(path), marks)
            appear(path, partial(np.save, arr=array))


def _write_marks(path: Path, marks: dict[int, str]) -> None:
    appear(path, lambda file: file.write(json.dumps(marks).encode()))


def _encode(entries: np.ndarray, samples: list[Sample | UserError], base: Base) -> None:
    """Fill the entries of the samples; those of bad rows stay 0."""
    good = {place: sample for place, sample in enumerate(samples) if isinstance(sample, Sample)}
    if not good:
        return
    moments = encode_moments(base.vae, torch.stack([sample.image for sample in good.values()])).float().cpu()
    for (place, sample), moment in zip(good.items(), moments, strict=True):
        entries[place] = moment.numpy(), sample.mask.numpy(), np.packbits(sample.valid.numpy())


def read_ahead(dataset: PairedDataset, keys: Iterable[tuple[int, int]]) -> Generator[Sample | UserError]:
    """The samples of (draw, row) in order, or the error of a bad one; threads are two batches ahead."""

    def read(draw: int, row: int) -> Sample | UserError:
        try:
            return dataset.sample(row, draw)
        except UserError as error:
            return error

    waiting: deque = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for key in keys:
            waiting.append(pool.submit(read, *key))
            if len(waiting) > 2 * BATCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _share(files: Iterable[tuple], accelerator) -> list[tuple]:
    """Of (path, ...) those of this process that do not stand; whose they are does not depend on what stands."""
    mine = islice(files, accelerator.process_index, None, accelerator.num_processes)
    return [item for item in mine if not item[0].exists()]
