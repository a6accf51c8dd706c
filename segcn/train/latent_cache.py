"""The cache of everything frozen: VAE moments and masks of K augmented draws of each row, and text embeddings.

Encoding once instead of in every step follows EDM2 (Karras et al. 2024, arXiv:2312.02696): moments are stored, latents
are sampled from them just in time. The files are plain .npy, memory-mapped, and each appears when it is complete: a
killed build resumes with the missing ones, more draws are added to those that exist, and two runs that build the same
cache at once write the same files."""

import dataclasses
import hashlib
import inspect
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from segcn.data.captions import cut_captions
from segcn.data.dataset import PairedDataset, Sample, in_batches
from segcn.models.base import Base, encode_moments, encode_text, weights_digest
from segcn.train.config import TrainConfig
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.io import Process, write_whole
from segcn.utils.paths import OUTPUTS, RUN_FILE
from segcn.utils.progress import Progress

CACHE_VERSION = 3  # of the files; another number makes other folders
ENCODED_AT_ONCE = 16  # images of 256 px or smaller; of larger ones as many as take the same memory
BLOCK_ROWS = 8, 256  # of one file: at least, at most
BLOCK_BYTES = 2**26  # of one file, at most; it is put together in memory
CAPTIONS = 256  # of one file
OPEN_FILES = 256  # at once: most systems allow a process 1024
SPARE = 10**9  # bytes of the disk that stay free
SHAPES, TEXTS = "layout.json", "captions.json"
BAD_ROWS = ".bad.json"  # ends the name of the file beside a file of draws


class Block(NamedTuple):
    """A file of the cache: consecutive rows of a draw, or consecutive captions."""

    path: Path
    dtype: np.dtype  # of an entry
    places: range
    draw: int = 0


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The shapes of a cache, and so its files."""

    rows: int
    latent_shape: tuple[int, int, int]  # (C,h,w)
    resolution: int
    text_shape: tuple[int, int]  # (L,D) of one caption
    sized: bool = False  # whether it keeps the sizes of the originals, which some bases read

    @property
    def entry(self) -> np.dtype:
        """One draw of one row: moments, class ids, which pixels are in frame, packed; the original's height, width."""
        (channels, height, width), side = self.latent_shape, self.resolution
        moments, frame = (2 * channels, height, width), (-(-side * side // 8),)
        parts = [("moments", "f2", moments), ("mask", "u1", (side, side)), ("frame", "u1", frame)]
        return np.dtype([*parts, *([("size", "u4", (2,))] if self.sized else [])])

    @property
    def embedding(self) -> np.dtype:
        """The text embedding of one caption."""
        return np.dtype((np.float16, self.text_shape))

    @property
    def draw_bytes(self) -> int:
        """Disk space of one draw of all rows."""
        return self.rows * self.entry.itemsize

    @property
    def block_rows(self) -> int:
        """Rows of one file: a kill costs a process at most a 64th of a draw, or a few seconds."""
        least, most = BLOCK_ROWS
        return max(1, min(max(least, self.rows // 64), most, BLOCK_BYTES // self.entry.itemsize))

    def draw_blocks(self, folder: Path, draws: int) -> list[Block]:
        """The files of the first `draws` draws."""
        entry, pairs = self.entry, product(range(draws), pieces(self.rows, self.block_rows))
        return [Block(folder / f"draw{draw:04}-row{rows.start:08}.npy", entry, rows, draw) for draw, rows in pairs]

    def text_blocks(self, texts: Path, captions: int) -> list[Block]:
        """The files of the embeddings of so many captions, beside the file that lists them."""
        parts, name = pieces(captions, CAPTIONS), texts.stem.replace("captions", "text")
        return [Block(texts.with_name(f"{name}{part.start:08}.npy"), self.embedding, part) for part in parts]


def pieces(count: int, size: int) -> list[range]:
    """The numbers below `count`, `size` at a time."""
    return [range(count)[first : first + size] for first in range(0, count, size)]


class LatentCache:
    """The memory-mapped files of a cache that `build` made; UserError names one that is missing or damaged."""

    def __init__(self, folder: Path, draws: int, texts: str = TEXTS):
        self.folder, self.draws, self.texts = folder, draws, texts
        found = read_json(folder / SHAPES)
        shapes = tuple(found["latent_shape"]), found["resolution"], tuple(found["text_shape"])
        self.layout = CacheLayout(found["rows"], *shapes, found.get("sized", False))
        captions = read_json(folder / texts)
        self._draws = self.layout.draw_blocks(folder, draws)
        self._text = self.layout.text_blocks(folder / texts, len(captions))
        for block in [*self._draws, *self._text]:
            open_block(block)
        self._open = lru_cache(OPEN_FILES)(open_block)
        hashes = np.array([rng.seed_of(caption) for caption in captions])
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]  # 16 bytes a caption stay in memory, not the captions
        self.bad = read_bad_rows(folder, self.layout, draws)  # rows that could not be read, and why

    def __reduce__(self):
        return LatentCache, (self.folder, self.draws, self.texts)  # a process that reads data opens the files itself

    def entry(self, draw: int, row: int) -> np.void:
        """moments float16 [2C,h,w], mask uint8 [R,R] and frame uint8 [R*R/8], packed, of a draw of a row; its size.

        With buckets each begins with the h x w cells, or H x W pixels, of the row's own shape, which has no more.
        """
        block, place = divmod(row, self.layout.block_rows)
        return self._open(self._draws[draw * (len(self._draws) // self.draws) + block])[place]

    def good(self, row: int, shapes: np.ndarray) -> int:
        """The row itself, or the next one of its shape that could be read; UserError where there is none.

        shapes: int [N, 2], of each row.
        """
        if row not in self.bad:
            return row
        alike = np.flatnonzero((shapes == shapes[row]).all(1)).tolist()
        after = [*(other for other in alike if other > row), *alike]
        if (found := next((other for other in after if other not in self.bad), None)) is None:
            raise UserError(f"{self.bad[row]}\nNo other row has its shape, {shapes[row].tolist()}, and can be read.")
        return found

    def text_of(self, caption: str) -> np.ndarray:
        """float16 [L,D]; KeyError for a caption that was not embedded."""
        key = rng.seed_of(caption)
        found = np.searchsorted(self._hashes, key)
        if found == len(self._hashes) or self._hashes[found] != key:
            raise KeyError(caption)
        block, place = divmod(int(self._order[found]), CAPTIONS)
        return self._open(self._text[block])[place]


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise damaged(path, "JSON", error) from None


def open_block(block: Block) -> np.ndarray:
    """The file, memory-mapped; UserError where it is missing, cut off or of other shapes."""
    try:
        array = np.load(block.path, mmap_mode="r")
        if (array.dtype, array.shape) != (block.dtype.base, (len(block.places), *block.dtype.shape)):
            raise ValueError(f"{array.dtype} {array.shape}")
    except Exception as error:  # the header of a damaged file may raise anything
        raise damaged(block.path, f"{len(block.places)} entries", error) from None
    return array


def damaged(path: Path, expected: str, error: Exception) -> UserError:
    """What to raise for a file of the cache that cannot be used."""
    if not path.exists():
        return UserError(
            f"{path}: expected a file of the latent cache, found none; all processes must see the same --cache_dir."
            " Rerun the same command to write it."
        )
    return UserError(
        f"{path}: expected {expected}, found a damaged file of the latent cache ({error}); remove it, rm {path},"
        " and rerun the same command: it is written again."
    )


def cache_root(config: TrainConfig) -> Path:
    """The folder of what is computed once for all runs."""
    return Path(config.cache_dir) if config.cache_dir else OUTPUTS / "cache"


def cache_folder(config: TrainConfig, dataset: PairedDataset, base: Base) -> Path:
    """The folder of this data set's latent cache under this base."""
    return cache_root(config) / cache_key(dataset, encoders_fingerprint(base))


def cache_key(dataset: PairedDataset, encoders: str) -> str:
    """16 hexadecimal digits that change with data, augmentation, seed, resolution, fit or encoders, not with K."""
    settings = [dataclasses.asdict(dataset.augment), dataset.seed, dataset.resolution, dataset.fit]
    own = [source_digest(dataset.function)] if dataset.function else []
    parts = [CACHE_VERSION, dataset.split.fingerprint, len(dataset), *settings, encoders, *own]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def source_digest(function: Callable) -> str:
    """16 hexadecimal digits that change with the source of a function."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # an object, such as a transform of torchvision
        source = repr(function)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def encoders_fingerprint(base: Base) -> str:
    """Changes with the base, the weights and precision of its two encoders, and its tokenizer."""
    assert base.vae is not None and base.text_encoder is not None
    vocabulary = hashlib.sha256(json.dumps(sorted(base.tokenizer.get_vocab().items())).encode()).hexdigest()
    parts = [f"{weights_digest(part)} {part.dtype}" for part in (base.vae, base.text_encoder)]
    return " ".join([base.fingerprint, *parts, vocabulary])


def layout_of(dataset: PairedDataset, base: Base) -> CacheLayout:
    """The shapes of the cache of a data set under a base."""
    side = dataset.resolution // base.latent_factor
    latents = base.latent_channels, side, side
    return CacheLayout(len(dataset), latents, dataset.resolution, base.text_shape, base.reads_sizes)


def cached_captions(dataset: PairedDataset, class_dropout: bool = False) -> list[str]:
    """What is embedded: the empty caption, and every one that a sample may have, also cut."""
    captions = list(dataset.captions())
    cut = (text for caption in captions if class_dropout for text in cut_captions(caption, dataset.split.palette))
    return list(dict.fromkeys(["", *captions, *cut]))


def settle_draws(config: TrainConfig, dataset: PairedDataset, base: Base, accelerator, log) -> TrainConfig:
    """The config with the number of draws resolved; a resumed run keeps the number that it began with."""
    if config.cache == "none":
        return config
    folder, layout = cache_folder(config, dataset, base), layout_of(dataset, base)
    run, requested = Path(config.output_dir) / RUN_FILE, config.cache_draws
    if run.is_file() and requested is None:
        requested = json.loads(run.read_text()).get("cache_draws")
    assert config.max_train_steps is not None
    seen = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
    visits = seen * accelerator.num_processes / len(dataset)
    texts = len(cached_captions(dataset, config.caption_class_dropout > 0)) * layout.embedding.itemsize  # bytes
    found = [0]
    if accelerator.is_main_process:
        requested, budget = 1 if dataset.still else requested, config.cache_budget_gb * 1e9
        there = sum(path.stat().st_size for path in folder.glob("*.npy"))
        found[0] = resolve_draws(requested, visits, layout.draw_bytes, texts, budget, free_bytes(folder), there)
    draws = broadcast_object_list(found)[0]
    log.say(
        f"{draws} draw(s) of each row are cached in {folder}: {_gb(draws * layout.draw_bytes)}, and {_gb(texts)} of"
        f" text; each draw is seen {visits / draws:.1f} times in {config.max_train_steps} steps; --cache none draws"
        " again each time."
    )
    return dataclasses.replace(config, cache_draws=draws)


def resolve_draws(
    requested: int | None, visits: float, draw_bytes: int, text_bytes: int, budget: float, free: int, there: int = 0
) -> int:
    """The number of draws K: as requested, else as many as the budget holds, and no more than each row has visits.

    draw_bytes: of one draw of all rows; budget: bytes for the draws; free: bytes on the disk; there: bytes of this
    cache that exist already. UserError where they do not fit, or not even one.
    """
    if requested is not None and requested < 1:
        raise UserError(f"--cache_draws: expected 1 or more, found {requested}")
    space = there + max(0, free - SPARE) - text_bytes
    fits = int((space if requested else min(space, budget)) // draw_bytes)
    draws = requested or max(1, min(fits, math.ceil(visits)))
    if draws > fits:
        raise UserError(
            f"the latent cache needs {_gb(draws * draw_bytes)} for {draws} draw(s) of all rows, and {_gb(text_bytes)}"
            f" for text; found a budget of {_gb(budget)} for draws, and {_gb(max(0, free - SPARE) + there)} of disk;"
            " give more by --cache_budget_gb, another disk by --cache_dir, or encode in every step by --cache none"
        )
    return draws


def free_bytes(folder: Path) -> int:
    """Free space of the disk on which a folder is or will be."""
    return shutil.disk_usage(next(path for path in [folder, *folder.absolute().parents] if path.exists())).free


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def build(
    folder: Path,
    dataset: PairedDataset,
    base: Base,
    draws: int,
    accelerator,
    log: Callable,
    bad_limit: int = 0,
    class_dropout: bool = False,
) -> LatentCache:
    """Write the files that are missing, each process its share; all processes must see `folder`.

    bad_limit: rows that may be unreadable: they are marked, and the next good rows are used instead. class_dropout:
    embed each caption without its classes, too. UserError where more rows are bad, or the disk does not take the files.
    """
    layout, captions = layout_of(dataset, base), cached_captions(dataset, class_dropout)
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:8]  # the palette's words may change
    texts = folder / (f"captions-{digest}-.json" if class_dropout else TEXTS)
    draw_blocks, text_blocks = layout.draw_blocks(folder, draws), layout.text_blocks(texts, len(captions))
    existing = [block for block in [*draw_blocks, *text_blocks] if block.path.exists()]
    for block in existing:
        open_block(block)  # one that is damaged is named before hours of encoding
    missing = len(draw_blocks) + len(text_blocks) - len(existing)
    log(f"Encoding {missing} missing files of the latent cache." if missing else f"Reusing the latent cache {folder}.")
    check_bad_rows(read_bad_rows(folder, layout, draws), bad_limit, layout.rows, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for leftover in folder.glob(".*"):  # of a killed build, an hour old, so that nobody can be writing it
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    leftover.unlink()
        shapes = {name: value for name, value in dataclasses.asdict(layout).items() if value is not False}
        write_file(folder / SHAPES, json.dumps(shapes))
        write_file(texts, json.dumps(captions, indent=0))
    process = Process(accelerator.process_index, accelerator.num_processes)
    write_text_blocks(_missing_share(text_blocks, process), captions, base)
    write_draw_blocks(_missing_share(draw_blocks, process), dataset, base, log, bad_limit)
    accelerator.wait_for_everyone()
    cache = LatentCache(folder, draws, texts.name)
    check_bad_rows(cache.bad, bad_limit, layout.rows, folder)
    for row, why in sorted(cache.bad.items()):
        log(f"Bad row {row}, the next good one is used instead: {why}")
    return cache


def _missing_share(blocks: list[Block], process: Process) -> list[Block]:
    """Those of this process that are missing; which are its own does not depend on what exists."""
    return [blocks[place] for place in process.share(len(blocks)) if not blocks[place].path.exists()]


def write_file(path: Path, content: np.ndarray | str) -> None:
    """Write an array or a text completely, on the disk before it has its name; UserError where that fails."""
    try:
        if isinstance(content, str):
            write_whole(path, lambda aside: aside.write_text(content))
        else:
            write_whole(path, lambda aside: np.save(aside, content))
    except UserError as error:
        raise UserError(
            f"{error} The latent cache can be in another folder by --cache_dir, smaller by --cache_draws, or left out"
            " by --cache none."
        ) from None


def write_text_blocks(blocks: list[Block], captions: list[str], base: Base) -> None:
    """Embed the captions of these files, 64 at a time."""
    for path, dtype, places, _ in blocks:
        array = np.empty(len(places), dtype)
        for first in range(0, len(places), 64):
            some = [captions[place] for place in places[first : first + 64]]
            array[first : first + 64] = encode_text(base, some).float().cpu().numpy()
        write_file(path, array)


def write_draw_blocks(blocks: list[Block], dataset: PairedDataset, base: Base, log: Callable, bad_limit: int) -> None:
    """Encode the draws of these files, while threads read what comes next."""
    keys = ((block.draw, row) for block in blocks for row in block.places)
    progress, done = Progress("encoded", sum(len(block.places) for block in blocks), log), 0
    bad: dict[int, str] = {}
    at_once = max(1, min(ENCODED_AT_ONCE, ENCODED_AT_ONCE * 256**2 // dataset.resolution**2))
    with closing(read_ahead(dataset, keys)) as samples:  # an error must not leave its threads to the garbage collector
        for path, dtype, rows, _ in blocks:
            array = np.zeros(len(rows), dtype)  # the entries of bad rows stay 0
            for first in range(0, len(rows), at_once):
                chunk = array[first : first + at_once]
                found = list(islice(samples, len(chunk)))
                bad |= {rows[first + n]: str(error) for n, error in enumerate(found) if isinstance(error, UserError)}
                check_bad_rows(bad, bad_limit, len(dataset) + 1)
                good = [(n, sample) for n, sample in enumerate(found) if isinstance(sample, Sample)]
                images = [sample.image for _, sample in good]
                for (n, sample), moment in zip(good, encoded(base, images), strict=True):
                    parts = {"moments": moment, "mask": sample.mask.numpy()}
                    for name, part in (parts | {"frame": np.packbits(sample.valid.numpy())}).items():
                        chunk[name][n].reshape(-1)[: part.size] = part.reshape(-1)
                    if "size" in (dtype.names or ()):
                        chunk["size"][n] = sample.original.shape[1:]
                done += len(chunk)
                progress(done)
            if bad.keys() & set(rows):  # written before the file of draws, which is then never without it
                write_file(path.with_suffix(BAD_ROWS), json.dumps({row: bad[row] for row in rows if row in bad}))
            write_file(path, array)


def encoded(base: Base, images: list[torch.Tensor]) -> list[np.ndarray]:
    """The moments of images, float32 [2C,h,w] each; those of one shape are encoded together."""
    return in_batches(
        images, lambda places: encode_moments(base.vae, torch.stack([images[p] for p in places])).float().cpu().numpy()
    )


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
            if len(waiting) > 2 * ENCODED_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def parse_limit(text: str) -> int:
    """How many rows may be bad when the cache is built: fail -> 0, skip:N -> N; UserError for another text."""
    kind, _, number = text.partition(":")
    if text == "fail":
        return 0
    if kind != "skip" or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise UserError(f"--on_bad_sample: expected fail, or skip:N with a whole number N from 1, found {text!r}")
    return int(number)


def read_bad_rows(folder: Path, layout: CacheLayout, draws: int) -> dict[int, str]:
    """The rows that could not be read when the cache was built, and why."""
    paths = (block.path.with_suffix(BAD_ROWS) for block in layout.draw_blocks(folder, draws))
    return {int(row): why for path in paths if path.is_file() for row, why in read_json(path).items()}


def check_bad_rows(bad: dict[int, str], limit: int, rows: int, built: Path | None = None) -> None:
    """UserError where more rows are bad than the limit, or all of them; built: a cache that was built without them."""
    if len(bad) <= limit and len(bad) < rows:
        return
    listed = "\n  ".join(bad.values())
    if limit:
        raise UserError(
            f"--on_bad_sample skip:{limit}: expected at most {limit} bad rows, found {len(bad)}:\n  {listed}"
        )
    skip = f"--on_bad_sample skip:{len(bad)} trains without such rows"
    if built:
        raise UserError(
            f"{built}: expected every row, found {len(bad)} that could not be read when it was built:\n  {listed}\n"
            f"{skip}; or fix the files and rm -r {built}"
        )
    raise UserError(f"{listed}\nThe file was good when it was checked. Fix it; or {skip}.")
