"""The lines of a metadata.csv or metadata.jsonl: read each with what is wrong with it, and written whole."""

import csv
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from segcn.data.files import Boundary, open_image
from segcn.data.masks import read_mask, write_mask
from segcn.data.palette import Palette, find_palette
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.io import write_whole
from segcn.utils.progress import Progress

# --- metadata: The lines of a metadata.csv or metadata.jsonl: read each with what is wrong with it, and written whole.

COLUMNS = ("file_name", "conditioning_image_file_name", "text")
STRAY = re.compile("[\ud800-\udfff]")  # half a character: a byte that was not UTF-8
SWALLOWED = re.compile(r"""\n[^\n]*\.(?:png|jpe?g|webp|tiff?|bmp|gif)"?\s*,""", re.IGNORECASE)


class Line(NamedTuple):
    """One row: its first line, counted from 1, and its fields ("" and no captions where it has none)."""

    number: int
    image: str
    mask: str
    captions: tuple[str, ...]
    fault: tuple[str, str] | None = None  # kind (metadata or caption) and message


def read_lines(metadata: Path) -> Iterator[Line]:
    """Every row that is not blank; UserError where the header is wrong."""
    return _jsonl_lines(metadata) if metadata.suffix == ".jsonl" else _csv_lines(metadata)


def write_jsonl(path: Path, rows: Iterable[tuple[str, str, str | Sequence[str]]]) -> None:
    """Write one object a row as UTF-8, whole or not at all; a row may have several captions."""
    _write(path, "".join(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as UTF-8, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _csv_lines(metadata: Path) -> Iterator[Line]:
    rows = read_csv(metadata)
    header, fault = next(rows, (1, [], None))[1:]
    fault = fault or _header_fault(header)
    if fault:
        raise UserError(f"{metadata}, line 1: {fault}")
    image, mask, text = (header.index(column) for column in COLUMNS)
    for number, fields, fault in rows:
        if fault is None:
            yield Line(number, fields[image], fields[mask], (fields[text],))
        else:
            padded = [_clean(field) for field in fields] + [""] * len(header)
            yield Line(number, padded[image], padded[mask], (padded[text],), ("metadata", fault))


def read_csv(path: Path) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield (first line, fields, fault) of the header, then of every row that is not blank; after a fault it reads on.

    fault: None, or what is wrong: text that is not UTF-8, a double quote that is left open, another number of fields
    than in the header.
    """
    first, header = 1, None
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            try:
                fields = next(reader)
                fault = _text_fault("".join(fields)) or (_swallowed(fields) if reader.line_num > first else None)
            except StopIteration:
                return
            except csv.Error as error:
                fields, fault = [], f"{error}; is a double quote left open?"
            if header is None:
                header = fields
            elif fields and fault is None and len(fields) != len(header):
                fault = _count_fault(header, fields)
            if fields or fault or first == 1:
                yield first, fields, fault
            first = reader.line_num + 1


def _text_fault(text: str) -> str | None:
    """NUL bytes, and bytes that are not UTF-8, which arrive as lone surrogates."""
    if "\0" in text:
        return "expected text, found a NUL byte; save the file as UTF-8"
    if text.isascii() or (stray := STRAY.search(text)) is None:
        return None
    return f"expected UTF-8 text, found byte {ord(stray[0]) - 0xDC00:#x}; save the file as UTF-8"


def _swallowed(fields: list[str]) -> str | None:
    """A quote that is left open swallows rows up to the next one: such a field names an image on a later line."""
    if any(SWALLOWED.search(field) for field in fields):
        return "a quoted field goes on over a line that names an image; is a double quote left open?"
    return None


def _clean(field: str) -> str:
    """Lone surrogates, which no file can hold, and NUL become question marks."""
    return field if field.isprintable() else field.encode("utf-8", "replace").decode().replace("\0", "?")


def _count_fault(header: list[str], fields: list[str]) -> str:
    return (
        f"expected {len(header)} fields, found {len(fields)}: {_clean(str(fields))};"
        ' a caption with a comma stands in double quotes, e.g. "a hill, at dusk"'
    )


def _jsonl_lines(metadata: Path) -> Iterator[Line]:
    with metadata.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield _jsonl_line(number, text)


def _jsonl_line(number: int, text: bytes) -> Line:
    try:
        row = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return Line(number, "", "", (), ("metadata", f"expected one JSON object a line: {error}"))
    if not isinstance(row, dict):
        return Line(number, "", "", (), ("metadata", f"expected an object of strings, found {_shown(row)}"))
    image, mask, told = (row.get(column) for column in COLUMNS)
    image, mask = (_clean(name) if isinstance(name, str) else "" for name in (image, mask))
    captions = told if isinstance(told, list) else [told]
    written = tuple(_clean(caption) for caption in captions if isinstance(caption, str))
    return Line(number, image, mask, written, _row_fault(row, captions))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row


def _row_fault(row: dict[str, object], captions: list[object]) -> tuple[str, str] | None:
    missing = _column_fault(list(row))
    if missing:
        return "metadata", missing
    for column in COLUMNS[:2]:
        if not _is_text(row[column]):
            return "metadata", f"column {column}: expected a string, found {_shown(row[column])}"
    if captions and all(map(_is_text, captions)):
        return None
    return "caption", f"column {COLUMNS[2]}: expected a string, or a list of strings, found {_shown(row[COLUMNS[2]])}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and not STRAY.search(value)


def _shown(value: object) -> str:
    return _clean(repr(value))[:120]


def _header_fault(header: list[str]) -> str | None:
    fault = _column_fault(header)
    if fault is None and header.index(COLUMNS[0]) > header.index(COLUMNS[1]):
        return (
            f"expected {COLUMNS[0]} before {COLUMNS[1]}, found {_shown(','.join(header))};"
            " datasets takes the first column of file names for the image: swap the columns"
        )
    if fault and len(header) == 1 and (mark := re.search(r"[;\t|]", header[0])):
        fault += f"; separate the fields by commas, not by {mark[0]!r}"
    return fault


def _column_fault(columns: list[str]) -> str | None:
    missing = [column for column in COLUMNS if columns.count(column) != 1]
    if not missing:
        return None
    return (
        f"expected the column {missing[0]} once (the columns are {','.join(COLUMNS)}),"
        f" found {_shown(','.join(columns)) if columns else 'nothing'}"
    )


# --- records: The rows of a data set: read metadata.csv or metadata.jsonl, refuse what is wrong with it, and write it.

METADATA = ("metadata.csv", "metadata.jsonl")
HELD_OUT = 128  # rows at most, of a data set without test/
ORIENTATION = 0x0112  # the EXIF tag


class Record(NamedTuple):
    """One row: `row` counts from 0, `line` is the line of the metadata file, counted from 1."""

    row: int
    line: int
    folder: str
    image_name: str  # as written, relative to the folder
    mask_name: str
    captions: tuple[str, ...]  # one of them is drawn in each epoch

    @property
    def image(self) -> Path:
        return Path(self.folder, self.image_name)

    @property
    def mask(self) -> Path:
        return Path(self.folder, self.mask_name)

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0] if self.captions else ""


class Problem(NamedTuple):
    """What is wrong with a row as written."""

    kind: str  # metadata, repeated, path, missing or caption
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

    def first(self, rows: int | None) -> "Split":
        """The split cut after so many rows; None: all of it."""
        return replace(self, records=self.records[:rows])

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the metadata, the palette, any file's size or time."""
        digest = hashlib.sha256(self.metadata.read_bytes() + self.palette.fingerprint.encode())
        for record in self.records:
            for name in (record.image_name, record.mask_name):
                digest.update(f"{name} {stamp(f'{record.folder}/{name}')}\n".encode())
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


def scan_split(dataset_name: str | Path, split: str | None = None) -> tuple[Split, list[Sequence[Problem]]]:
    """As `read_split`, but rows that are wrong are kept: every row, and the problems of each as it is written."""
    metadata = _find_metadata(Path(dataset_name), split)
    palette = Palette.load(find_palette(metadata.parent))
    folder, check = str(metadata.parent), LineCheck(metadata.parent)
    records, problems = [], []
    for row, line in enumerate(read_lines(metadata)):
        records.append(Record(row, line.number, folder, line.image, line.mask, line.captions))
        problems.append(check(line))
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

    As in `datasets`, "train[24:]" is train from its 25th row on and "train[:24]" what comes before. UserError for
    another form, a split that is not there, and what `read_split` refuses.
    """
    folder = Path(dataset_name)
    has_splits = folder.is_dir() and not any((folder / metadata).is_file() for metadata in METADATA)
    found = re.fullmatch(r"([^[]*)(?:\[(\d*):(\d*)\])?", name)
    if found is None:
        raise UserError(f"--split: expected a name such as test, train[24:] or train[:24], found {name!r}")
    name, first, last = found.groups()
    split = read_split(folder, name if has_splits else None)
    return replace(split, records=split.records[int(first or 0) : int(last) if last else None])


def hold_out(dataset: str | Path) -> tuple[str, str]:
    """The names, for `read_named_split`, of the rows to train on and of those held out.

    They are train and test; where there is no test/, the last eighth of the rows (2 to 128) is held out. UserError
    where fewer than 3 rows are there.
    """
    if _metadata_in(Path(dataset) / "test") is not None:
        return "train", "test"
    rows = len(read_split(dataset, "train"))
    kept = rows - max(2, min(HELD_OUT, rows // 8))
    if kept < 1:
        raise UserError(f"{dataset}: expected at least 3 rows, some of them to hold out, found {rows}")
    return f"train[:{kept}]", f"train[{kept}:]"


def check_split(split: Split, log: Callable[[str], None] | None = None) -> None:
    """Decode every image and mask, on all cores: same size, declared labels.

    UserError names the first row that fails and how many more do. `log` is told how far it is.
    """
    told = Progress("rows checked", len(split), log) if log else lambda done: None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = []
        for problem in pool.map(partial(_file_problem, split), split.records):
            problems.append(problem)
            told(len(problems))
    _raise_first(split.metadata, split.records, problems)


def read_image(path: str | Path) -> np.ndarray:
    """Read a photo upright (by its EXIF orientation), uint8 [H, W, 3]; UserError where it is broken."""
    with open_image(path) as image:
        return np.array(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """An open photo as RGB, turned by its EXIF orientation."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def write_metadata(folder: str | Path, rows: Iterable[tuple[str, str, str | Sequence[str]]]) -> Path:
    """Write rows of (image file, mask file, caption or captions), whole or not at all.

    It is metadata.csv, or metadata.jsonl where a row has several captions; line breaks in captions become spaces. The
    order of the columns matters: `datasets` takes the first `*_file_name` column for the image.
    """
    told = [(image, mask, [said] if isinstance(said, str) else list(said)) for image, mask, said in rows]
    rows = [(image, mask, [" ".join(caption.split()) for caption in captions]) for image, mask, captions in told]
    several = any(len(captions) > 1 for _, _, captions in rows)
    path = Path(folder) / METADATA[1 if several else 0]
    if several:
        write_jsonl(path, rows)  # a list in every row: datasets wants one type a column
    else:
        write_csv(path, COLUMNS, ((image, mask, said[0]) for image, mask, said in rows))
    return path


def stamp(path: str | Path) -> str:
    """Size and time of a file, or that it is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


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
        if split and (others := [entry.name for entry in sorted(path.iterdir()) if _metadata_in(entry)]):
            raise UserError(f"{path}: expected a split {split}, found {', '.join(others)}; see --split")
        expected = f"expected {' or '.join(METADATA)} in {path if split is None else wanted}, found none"
        raise UserError(f"{path}: {expected}; segcn import makes a data set of what you have (see data/README.md)")
    return chosen


def _metadata_in(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: expected one metadata file, found {' and '.join(METADATA)}; remove one")
    return found[0] if found else None


class LineCheck:
    """What is wrong with each row as written; made for a million rows: nothing is kept of them but a hash."""

    def __init__(self, folder: Path):
        self._boundary = Boundary(folder)
        self._line_of: dict[int, int] = {}

    def __call__(self, line: Line) -> Sequence[Problem]:
        """All that is wrong with a row; the files of a row whose line is broken are not looked for."""
        number, image, mask, captions, fault = line
        if fault is not None and fault[0] == "metadata":
            return (Problem(fault[0], "", fault[1]),)
        first = self._line_of.setdefault(hash((image, mask, captions)), number)
        files = self._boundary.problem(image), self._boundary.problem(mask)
        if files == (None, None) and fault is None and first == number and all(map(str.strip, captions)):
            return ()
        return list(_explained(line, first, files))


def _explained(line: Line, first: int, files: Sequence[tuple[str, str] | None]) -> Iterator[Problem]:
    if line.fault is not None:
        yield Problem(line.fault[0], "", line.fault[1])
    if first != line.number:
        yield Problem("repeated", "", f"the row says the same as line {first}; remove one of them")
    for column, name, problem in zip(COLUMNS[:2], (line.image, line.mask), files, strict=True):
        if problem is not None:
            yield Problem(problem[0], name, f"column {column}: {problem[1]}")
    if line.fault is None and not all(map(str.strip, line.captions)):
        yield Problem("caption", "", f"column {COLUMNS[2]}: expected a caption, found an empty one")


def _file_problem(split: Split, record: Record) -> str | None:
    """What is wrong with a row's files, or None."""
    try:
        image_size = read_image(record.image).shape[1::-1]
    except UserError as error:
        return f"column {COLUMNS[0]}: {error}"
    try:
        mask = read_mask(record.mask, split.palette)
    except UserError as error:
        return f"column {COLUMNS[1]}: {error}"
    if mask.shape[::-1] != image_size:
        expected, found = "{} x {}".format(*image_size), "{} x {}".format(*mask.shape[::-1])
        expected = f"expected a mask of its image's size, {expected}"
        return f"column {COLUMNS[1]}: {expected}, found {found} in {record.mask_name!r}"
    return None


def _raise_first(metadata: Path, records: Iterable[Record], problems: list[str | None]) -> None:
    failed = [f"{metadata}, line {record.line} (row {record.row}): {problem}"
              for record, problem in zip(records, problems, strict=True) if problem]  # fmt: skip
    refuse_failed(failed, len(problems))


SAVING = threading.Lock()  # rows are appended one at a time


def write_pair(
    folder: Path,
    names: tuple[str, str],
    image: np.ndarray,
    mask: np.ndarray,
    palette: Palette,
    told: PngInfo | None = None,
    work: Path | None = None,
) -> None:
    """Write mask, then image, each in one step (see `write_whole`): an image that stands is whole and has its mask.

    names: of image and mask; told: text chunks of the image.
    """
    write_whole(folder / names[1], lambda path: write_mask(path, mask, palette), work)
    write_whole(folder / names[0], lambda path: Image.fromarray(image).save(path, format="PNG", pnginfo=told), work)


def finish_dataset(
    folder: Path, rows: Iterable[tuple[str, str, str]], palette: Palette, work: Path | None = None
) -> Path:
    """The palette and, last, the metadata of (image, mask, caption) that makes the folder a data set."""
    write_whole(folder / "palette.json", palette.save, work)
    write_metadata(folder, rows)
    return folder


def save_row(
    folder: str | Path,
    image: np.ndarray,
    mask: np.ndarray,
    caption: str,
    palette: Palette,
    told: PngInfo | None = None,
) -> int:
    """Append a row to a data set folder, which is a whole data set before and after; returns the row's number.

    told: text chunks of the image. Nothing that stands is overwritten. UserError if the caption is empty or the folder
    is another data set.
    """
    folder = Path(folder)
    if not caption.strip():
        raise UserError("a row of a data set needs a caption: write a prompt before saving")
    with SAVING:
        rows = _rows_of(folder, palette)
        number = _claim(folder)
        names = f"images/{number:06d}.png", f"masks/{number:06d}.png"
        write_pair(folder, names, image, mask, palette, told)
        write_metadata(folder, [*rows, (*names, caption)])
    return len(rows)


def _rows_of(folder: Path, palette: Palette) -> list[tuple[str, str, str]]:
    """The rows that stand in `folder`, which is made with its palette if it is new."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metadata, own = folder / "metadata.csv", folder / "palette.json"
    other = UserError(f"{folder}: its palette differs from the mask's; choose another folder")
    if not metadata.is_file():
        if (folder / "metadata.jsonl").is_file():
            raise UserError(f"{folder}: expected metadata.csv, found metadata.jsonl; choose another folder")
        if own.is_file() and Palette.load(own).fingerprint != palette.fingerprint:
            raise other
        palette.save(own)
        return []
    header = next(csv.reader(io.StringIO(metadata.read_text(encoding="utf-8-sig"))), [])
    if tuple(header) != COLUMNS:
        raise UserError(f"{metadata}: expected the columns {','.join(COLUMNS)}, found {','.join(header)}")
    split = read_split(folder)
    if split.palette.fingerprint != palette.fingerprint:
        raise other
    return [
        (record.image.relative_to(folder).as_posix(), record.mask.relative_to(folder).as_posix(), record.caption)
        for record in split.records
    ]


def _claim(folder: Path) -> int:
    """The first number above all that are taken, reserved by its empty mask file."""
    names = [path.stem for name in ("images", "masks") for path in (folder / name).glob("*.png")]
    number = max([int(name) for name in names if name.isdecimal()], default=-1) + 1
    while True:
        try:
            (folder / "masks" / f"{number:06d}.png").open("xb").close()
            return number
        except FileExistsError:
            number += 1
