"""Pictures painted one after the other, each with all that it was painted from: what the panel does, headless."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segcn.config import SampleConfig
from segcn.labels import Palette
from segcn.made_with import in_chunk, made_with
from segcn.pipeline import Painter, generate
from segcn.rows import save_row

Order = tuple[np.ndarray, str, SampleConfig]  # class ids uint8 [H, W], caption and settings of one picture


@dataclass(eq=False)
class Picture:
    """A painted image, uint8 [H, W, 3], its order, and what is told of it in its PNG."""

    image: np.ndarray
    mask: np.ndarray  # uint8 [H, W] class ids
    caption: str
    settings: SampleConfig
    told: dict[str, Any]  # see `made_with`

    def save(self, folder: str | Path, palette: Palette) -> int:
        """Append image, mask, caption and settings to a data set folder; returns the row's number. See `save_row`."""
        return save_row(folder, self.image, self.mask, self.caption, palette, in_chunk(self.told))


def paint_each(
    painter: Painter, orders: Iterable[Order], on_step: Callable[[int], bool | None] | None = None
) -> Iterator[Picture]:
    """Paint one at a time, so the first is seen early and masks may differ in size.

    `on_step(step)` is called after each denoising step; True stops: the picture at work is dropped, and none follows.
    """
    stopped = False

    def after_step(step: int) -> bool:
        nonlocal stopped
        stopped = bool(on_step and on_step(step))
        return stopped

    for mask, caption, settings in orders:
        image = generate(painter, mask[None], [caption], [0], settings, on_step=after_step)[0]
        if stopped:
            return
        used = dataclasses.replace(settings, controlnet_model_name_or_path=painter.controlnet_folder)
        yield Picture(image, mask, caption, used, made_with(painter, used, [caption], [(used.seed, 0)]))
