"""Mask files as class ids, class ids as palette PNGs, and as the colors of the control image."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from segcn.data.files import open_image
from segcn.data.palette import IGNORE, Label, Palette
from segcn.utils.errors import UserError

LOSSY = ("JPEG", "MPO", "AVIF")  # formats that change labels; WebP does unless it says that it is lossless
LOW_BIT_GREY = {"L;2": 85, "L;4": 17}  # Pillow stretches 2- and 4-bit grey files to 0..255 by these factors
Color = tuple[int, int, int]


@dataclass(frozen=True)
class StoredMask:
    """A mask file as it is stored, before any palette says what its values mean."""

    path: str | Path
    values: np.ndarray  # [H, W]: class ids, uint8 (int32 where one is out of its range), or colors as 0xRRGGBB, int32
    colored: bool  # the values are colors
    lossy: bool  # the format changes labels
    own_palette: tuple[int, ...]  # of a palette file: red, green and blue of the values 0, 1, ...

    @cached_property
    def pixels(self) -> dict[int, int]:
        """How many pixels hold each value."""
        if self.values.dtype == np.uint8:
            counts = count_ids(self.values)
            return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
        values, counts = np.unique(self.values, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    @property
    def own_colors(self) -> dict[int, Color]:
        """The color of each value by the file's own palette; empty where that doesn't give each a different one."""
        if not self.own_palette or 3 * max(self.pixels) + 3 > len(self.own_palette):
            return {}
        red, green, blue = (self.own_palette[channel::3] for channel in range(3))
        own = {value: (red[value], green[value], blue[value]) for value in self.pixels}
        return own if len(set(own.values())) == len(own) else {}


def read_stored_mask(path: str | Path) -> StoredMask:
    """Decode a mask file; UserError where it can't be decoded or holds fractions.

    Palette, grey and 1-bit files give their values (2- and 4-bit ones not stretched), all other files their colors;
    alpha is unused. A grey TIFF whose 0 is white is read by the brightness it shows.
    """
    with open_image(path, "mask") as image:
        stretch = next((by for raw, by in LOW_BIT_GREY.items() if image.tile and raw in str(image.tile[0][3])), 1)
        image.load()
        if image.mode == "F":
            raise UserError(f"{path}: expected whole numbers, class ids, found a mask of fractions (mode F)")
        colored = image.mode not in ("P", "PA", "L", "LA", "1") and not image.mode.startswith("I")
        values = np.array(image.convert("RGB") if colored else image)
        own_palette = tuple(image.getpalette() or ()) if image.mode == "P" else ()
        lossy = is_lossy(image)
    if colored:
        values = color_codes(values)
    elif values.ndim == 3:
        values = values[..., 0]
    if stretch > 1:
        values = values // stretch
    small = not colored and values.min() >= 0 and values.max() <= 255
    values = np.ascontiguousarray(values, np.uint8 if small else np.int32)
    return StoredMask(path, values, colored, lossy, own_palette)


def is_lossy(image: ImageFile.ImageFile) -> bool:
    """Whether the format of an open file changes labels."""
    if image.format != "WEBP":
        return image.format in LOSSY
    with open(image.filename, "rb") as file:
        return b"VP8L" not in file.read(4096)


def lossy_error(path: str | Path) -> UserError:
    """What a mask of such a format is refused with."""
    return UserError(
        f"{path}: expected a mask, found a lossy format, which changes labels: save it as PNG again, from the original"
        " labels. Masks of two classes, dark and light, are read by: segcn import SOURCE OUT --threshold 128"
    )


def read_mask(path: str | Path, palette: Palette) -> np.ndarray:
    """Read a mask file as class ids, uint8 [H, W]; labels marked ignore are read as 255.

    Palette, grey, 1-bit and 16-bit files hold ids; RGB files are read through the palette's colors (alpha is
    unused). UserError names the values or colors that the palette lacks, with their pixel counts, and a lossy file.
    """
    stored = read_stored_mask(path)
    if stored.lossy:
        raise lossy_error(path)
    if stored.colored:
        return _ids_of_colors(stored, palette)
    classes = palette.class_of_id
    undeclared = {value: n for value, n in stored.pixels.items() if not 0 <= value <= IGNORE or classes[value] < 0}
    if undeclared:
        ids = palette.ids
        declared = ", ".join(map(str, ids)) if len(ids) <= 20 else f"{min(ids)} to {max(ids)} in palette.json"
        raise _undeclared_error(stored, undeclared, f"the ids {declared}, or 255")
    _refuse_renumbered(stored, palette)
    if any(classes[value] != value for value in stored.pixels):
        return classes.astype(np.uint8)[stored.values]
    return stored.values.astype(np.uint8, copy=False)


def write_mask(path: str | Path | BinaryIO, mask: np.ndarray, palette: Palette) -> None:
    """Write class ids, uint8 [H, W], as a palette PNG: its array is the ids, its RGB view the colors.

    ValueError for another type or shape.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"expected uint8 [H, W], found {mask.dtype} {list(mask.shape)}")
    image = Image.fromarray(mask)
    image.putpalette(palette.table.tobytes())
    image.save(path, format="PNG")


def count_ids(mask: np.ndarray) -> np.ndarray:
    """How many pixels of a mask, uint8 [H, W], hold each id, int64 [256]."""
    return np.array(Image.fromarray(mask).histogram())


def colorize(mask: np.ndarray, palette: Palette) -> np.ndarray:
    """Class ids, uint8 [..., H, W], as the palette's colors, uint8 [..., H, W, 3]."""
    return palette.table[mask]


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize class ids, uint8 [H, W], to (height, width) by NEAREST, the one filter that invents no class."""
    height, width = size
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def code_of(color: Iterable[Any]) -> Any:
    """A color as 0xRRGGBB, of three numbers or three arrays of int32."""
    red, green, blue = color
    return red << 16 | green << 8 | blue


def color_codes(rgb: np.ndarray) -> np.ndarray:
    """Colors, uint8 [..., 3], as 0xRRGGBB, int32 [...]."""
    return code_of(np.moveaxis(rgb.astype(np.int32), -1, 0))


def color_of(code: int) -> Color:
    """The color of 0xRRGGBB."""
    return code >> 16, code >> 8 & 255, code & 255


def _ids_of_colors(stored: StoredMask, palette: Palette) -> np.ndarray:
    declared = color_codes(np.array([label.color for label in palette.labels], np.uint8))
    order = np.argsort(declared)
    nearest = np.searchsorted(declared[order], stored.values).clip(max=len(order) - 1)
    undeclared = declared[order][nearest] != stored.values
    if undeclared.any():
        codes, counts = np.unique(stored.values[undeclared], return_counts=True)
        found = dict(zip(codes.tolist(), counts.tolist(), strict=True))
        raise _undeclared_error(stored, found, "colors of palette.json")
    return palette.class_of_id[np.array(palette.ids)[order][nearest]].astype(np.uint8)


def _refuse_renumbered(stored: StoredMask, palette: Palette) -> None:
    """Refuse a palette file that an image editor renumbered: its colors belong to other values."""
    labels: dict[Color, list[Label]] = {}  # labels marked ignore may share a color
    for label in palette.labels:
        labels.setdefault(label.color, []).append(label)
    own = stored.own_colors
    if len(own) < 2 or not all(color in labels for color in own.values()):
        return
    for value, color in own.items():
        if value not in [label.id for label in labels[color]]:
            label = labels[color][0]
            raise UserError(
                f"{stored.path}: value {value} has the color of {label.name!r}, id {label.id}: an image editor seems"
                " to have renumbered this palette file; save the mask as RGB, which is read by its colors"
            )


def _undeclared_error(stored: StoredMask, pixels: dict[int, int], expected: str) -> UserError:
    """Values or colors without a label: the five most frequent of them, and what to do."""
    most = sorted(pixels, key=lambda value: -pixels[value])[:5]
    names = {value: f"color {list(color_of(value))}" if stored.colored else f"value {value}" for value in most}
    found = ", ".join(f"{name} ({pixels[value]} pixels)" for value, name in names.items())
    more = f" and {len(pixels) - 5} more" if len(pixels) > 5 else ""
    fix = "declare it there, or give unlabelled pixels the value 255 (in RGB: the color of a label with ignore)"
    if stored.colored and all(len(set(color_of(value))) == 1 for value in pixels):
        fix = "are these class ids in three channels? segcn import SOURCE OUT reads them so"
    undeclared = f"found {found}{more} that palette.json does not declare"
    return UserError(f"{stored.path}: expected {expected}, {undeclared}; {fix}")
