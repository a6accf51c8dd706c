"""Images without masks as a split: any folder of images, or the rows of a data set with their masks left aside."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.data.files import DEEP, FORMATS, Boundary, open_image
from segcn.data.metadata import COLUMNS, METADATA, Record, Split, check_split, read_csv
from segcn.data.palette import Label, Palette
from segcn.utils.errors import UserError, refuse_failed

NO_CLASSES = Palette((Label(0, "image", (255, 255, 255)),))  # a palette has a class; here no pixel is of it
NOT_IMAGES = ("masks", "mask", "labels", "label", "annotations", "conditioning_images", "conditioning_image", "gtFine")
IMAGE_ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


def unlabelled_split(dataset_name: str | Path) -> Split:
    """The images of a folder, of a metadata.csv or .jsonl, or of a data set's train/, as rows without masks.

    A folder without metadata gives all images in it and below it, but for hidden ones and folders of masks; their
    captions are the lines of NAME.txt beside NAME.png. Rows without a caption have the empty one. UserError where no
    image is there, or where rows are wrong.
    """
    path = Path(dataset_name)
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; expected a folder of images, or a data set")
    folders = [path, path / "train"] if path.is_dir() else [path.parent]
    named = [folder / name for folder in folders for name in METADATA] if path.is_dir() else [path]
    metadata = next((file for file in named if file.is_file()), None)
    if metadata is None:
        return Split(path, path, NO_CLASSES, tuple(_found_in(path)))
    records, boundary, failed = [], Boundary(metadata.parent), []
    for row, (line, image, captions) in enumerate(_rows_of(metadata)):
        if problem := boundary.problem(image):
            failed.append(f"{metadata}, line {line} (row {row}): column {COLUMNS[0]}: {problem[1]}")
        records.append(Record(row, line, str(metadata.parent), image, "", captions))
    if not records:
        raise UserError(f"{metadata}: expected at least one row under the header, found none")
    refuse_failed(failed, len(records))
    return Split(metadata.parent, metadata, NO_CLASSES, tuple(records))


def _found_in(folder: Path) -> Iterator[Record]:
    """The image files of a folder without metadata, in the order of their names."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in NOT_IMAGES)
        kept = (name for name in names if name[0] != "." and Path(name).suffix.lower() in IMAGE_ENDINGS)
        found += [Path(place, name).relative_to(folder).as_posix() for name in kept]
    if not found:
        raise UserError(f"{folder}: expected images (.png, .jpg, .tif ...) or metadata.csv, found none")
    boundary, failed = Boundary(folder), []
    for name in found:
        if problem := boundary.problem(name):
            failed.append(f"{folder}: {problem[1]}")
    refuse_failed(failed, len(found))
    for row, name in enumerate(sorted(found)):
        yield Record(row, row + 1, str(folder), name, "", captions_beside(folder / name) or ("",))


def captions_beside(file: Path) -> tuple[str, ...]:
    """The captions of NAME.png: the lines of NAME.txt beside it."""
    text = file.with_suffix(".txt")
    lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines() if text.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())


def _rows_of(metadata: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Line, image and captions of each row; a table may lack the columns of masks and captions."""
    if metadata.suffix == ".csv":
        rows = read_csv(metadata)
        header, fault = next(rows, (1, [], None))[1:]
        if fault or COLUMNS[0] not in header:
            raise UserError(f"{metadata}, line 1: {fault or f'expected the column {COLUMNS[0]}, found {header}'}")
        image, text = header.index(COLUMNS[0]), header.index(COLUMNS[2]) if COLUMNS[2] in header else None
        for line, fields, fault in rows:
            if fault:
                raise UserError(f"{metadata}, line {line}: {fault}")
            yield line, fields[image], (fields[text].strip() if text is not None else "",)
        return
    for line, written in enumerate(metadata.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not written.strip():
            continue
        try:
            one = json.loads(written)
            captions = one.get(COLUMNS[2], "")
            captions = captions if isinstance(captions, list) else [captions]
            yield line, str(one[COLUMNS[0]]), tuple(str(caption).strip() for caption in captions) or ("",)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f"expected a JSON object with {COLUMNS[0]}"
            raise UserError(f"{metadata}, line {line}: {expected}, found {type(error).__name__}: {error}") from None


def check_images(split: Split, log) -> None:
    """Decode every image, as `check_split` does; UserError, too, where images of 16 bits would come out black."""
    check_split(split, log)
    failed = []
    for record in split.records:
        with open_image(record.image) as image:
            if image.mode[0] == "I" and (deepest := int(np.asarray(image).max())) < DEEP:
                failed.append(
                    f"{record.image}: its largest number is {deepest} of 65535, which is nearly black: scale the"
                    " numbers to 8 or to 16 bits first"
                )
    refuse_failed(failed, len(split))
