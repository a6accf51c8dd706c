"""The rows of a data set: read metadata.csv or metadata.jsonl, refuse what is wrong with it, and write it."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from segcn.errors import UserError
from segcn.labels import UNREADABLE, Palette, find_palette, read_mask

COLUMNS = ("file_name", "conditioning_image_file_name", "text")
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
                status = path.stat()
                digest.update(f"{path.relative_to(self.folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def read_split(dataset_name: str | Path, split: str | None = None) -> Split:
    """Read a folder, or a metadata file itself; a folder of splits gives "train" unless `split` is named.

    UserError names the file and the line of the first row that is wrong, and how many more rows are.
    """
    metadata = _find_metadata(Path(dataset_name), split)
    palette = Palette.load(find_palette(metadata.parent))
    rows = _jsonl_rows(metadata) if metadata.suffix == ".jsonl" else _csv_rows(metadata)
    records, problems = [], []
    for row, (line, fields) in enumerate(rows):
        record = Record(row, line, metadata.parent / fields[0], metadata.parent / fields[1], fields[2])
        records.append(record)
        problems.append(_field_problem(record, fields))
    if not records:
        raise UserError(f"{metadata}: expected at least one row under the header, found none")
    _raise_first(metadata, records, problems)
    return Split(metadata.parent, metadata, palette, tuple(records))


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
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{path}: the image cannot be read: {error}") from None


def write_metadata(folder: str | Path, rows: Iterable[tuple[str, str, str]]) -> Path:
    """Write metadata.csv from rows of (image file, mask file, caption), whole or not at all.

    Line breaks in a caption become spaces. The order of the columns matters: `datasets` takes the first
    `*_file_name` column for the image.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((image, mask, " ".join(caption.split())) for image, mask, caption in rows)
    path = Path(folder) / "metadata.csv"
    staged = path.with_name(f".metadata.csv.{os.getpid()}")
    with staged.open("wb") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
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


def _csv_rows(metadata: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line, fields in the order of COLUMNS) of every row that is not blank."""
    rows = _csv_fields(metadata)
    header = next(rows, (1, 1, []))[2]
    _check_columns(metadata, 1, header)
    for first, last, fields in rows:
        if last > first:
            raise UserError(
                f"{metadata}, line {first}: the row goes on to line {last}; is a double quote left open?"
                " (captions with line breaks belong in metadata.jsonl)"
            )
        if fields and len(fields) != len(header):
            raise UserError(
                f"{metadata}, line {first}: expected {len(header)} fields, found {len(fields)}: {fields};"
                ' a caption with a comma stands in double quotes, e.g. "a hill, at dusk"'
            )
        if fields:
            yield first, tuple(fields[header.index(column)] for column in COLUMNS)


def _csv_fields(metadata: Path) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (first line, last line, fields) of every row, the header and blank ones too."""
    first = 1
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for fields in reader:
                yield first, reader.line_num, fields
                first = reader.line_num + 1
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#x}"
            raise UserError(f"{metadata}: expected UTF-8 text, found {byte}; save the file as UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{metadata}, line {first}: {error}; is a double quote left open?") from None


def _jsonl_rows(metadata: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line, fields in the order of COLUMNS) of every line that is not blank."""
    for line, text in enumerate(metadata.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{metadata}, line {line}: expected one JSON object a line: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(column, ""), str) for column in COLUMNS):
            raise UserError(f"{metadata}, line {line}: expected an object of strings, found {text.decode()[:80]}")
        _check_columns(metadata, line, list(row))
        yield line, tuple(row[column] for column in COLUMNS)


def _check_columns(metadata: Path, line: int, columns: list[str]) -> None:
    wanted = ",".join(COLUMNS)
    missing = [column for column in COLUMNS if columns.count(column) != 1]
    if missing:
        raise UserError(
            f"{metadata}, line {line}: expected the column {missing[0]} once (the columns are {wanted}),"
            f" found {','.join(columns) or 'nothing'}"
        )


def _field_problem(record: Record, fields: tuple[str, ...]) -> str | None:
    """What is wrong with a row as written, or None."""
    for column, name, path in zip(COLUMNS[:2], fields[:2], (record.image, record.mask), strict=True):
        if _leaves_folder(name):
            return f"column {column}: expected a path inside the folder, written with /, found {name!r}"
        if not path.is_file():
            return f"column {column}: expected a file, found none at {name!r} (looked for {path})"
    return None if record.caption.strip() else "column text: expected a caption, found an empty one"


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
