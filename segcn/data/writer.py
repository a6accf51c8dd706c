"""Rows of a data set: image and mask as files, the files around them, and rows appended one at a time."""

import csv
import io
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segcn.data.masks import write_mask
from segcn.data.metadata import COLUMNS, read_split, write_metadata
from segcn.data.palette import Palette
from segcn.utils.errors import UserError
from segcn.utils.io import write_whole

SAVING = threading.Lock()


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
