"""The mask and the prompt of every image of a job: files of a folder or data set, read one by one."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from segcn.data.captions import CLASSES, classes_of, mirrored, mirrored_ids, without_classes
from segcn.data.dataset import read_framed_mask
from segcn.data.importers.palettes import is_dataset, mask_files
from segcn.data.masks import read_mask
from segcn.data.metadata import Split, read_named_split, read_row
from segcn.data.palette import Palette, find_palette
from segcn.data.transforms import AugmentConfig, Box, Draw, apply, draw, output_shape
from segcn.data.unlabelled import captions_beside
from segcn.generate.config import GenerateConfig
from segcn.utils import rng
from segcn.utils.args import suggest
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.progress import Progress

CAPTION = "{caption}"
ONE_OF = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")  # {by day|at night}
CHECKED_AT_ONCE = 256  # masks


class Condition(NamedTuple):
    """What an image is generated from."""

    row: int
    replicate: int
    mask: np.ndarray  # uint8 [H, W], class ids
    frame: Box  # the part of the mask that is not padding
    prompt: str
    image: np.ndarray | None = None  # uint8 [H, W, 3], the row's own, which --from_images and --inpaint start from
    region: np.ndarray | None = None  # bool [H, W], the classes of --inpaint


class WordGroup(NamedTuple):
    """Words of which one may replace another, of --vary."""

    words: list[str]
    pattern: re.Pattern  # finds any of them as whole words


@dataclass(frozen=True)
class Conditions:
    """The rows of --controls; of a mask only its file name is kept in memory."""

    config: GenerateConfig
    files: Sequence[str]  # of every row, also of those that --limit leaves out
    captions: Sequence[tuple[str, ...]]  # as they are used; empty where a folder of masks has no captions
    palette: Palette
    augment: AugmentConfig | None  # of --augment_masks
    groups: Sequence[WordGroup]
    real: Split | None = None  # the rows with their images, where these are started from
    inpainted: Sequence[int] = ()  # class ids of --inpaint

    def __len__(self) -> int:
        """The number of rows to generate from."""
        return len(self.files) if self.config.limit is None else min(self.config.limit, len(self.files))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any file name or caption."""
        digest = hashlib.sha256()
        for row, file in enumerate(self.files):
            digest.update(repr((os.path.basename(file), *self.captions[row : row + 1])).encode())
        return digest.hexdigest()[:16]

    def read(self, row: int, replicate: int) -> Condition:
        """All that one image is generated from, which depends on the seed, its row and its replicate alone."""
        prompt = self.prompt(row, replicate)
        mask, frame, drawn = self.read_mask(row, replicate, prompt)
        if CLASSES in prompt and self.config.prompt is not None:
            prompt = prompt.replace(CLASSES, classes_of(frame.cut(mask), self.palette))
        if self.augment and drawn and drawn.flip and self.augment.sided_captions == "rewrite":
            prompt = mirrored(prompt)
        image = self.read_image(row, mask.shape, drawn) if self.real else None
        region = np.isin(mask, self.inpainted) if self.inpainted else None
        return Condition(row, replicate, mask, frame, prompt, image, region)

    def read_mask(self, row: int, replicate: int, prompt: str) -> tuple[np.ndarray, Box, Draw | None]:
        """Class ids, uint8 [H, W], the part of them that is not padding, and how they were moved.

        Where the prompt says left or right, the mask is not mirrored. UserError names the file.
        """
        file, resolution, fit = self.files[row], self.config.square, self.config.framing
        if self.augment is None:
            return *read_framed_mask(file, self.palette, resolution, fit), None
        mask = read_mask(file, self.palette)
        side = resolution or mask.shape[0]
        shape = output_shape(mask.shape, side, fit)
        if resolution is None and mask.shape[0] != mask.shape[1]:
            raise UserError(f"{file}: --augment_masks moves squares, found {_size(mask)}: give a side by --resolution")
        swapped = mirrored_ids(self.palette)
        augment = self.augment if swapped is not None else replace(self.augment, hflip=0.0)
        drawn = draw(augment, self.config.seed, replicate, row, prompt, fit, shape)
        blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, *mask.shape)
        moved = apply(blank, torch.from_numpy(mask)[None], drawn, side)[1][0]
        ids = swapped[moved.numpy()] if drawn.flip and swapped is not None else moved.numpy()
        return ids, Box(0, 0, *shape), drawn

    def read_image(self, row: int, shape: Sequence[int], drawn: Draw | None) -> np.ndarray:
        """The row's own image, uint8 [H, W, 3], cut, fitted and moved as its mask; UserError names its line."""
        assert self.real is not None
        image = read_row(self.real, row)[0]
        if drawn is None and self.config.resolution is None:
            return image
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        drawn, side = drawn or Draw(fit=self.config.framing), self.config.square or shape[0]
        moved = apply(pixels, torch.zeros_like(pixels[:1]), drawn, side)[0]
        return moved.permute(1, 2, 0).numpy()

    def prompt(self, row: int, replicate: int) -> str:
        """The text of an image before its mask is read: of several captions of a row, each replicate takes the next."""
        seed, text = self.config.seed, self.config.prompt

        def one_of(found: re.Match) -> str:
            options = found[1].split("|")
            return options[rng.integer(len(options), "prompts", seed, row, replicate, found.start())]

        drawn = ONE_OF.sub(one_of, text) if text is not None else CAPTION
        if text is None or CAPTION in text:
            captions = self.captions[self._order(replicate)[row] if self.config.mix_prompts else row]
            drawn = drawn.replace(CAPTION, captions[replicate % len(captions)])
        for number, group in enumerate(self.groups):
            word = group.words[rng.integer(len(group.words), "vary", seed, row, replicate, number)]
            drawn = group.pattern.sub(word.replace("\\", r"\\"), drawn)
        return drawn

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """Of a replicate: the row whose caption each row gets under --mix_prompts."""
        count, seed = len(self.files), self.config.seed
        return lru_cache(None)(lambda replicate: np.array(rng.permutation(count, "prompts", seed, replicate)))


def read_conditions(config: GenerateConfig) -> Conditions:
    """The rows, texts and palette of --controls; UserError where there are none, and for flags that do not fit them."""
    if not config.controls:
        raise UserError("--controls: expected a data set or a folder of masks, found nothing")
    check_tiled(config)
    folder, real, inpainted = Path(config.controls), None, list[int]()
    if is_dataset(folder):
        split = read_named_split(folder, config.split)
        palette = Palette.load(config.palette) if config.palette else split.palette
        if config.from_images is not None or config.inpaint:
            inpainted = _ids_of(config.inpaint, palette)
            real = split = _rows_with(inpainted, replace(split, palette=palette), config)
        files, captions = [str(record.mask) for record in split.records], [row.captions for row in split.records]
    elif config.from_images is not None or config.inpaint:
        flag = "--inpaint" if config.inpaint else "--from_images"
        raise UserError(f"{flag} starts from real images, and --controls {folder} holds masks alone: give a data set")
    else:
        paths = mask_files(folder)
        files, captions = [str(path) for path in paths], [captions_beside(path) for path in paths]
        captions = captions if all(captions) else []
        palette = Palette.load(config.palette or find_palette(folder))
    if not files:
        raise UserError(f"--controls {folder}: --split {config.split} leaves no row")
    _check_prompt(config, captions)
    if config.without_class_words:
        captions = [tuple(without_classes(text, palette) for text in each) for each in captions]
    augment = _augment_masks(config.augment_masks) if config.augment_masks else None
    groups = [_word_group(text, config, captions) for text in config.vary]
    return Conditions(config, files, captions, palette, augment, groups, real, inpainted)


def check_tiled(config: GenerateConfig) -> None:
    """UserError for a flag that --tiled cannot be combined with: all that reads real images, and square masks."""
    for name in ("from_images", "inpaint", "augment_masks", "hard_first", "min_miou", "reconstruct"):
        if config.tiled and getattr(config, name) not in (None, [], False):
            raise UserError(f"--tiled generates from masks as they are, all that it generates is kept: drop --{name}")


def _ids_of(names: Sequence[str], palette: Palette) -> list[int]:
    """The class ids of --inpaint; UserError for a name that is not in the palette."""
    ids = {label.name: label.id for label in palette.labels if not label.ignore}
    for name in names:
        if name not in ids:
            raise UserError(f"--inpaint: expected a class of palette.json, found {name!r}.{suggest(name, ids)}")
    return [ids[name] for name in names]


def _rows_with(ids: Sequence[int], split: Split, config: GenerateConfig) -> Split:
    """The rows whose masks, as they are used, have one of these classes; all rows where `ids` is empty."""
    if not ids:
        return split

    def has_one(file: Path) -> bool:
        return bool(np.isin(read_framed_mask(file, split.palette, config.resolution, config.framing)[0], ids).any())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        records = tuple(compress(split.records, pool.map(has_one, [record.mask for record in split.records])))
    if not records:
        raise UserError(f"--inpaint {' '.join(config.inpaint)}: no mask of {config.controls}, {config.split} has it")
    return replace(split, records=records)


def _check_prompt(config: GenerateConfig, captions: Sequence) -> None:
    prompt = CAPTION if config.prompt is None else config.prompt
    if CAPTION in prompt and not captions:
        raise UserError(
            f"--controls {config.controls} has no captions, or not for every mask: give one by --prompt, where"
            f" {CLASSES} is replaced by the classes of each mask"
        )
    if config.without_class_words and CAPTION not in prompt:
        raise UserError(f"--without_class_words cuts the captions of a data set: leave out --prompt, or say {CAPTION}")
    if config.mix_prompts and config.prompt is not None:
        raise UserError("--mix_prompts exchanges the captions of a data set: leave out --prompt")


def _augment_masks(text: str) -> AugmentConfig:
    """--augment_masks, without changes of color; scaled up until nothing is empty, unless it says fill=ignore."""
    try:
        found = AugmentConfig.parse(text)
    except UserError as error:
        raise UserError(str(error).replace("--augment:", "--augment_masks:")) from None
    fill = found.fill if "fill=" in text.replace(" ", "") else "cover"
    return replace(found, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, fill=fill)


def _word_group(text: str, config: GenerateConfig, captions: Sequence[tuple[str, ...]]) -> WordGroup:
    """One group of --vary; UserError where it is not two words or more, or where no text has any of them."""
    words = [word.strip() for word in text.split("|")]
    if len(set(words)) < 2 or not all(words):
        raise UserError(f"--vary: expected words with bars between them as in 'by day|at night', found {text!r}")
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
    if not any(map(pattern.search, chain([config.prompt or ""], *captions))):
        raise UserError(f"--vary {text!r}: no caption of {config.controls} has one of these words")
    return WordGroup(words, pattern)


def check_masks(conditions: Conditions, rows: Iterable[int], factor: int, log: Callable[[str], None] = print) -> None:
    """Read the masks of these rows on all cores before anything is generated.

    factor: pixels per latent cell. UserError names the first mask that cannot be used and how many more there are.
    """

    def problem(row: int) -> str | None:
        try:
            mask, _, drawn = conditions.read_mask(row, 0, "")
            if conditions.real:
                conditions.read_image(row, mask.shape, drawn)
        except UserError as error:
            return str(error)
        if not conditions.config.tiled and (mask.shape[0] % factor or mask.shape[1] % factor):
            return (
                f"{conditions.files[row]}: expected sides that are multiples of {factor}, found {_size(mask)}:"
                " --resolution makes a square of the size that you give, --tiled takes any"
            )
        return None

    rows, problems = list(dict.fromkeys(rows)), list[str]()
    progress = Progress("masks checked", len(rows), log)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(rows), CHECKED_AT_ONCE):
            problems += filter(None, pool.map(problem, rows[first : first + CHECKED_AT_ONCE]))
            progress(min(first + CHECKED_AT_ONCE, len(rows)))
    refuse_failed(problems, len(rows), "masks")


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]} x {mask.shape[0]}"
