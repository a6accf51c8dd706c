"""Rows of (image, mask, captions) as other people keep them: CSV and JSON lines, parquet, saved `datasets`."""

import json
from collections.abc import Iterable, Iterator
from os.path import abspath, isfile
from pathlib import Path
from typing import Any, NamedTuple

from segcn.data.config import ImportConfig
from segcn.data.metadata import STRAY, read_csv
from segcn.utils.errors import UserError, refuse_failed

CANDIDATES = {
    "image_column": ("file_name", "image_file_name", "image"),
    "conditioning_image_column": ("conditioning_image_file_name", "conditioning_image"),
    "caption_column": ("text",),
}  # tried in this order where a flag names none: those of the contract, then diffusers'


class Row(NamedTuple):
    """One pair: its place in the source, its files (or what is in them) and its captions."""

    where: str
    image: Path | bytes
    mask: Path | bytes | tuple[Path, ...]  # several: one binary file an object
    captions: tuple[str, ...]
    split: str = ""
    more: tuple[tuple[str, str], ...] = ()  # further columns of a table and what they hold
    group: str = ""  # rows of a group, such as a patient, stay on one side of a split


def file_rows(table: Path, config: ImportConfig) -> list[Row]:
    """Every row of a .csv, .jsonl or .json file; rows of the same image and mask become one with all their captions.

    UserError names the first line that is wrong and how many more are.
    """
    rows: dict[tuple, Row] = {}
    count, problems, left, columns = 0, [], [], None
    try:
        for line, fields, fault in (_csv_rows if table.suffix.lower() == ".csv" else _json_rows)(table):
            where, count = f"{table}, line {line}", count + 1
            if fault is not None:
                problems.append(f"{where}: {fault}")
                continue
            columns = columns or choose_columns(fields, config, where)
            if config.skip_unpaired and not all(fields.get(column) for column in columns[:2]):
                left.append(line)
                continue
            try:
                row = _row(where, fields, columns, table.parent, config)
            except UserError as error:
                problems.append(str(error))
                continue
            first = rows.setdefault((row.image, row.mask), row)
            captions = tuple(dict.fromkeys(first.captions + row.captions))
            rows[row.image, row.mask] = first._replace(captions=captions)
    except OSError as error:
        raise UserError(f"{table}: cannot be read: {error}") from None
    empty = bool(problems) and "expected a file, found ''" in problems[0]
    refuse_failed(problems, count, fix="; --skip_unpaired leaves such rows out" if empty else "")
    if left:
        print(f"{table}: left out: {len(left)} rows without an image or a mask, in line {left[0]} and so on")
    return list(rows.values())


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


def choose_columns(names: Iterable[str], config: ImportConfig, where: str) -> list[str]:
    """The columns of image, mask and caption: what a flag names, else the first candidate; UserError without one.

    The last one is "" where there are no captions and --caption is given.
    """
    names, chosen = list(names), []
    for flag, candidates in CANDIDATES.items():
        given = getattr(config, flag)
        found = [column for column in ((given,) if given else candidates) if column in names]
        if not found and (given or flag != "caption_column" or not config.caption):
            expected = given or " or ".join(candidates)
            raise UserError(f"{where}: expected a column {expected}, found {', '.join(names)}; name it by --{flag}")
        chosen.append(found[0] if found else "")
    return chosen


def captions_of(cell: Any, config: ImportConfig) -> tuple[str, ...]:
    """A caption or a list of them; none at all is UserError without --caption."""
    captions = cell if isinstance(cell, list) else [cell]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        raise UserError(f"expected a caption or a list of captions, found {str(cell)[:80]!r}")
    if any(caption and ("\0" in caption or STRAY.search(caption)) for caption in captions):
        raise UserError(f"expected UTF-8 text, found {captions!r:.80}")
    written = tuple(dict.fromkeys(caption.strip() for caption in captions if caption and caption.strip()))
    if not written and not config.caption:
        raise UserError("expected a caption, found none; --caption TEXT is used where a row has none")
    return written


def _row(where: str, fields: dict[str, Any], columns: list[str], folder: Path, config: ImportConfig) -> Row:
    image, mask, text = columns
    column, split = image, config.split_column or ("split" if "split" in fields else "")
    if split and split not in fields:
        raise UserError(f"{where}: expected a column {split}, found {', '.join(fields)}; name it by --split_column")
    if config.group_column and config.group_column not in fields:
        raise UserError(f"{where}: expected a column {config.group_column}, found {', '.join(fields)}: --group_column")
    more = tuple((name, str(cell)) for name, cell in fields.items()
                 if name not in (*columns, split) and isinstance(cell, str | int | float))  # fmt: skip
    try:
        image_file, column = _file_of(fields.get(image), folder), mask
        mask_file, column = _file_of(fields.get(mask), folder), text
        captions = captions_of(fields.get(text) if text else None, config)
        group = str(fields.get(config.group_column, "")) if config.group_column else ""
        return Row(where, image_file, mask_file, captions, str(fields.get(split) or "") if split else "", more, group)
    except UserError as error:
        raise UserError(f"{where}: {f'column {column}: ' if column else ''}{error}") from None


def _file_of(cell: Any, folder: Path) -> Path | bytes:
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


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(line, fields, fault) of every row that is not blank; UserError where the header is wrong."""
    rows = read_csv(table, find_delimiter(table))
    _, header, fault = next(rows, (1, [], None))
    if len(set(header)) < len(header):
        fault = f"expected different columns, found {','.join(header)}"
    if fault:
        raise UserError(f"{table}, line 1: {fault}")
    for line, fields, fault in rows:
        yield line, dict(zip(header, fields, strict=False)), fault


def find_delimiter(table: Path) -> str:
    """What separates the columns in the first line of a table: a comma, a semicolon or a tab."""
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    return max(",;\t", key=lambda sign: (first.count(sign), sign == ","))


def _json_rows(table: Path) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """The same of JSON lines; a .json file may be one array, whose objects are counted as lines."""
    data = table.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if table.suffix.lower() == ".json" and data.lstrip().startswith(b"["):
        try:
            lines = [json.dumps(row).encode() for row in json.loads(data)]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}: expected JSON: {error}") from None
    else:
        lines = data.splitlines()
    for line, text in enumerate(lines, start=1):
        if text.strip():
            try:
                row = json.loads(text)
                fault = None if isinstance(row, dict) else f"expected an object of columns, found {str(row)[:80]}"
                yield line, row, fault
            except (ValueError, RecursionError) as error:
                yield line, {}, f"expected one JSON object a line, in UTF-8: {error}"
