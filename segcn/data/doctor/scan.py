"""Facts about a data set: its rows, every file decoded exactly once on all cores, and its captions in tokens."""

import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, repeat
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from segcn.data.config import DoctorConfig
from segcn.data.files import ORIENTATION, Unreadable, open_image, read_image, upright
from segcn.data.masks import count_ids, is_lossy, read_mask
from segcn.data.metadata import Problem, Record, Split, find_splits, scan_split
from segcn.data.palette import Palette
from segcn.utils.errors import UserError
from segcn.utils.progress import Progress

SAMPLED = (9 * 16, 8 * 16)  # pixels of an image that are compared with other images: the thumb holds their means


@dataclass(frozen=True)
class ImageFacts:
    """An image file; without a size where it could not be decoded."""

    fault: Problem | None = None  # undecodable, truncated, too_large or labels
    size: tuple[int, int] | None = None  # (width, height), upright
    orientation: int = 1  # EXIF; 1: stored upright
    checksum: int = 0  # CRC-32 of the sampled pixels
    all_pixels: int = 0  # CRC-32 of all pixels, where another file has the same sampled ones
    thumb: np.ndarray | None = None  # uint8 [8, 9], grey
    levels: int = 255  # between the darkest and the brightest sampled value
    deepest: int | None = None  # of an image of more than 8 bits: its largest number
    transparent: bool = False  # some of its pixels, whose color is used nevertheless

    @property
    def identity(self) -> tuple:
        """Equal for images with the same pixels; the thumb makes up for the few bits of a checksum."""
        assert self.thumb is not None
        return self.size, self.checksum, self.all_pixels, self.thumb.tobytes()


@dataclass(frozen=True)
class MaskFacts:
    """A mask file; without a size where it could not be read as class ids."""

    fault: Problem | None = None
    size: tuple[int, int] | None = None  # (width, height), as stored
    orientation: int = 1  # EXIF, which masks are read without
    lossy: str = ""  # the format, where it changes labels
    counts: np.ndarray | None = None  # uint32 [256], pixels of each class id; 255 unlabelled


class Case(NamedTuple):
    """A row of a split with what is wrong with it as written."""

    split: str
    record: Record
    problems: Sequence[Problem]

    @property
    def key(self) -> tuple[str, int]:
        return self.split, self.record.row

    @property
    def readable(self) -> bool:
        """Whether its files are looked at: the line is whole, not a repeated one, and its paths stay in the folder."""
        return not any(problem.kind in ("metadata", "repeated", "path") for problem in self.problems)

    def __str__(self) -> str:
        return f"{self.split} line {self.record.line}: {self.record.image_name}"


@dataclass(frozen=True)
class Facts:
    """All that the findings are made of."""

    dataset: Path
    splits: dict[str, Split]
    cases: tuple[Case, ...]
    images: dict[Path, ImageFacts]  # of the files that exist
    masks: dict[Path, MaskFacts]
    tokens: dict[str, tuple[int, str]]  # of each caption: how many tokens, and the end that is cut off
    token_limit: int
    seconds: float  # of decoding

    def of_split(self, name: str) -> list[Case]:
        return [case for case in self.cases if case.split == name]


def scan_dataset(config: DoctorConfig, log: Callable[[str], None] = print) -> Facts:
    """Read every row, file and caption of all splits; UserError only where there is nothing to check."""
    if not config.dataset_name:
        raise UserError("segcn validate needs a data set: segcn validate DATASET")
    tokenizer = caption_tokenizer(config.pretrained_model_name_or_path)
    splits, cases = {}, []
    for name, metadata in find_splits(config.dataset_name).items():
        splits[name], problems = scan_split(metadata)
        cases += [Case(name, *pair) for pair in zip(splits[name].records, problems, strict=True)]
    if not cases:
        raise UserError(f"{config.dataset_name}: expected at least one row, found none")
    began = time.monotonic()
    there = [case for case in cases if case.readable]
    images = [case.record.image for case in there if isfile(case.record.image)]
    palettes: dict[Path, Palette] = {}  # of each mask; a mask of several rows is decoded once
    for case in there:
        if isfile(case.record.mask):
            palettes.setdefault(case.record.mask, splits[case.split].palette)
    found = _scan_files(images, palettes, config.max_pixels, log)
    seconds = time.monotonic() - began
    tokens = _count_tokens(dict.fromkeys(chain.from_iterable(case.record.captions for case in cases)), tokenizer)
    return Facts(Path(config.dataset_name), splits, tuple(cases), *found, tokens, tokenizer.model_max_length, seconds)


def caption_tokenizer(folder: str):
    """The base's tokenizer alone; without the imports of its networks, which take longer than small data sets."""
    from transformers import CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--pretrained_model_name_or_path: no tokenizer in {folder}: {error}") from None
    if len(tokenizer) < 256:  # a folder without one gives an empty tokenizer
        raise UserError(f"--pretrained_model_name_or_path: no tokenizer in {folder}")
    return tokenizer


def _count_tokens(captions: Iterable[str], tokenizer) -> dict[str, tuple[int, str]]:
    """Of each caption that is not blank its tokens, and the end that the text encoder never sees."""
    written, limit = [caption for caption in captions if caption.strip()], tokenizer.model_max_length
    ids = tokenizer(written).input_ids if written else []
    ends = [tokenizer.decode(each[limit - 1 : -1]).strip() if len(each) > limit else "" for each in ids]  # but the mark
    return {caption: (len(each), end) for caption, each, end in zip(written, ids, ends, strict=True)}


def _scan_files(
    images: Iterable[Path], masks: dict[Path, Palette], max_pixels: int, log: Callable[[str], None]
) -> tuple[dict[Path, ImageFacts], dict[Path, MaskFacts]]:
    """Decode every image and every mask once; threads, since Pillow decodes outside the interpreter lock.

    Only of images that look the same in a grid of sampled pixels are all pixels compared, which decodes them again.
    """
    photos, of_images, of_masks = list(dict.fromkeys(images)), {}, {}
    progress = Progress("files decoded", len(photos) + len(masks), log)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        image_work = pool.map(image_facts, photos, repeat(max_pixels))
        mask_work = pool.map(mask_facts, masks, masks.values(), repeat(max_pixels))
        for path, image in zip(photos, image_work, strict=True):
            of_images[path] = image
            progress(len(of_images))
        for path, mask in zip(masks, mask_work, strict=True):
            of_masks[path] = mask
            progress(len(of_images) + len(of_masks))
    alike = defaultdict(list)
    for path, found in of_images.items():
        if found.fault is None:
            alike[found.identity].append(path)
    for path in (path for paths in alike.values() if len(paths) > 1 for path in paths):
        of_images[path] = replace(of_images[path], all_pixels=zlib.crc32(read_image(path).data))
    return of_images, of_masks


def image_facts(path: Path, max_pixels: int) -> ImageFacts:
    """Size, orientation, checksum and thumb of an image, or its fault."""
    try:
        with open_image(path, max_pixels=max_pixels) as image:
            cut = image.mode == "RGB" and ";16" in str(image.tile)  # of 16 bits a channel Pillow keeps 8
            orientation, photo = image.getexif().get(ORIENTATION, 1), upright(image)
            deepest = int(np.asarray(image).max()) if image.mode[0] == "I" else None
            transparent = image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
            sampled = photo.resize(SAMPLED, Image.Resampling.NEAREST)
            thumb = np.asarray(sampled.resize((9, 8), Image.Resampling.BOX).convert("L"))
            lows, highs = zip(*sampled.getextrema(), strict=True)
            levels, checksum = max(highs) - min(lows), zlib.crc32(sampled.tobytes())
            deepest = 256 * max(highs) + 255 if cut else deepest
            return ImageFacts(None, photo.size, orientation, checksum, 0, thumb, levels, deepest, transparent)
    except Unreadable as error:
        return ImageFacts(_fault(path, error))


def mask_facts(path: Path, palette: Palette, max_pixels: int) -> MaskFacts:
    """Size, format, orientation and pixels of each class of a mask, or its fault."""
    lossy = ""
    try:
        with open_image(path, "mask", max_pixels) as image:  # the header: too large a mask takes no memory
            lossy = str(image.format) if is_lossy(image) else ""
            late = image.format == "PNG" and "exif" not in image.info  # asking for it would decode the file
            orientation = 1 if late else image.getexif().get(ORIENTATION, 1)
        mask = read_mask(path, palette)
    except UserError as error:
        fault = _fault(path, error)
        return MaskFacts(fault, lossy=lossy if fault.kind == "labels" else "")
    return MaskFacts(None, mask.shape[::-1], orientation, lossy, count_ids(mask).astype(np.uint32))


def dhash(thumbs: np.ndarray) -> np.ndarray:
    """Thumbs, uint8 [N, 8, 9] -> uint64 [N], one bit for each step to the right: is it brighter there?"""
    brighter = thumbs[:, :, 1:] > thumbs[:, :, :-1]
    return np.packbits(brighter.reshape(len(thumbs), 64), axis=1).view(np.uint64)[:, 0]


def _fault(path: Path, error: UserError) -> Problem:
    """Broken files say how; the rest are values without a label."""
    kind = error.kind if isinstance(error, Unreadable) else "labels"
    return Problem(kind, path.name, str(error).removeprefix(f"{path}: "))
