"""What mask files hold before there is a palette: where they are, and the pixels of every value or colour."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.errors import UserError
from segcn.files import READABLE, Boundary, open_image
from segcn.labels import IGNORE
from segcn.masks import LOSSY, LOW_BIT_GREY, colour_codes
from segcn.metadata import read_lines
from segcn.progress import Progress
from segcn.records import METADATA, find_splits

Colour = tuple[int, int, int]
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in READABLE}


@dataclass(frozen=True)
class MaskValues:
    """One mask file: the pixels of each id, or of each colour as 0xRRGGBB."""

    path: Path
    coloured: bool
    pixels: dict[int, int]
    own: dict[int, Colour]  # the file's own palette, of the values in it; empty where it does not tell them apart


@dataclass(frozen=True)
class Survey:
    """All mask files together."""

    coloured: bool  # values are colours as 0xRRGGBB, else ids
    pixels: Counter[int] = field(default_factory=Counter)  # of each value
    files: Counter[int] = field(default_factory=Counter)  # that hold it
    example: dict[int, Path] = field(default_factory=dict)  # one of them
    own: dict[tuple[int, Colour], Path] = field(default_factory=dict)  # value and colour in the files' own palettes

    def add(self, mask: MaskValues) -> None:
        """Count one more file."""
        self.pixels.update(mask.pixels)
        self.files.update(mask.pixels.keys())
        for value in mask.pixels:
            self.example.setdefault(value, mask.path)
        for pair in mask.own.items():
            self.own.setdefault(pair, mask.path)

    def told(self, values: Iterable[int]) -> str:
        """The most frequent of these values, with their pixels, files and one of the files."""
        ranked = sorted(values, key=lambda value: (-self.pixels[value], value))
        shown = ", ".join(
            f"{self.name(value)} ({self.pixels[value]:,} pixels in {self.files[value]:,} files,"
            f" e.g. {self.example[value]})"
            for value in ranked[:5]
        )
        return shown + (f" and {len(ranked) - 5} more" if len(ranked) > 5 else "")

    def name(self, value: int) -> str:
        """The value in words."""
        return f"colour #{value:06x}" if self.coloured else f"value {value}"


def survey(paths: Iterable[Path], log: Callable[[str], None] = print) -> Survey:
    """Count every mask; UserError names a file that is no mask, or two of different kinds."""
    unique = list(dict.fromkeys(paths))
    if not unique:
        raise UserError("expected masks, found none")
    progress = Progress("masks read", len(unique), log)
    found: dict[bool, Survey] = {}  # by whether they are coloured
    first: dict[bool, Path] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, mask in enumerate(pool.map(read_values, unique), start=1):
            found.setdefault(mask.coloured, Survey(mask.coloured)).add(mask)
            first.setdefault(mask.coloured, mask.path)
            progress(done)
    if len(found) > 1:
        raise UserError(
            f"expected masks of one kind, found colours in {first[True]} and class ids in {first[False]}:"
            " name the folder of the masks alone, or save all of them in one way"
        )
    return next(iter(found.values()))


def read_values(path: Path) -> MaskValues:
    """Count the values of one mask, which `masks.read_mask` would read through a palette; UserError if it is none."""
    with open_image(path, "mask") as image:
        if image.format in LOSSY:
            raise UserError(
                f"{path}: expected a mask, found a JPEG, whose compression changes labels: name the folder of the"
                " masks alone; masks that are JPEG must be saved as PNG again, from the original labels"
            )
        stretch = next((by for raw, by in LOW_BIT_GREY.items() if image.tile and raw in str(image.tile[0][3])), 1)
        image.load()
        if image.mode == "F":
            raise UserError(f"{path}: expected whole numbers, class ids, found a mask of fractions (mode F)")
        coloured = image.mode not in ("P", "PA", "L", "LA", "1") and not image.mode.startswith("I")
        values = colour_codes(np.asarray(image.convert("RGB"))) if coloured else np.asarray(image).astype(np.int32)
        colours = image.getpalette() if image.mode == "P" else None
        if image.mode in ("PA", "LA"):
            values = values[..., 0]
    distinct, counts = np.unique(values // stretch, return_counts=True)
    pixels = dict(zip(distinct.tolist(), counts.tolist(), strict=True))
    if len(pixels) > IGNORE + 1 - coloured:
        raise UserError(_too_many(path, pixels, coloured))
    return MaskValues(path, coloured, pixels, _own_colours(pixels, colours))


def is_dataset(folder: Path) -> bool:
    """Whether it is a data set, or the metadata file of one, rather than a folder of masks."""
    return folder.is_file() or any(any(folder.glob(f"{below}{name}")) for below in ("", "*/") for name in METADATA)


def mask_files(dataset: str | Path, log: Callable[[str], None] = print) -> list[Path]:
    """The masks of a data set by its metadata, of its folders masks/ or SPLIT/masks/, or of a folder of mask files.

    Only regular files inside the folder count. UserError where there is none.
    """
    folder = Path(dataset)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; expected a folder of masks, or a data set")
    if is_dataset(folder):
        return _named_masks(find_splits(folder), log)
    own = [folder / "masks"] if (folder / "masks").is_dir() else sorted(folder.glob("*/masks/"))
    boundary = Boundary(folder)
    masks = [
        path
        for place in own or [folder]
        for path in sorted(place.iterdir())
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and not boundary.problem(path.relative_to(folder).as_posix())
    ]
    if not masks:
        raise UserError(
            f"{folder}: expected mask files here, in masks/ or in SPLIT/masks/, found none;"
            " name the folder that holds them"
        )
    return masks


def _named_masks(splits: dict[str, Path], log: Callable[[str], None]) -> list[Path]:
    masks, left_out = [], 0
    for metadata in splits.values():
        boundary = Boundary(metadata.parent)
        for line in read_lines(metadata):
            readable = bool(line.mask) and not boundary.problem(line.mask)
            masks += [metadata.parent / line.mask] if readable else []
            left_out += not readable
    if not masks:
        raise UserError(f"{next(iter(splits.values()))}: no row names a mask that is there")
    if left_out:
        log(f"Left out: {left_out} rows whose mask is not to be found; segcn validate names them")
    return masks


def _own_colours(pixels: dict[int, int], colours: list[int] | None) -> dict[int, Colour]:
    told = {value: colours[3 * value : 3 * value + 3] for value in pixels} if colours else {}
    if not all(len(colour) == 3 for colour in told.values()):
        return {}
    own = {value: (red, green, blue) for value, (red, green, blue) in told.items()}
    return own if len(set(own.values())) == len(own) else {}


def _too_many(path: Path, pixels: dict[int, int], coloured: bool) -> str:
    top = sorted(pixels.items(), key=lambda item: (-item[1], item[0]))[:5]
    shown = ", ".join(f"{f'#{value:06x}' if coloured else value} ({count:,} pixels)" for value, count in top)
    kind, cause = (
        ("colours", "was it smoothed, resized with another filter than NEAREST, or once a JPEG?")
        if coloured
        else ("values", f"from {min(pixels)} to {max(pixels)}: is it a depth map, or does it number instances?")
    )
    return f"{path}: expected at most 255 classes, found {len(pixels):,} {kind}; {cause} The most frequent: {shown}"
