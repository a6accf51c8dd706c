"""The lines of a metadata.csv or metadata.jsonl: read each with what is wrong with it, and written whole."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from segcn.errors import UserError

COLUMNS = ("file_name", "conditioning_image_file_name", "text")


class Line(NamedTuple):
    """One row: its first line, counted from 1, its fields in the order of COLUMNS ("" where it has none)."""

    number: int
    fields: tuple[str, str, str]
    fault: tuple[str, str] | None = None  # kind (metadata or caption) and message


def read_lines(metadata: Path) -> Iterator[Line]:
    """Every row that is not blank; UserError where the header is wrong."""
    return _jsonl_lines(metadata) if metadata.suffix == ".jsonl" else _csv_lines(metadata)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as UTF-8, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("wb") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _csv_lines(metadata: Path) -> Iterator[Line]:
    rows = _csv_rows(metadata)
    header, fault = next(rows, (1, [], None))[1:]
    fault = fault or _column_fault(header)
    if fault:
        raise UserError(f"{metadata}, line 1: {fault}")
    for number, fields, fault in rows:
        fault = fault or _count_fault(header, fields)
        if fault:
            padded = fields + [""] * len(header)
            yield Line(number, _in_order(dict(zip(header, padded, strict=False))), ("metadata", fault))
        elif fields:
            yield Line(number, _in_order(dict(zip(header, fields, strict=True))))


def _csv_rows(metadata: Path) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield (first line, fields, fault) of every row, the header and blank ones too; after a fault it reads on."""
    first = 1
    with metadata.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            try:
                fields, fault = next(reader), None
            except StopIteration:
                return
            except csv.Error as error:
                fields, fault = [], f"{error}; is a double quote left open?"
            if reader.line_num > first and not fault:
                fault = (
                    f"the row goes on to line {reader.line_num}; is a double quote left open?"
                    " (captions with line breaks belong in metadata.jsonl)"
                )
            yield first, [_clean(field) for field in fields], _encoding_fault(fields) or fault
            first = reader.line_num + 1


def _encoding_fault(fields: list[str]) -> str | None:
    """Bytes that are not UTF-8 arrive as lone surrogates."""
    strays = [letter for field in fields for letter in field if "\udc80" <= letter <= "\udcff"]
    return f"expected UTF-8 text, found byte {ord(strays[0]) - 0xDC00:#x}; save the file as UTF-8" if strays else None


def _clean(field: str) -> str:
    """Lone surrogates, which no file can hold, become question marks."""
    return field if field.isascii() else field.encode("utf-8", "replace").decode()


def _count_fault(header: list[str], fields: list[str]) -> str | None:
    if not fields or len(fields) == len(header):
        return None
    return (
        f"expected {len(header)} fields, found {len(fields)}: {fields};"
        ' a caption with a comma stands in double quotes, e.g. "a hill, at dusk"'
    )


def _jsonl_lines(metadata: Path) -> Iterator[Line]:
    for number, text in enumerate(metadata.read_bytes().splitlines(), start=1):
        if text.strip():
            try:
                row = json.loads(text.decode("utf-8-sig"))
            except ValueError as error:
                yield Line(number, ("", "", ""), ("metadata", f"expected one JSON object a line: {error}"))
                continue
            yield Line(number, _in_order(row if isinstance(row, dict) else {}), _row_fault(row))


def _row_fault(row: object) -> tuple[str, str] | None:
    if not isinstance(row, dict):
        return "metadata", f"expected an object of strings, found {_clean(str(row))[:80]}"
    missing = _column_fault(list(row))
    if missing:
        return "metadata", missing
    wrong = [column for column in COLUMNS if not isinstance(row[column], str) or _clean(row[column]) != row[column]]
    if not wrong:
        return None
    kind = "caption" if wrong == [COLUMNS[2]] else "metadata"
    return kind, f"column {wrong[0]}: expected an object of strings, found {_clean(str(row[wrong[0]]))[:80]}"


def _in_order(row: dict[str, object]) -> tuple[str, str, str]:
    values = [row.get(column, "") for column in COLUMNS]
    return tuple(_clean(value) if isinstance(value, str) else "" for value in values)


def _column_fault(columns: list[str]) -> str | None:
    missing = [column for column in COLUMNS if columns.count(column) != 1]
    if not missing:
        return None
    return (
        f"expected the column {missing[0]} once (the columns are {','.join(COLUMNS)}),"
        f" found {_clean(','.join(columns)) or 'nothing'}"
    )
