"""The files of a latent cache: one draw of a block of rows each, or the embeddings of a block of captions.

They are plain .npy, memory-mapped. Each is written aside and appears whole."""

import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import numpy as np
import torch

from segcn.data.dataset import PairedDataset, Sample
from segcn.data.metadata import Split, check_split, stamp
from segcn.models.base import Base, encode_moments, encode_text, weights_digest
from segcn.train.config import TrainConfig
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.io import write_text, write_whole
from segcn.utils.paths import OUTPUTS
from segcn.utils.progress import Progress

# --- latent_files: The files of a latent cache: one draw of a block of rows each, or the embeddings of a block of captions.
#
# They are plain .npy, memory-mapped. Each is written aside and appears whole.

BLOCK_ROWS = 8, 256  # of one file: at least, at most
BLOCK_BYTES = 2**26  # of one file, at most; it is put together in memory
CAPTIONS = 256  # of one file
OPEN_FILES = 256  # at once: most systems allow a process 1024
LAYOUT, TEXTS = "layout.json", "captions.json"


@dataclass(frozen=True)
class Layout:
    """The shapes of a cache, and so its files."""

    rows: int
    latent_shape: tuple[int, int, int]  # (C,h,w)
    resolution: int
    text_shape: tuple[int, int]  # (L,D) of one caption

    @property
    def entry(self) -> np.dtype:
        """One draw of one row: moments, class ids, and which pixels are in frame, packed."""
        (channels, height, width), side = self.latent_shape, self.resolution
        frame = ("frame", np.uint8, (-(-side * side // 8),))
        return np.dtype(
            [("moments", np.float16, (2 * channels, height, width)), ("mask", np.uint8, (side, side)), frame]
        )

    @property
    def draw_bytes(self) -> int:
        """Disk space of one draw of all rows."""
        return self.rows * self.entry.itemsize

    def text_bytes(self, captions: int) -> int:
        """Disk space of the embeddings."""
        return captions * self.embedding.itemsize

    @property
    def block(self) -> int:
        """Rows of one file: a kill costs a process at most a 64th of a draw, or a few seconds."""
        least, most = BLOCK_ROWS
        return max(1, min(max(least, self.rows // 64), most, BLOCK_BYTES // self.entry.itemsize))

    def draws(self, folder: Path, draws: int) -> Iterator[tuple[Path, int, range]]:
        """The file, the draw and the rows of each block."""
        for draw in range(draws):
            for rows in _blocks(self.rows, self.block):
                yield folder / f"draw{draw:04}-row{rows.start:08}.npy", draw, rows

    @property
    def embedding(self) -> np.dtype:
        """The text embedding of one caption."""
        return np.dtype((np.float16, self.text_shape))

    def text(self, folder: Path, captions: int) -> Iterator[tuple[Path, range]]:
        """The file and the captions of each block."""
        for block in _blocks(captions, CAPTIONS):
            yield folder / f"text{block.start:08}.npy", block


class LatentCache:
    """The memory-mapped files of a cache that `build` made; UserError names one that is missing or damaged."""

    def __init__(self, folder: Path, draws: int):
        self.folder, self.draws = folder, draws
        self.layout = read_layout(folder)
        self._files = [(path, len(rows), self.layout.entry) for path, _, rows in self.layout.draws(folder, draws)]
        captions = read_json(folder / TEXTS)
        blocks = self.layout.text(folder, len(captions))
        self._text = [(path, len(block), self.layout.embedding) for path, block in blocks]
        for file in [*self._files, *self._text]:
            open_block(*file)
        self._open = lru_cache(OPEN_FILES)(open_block)
        hashes = np.array([rng.seed_of(caption) for caption in captions])
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]  # 16 bytes a caption stay in memory, not the captions
        self.bad = read_marks(folder, self.layout, draws)  # rows that could not be read, and why

    def __reduce__(self):
        return LatentCache, (self.folder, self.draws)  # a process that reads data opens the files itself

    def entry(self, draw: int, row: int) -> np.void:
        """moments float16 [2C,h,w], mask uint8 [R,R] and frame uint8 [R*R/8], packed, of a draw of a row."""
        files = len(self._files) // self.draws
        block, place = divmod(row, self.layout.block)
        return self._open(*self._files[draw * files + block])[place]

    def good(self, row: int) -> int:
        """The row itself, or the next one that could be read."""
        while row in self.bad:
            row = (row + 1) % self.layout.rows
        return row

    def text_of(self, caption: str) -> np.ndarray:
        """float16 [L,D]; KeyError for a caption that was not embedded."""
        key = rng.seed_of(caption)
        found = np.searchsorted(self._hashes, key)
        if found == len(self._hashes) or self._hashes[found] != key:
            raise KeyError(caption)
        block, place = divmod(int(self._order[found]), CAPTIONS)
        return self._open(*self._text[block])[place]


def read_marks(folder: Path, layout: Layout, draws: int) -> dict[int, str]:
    """The rows that could not be read when the cache was built, and why."""
    paths = (mark_path(path) for path, _, _ in layout.draws(folder, draws))
    marks = (read_json(path) for path in paths if path.is_file())
    return {int(row): why for found in marks for row, why in found.items()}


def mark_path(path: Path) -> Path:
    """Where the bad rows of a file of draws are named; no such file: there are none."""
    return path.with_suffix(".bad.json")


def read_layout(folder: Path) -> Layout:
    """The shapes of a cache that stands."""
    told = read_json(folder / LAYOUT)
    return Layout(told["rows"], tuple(told["latent_shape"]), told["resolution"], tuple(told["text_shape"]))


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(damaged(path, "JSON", error)) from None


def open_block(path: Path, count: int, dtype: np.dtype) -> np.ndarray:
    """A memory-mapped file of `count` entries; UserError where it is missing, cut off or of other shapes."""
    expected = np.empty(0, dtype)
    try:
        array = np.load(path, mmap_mode="r")
        found = array.dtype, array.shape
        if found != (expected.dtype, (count, *expected.shape[1:])):
            raise ValueError(f"{array.dtype} {array.shape}")
    except Exception as error:  # the header of a damaged file may raise anything
        raise UserError(damaged(path, f"{count} entries", error)) from None
    return array


def damaged(path: Path, expected: str, error: Exception) -> str:
    """The message for a file of the cache that cannot be used."""
    if not path.exists():
        return (
            f"{path}: expected a file of the latent cache, found none; all processes must see the same --cache_dir."
            " The same command makes what is missing."
        )
    return (
        f"{path}: expected {expected}, found a damaged file of the latent cache ({error}); remove it, rm {path},"
        " and give the same command again: it is made anew."
    )


def appear(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write(file)` fill a file aside, then make it appear in one step, on disk before it has its name."""
    aside = path.with_name(f".{path.name}.{uuid4().hex}.staged")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the latent cache cannot be written: {error.strerror or error}; choose another folder by"
            " --cache_dir, fewer draws by --cache_draws, or none by --cache none"
        ) from None


def sweep(folder: Path) -> None:
    """Remove what killed builds left aside; an hour old, so that nobody can be writing it."""
    for aside in folder.glob(".*.staged"):
        with suppress(FileNotFoundError):
            if time.time() - aside.stat().st_mtime > 3600:
                aside.unlink()


def _blocks(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))


# --- bad_samples: Rows whose files go bad after the check: the run ends, or goes on with the next good row, as --on_bad_sample says.

REPORT = "bad_rows.json"
SKIP = "--on_bad_sample skip:N goes on with the next good row instead, for N rows at most"
Read = TypeVar("Read")


class BadSample(UserError):
    """A row that cannot be read; its message stays as it is where a worker's traceback is put around it."""

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


def parse_limit(text: str) -> int:
    """How many bad rows a run may meet: fail -> 0, skip:N -> N; UserError for another text."""
    kind, _, number = text.partition(":")
    if text == "fail":
        return 0
    if kind != "skip" or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise UserError(f"--on_bad_sample: expected fail, or skip:N with a whole number N from 1, found {text!r}")
    return int(number)


def first_good(read: Callable[[int], Read], row: int, rows: int, limit: int) -> tuple[Read, int]:
    """What `read` gives for the first row from `row` on that it can read, and that row.

    BadSample where more than `limit` rows one after another are bad.
    """
    errors = []
    for place in range(row, row + min(limit + 1, rows)):
        try:
            return read(place % rows), place % rows
        except UserError as error:
            errors.append(str(error))
    raise BadSample(too_many(errors, limit))


def too_many(errors: Iterable[str], limit: int) -> str:
    """The message for more bad rows than the limit."""
    errors = list(errors)
    if not limit:
        return f"{errors[0]}\nThe file was good when it was checked. Mend it; or {SKIP}."
    listed = "\n  ".join(errors)
    return f"--on_bad_sample skip:{limit}: expected at most {limit} bad rows, found {len(errors)}:\n  {listed}"


class BadRows:
    """The bad rows of a run, the same in every process: each is named once, and more than the limit end the run."""

    def __init__(self, output_dir: Path, limit: int, dataset, accelerator, log: Callable[[str], None]):
        self.path, self.limit, self.dataset = output_dir / REPORT, limit, dataset
        self.accelerator, self.log = accelerator, log
        told = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.known = {int(row): why for row, why in told.items()}  # also those from before the run was resumed
        accelerator.wait_for_everyone()

    def seen(self, batch: dict) -> None:
        """Take note of the rows that a micro-batch replaced, in all processes together; under `fail` it does nothing.

        bad_row, row: int [B], the row whose turn it was, -1 if it was good, and the one that was used.
        """
        if not self.limit:
            return
        pairs = torch.stack([batch["bad_row"], batch["row"]], 1).to(self.accelerator.device)
        skipped = [self._between(bad, used) for bad, used in self.accelerator.gather(pairs).tolist() if bad >= 0]
        self.add({row: None for rows in skipped for row in rows})

    def add(self, rows: Mapping[int, str | None]) -> None:
        """Take note of bad rows and why, the same ones in every process; UserError if there are more than the limit."""
        new = sorted(rows.keys() - self.known.keys())
        for row in new:
            self.known[row] = rows[row] or self._why(row)
        if len(self.known) > self.limit:
            raise UserError(too_many(self.known.values(), self.limit))
        if new and self.accelerator.is_main_process:
            write_text(self.path, json.dumps(self.known, indent=1) + "\n")
        for row in new:
            self.log(f"Bad row {row}, the next good one is used instead: {self.known[row]}")

    def _between(self, bad: int, used: int) -> list[int]:
        """The bad rows from the first one to the one that was used instead."""
        rows = len(self.dataset)
        return [(bad + ahead) % rows for ahead in range((used - bad) % rows)]

    def _why(self, row: int) -> str:
        try:
            self.dataset.sample(row, 0)
        except UserError as error:
            return str(error)
        return f"row {row}: it could not be read, and now it can"


# --- draws: How many augmented draws of each row the latent cache keeps, by what the run needs and the disk holds.

SPARE = 10**9  # bytes of the disk that stay free


def resolve_draws(
    asked: int | None, visits: float, draw_bytes: int, text_bytes: int, budget: float, free: int, there: int = 0
) -> int:
    """The number of draws K: as asked, else as many as the budget holds, and no more than each row has visits.

    draw_bytes: of one draw of all rows; budget: bytes for the draws; free: bytes on the disk; there: bytes of this
    cache that stand already. UserError where they do not fit, or not even one.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--cache_draws: expected 1 or more, found {asked}")
    space = there + max(0, free - SPARE) - text_bytes
    fits = int((space if asked else min(space, budget)) // draw_bytes)
    draws = asked or max(1, min(fits, math.ceil(visits)))
    if draws > fits:
        raise UserError(
            f"the latent cache needs {_gb(draws * draw_bytes)} for {draws} draw(s) of all rows, and {_gb(text_bytes)}"
            f" for text; found a budget of {_gb(budget)} for draws, and {_gb(max(0, free - SPARE) + there)} of disk;"
            " give more by --cache_budget_gb, another disk by --cache_dir, or encode in every step by --cache none"
        )
    return draws


def free_bytes(folder: Path) -> int:
    """Free space of the disk on which a folder stands or will stand."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def standing_bytes(folder: Path) -> int:
    """What the arrays of a cache take up already."""
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def announce(layout: Layout, captions: int, draws: int, visits: float, steps: int, folder: Path) -> str:
    """What the cache costs and how often each draw is seen, in one line."""
    size = f"{_gb(draws * layout.draw_bytes)}, and {_gb(layout.text_bytes(captions))} of text"
    times = f"each draw is seen {visits / draws:.1f} times in {steps} steps"
    return f"{draws} draw(s) of each row are cached in {folder}: {size}; {times}; --cache none draws anew each time."


def _gb(size: float) -> str:
    """Bytes in GB, or MB where they are few."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# --- stamps: Which files of a data set have changed since a run began: those that went bad need not end it.


def remember_stamps(split: Split, folder: Path) -> None:
    """Keep sizes and times of a split's files under its fingerprint, so that it can be told later which changed."""
    path = _stamps_path(split, split.fingerprint, folder)
    if not path.is_file():
        stamps = _stamps(split)
        write_whole(path, lambda aside: np.save(aside, stamps))


def overlook_bad(split: Split, recorded: str, folder: Path, limit: int) -> None:
    """Give a split its recorded fingerprint back if all that changed is at most `limit` rows, unreadable now.

    Without it a run could not go on after a file went bad: its data would count as changed.
    """
    path = _stamps_path(split, recorded, folder)
    if not limit or split.fingerprint == recorded or not path.is_file():
        return
    changed = np.flatnonzero(np.load(path) != _stamps(split))
    if len(changed) <= limit and all(row < len(split) and _gone_bad(split, row) for row in changed.tolist()):
        vars(split)["fingerprint"] = recorded  # a cached property


def _gone_bad(split: Split, row: int) -> bool:
    try:
        check_split(replace(split, records=(split[row],)))
    except UserError:
        return True
    return False


def _stamps_path(split: Split, fingerprint: str, folder: Path) -> Path:
    return folder / f"stamps-{fingerprint}-{len(split)}.npy"


def _stamps(split: Split) -> np.ndarray:
    """A number for each row's two files, and one for metadata and palette, int64 [N + 1]."""
    whole = rng.seed_of(hashlib.sha256(split.metadata.read_bytes()).hexdigest(), split.palette.fingerprint)
    return np.array([*(rng.seed_of(stamp(row.image), stamp(row.mask)) for row in split.records), whole])


# --- latents: Build the cache of everything frozen: VAE moments and masks of K augmented draws a row, and text embeddings.
#
# Encoding once instead of in every step follows EDM2 (Karras et al. 2024, arXiv:2312.02696): moments are stored, latents
# are sampled from them just in time. A killed build goes on with the files that are missing, more draws are added to
# those that stand, and two runs that build the same cache at once write the same files.

VERSION = 3  # of the files; another number makes other folders
BATCH = 16  # images of 256 px, or smaller ones, encoded at once; of larger ones as many as take the same memory


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


# --- feed: What feeds a training: its data set, the latent cache and how many draws it holds, the examples, the bad rows.


def cache_folder(config: TrainConfig, dataset: PairedDataset, base: Base) -> Path:
    """The folder of this data set's latent cache."""
    return cache_root(config) / cache_key(dataset, encoders_fingerprint(base))


def cache_root(config: TrainConfig) -> Path:
    """The folder of what is computed once for all runs."""
    return Path(config.cache_dir) if config.cache_dir else OUTPUTS / "cache"
