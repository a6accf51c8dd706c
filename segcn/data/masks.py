"""Mask files as class ids, class ids as palette PNGs, and as the colors of the control image."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from segcn.data.files import open_image
from segcn.data.palette import IGNORE, Label, Palette
from segcn.utils.errors import UserError

LOSSY = ("JPEG", "MPO")  # formats that change labels
LOW_BIT_GREY = {
    "L;2": 85,
    "L;4": 17,
}  # Pillow stretches 2- and 4-bit grey PNG files to 0..255 by these factors


def read_mask(path: str | Path, palette: Palette) -> np.ndarray:
    """Read a mask file as class ids, uint8 [H, W]; labels marked ignore are read as 255.

    Palette, grey, 1-bit and 16-bit files hold ids; RGB files are read through the palette's colors (alpha is
    unused). UserError names the values or colors that the palette lacks, with their pixel counts.
    """
    return read_counted_mask(path, palette)[0]


def read_counted_mask(path: str | Path, palette: Palette) -> tuple[np.ndarray, np.ndarray]:
    """As `read_mask`, and the pixels of each id, int64 [256]."""
    with open_image(path, "mask") as image:
        stretch = LOW_BIT_GREY.get(_raw_mode(image), 1)
        image.load()
        if image.mode == "F":
            raise UserError(f"{path}: expected whole numbers, class ids, found a mask of fractions (mode F)")
        lossy, own_colors = image.format in LOSSY, image.getpalette() if image.mode == "P" else None
        color_coded = image.mode not in ("P", "PA", "L", "LA", "1") and not image.mode.startswith("I")
        values = np.array(image.convert("RGB") if color_coded else image)
        values = values[..., 0] if image.mode in ("PA", "LA") else values
        counts = np.array(image.histogram()) if image.mode in ("P", "L") and stretch == 1 else None
    if color_coded:
        values = _ids_of_colors(values, palette, path, lossy)
    elif counts is None:
        values = _ids_of_values(values.astype(np.int32) // stretch, palette, path, lossy)
    else:
        _ids_of_values(np.flatnonzero(counts), palette, path, lossy, counts[counts > 0])
        _refuse_reindexed(np.flatnonzero(counts).tolist(), own_colors, palette, path)
        return _as_classes(values, counts, palette)
    return values, np.bincount(values.ravel(), minlength=256)


def write_mask(path: str | Path, mask: np.ndarray, palette: Palette) -> None:
    """Write class ids, uint8 [H, W], as a palette PNG: its array is the ids, its RGB view the colors.

    ValueError for another type or shape.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"expected uint8 [H, W], found {mask.dtype} {list(mask.shape)}")
    image = Image.fromarray(mask)
    image.putpalette(palette.table.tobytes())
    image.save(path, format="PNG")


def colorize(mask: np.ndarray, palette: Palette) -> np.ndarray:
    """Class ids, uint8 [..., H, W], as the palette's colors, uint8 [..., H, W, 3]."""
    return palette.table[mask]


def code_of(color: Iterable[Any]) -> Any:
    """A color as 0xRRGGBB, of three numbers or three arrays of int32."""
    red, green, blue = color
    return red << 16 | green << 8 | blue


def color_codes(rgb: np.ndarray) -> np.ndarray:
    """Colors, uint8 [..., 3], as 0xRRGGBB, int32 [...]."""
    return code_of(np.moveaxis(rgb.astype(np.int32), -1, 0))


def color_of(code: int) -> tuple[int, int, int]:
    """The color that 0xRRGGBB stands for."""
    return code >> 16, code >> 8 & 255, code & 255


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize class ids, uint8 [H, W], to (height, width) by NEAREST, the one filter that invents no class."""
    height, width = size
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _raw_mode(image: ImageFile.ImageFile) -> str:
    args = image.tile[0][3] if image.tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _ids_of_values(
    values: np.ndarray, palette: Palette, path: str | Path, lossy: bool, counts: np.ndarray | None = None
) -> np.ndarray:
    """Integers of any range as ids; `counts`: how many pixels each stands for, where it is more than one."""
    in_range = (values >= 0) & (values <= IGNORE)
    ids = np.where(in_range, palette._class_of_id[np.where(in_range, values, 0)], -1)
    undeclared = ids < 0
    if undeclared.any():
        each = np.unique(values[undeclared], return_counts=True)
        each = each if counts is None else (values[undeclared], counts[undeclared])
        found = _counted(*each, "value {}".format)
        raise UserError(_undeclared_message(path, found, f"the ids {_listed(palette.ids)}, or 255", lossy))
    return ids.astype(np.uint8)


def _as_classes(values: np.ndarray, counts: np.ndarray, palette: Palette) -> tuple[np.ndarray, np.ndarray]:
    """Declared values, uint8, and their pixels, as class ids: those of labels marked ignore become 255."""
    moved = [value for value in np.flatnonzero(counts).tolist() if palette._class_of_id[value] != value]
    if moved:
        values = palette._class_of_id.astype(np.uint8)[values]
        counts[IGNORE] += counts[moved].sum()
        counts[moved] = 0
    return values, counts


def _ids_of_colors(rgb: np.ndarray, palette: Palette, path: str | Path, lossy: bool) -> np.ndarray:
    codes = color_codes(rgb)
    declared = color_codes(np.array([label.color for label in palette.labels], np.uint8))
    order = np.argsort(declared)
    nearest = np.searchsorted(declared[order], codes).clip(max=len(order) - 1)
    undeclared = declared[order][nearest] != codes
    if undeclared.any():
        found = _counted(*np.unique(codes[undeclared], return_counts=True), _color_name)
        raise UserError(_undeclared_message(path, found, "colors of palette.json", lossy))
    return palette._class_of_id[np.array(palette.ids)[order][nearest]].astype(np.uint8)


def _color_name(code: int) -> str:
    return f"color {list(color_of(code))}"


def _refuse_reindexed(values: list[int], own_colors: list[int] | None, palette: Palette, path: str | Path) -> None:
    """Refuse a palette file that an image editor renumbered: its colors belong to other values."""
    if own_colors is None:
        return
    own = {value: tuple(own_colors[3 * value : 3 * value + 3]) for value in values}
    declared: dict[tuple, list[Label]] = {}  # labels marked ignore may share a color
    for label in palette.labels:
        declared.setdefault(label.color, []).append(label)
    moved = [value for value, color in own.items() if color in declared
             and value not in [label.id for label in declared[color]]]  # fmt: skip
    if moved and len(set(own.values())) == len(own) > 1 and all(color in declared for color in own.values()):
        label = declared[own[moved[0]]][0]
        raise UserError(
            f"{path}: value {moved[0]} has the color of {label.name!r}, id {label.id}: an image editor"
            " seems to have renumbered this palette file; save the mask as RGB, which is read by its colors"
        )


def _counted(values: np.ndarray, counts: np.ndarray, name) -> str:
    order = np.argsort(-counts, kind="stable")[:5]
    shown = ", ".join(f"{name(int(values[k]))} ({counts[k]} pixels)" for k in order)
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids)) if len(ids) <= 20 else f"{min(ids)} to {max(ids)} in palette.json"


def _undeclared_message(path: str | Path, found: str, expected: str, lossy: bool) -> str:
    mend = (
        "JPEG compression changes labels: save masks as PNG, from the original labels"
        if lossy
        else "declare it there, or give unlabelled pixels the value 255 (in RGB masks: the color of a label"
        ' with "ignore": true)'
    )
    return f"{path}: expected {expected}, found {found} that palette.json does not declare; {mend}"
