"""The sides of a benchmark of painting: each paints the same masks in turns, into a data set of its own that stays."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from segcn.atomic import write_text
from segcn.config import MODELS, OUTPUTS, SampleConfig
from segcn.dataset import read_framed_mask
from segcn.errors import UserError
from segcn.masks import colourise
from segcn.pipeline import Painter, first_noise, generate, make_pipeline
from segcn.records import Split, read_split
from segcn.rows import finish_dataset, write_pair
from segcn.timed import busy_seconds

TURNS = "turns.json"
FIXED = {
    *MODELS,
    "preset",
    "resolution",
    "fit",
    "mixed_precision",
    "torch_compile",
}  # all sides share these


@dataclass(frozen=True)
class Masks:
    """What all sides paint: framed class ids uint8 [N, H, W], a caption each, and the real rows that they are of."""

    ids: np.ndarray
    captions: Sequence[str]
    real: Split


def read_masks(split: Split, settings: SampleConfig) -> Masks:
    """The masks of a split, made square where --resolution says so; UserError where they differ in size."""
    ids = [read_framed_mask(row.mask, split.palette, settings.resolution, settings.fit)[0] for row in split.records]
    sizes = {mask.shape for mask in ids}
    if len(sizes) > 1:
        raise UserError(
            f"{split.metadata}: expected masks of one size, found {len(sizes)}: --resolution makes them one"
        )
    return Masks(np.stack(ids), [row.caption for row in split.records], split)


@dataclass
class Side:
    """A way of painting, and the folder of what it painted."""

    title: str
    settings: SampleConfig
    batch_size: int  # 0: the plain way, a call of diffusers' pipeline an image
    painter: Painter
    folder: Path = OUTPUTS  # below which its own stands
    data: str = ""  # which masks

    @property
    def plain(self) -> bool:
        return self.batch_size == 0

    @cached_property
    def out(self) -> Path:
        """Named after everything that its images and times depend on."""
        told = dataclasses.asdict(self.settings) | {"batch_size": self.batch_size, "threads": torch.get_num_threads()}
        told |= {"base": self.painter.base.fingerprint, "controlnet": self.painter.controlnet_digest}
        told |= {"data": self.data, "torch": torch.__version__, "diffusers": diffusers.__version__}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        name = "".join(letter if letter.isalnum() or letter in ".-=" else "_" for letter in self.title)
        return self.folder / f"{name[:60]}-{digest}"

    @cached_property
    def pipe(self):
        return make_pipeline(self.painter.base, self.settings, self.painter.controlnet)

    def paint(self, masks: np.ndarray, captions: Sequence[str], rows: list[int]) -> np.ndarray:
        """uint8 [N, H, W, 3] from class ids uint8 [N, H, W]; both ways begin with the same noise."""
        if self.plain:
            return np.stack([self._plainly(*row) for row in zip(masks, captions, rows, strict=True)])
        painted = []
        for first in range(0, len(rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            painted.append(generate(self.painter, masks[part], list(captions[part]), rows[part], self.settings))
        return np.concatenate(painted)

    def _plainly(self, mask: np.ndarray, caption: str, row: int) -> np.ndarray:
        noise = first_noise(self.painter.base, [row], self.settings, mask.shape).to(self.painter.base.dtype)
        picture = self.pipe(
            prompt=caption,
            image=Image.fromarray(colourise(mask, self.painter.palette)),
            negative_prompt=self.settings.negative_prompt or None,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            latents=noise,
        )
        return np.asarray(picture.images[0])

    @property
    def turns(self) -> dict[str, dict]:
        """By its rows, what is known of each finished turn."""
        path = self.out / TURNS
        return json.loads(path.read_text()) if path.is_file() else {}

    def painted(self) -> Split:
        """What stands, as a data set."""
        return read_split(self.out)


def take_turns(sides: list[Side], masks: Masks, rows_a_turn: int, log: Callable[[str], None]) -> list[str]:
    """Each side paints some rows, then the next one the same; another one first in every other turn.

    Turns that stand are kept. Returns the names of the turns, one entry in each side's `turns`.
    """
    began, warm, names = time.time(), set(), []
    for number, first in enumerate(range(0, len(masks.ids), rows_a_turn)):
        rows = list(range(first, min(first + rows_a_turn, len(masks.ids))))
        names.append(f"{rows[0]}-{rows[-1]}")
        for side in sides if number % 2 == 0 else reversed(sides):
            if names[-1] in side.turns:
                continue
            if side.title not in warm:
                few = rows[: max(1, side.batch_size)]
                side.paint(masks.ids[few], [masks.captions[row] for row in few], few)
                warm.add(side.title)
            take_turn(side, masks, rows, names[-1], began)
            pace = len(rows) / side.turns[names[-1]]["seconds"]
            log(f"rows {names[-1]} of {len(masks.ids)}, {side.title}: {pace:.2f} images/s")
    for side in sides:
        finish(side, masks)
    return names


def take_turn(side: Side, masks: Masks, rows: list[int], name: str, run: float) -> None:
    """Paint the rows against the clock, write them, then the entry that says so."""
    busy, cpu, began = busy_seconds(), time.process_time(), time.monotonic()
    images = side.paint(masks.ids[rows], [masks.captions[row] for row in rows], rows)
    seconds, own = time.monotonic() - began, time.process_time() - cpu
    now = busy_seconds()
    other = None if busy is None or now is None else max(0.0, now - busy - own) / seconds
    for row, image in zip(rows, images, strict=True):
        write_pair(side.out, pair_of(row), image, masks.ids[row], masks.real.palette)
    entry = {"seconds": seconds, "cpu_seconds": own, "other_load": other, "run": run}
    write_text(side.out / TURNS, json.dumps(side.turns | {name: entry}, indent=1) + "\n")


def finish(side: Side, masks: Masks) -> None:
    """What makes the folder a data set of the rows painted in this run or an earlier one."""
    rows = [(*pair_of(row), text) for row, text in enumerate(masks.captions)]
    finish_dataset(side.out, rows, masks.real.palette)


def pair_of(row: int) -> tuple[str, str]:
    """The names of its picture and mask."""
    return f"images/{row:06d}.png", f"masks/{row:06d}.png"


def variant(settings: SampleConfig, words: str) -> SampleConfig:
    """The settings changed by "name=value,name=value"; UserError for a name or value that they do not have."""
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SampleConfig)}
    changes: dict[str, Any] = {}
    for word in words.split(","):
        name, _, value = word.partition("=")
        if name in FIXED:
            raise UserError(f"--variants {words}: {name} is the same for all of them; give it as --{name}")
        if name not in known:
            raise UserError(f"--variants {words}: expected name=value,name=value with flags' names, found {word!r}")
        kind = str if known[name] is None else type(known[name])
        try:
            changes[name] = kind(value)
        except ValueError:
            raise UserError(f"--variants {words}: expected {name}={kind.__name__}, found {value!r}") from None
    return dataclasses.replace(settings, **changes)
