"""The masks that are painted from: files of a folder or data set, read one by one, moved where they are augmented."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segcn.data.captions import classes_of, mirrored
from segcn.data.dataset import read_framed_mask
from segcn.data.importers.palettes import is_dataset, mask_files
from segcn.data.masks import read_mask
from segcn.data.metadata import read_named_split
from segcn.data.palette import Palette, find_palette
from segcn.data.transforms import AugmentConfig, Box, Draw, apply, draw
from segcn.generate.config import GenerateConfig
from segcn.utils import rng
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.progress import Progress

# --- controls: The masks that are painted from: files of a folder or data set, read one by one, moved where they are augmented.

CHECKED_AT_ONCE = 256  # masks


@dataclass(frozen=True)
class Controls:
    """Every row of --controls, --limit or not: nothing of a mask is held but its name."""

    files: Sequence[str]
    captions: Sequence[tuple[str, ...]]  # none where a folder of masks has no captions
    palette: Palette
    limit: int | None
    resolution: int | None
    fit: str
    augment: AugmentConfig | None  # of --augment_masks
    seed: int

    def __len__(self) -> int:
        """The rows to paint."""
        return len(self.files) if self.limit is None else min(self.limit, len(self.files))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any file name or caption."""
        digest = hashlib.sha256()
        for row, file in enumerate(self.files):
            digest.update(repr((os.path.basename(file), *self.captions[row : row + 1])).encode())
        return digest.hexdigest()[:16]

    def read(self, row: int, replicate: int, caption: str) -> tuple[np.ndarray, Box, Draw | None]:
        """Class ids, uint8 [H, W], the part of them that holds image, and how they were moved.

        caption: what is told of the image; where it says left or right it is not mirrored. UserError names the file.
        """
        file = self.files[row]
        if self.augment is None:
            return *read_framed_mask(file, self.palette, self.resolution, self.fit), None
        mask = read_mask(file, self.palette)
        side = self.resolution or mask.shape[0]
        if self.resolution is None and mask.shape[0] != mask.shape[1]:
            raise UserError(f"{file}: --augment_masks moves squares, found {_size(mask)}: give a side by --resolution")
        drawn = draw(self.augment, self.seed, replicate, row, caption, self.fit)
        blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, *mask.shape)
        moved = apply(blank, torch.from_numpy(mask)[None], drawn, side)[1][0]
        return moved.numpy(), Box(0, 0, side, side), drawn


def read_controls(config: GenerateConfig) -> Controls:
    """The rows, captions and palette of --controls; UserError where there are none."""
    if not config.controls:
        raise UserError("--controls: expected a data set or a folder of masks, found nothing")
    folder = Path(config.controls)
    if is_dataset(folder):
        split = read_named_split(folder, config.split)
        files, captions = [str(record.mask) for record in split.records], [row.captions for row in split.records]
        palette = Palette.load(config.palette) if config.palette else split.palette
    else:
        files = [str(path) for path in mask_files(folder)]
        palette, captions = Palette.load(config.palette or find_palette(folder)), []
    if not files:
        raise UserError(f"--controls {folder}: --split {config.split} leaves no row")
    augment = _augment(config.augment_masks) if config.augment_masks else None
    return Controls(files, captions, palette, config.limit, config.resolution, config.fit, augment, config.seed)


def _augment(text: str) -> AugmentConfig:
    """What --augment_masks says of layouts; scaled up until nothing leaves the frame, unless it says fill=ignore."""
    try:
        found = AugmentConfig.parse(text)
    except UserError as error:
        raise UserError(str(error).replace("--augment:", "--augment_masks:")) from None
    still: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return replace(found, **still, fill=found.fill if "fill=" in text.replace(" ", "") else "cover")


def check_masks(
    controls: Controls, places: Iterable[tuple[int, int]], factor: int, log: Callable[[str], None] = print
) -> None:
    """Read the masks of (row, replicate) on all cores before anything is painted.

    factor: pixels a side of one latent cell. UserError names the first that cannot be painted and how many more fail.
    """
    failed: list[str] = []
    done, rows = 0, list(dict.fromkeys(row for row, _ in places))
    told = Progress("masks checked", len(rows), log)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for some in _cut(rows, CHECKED_AT_ONCE):
            failed += filter(None, pool.map(lambda row: _problem(controls, row, factor), some))
            done += len(some)
            told(done)
    refuse_failed(failed, len(rows), "masks")


def _problem(controls: Controls, row: int, factor: int) -> str | None:
    try:
        mask = controls.read(row, 0, "")[0]
    except UserError as error:
        return str(error)
    if mask.shape[0] % factor or mask.shape[1] % factor:
        return (
            f"{controls.files[row]}: expected sides that are multiples of {factor}, found {_size(mask)}:"
            " --resolution paints a square of a side of your own"
        )
    return None


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]} x {mask.shape[0]}"


def _cut(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


# --- prompts: What each image is told: captions of the data set, of another row or varied, one text, the classes of its mask.

CLASSES, CAPTION = "{classes}", "{caption}"
ONE_OF = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")  # {by day|at night}


class Group:
    """Words that may stand for one another, as in `a spring|a summer|an autumn`; UserError where these are not two."""

    def __init__(self, text: str):
        self.text, self.words = text, [word.strip() for word in text.split("|")]
        if len(set(self.words)) < 2 or not all(self.words):
            raise UserError(f"--vary: expected words with bars between them as in 'by day|at night', found {text!r}")
        longest_first = sorted(map(re.escape, self.words), key=len, reverse=True)
        self.found = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def put(self, word: str, text: str) -> str:
        """The text with `word` wherever it has one of the group."""
        return self.found.sub(lambda _: word, text)


@dataclass
class Prompts:
    """The text of every (row, replicate), by these alone."""

    controls: Controls
    text: str | None  # of --prompt
    mixed: bool
    groups: list["Group"] = field(default_factory=list)  # of --vary
    orders: dict[int, np.ndarray] = field(default_factory=dict)  # of each replicate: whose caption a row is given

    def asked(self, row: int, replicate: int) -> str:
        """The text before its mask is read: of several captions a row, each replicate takes the next."""
        return self._varied(self._said(row, replicate), row, replicate)

    def _said(self, row: int, replicate: int) -> str:
        if self.text is not None and CAPTION not in self.text:
            return self._drawn(self.text, row, replicate)
        captions = self.controls.captions[self._giver(row, replicate) if self.mixed else row]
        caption = captions[replicate % len(captions)]
        return caption if self.text is None else self._drawn(self.text, row, replicate).replace(CAPTION, caption)

    def told(self, asked: str, mask: np.ndarray, drawn: Draw | None) -> str:
        """The text with the classes of the mask, uint8 [H, W], in it, and mirrored as the mask is where so asked."""
        if CLASSES in asked and self.text is not None:
            asked = asked.replace(CLASSES, classes_of(mask, self.controls.palette))
        augment = self.controls.augment
        rewrites = augment is not None and augment.sided_captions == "rewrite"
        return mirrored(asked) if rewrites and drawn is not None and drawn.flip else asked

    def _drawn(self, text: str, row: int, replicate: int) -> str:
        """The text with one of each {by day|at night}."""

        def one_of(found: re.Match) -> str:
            options = found[1].split("|")
            place = rng.integer(len(options), "prompts", self.controls.seed, row, replicate, found.start())
            return options[place]

        return ONE_OF.sub(one_of, text)

    def _varied(self, text: str, row: int, replicate: int) -> str:
        """The text with one word of each group, drawn for the image."""
        for number, group in enumerate(self.groups):
            place = rng.integer(len(group.words), "vary", self.controls.seed, row, replicate, number)
            text = group.put(group.words[place], text)
        return text

    def _giver(self, row: int, replicate: int) -> int:
        if replicate not in self.orders:
            order = rng.permutation(len(self.controls.files), "prompts", self.controls.seed, replicate)
            self.orders[replicate] = np.array(order)
        return int(self.orders[replicate][row])


def read_prompts(config: GenerateConfig, controls: Controls) -> Prompts:
    """The texts that the flags ask for; UserError where there are none."""
    if config.prompt is not None and not config.prompt.strip():
        raise UserError("--prompt: expected a text, found an empty one; without the flag, captions of the data set")
    if CAPTION in (config.prompt or CAPTION) and not controls.captions:
        raise UserError(
            f"--controls {config.controls} has no captions: give one by --prompt, in which {CLASSES} stands for the"
            " classes of each mask"
        )
    if config.mix_prompts and config.prompt is not None:
        raise UserError("--mix_prompts deals out the captions of a data set: leave out --prompt")
    prompts = Prompts(controls, config.prompt, config.mix_prompts, [Group(text) for text in config.vary])
    for group in prompts.groups:
        _check_group(group, prompts, config)
    return prompts


def _check_group(group: Group, prompts: Prompts, config: GenerateConfig) -> None:
    """UserError where no text has any word of the group: it would change nothing."""
    captions = (caption for captions in prompts.controls.captions for caption in captions)
    if not any(group.found.search(text) for text in (config.prompt or "", *captions)):
        raise UserError(f"--vary {group.text!r}: no caption of {config.controls} has one of these words")
