"""Pictures of one size in a sheet: laid out with white gaps, and cut out again."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

GAP = 4  # px
COLUMNS = 8  # at most; more pictures go on below
WIDEST = 2048  # px


def lay_out(lines: Sequence[np.ndarray]) -> np.ndarray:
    """Lines of N pictures each, uint8 [N, R, R, 3], one below the other: uint8 [H, W, 3], at most 2048 pixels wide.

    The first line holds masks: where pictures are made smaller, its colours stay the palette's. More than eight columns
    go on below the last line, all lines again.
    """
    count, side = lines[0].shape[:2]
    columns = min(count, COLUMNS)
    side = min(side, (WIDEST - GAP * (columns - 1)) // columns)
    blocks = [slice(start, start + columns) for start in range(0, count, columns)]
    rows = [(line[block], number == 0) for block in blocks for number, line in enumerate(lines)]
    sheet = np.full((len(rows) * (side + GAP) - GAP, columns * (side + GAP) - GAP, 3), 255, np.uint8)
    for row, (pictures, masks) in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (side + GAP), column * (side + GAP)
            sheet[top : top + side, left : left + side] = _resized(picture, side, masks)
    return sheet


def write_sheet(path: Path, lines: Sequence[np.ndarray]) -> np.ndarray:
    """Lay out lines of pictures, write them as PNG and return the sheet; the file knows the number of its columns."""
    sheet, known = lay_out(lines), PngInfo()
    known.add_text("columns", str(min(len(lines[0]), COLUMNS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, pnginfo=known)
    return sheet


def read_sheet(path: Path) -> list[list[np.ndarray]]:
    """The pictures of each line of a sheet, uint8 [R, R, 3]."""
    with Image.open(path) as image:
        return cut_out(np.asarray(image), int(image.info["columns"]))


def cut_out(sheet: np.ndarray, columns: int) -> list[list[np.ndarray]]:
    """The pictures of each line of a sheet, uint8 [R, R, 3], by the number of its columns."""
    step = (sheet.shape[1] + GAP) // columns
    rows = (sheet.shape[0] + GAP) // step
    tops, lefts = (range(0, number * step, step) for number in (rows, columns))
    return [[sheet[top : top + step - GAP, left : left + step - GAP] for left in lefts] for top in tops]


def _resized(picture: np.ndarray, side: int, mask: bool) -> np.ndarray:
    if picture.shape[0] == side:
        return picture
    method = Image.Resampling.NEAREST if mask else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize((side, side), method))
