"""Rows of (image, mask, captions) as other people keep them: CSV and JSON lines, parquet, saved `datasets`."""

import csv
import json
from collections.abc import Iterable, Iterator
from os.path import abspath, isfile
from pathlib import Path
from typing import Any, NamedTuple

from segcn.data.config import ImportConfig
from segcn.data.metadata import STRAY, SWALLOWED
from segcn.utils.errors import UserError, refuse_failed

CANDIDATES = {
    "image_column": ("file_name", "image_file_name", "image"),
    "conditioning_image_column": ("conditioning_image_file_name", "conditioning_image"),
    "caption_column": ("text",),
}  # tried in this order where a flag names none: those of the contract, then diffusers'
Columns = tuple[str, str, str | None]  # of image, mask and caption


class Row(NamedTuple):
    """One pair: where it stands, its files (or what is in them) and its captions."""

    where: str
    image: Path | bytes
    mask: Path | bytes
    captions: tuple[str, ...]


def file_rows(table: Path, config: ImportConfig) -> list[Row]:
    """Every row of a .csv, .jsonl or .json file; rows of the same image and mask become one with all their captions.

    UserError names the first line that is wrong and how many more are.
    """
    rows, problems, columns = [], [], None
    for line, fields in _read_table(table):
        columns = columns or choose_columns(fields, config, f"{table}, line {line}")
        try:
            rows.append(_row(f"{table}, line {line}", fields, columns, table.parent, config))
        except UserError as error:
            problems.append(str(error))
    refuse_failed(problems, len(problems) + len(rows))
    return _merged(rows)


def arrow_rows(dataset: Any, name: str, folder: Path, config: ImportConfig) -> Iterator[Row]:
    """Every row of a `datasets` object with images as they are stored, one at a time; none is decoded."""
    from datasets import Image

    columns = choose_columns(dataset.column_names, config, name)
    dataset = dataset.select_columns([column for column in columns if column])
    row = -1
    try:
        for column in columns[:2]:
            dataset = dataset.cast_column(column, Image(decode=False))
        for row, fields in enumerate(dataset):
            yield _row(f"{name}, row {row}", fields, columns, folder, config)
    except (TypeError, ValueError, RuntimeError) as error:  # pyarrow's are among these
        where = f"{name}, after row {row}" if row >= 0 else name
        raise UserError(f"{where}: cannot be read as images in {columns[0]} and {columns[1]}: {error}") from None


def choose_columns(names: Iterable[str], config: ImportConfig, where: str) -> Columns:
    """The columns of image, mask and caption; there may be no captions where --caption is given."""
    names = list(names)
    image, mask, caption = (_column(flag, names, config, where) for flag in CANDIDATES)
    return image, mask, caption or None


def _column(flag: str, names: list[str], config: ImportConfig, where: str) -> str:
    """The column that a flag names, else the first that it may be; "" for captions where --caption is given."""
    given, candidates = getattr(config, flag), CANDIDATES[flag]
    found = [column for column in ((given,) if given else candidates) if column in names]
    if not found and (given or flag != "caption_column" or not config.caption):
        expected = given or " or ".join(candidates)
        raise UserError(f"{where}: expected a column {expected}, found {', '.join(names)}; name it by --{flag}")
    return found[0] if found else ""


def captions_of(told: Any, config: ImportConfig) -> tuple[str, ...]:
    """A caption or a list of them; none at all is UserError without --caption."""
    captions = told if isinstance(told, list) else [told]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        raise UserError(f"expected a caption or a list of captions, found {str(told)[:80]!r}")
    if any(caption and ("\0" in caption or STRAY.search(caption)) for caption in captions):
        raise UserError(f"expected UTF-8 text, found {captions!r:.80}")
    written = tuple(dict.fromkeys(caption.strip() for caption in captions if caption and caption.strip()))
    if not written and not config.caption:
        raise UserError("expected a caption, found none; --caption TEXT is used where a row has none")
    return written


def _row(where: str, fields: dict[str, Any], columns: Columns, folder: Path, config: ImportConfig) -> Row:
    files: list[Path | bytes] = []
    column: str | None = None
    try:
        for column in columns[:2]:
            files.append(_file(fields.get(column), folder))
        column = columns[2]
        return Row(where, files[0], files[1], captions_of(fields.get(column) if column else None, config))
    except UserError as error:
        raise UserError(f"{where}: {f'column {column}: ' if column else ''}{error}") from None


def _file(cell: Any, folder: Path) -> Path | bytes:
    """The file that a cell names, or the bytes it holds; UserError where it holds neither."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str) or not cell.strip():
        raise UserError(f"expected a file, found {str(cell)[:80]!r}")
    if "://" in cell:
        raise UserError(f"{cell!r} is a URL, which is never downloaded: fetch the files first, then name their paths")
    places = [base / name for name in dict.fromkeys((cell, cell.replace("\\", "/"))) for base in (folder, Path.cwd())]
    for place in places:  # an absolute path is the same from both
        if isfile(place):
            return Path(abspath(place))
    looked = " and ".join(dict.fromkeys(str(place) for place in places))
    raise UserError(f"expected a regular file, found none at {cell!r} (looked for {looked})")


def _merged(rows: Iterable[Row]) -> list[Row]:
    found: dict[tuple, Row] = {}
    for row in rows:
        first = found.setdefault((row.image, row.mask), row)
        if first is not row:
            captions = tuple(dict.fromkeys(first.captions + row.captions))
            found[row.image, row.mask] = first._replace(captions=captions)
    return list(found.values())


def _read_table(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of every row that is not blank."""
    read = {".csv": _read_csv, ".jsonl": _read_json_lines}.get(table.suffix.lower(), _read_json)
    try:
        yield from read(table)
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: expected UTF-8 text ({error}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{table}: cannot be read: {error}") from None


def _read_csv(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise UserError(f"{table}, line 1: expected different columns, found {','.join(header)}")
            line = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise UserError(
                        f"{table}, line {line}: expected {len(header)} fields, found {len(fields)}:"
                        f" {str(fields)[:200]};"
                        " a caption with a comma stands in double quotes"
                    )
                if reader.line_num > line and any(map(SWALLOWED.search, fields)):
                    raise UserError(f"{table}, line {line}: a field goes on over a line that names an image;"
                                    " is a double quote left open?")  # fmt: skip
                if fields:
                    yield line, dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{table}, line {line}: {error}; is a double quote left open?") from None


def _read_json_lines(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, _object(text, f"{table}, line {line}")


def _read_json(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One array of objects (each counted as a line), or JSON lines."""
    text = table.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(table)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table}: expected JSON: {error}") from None
    for line, row in enumerate(rows, start=1):
        yield line, _object(json.dumps(row), f"{table}, line {line}")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected one JSON object a line: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object of columns, found {str(row)[:80]}")
    return row
