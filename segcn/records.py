"""The rows of a data set: read metadata.csv or metadata.jsonl, refuse what is wrong with it, and write it."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from os.path import isfile  # False for a name that is too long, where Path.is_file raises
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from segcn.errors import UserError
from segcn.labels import UNREADABLE, Palette, find_palette, read_mask
from segcn.metadata import COLUMNS, Line, read_lines, write_csv

METADATA = ("metadata.csv", "metadata.jsonl")
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


@dataclass(frozen=True)
class Record:
    """One row: `row` counts from 0, `line` is the line of the metadata file, counted from 1."""

    row: int
    line: int
    image: Path
    mask: Path
    caption: str


class Problem(NamedTuple):
    """What is wrong with a row as written."""

    kind: str  # metadata, path, missing or caption
    file: str  # the file it is about, as written; "" where it is about the row
    message: str


@dataclass(frozen=True)
class Split:
    """The rows of one metadata file under one palette."""

    folder: Path
    metadata: Path
    palette: Palette
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Record:
        return self.records[row]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the metadata, the palette, any file's size or time."""
        digest = hashlib.sha256(self.metadata.read_bytes() + self.palette.fingerprint.encode())
        for record in self.records:
            for path in (record.image, record.mask):
                digest.update(f"{path.relative_to(self.folder)} {_stamp(path)}\n".encode())
        return digest.hexdigest()[:16]


def read_split(dataset_name: str | Path, split: str | None = None) -> Split:
    """Read a folder, or a metadata file itself; a folder of splits gives "train" unless `split` is named.

    UserError names the file and the line of the first row that is wrong, and how many more rows are.
    """
    found, problems = scan_split(dataset_name, split)
    if not found.records:
        raise UserError(f"{found.metadata}: expected at least one row under the header, found none")
    _raise_first(found.metadata, found.records, [row[0].message if row else None for row in problems])
    return found


def scan_split(dataset_name: str | Path, split: str | None = None) -> tuple[Split, list[list[Problem]]]:
    """As `read_split`, but rows that are wrong are kept: every row, and the problems of each as it is written."""
    metadata = _find_metadata(Path(dataset_name), split)
    palette = Palette.load(find_palette(metadata.parent))
    records, problems = [], []
    for row, line in enumerate(read_lines(metadata)):
        image, mask, caption = line.fields
        records.append(Record(row, line.number, metadata.parent / image, metadata.parent / mask, caption))
        problems.append(list(_line_problems(records[-1], line)))
    return Split(metadata.parent, metadata, palette, tuple(records)), problems


def find_splits(dataset_name: str | Path) -> dict[str, Path]:
    """The metadata file of every split by name, train first; a data set without splits is "train" alone."""
    path = Path(dataset_name)
    folders = sorted(path.iterdir()) if path.is_dir() and _metadata_in(path) is None else []
    found = {folder.name: _metadata_in(folder) for folder in folders if folder.is_dir()}
    splits = {name: metadata for name, metadata in found.items() if metadata is not None}
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train")) or {"train": _find_metadata(path, None)}


def read_named_split(dataset_name: str | Path, name: str) -> Split:
    """The named split of a folder of splits; a data set without splits as it is.

    As in `datasets`, "train[24:]" is train from its 25th row on and "train[:24]" what comes before.
    """
    folder = Path(dataset_name)
    has_splits = folder.is_dir() and not any((folder / metadata).is_file() for metadata in METADATA)
    found = re.fullmatch(r"([^[]*)(?:\[(\d*):(\d*)\])?", name)
    if found is None:
        raise UserError(f"--split: expected a name such as test, train[24:] or train[:24], found {name!r}")
    name, first, last = found.groups()
    split = read_split(folder, name if has_splits else None)
    return replace(split, records=split.records[int(first or 0) : int(last) if last else None])


def check_split(split: Split, progress: bool = False, full: bool = False) -> None:
    """Open every image and decode every mask: same size, declared labels; `full` decodes the images too.

    UserError names the first row that fails and how many more do.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(_file_problem, split, full=full), split.records)
        problems = list(tqdm(found, "checking", len(split), disable=not progress))
    _raise_first(split.metadata, split.records, problems)


def read_image(path: str | Path) -> np.ndarray:
    """Read a photo upright (by its EXIF orientation), uint8 [H, W, 3]; UserError where it is broken."""
    return read_turned_image(path)[0]


def read_turned_image(path: str | Path) -> tuple[np.ndarray, int]:
    """As `read_image`, and the EXIF orientation it was stored with (1: upright)."""
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                pixels = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(pixels[..., None], 3, axis=2), orientation
            return np.array(image.convert("RGB")), orientation
    except UNREADABLE as error:
        raise UserError(f"{path}: the image cannot be read: {error}") from None


def write_metadata(folder: str | Path, rows: Iterable[tuple[str, str, str]]) -> Path:
    """Write metadata.csv from rows of (image file, mask file, caption), whole or not at all.

    Line breaks in a caption become spaces. The order of the columns matters: `datasets` takes the first
    `*_file_name` column for the image.
    """
    path = Path(folder) / METADATA[0]
    write_csv(path, COLUMNS, ((image, mask, " ".join(caption.split())) for image, mask, caption in rows))
    return path


def _find_metadata(path: Path, split: str | None) -> Path:
    if path.is_file():
        if path.suffix not in (".csv", ".jsonl"):
            raise UserError(
                f"{path}: expected a folder, a metadata.csv or a metadata.jsonl, found a {path.suffix} file"
            )
        if split not in (None, "train", path.absolute().parent.name):
            raise UserError(f"{path}: this is one metadata file; to choose the split {split!r} name the folder above")
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or file; expected a data set folder (see data/README.md)")
    own, chosen = _metadata_in(path), _metadata_in(path / (split or "train"))
    if split is None or (chosen is None and split in ("train", path.absolute().name)):
        chosen = own or chosen  # as in `datasets`, rows without splits are "train"
    if chosen is None:
        wanted = path / (split or "train")
        raise UserError(f"{path}: expected {' or '.join(METADATA)} in {path if split is None else wanted}, found none")
    return chosen


def _metadata_in(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: expected one metadata file, found {' and '.join(METADATA)}; remove one")
    return found[0] if found else None


def _line_problems(record: Record, line: Line) -> Iterator[Problem]:
    """All that is wrong with a row as written; the files of a row whose line is broken are not looked for."""
    if line.fault is not None:
        yield Problem(line.fault[0], "", line.fault[1])
    if line.fault is not None and line.fault[0] == "metadata":
        return
    for column, name, path in zip(COLUMNS[:2], line.fields[:2], (record.image, record.mask), strict=True):
        if _leaves_folder(name):
            expected = "expected a path inside the folder, written with /"
            yield Problem("path", name, f"column {column}: {expected}, found {name!r}")
        elif not isfile(path):
            expected = f"expected a file, found none at {name!r}"
            yield Problem("missing", name, f"column {column}: {expected} (looked for {path})")
    if line.fault is None and not record.caption.strip():
        yield Problem("caption", "", "column text: expected a caption, found an empty one")


def _stamp(path: Path) -> str:
    status = path.stat() if isfile(path) else None
    return f"{status.st_size} {status.st_mtime_ns}" if status else "missing"


def _leaves_folder(name: str) -> bool:
    windows = PureWindowsPath(name)
    return bool("\\" in name or "://" in name or windows.drive or windows.root or ".." in PurePosixPath(name).parts)


def _file_problem(split: Split, record: Record, full: bool) -> str | None:
    """What is wrong with a row's files, or None."""
    try:
        image_size = read_image(record.image).shape[1::-1] if full else _upright_size(record.image)
    except UserError as error:
        return f"column {COLUMNS[0]}: {error}"
    try:
        mask = read_mask(record.mask, split.palette)
    except UserError as error:
        return f"column {COLUMNS[1]}: {error}"
    if mask.shape[::-1] != image_size:
        expected, found = "{} x {}".format(*image_size), "{} x {}".format(*mask.shape[::-1])
        name = str(record.mask.relative_to(split.folder))
        return f"column {COLUMNS[1]}: expected a mask of its image's size, {expected}, found {found} in {name!r}"
    return None


def _upright_size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header, as the photo is shown."""
    try:
        with Image.open(path) as image:
            sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
            return image.size[::-1] if sideways else image.size
    except UNREADABLE as error:
        raise UserError(f"{path}: the image cannot be read: {error}") from None


def _raise_first(metadata: Path, records: Iterable[Record], problems: list[str | None]) -> None:
    failed = [(record, problem) for record, problem in zip(records, problems, strict=True) if problem]
    if failed:
        record, problem = failed[0]
        more = f"; {len(failed) - 1} more of {len(problems)} rows fail" if len(failed) > 1 else ""
        raise UserError(f"{metadata}, line {record.line} (row {record.row}): {problem}{more}")
