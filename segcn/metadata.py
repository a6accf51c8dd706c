"""The lines of a metadata.csv or metadata.jsonl: read each with what is wrong with it, and written whole."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from segcn.errors import UserError

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
    rows = _csv_rows(metadata)
    header, fault = next(rows, (1, [], None))[1:]
    fault = fault or _header_fault(header)
    if fault:
        raise UserError(f"{metadata}, line 1: {fault}")
    image, mask, text = (header.index(column) for column in COLUMNS)
    for number, fields, fault in rows:
        if fault is None and len(fields) == len(header):
            yield Line(number, fields[image], fields[mask], (fields[text],))
        elif fault or fields:
            padded = [_clean(field) for field in fields] + [""] * len(header)
            message = fault or _count_fault(header, fields)
            yield Line(number, padded[image], padded[mask], (padded[text],), ("metadata", message))


def _csv_rows(metadata: Path) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield (first line, fields, fault) of every row, the header and blank ones too; after a fault it reads on."""
    first = 1
    with metadata.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            try:
                fields = next(reader)
                fault = _text_fault("".join(fields)) or (_swallowed(fields) if reader.line_num > first else None)
            except StopIteration:
                return
            except csv.Error as error:
                fields, fault = [], f"{error}; is a double quote left open?"
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
    """A quote that is left open swallows rows up to the next one: such a field names a picture on a later line."""
    if any(SWALLOWED.search(field) for field in fields):
        return "a quoted field goes on over a line that names a picture; is a double quote left open?"
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
