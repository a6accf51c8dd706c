"""The files of a latent cache: one draw of a block of rows each, or the embeddings of a block of captions.

They are plain .npy, memory-mapped. Each is written aside and appears whole.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from segcn import seeds
from segcn.errors import UserError

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
        hashes = np.array([seeds.seed_of(caption) for caption in captions])
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
        key = seeds.seed_of(caption)
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
