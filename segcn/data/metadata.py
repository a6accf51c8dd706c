"""The rows of a data set: read metadata.csv or metadata.jsonl, refuse what is wrong with it, and write rows."""

import csv
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segcn.data.files import Boundary, digests, read_image
from segcn.data.masks import read_mask, write_mask
from segcn.data.palette import IGNORE, Palette, find_palette
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.io import write_whole
from segcn.utils.progress import Progress

METADATA = ("metadata.csv", "metadata.jsonl")
COLUMNS = ("file_name", "conditioning_image_file_name", "text")
HELD_OUT = 128  # rows at most, of a data set without test/
STRAY = re.compile("[\ud800-\udfff]")  # half a character: a byte that was not UTF-8
SWALLOWED = re.compile(r"""\n[^\n]*\.(?:png|jpe?g|webp|tiff?|bmp|gif)"?\s*,""", re.IGNORECASE)
SAVING = threading.Lock()  # rows are appended one at a time


class Problem(NamedTuple):
    """What is wrong with a row as written."""

    kind: str  # metadata, repeated, path, missing or caption
    file: str  # the file it is about, as written; "" where it is about the row
    message: str


class Line(NamedTuple):
    """One row as written: its first line, counted from 1, and its fields ("" and no captions where it has none)."""

    number: int
    image: str
    mask: str
    captions: tuple[str, ...]
    fault: Problem | None = None


class Record(NamedTuple):
    """One row: `row` counts from 0, `line` is the line of the metadata file, counted from 1."""

    row: int
    line: int
    folder: str
    image_name: str  # as written, relative to the folder
    mask_name: str  # "": without one
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
        """16 hexadecimal digits that change with the metadata, the palette and any file's bytes, wherever they are."""
        found = [(record.image_name, record.captions) for record in self.records]  # of a folder without metadata
        written = self.metadata.read_bytes() if self.metadata.is_file() else repr(found).encode()
        digest = hashlib.sha256(written + self.palette.fingerprint.encode())
        names = [name for record in self.records for name in (record.image_name, record.mask_name) if name]
        for name, content in zip(names, digests(self.folder, names), strict=True):
            digest.update(f"{name} {content}\n".encode())
        return digest.hexdigest()[:16]


# --- Reading splits


def read_split(dataset_name: str | Path, split: str | None = None) -> Split:
    """Read a folder, or a metadata file itself; a folder of splits gives "train" unless `split` is named.

    UserError names the file and the line of the first row that is wrong, and how many more rows are.
    """
    found, problems = scan_split(dataset_name, split)
    if not found.records:
        raise UserError(f"{found.metadata}: expected at least one row under the header, found none")
    failed = [_at(found, row, faults[0].message) for row, faults in enumerate(problems) if faults]
    refuse_failed(failed, len(found))
    return found


def scan_split(dataset_name: str | Path, split: str | None = None) -> tuple[Split, list[Sequence[Problem]]]:
    """As `read_split`, but rows that are wrong are kept: every row, and the problems of each as it is written."""
    metadata = _find_metadata(Path(dataset_name), split)
    palette = Palette.load(find_palette(metadata.parent))
    folder, boundary = str(metadata.parent), Boundary(metadata.parent)
    records, problems = [], []
    first_lines: dict[int, int] = {}
    for row, line in enumerate(read_lines(metadata)):
        records.append(Record(row, line.number, folder, line.image, line.mask, line.captions))
        problems.append(_problems_of(line, boundary, first_lines))
    return Split(metadata.parent, metadata, palette, tuple(records)), problems


def find_splits(dataset_name: str | Path) -> dict[str, Path]:
    """The metadata file of every split by name, train first; a data set without splits is "train" alone."""
    path = Path(dataset_name)
    folders = sorted(path.iterdir()) if path.is_dir() and _metadata_in(path) is None else []
    splits = {folder.name: found for folder in folders if folder.is_dir() and (found := _metadata_in(folder))}
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train")) or {"train": _find_metadata(path, None)}


def read_named_split(dataset_name: str | Path, name: str) -> Split:
    """The named split of a folder of splits; a data set without splits as it is.

    As in `datasets`, "train[24:]" is train from its 25th row on and "train[:24]" what comes before. UserError for
    another form, a split that is not there, and what `read_split` refuses.
    """
    folder = Path(dataset_name)
    has_splits = folder.is_dir() and _metadata_in(folder) is None
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

    UserError names the first row that fails and how many more do. log: receives a line of progress now and then.
    """

    def problem_of(row: int) -> str | None:
        try:
            read_row(split, row)
        except UserError as error:
            return str(error)
        return None

    progress = Progress("rows checked", len(split), log) if log else lambda done: None
    problems = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, problem in enumerate(pool.map(problem_of, range(len(split))), start=1):
            problems += [problem] if problem else []
            progress(done)
    refuse_failed(problems, len(split))


def read_row(split: Split, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 [H, W, 3], and the class ids, uint8 [H, W], of a row; all 255 where it has no mask.

    UserError names the line and the column of a file that can't be read, or of a mask of another size.
    """
    record, column = split[row], COLUMNS[0]
    try:
        image = read_image(record.image)
        column = COLUMNS[1]
        mask = read_mask(record.mask, split.palette) if record.mask_name else np.full(image.shape[:2], IGNORE, np.uint8)
        if mask.shape != image.shape[:2]:
            expected, found = "{1} x {0}".format(*image.shape), "{1} x {0}".format(*mask.shape)
            raise UserError(f"expected a mask of its image's size, {expected}, found {found} in {record.mask_name!r}")
    except UserError as error:
        raise UserError(_at(split, row, f"column {column}: {error}")) from None
    return image, mask


def _at(split: Split, row: int, message: str) -> str:
    record = split[row]
    return f"{split.metadata}, line {record.line} (row {record.row}): {message}"


def _metadata_in(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: expected one metadata file, found {' and '.join(METADATA)}; remove one")
    return found[0] if found else None


def _find_metadata(path: Path, split: str | None) -> Path:
    if path.is_file():
        if path.suffix not in (".csv", ".jsonl"):
            raise UserError(f"{path}: expected a folder, or {' or '.join(METADATA)}, found a {path.suffix} file")
        if split not in (None, "train", path.absolute().parent.name):
            raise UserError(f"{path}: this is one metadata file; to choose the split {split!r} name the folder above")
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or file; expected a data set folder (see data/README.md)")
    own, chosen = _metadata_in(path), _metadata_in(path / (split or "train"))
    if split is None or (chosen is None and split in ("train", path.absolute().name)):
        chosen = own or chosen  # as in `datasets`, rows without splits are "train"
    if chosen is None:
        if split and (others := [entry.name for entry in sorted(path.iterdir()) if _metadata_in(entry)]):
            raise UserError(f"{path}: expected a split {split}, found {', '.join(others)}; see --split")
        expected = f"expected {' or '.join(METADATA)} in {path / split if split else path}, found none"
        raise UserError(f"{path}: {expected}; segcn import makes a data set of what you have (see data/README.md)")
    return chosen


def _problems_of(line: Line, boundary: Boundary, first_lines: dict[int, int]) -> Sequence[Problem]:
    """All that is wrong with a row as written; `first_lines`: by the hash of a row, all that is kept of a million."""
    if line.fault is not None and line.fault.kind == "metadata":
        return (line.fault,)
    found = [line.fault] if line.fault else []
    first = first_lines.setdefault(hash((line.image, line.mask, line.captions)), line.number)
    if first != line.number:
        found.append(Problem("repeated", "", f"the row says the same as line {first}; remove one of them"))
    for column, name in zip(COLUMNS[:2], (line.image, line.mask), strict=True):
        if problem := boundary.problem(name):
            found.append(Problem(problem[0], name, f"column {column}: {problem[1]}"))
    if line.fault is None and not all(map(str.strip, line.captions)):
        found.append(Problem("caption", "", f"column {COLUMNS[2]}: expected a caption, found an empty one"))
    return found or ()


# --- Reading lines


def read_lines(metadata: Path) -> Iterator[Line]:
    """Every row that is not blank; UserError where the header is wrong."""
    if metadata.suffix == ".jsonl":
        with metadata.open("rb") as file:
            yield from (_jsonl_line(number, text) for number, text in enumerate(file, start=1) if text.strip())
        return
    rows = read_csv(metadata)
    header, fault = next(rows, (1, [], None))[1:]
    if fault := fault or _header_fault(header):
        raise UserError(f"{metadata}, line 1: {fault}")
    image, mask, text = (header.index(column) for column in COLUMNS)
    for number, fields, fault in rows:
        if fault is None:
            yield Line(number, fields[image], fields[mask], (fields[text],))
        else:
            fields = [_clean(field) for field in fields] + [""] * len(header)
            yield Line(number, fields[image], fields[mask], (fields[text],), Problem("metadata", "", fault))


def read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str], str | None]]:
    """Yield (first line, fields, fault) of the header, then of every row that is not blank; after a fault it reads on.

    fault: None, or what is wrong: text that is not UTF-8, a double quote that is left open, another number of fields
    than in the header.
    """
    first, header = 1, None
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        while True:
            try:
                fields = next(reader)
                fault = _text_fault("".join(fields))
            except StopIteration:
                return
            except csv.Error as error:
                fields, fault = [], f"{error}; is a double quote left open?"
            header = fields if header is None else header
            if fault is None and reader.line_num > first and any(map(SWALLOWED.search, fields)):
                fault = "a quoted field runs over a line that names an image; is a double quote left open?"
            elif fault is None and fields and len(fields) != len(header):
                fault = (
                    f"expected {len(header)} fields, found {len(fields)}: {_clean(str(fields))};"
                    ' put a caption with a comma in double quotes, e.g. "a hill, at dusk"'
                )
            if fields or fault or first == 1:
                yield first, fields, fault
            first = reader.line_num + 1


def _jsonl_line(number: int, text: bytes) -> Line:
    try:
        row = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
        if not isinstance(row, dict):
            raise ValueError(f"found {_shown(row)}")
    except (ValueError, RecursionError) as error:
        return Line(number, "", "", (), Problem("metadata", "", f"expected one JSON object a line: {error}"))
    image, mask, captions = (row.get(column) for column in COLUMNS)
    captions = captions if isinstance(captions, list) else [captions]
    problem, fault = None, _columns_fault(list(row)) or next(
        (f"column {column}: expected a string, found {_shown(row[column])}"
         for column in COLUMNS[:2] if not _is_text(row[column])), None)  # fmt: skip
    if fault:
        problem = Problem("metadata", "", fault)
    elif not captions or not all(map(_is_text, captions)):
        expected = f"column {COLUMNS[2]}: expected a string, or a list of strings"
        problem = Problem("caption", "", f"{expected}, found {_shown(row[COLUMNS[2]])}")
    image, mask = (_clean(name) if isinstance(name, str) else "" for name in (image, mask))
    return Line(number, image, mask, tuple(_clean(each) for each in captions if isinstance(each, str)), problem)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return dict(pairs)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _text_fault(value) is None


def _text_fault(text: str) -> str | None:
    """NUL bytes, and bytes that are not UTF-8, which arrive as lone surrogates."""
    if "\0" in text:
        return "expected text, found a NUL byte; save the file as UTF-8"
    if text.isascii() or (stray := STRAY.search(text)) is None:
        return None
    return f"expected UTF-8 text, found byte {ord(stray[0]) - 0xDC00:#x}; save the file as UTF-8"


def _clean(text: str) -> str:
    """Lone surrogates, which no file can hold, and NUL become question marks."""
    return text if text.isprintable() else text.encode("utf-8", "replace").decode().replace("\0", "?")


def _shown(value: object) -> str:
    return _clean(repr(value))[:120]


def _header_fault(header: list[str]) -> str | None:
    fault = _columns_fault(header)
    if fault is None and header.index(COLUMNS[0]) > header.index(COLUMNS[1]):
        reason = "datasets takes the first column of file names for the image: swap the columns"
        return f"expected {COLUMNS[0]} before {COLUMNS[1]}, found {_shown(','.join(header))}; {reason}"
    if fault and len(header) == 1 and (mark := re.search(r"[;\t|]", header[0])):
        fault += f"; separate the fields by commas, not by {mark[0]!r}"
    return fault


def _columns_fault(columns: list[str]) -> str | None:
    for column in COLUMNS:
        if columns.count(column) != 1:
            found = _shown(",".join(columns)) if columns else "nothing"
            return f"expected the column {column} once (the columns are {','.join(COLUMNS)}), found {found}"
    return None


# --- Writing


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as UTF-8, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, lambda file: file.write_bytes(text.getvalue().encode()))


def write_metadata(
    folder: str | Path,
    rows: Iterable[tuple[str, str, str | Sequence[str]]],
    more: Sequence[dict[str, str]] = (),
) -> Path:
    """Write rows of (image file, mask file, caption or captions), whole or not at all.

    more: further columns of each row.

    It is metadata.csv, or metadata.jsonl where a row has several captions (then each has a list: `datasets` wants one
    type in a column); line breaks in captions become spaces. The order of the columns matters: `datasets` takes the
    first `*_file_name` column for the image.
    """
    written = []
    for image, mask, text in rows:
        captions = [text] if isinstance(text, str) else text
        written.append((image, mask, [" ".join(caption.split()) for caption in captions]))
    if all(len(captions) <= 1 for _, _, captions in written):
        path = Path(folder) / METADATA[0]
        names = list(dict.fromkeys(name for one in more for name in one))
        cells = [[one.get(name, "") for name in names] for one in more] or [[]] * len(written)
        lines = ((image, mask, captions[0], *own) for (image, mask, captions), own in zip(written, cells, strict=True))
        write_csv(path, (*COLUMNS, *names), lines)
    else:
        path = Path(folder) / METADATA[1]
        own = more or [{}] * len(written)
        objects = (dict(zip(COLUMNS, row, strict=True)) | one for row, one in zip(written, own, strict=True))
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
        write_whole(path, lambda file: file.write_bytes(text.encode()))
    return path


def write_pair(
    folder: Path,
    names: tuple[str, str],
    image: np.ndarray,
    mask: np.ndarray,
    palette: Palette,
    info: PngInfo | None = None,
    work: Path | None = None,
) -> None:
    """Write mask, then image, each in one step (see `write_whole`): an image that exists is whole and has its mask.

    names: of image and mask; info: text chunks of the image.
    """
    write_whole(folder / names[1], lambda path: write_mask(path, mask, palette), work)
    write_whole(folder / names[0], lambda path: Image.fromarray(image).save(path, format="PNG", pnginfo=info), work)


def finish_dataset(
    folder: Path, rows: Iterable[tuple[str, str, str]], palette: Palette, work: Path | None = None
) -> Path:
    """The palette and, last, the metadata of (image, mask, caption) that makes the folder a data set."""
    write_whole(folder / "palette.json", palette.save, work)
    write_metadata(folder, rows)
    return folder


def save_row(
    folder: str | Path, image: np.ndarray, mask: np.ndarray, caption: str, palette: Palette, info: PngInfo | None = None
) -> int:
    """Append a row to a data set folder, which is a whole data set before and after; returns the row's number.

    info: text chunks of the image. No file is overwritten. UserError if the caption is empty or the folder is another
    data set.
    """
    folder = Path(folder)
    if not caption.strip():
        raise UserError("a row of a data set needs a caption: write a prompt before saving")
    with SAVING:
        rows = _rows_to_extend(folder, palette)
        number = _reserve_number(folder)
        names = f"images/{number:06d}.png", f"masks/{number:06d}.png"
        write_pair(folder, names, image, mask, palette, info)
        write_metadata(folder, [*rows, (*names, caption)])
    return len(rows)


def _rows_to_extend(folder: Path, palette: Palette) -> list[tuple[str, str, str]]:
    """The rows in `folder`, which is made with its palette if it is new."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metadata, own = folder / METADATA[0], folder / "palette.json"
    if not metadata.is_file() and (folder / METADATA[1]).is_file():
        raise UserError(f"{folder}: expected metadata.csv, found metadata.jsonl; choose another folder")
    header = tuple(next(read_csv(metadata), (1, [], None))[1]) if metadata.is_file() else COLUMNS
    if header != COLUMNS:
        raise UserError(f"{metadata}: expected the columns {','.join(COLUMNS)}, found {','.join(header)}")
    records = read_split(folder).records if metadata.is_file() else ()
    if not own.is_file() and not records:
        palette.save(own)
    if Palette.load(find_palette(folder)).fingerprint != palette.fingerprint:
        raise UserError(f"{folder}: its palette differs from the mask's; choose another folder")
    return [(record.image_name, record.mask_name, record.caption) for record in records]


def _reserve_number(folder: Path) -> int:
    """The first number above all that are taken, reserved by its empty mask file."""
    names = [path.stem for name in ("images", "masks") for path in (folder / name).glob("*.png")]
    number = max([int(name) for name in names if name.isdecimal()], default=-1) + 1
    while True:
        with suppress(FileExistsError):
            (folder / "masks" / f"{number:06d}.png").open("xb").close()
            return number
        number += 1
