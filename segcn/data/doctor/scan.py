"""What the doctor must know of every file, from decoding each exactly once, on all cores."""

import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from segcn.data.files import ORIENTATION, Unreadable, open_image, read_image, upright
from segcn.data.masks import LOSSY, count_ids, read_mask
from segcn.data.palette import Palette
from segcn.utils.errors import UserError
from segcn.utils.progress import Progress

SAMPLED = (9 * 16, 8 * 16)  # pixels of an image that tell it from others: the thumb is their means


class Fault(NamedTuple):
    """Why a file is of no use: undecodable, truncated, too_large or labels."""

    kind: str
    message: str


@dataclass(frozen=True)
class ImageFacts:
    """An image file; without a size where it could not be decoded."""

    fault: Fault | None = None
    size: tuple[int, int] | None = None  # (width, height), upright
    orientation: int = 1  # EXIF; 1: stored upright
    checksum: int = 0  # CRC-32 of the sampled pixels
    all_pixels: int = 0  # CRC-32 of all pixels, where another file has the same sampled ones
    thumb: np.ndarray | None = None  # uint8 [8, 9], grey

    @property
    def identity(self) -> tuple:
        """Equal for images with the same pixels; the thumb makes up for the few bits of a checksum."""
        assert self.thumb is not None
        return self.size, self.checksum, self.all_pixels, self.thumb.tobytes()


@dataclass(frozen=True)
class MaskFacts:
    """A mask file; without a size where it could not be read as class ids."""

    fault: Fault | None = None
    size: tuple[int, int] | None = None  # (width, height), as stored
    orientation: int = 1  # EXIF, which masks are read without
    lossy: str = ""  # the format, where it changes labels
    counts: np.ndarray | None = None  # uint32 [256], pixels of each class id; 255 unlabelled


class Header(NamedTuple):
    """What a file says of itself before it is decoded."""

    format: str
    orientation: int


def scan_files(
    images: Iterable[Path], masks: dict[Path, Palette], max_pixels: int, log: Callable[[str], None] = print
) -> tuple[dict[Path, ImageFacts], dict[Path, MaskFacts]]:
    """Decode every image and every mask once; threads, since Pillow decodes outside the interpreter lock.

    Only of images that look the same in a grid of sampled pixels are all pixels compared, which decodes them again.
    """
    files = [*((path, None) for path in dict.fromkeys(images)), *masks.items()]
    progress, found = Progress("files decoded", len(files), log), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for facts in pool.map(partial(_facts, max_pixels=max_pixels), files):
            found.append(facts)
            progress(len(found))
    known = [(path, facts) for (path, _), facts in zip(files, found, strict=True)]
    of_images = {path: facts for path, facts in known if isinstance(facts, ImageFacts)}
    return _told_apart(of_images), {path: facts for path, facts in known if isinstance(facts, MaskFacts)}


def _told_apart(images: dict[Path, ImageFacts]) -> dict[Path, ImageFacts]:
    """With the checksum of all pixels where the sampled ones are those of another file."""
    alike = defaultdict(list)
    for path, facts in images.items():
        if facts.fault is None:
            alike[facts.identity].append(path)
    twins = [path for paths in alike.values() if len(paths) > 1 for path in paths]
    return images | {path: replace(images[path], all_pixels=zlib.crc32(read_image(path).data)) for path in twins}


def _facts(file: tuple[Path, Palette | None], max_pixels: int) -> ImageFacts | MaskFacts:
    path, palette = file
    return image_facts(path, max_pixels) if palette is None else mask_facts(path, palette, max_pixels)


def image_facts(path: Path, max_pixels: int) -> ImageFacts:
    """Size, orientation, checksum and thumb of an image, or its fault."""
    try:
        with open_image(path, max_pixels=max_pixels) as image:
            orientation, photo = image.getexif().get(ORIENTATION, 1), upright(image)
            sampled = photo.resize(SAMPLED, Image.Resampling.NEAREST)
            return ImageFacts(None, photo.size, orientation, zlib.crc32(sampled.tobytes()), thumb=grey_thumb(sampled))
    except Unreadable as error:
        return ImageFacts(_fault(path, error))


def mask_facts(path: Path, palette: Palette, max_pixels: int) -> MaskFacts:
    """Size, format, orientation and pixels of each class of a mask, or its fault."""
    header = read_header(path, max_pixels)
    if isinstance(header, Fault):
        return MaskFacts(header)
    lossy = header.format if header.format in LOSSY else ""
    try:
        mask = read_mask(path, palette)
    except UserError as error:
        fault = _fault(path, error)
        return MaskFacts(fault, lossy=lossy if fault.kind == "labels" else "")
    return MaskFacts(None, mask.shape[::-1], header.orientation, lossy, count_ids(mask).astype(np.uint32))


def read_header(path: Path, max_pixels: int) -> Header | Fault:
    """Format and EXIF orientation; an image above the limit is refused before it takes any memory."""
    try:
        with open_image(path, max_pixels=max_pixels) as image:
            late = image.format == "PNG" and "exif" not in image.info  # asking for it would decode the file
            return Header(image.format or "", 1 if late else image.getexif().get(ORIENTATION, 1))
    except Unreadable as error:
        return _fault(path, error)


def grey_thumb(image: Image.Image) -> np.ndarray:
    """The image as 9 x 8 grey means, uint8 [8, 9]."""
    return np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"))


def dhash(thumbs: np.ndarray) -> np.ndarray:
    """Thumbs, uint8 [N, 8, 9] -> uint64 [N], one bit for each step to the right: is it brighter there?"""
    brighter = thumbs[:, :, 1:] > thumbs[:, :, :-1]
    return np.packbits(brighter.reshape(len(thumbs), 64), axis=1).view(np.uint64)[:, 0]


def _fault(path: Path, error: UserError) -> Fault:
    """Broken files say how; the rest are values without a label."""
    kind = error.kind if isinstance(error, Unreadable) else "labels"
    return Fault(kind, str(error).removeprefix(f"{path}: "))
