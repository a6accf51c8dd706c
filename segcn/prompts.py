"""What each picture is told: captions of the data set, of another row or varied, one text, the classes of its mask."""

import re
from dataclasses import dataclass, field

import numpy as np

from segcn import seeds
from segcn.captions import classes_of, mirrored
from segcn.config import GenerateConfig
from segcn.controls import Controls
from segcn.errors import UserError
from segcn.geometry import Draw

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
            place = seeds.integer(len(options), "prompts", self.controls.seed, row, replicate, found.start())
            return options[place]

        return ONE_OF.sub(one_of, text)

    def _varied(self, text: str, row: int, replicate: int) -> str:
        """The text with one word of each group, drawn for the picture."""
        for number, group in enumerate(self.groups):
            place = seeds.integer(len(group.words), "vary", self.controls.seed, row, replicate, number)
            text = group.put(group.words[place], text)
        return text

    def _giver(self, row: int, replicate: int) -> int:
        if replicate not in self.orders:
            order = seeds.permutation(len(self.controls.files), "prompts", self.controls.seed, replicate)
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
