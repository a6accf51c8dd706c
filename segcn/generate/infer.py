"""What an image was made with, kept in a text chunk of its PNG by `segcn infer` and the panel."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segcn.data.dataset import read_framed_mask
from segcn.data.files import open_image
from segcn.data.metadata import save_row
from segcn.data.palette import Palette, find_palette
from segcn.generate.config import InferConfig, SampleConfig
from segcn.generate.pipeline import Pipeline, generate, load_pipeline
from segcn.utils.errors import UserError
from segcn.utils.io import aside, write_whole

# --- made_with: What an image was made with, kept in a text chunk of its PNG by `segcn infer` and the panel.

CHUNK = "segcn"  # the name of the text chunk


def made_with(
    painter: Pipeline, settings: SampleConfig, prompts: Sequence[str], seeds: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """All that images of these prompts depend on but their mask; seeds: (seed, row) of each image of a prompt."""
    names = [field.name for field in dataclasses.fields(SampleConfig)]
    return {
        "settings": {name: getattr(settings, name) for name in names},
        "prompt": list(prompts),
        "seeds": list(seeds),
        "base_fingerprint": painter.base.fingerprint,
        "controlnet": painter.controlnet_folder,
        "controlnet_weights": painter.controlnet_digest,
        "palette_fingerprint": painter.palette.fingerprint,
    }


def in_chunk(told: dict[str, Any]) -> PngInfo:
    """What Pillow writes into a PNG."""
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(told))
    return chunks


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a PNG was made with: settings (those of SampleConfig), prompt, seeds, fingerprints."""
    with open_image(path) as image:
        image.load()
        text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        raise UserError(f"{path}: expected an image that segcn infer or the panel wrote, found no settings in it")
    return json.loads(text)


# --- by_hand: Images painted one after the other, each with all that it was painted from: what the panel does, headless.

Order = tuple[np.ndarray, str, SampleConfig]  # class ids uint8 [H, W], caption and settings of one image


@dataclass(eq=False)
class GeneratedImage:
    """A painted image, uint8 [H, W, 3], its order, and what is told of it in its PNG."""

    image: np.ndarray
    mask: np.ndarray  # uint8 [H, W] class ids
    caption: str
    settings: SampleConfig
    told: dict[str, Any]  # see `made_with`

    def save(self, folder: str | Path, palette: Palette) -> int:
        """Append image, mask, caption and settings to a data set folder; returns the row's number. See `save_row`."""
        return save_row(folder, self.image, self.mask, self.caption, palette, in_chunk(self.told))


def generate_each(
    painter: Pipeline, orders: Iterable[Order], on_step: Callable[[int], bool | None] | None = None
) -> Iterator[GeneratedImage]:
    """Paint one at a time, so the first is seen early and masks may differ in size.

    `on_step(step)` is called after each denoising step; True stops: the image at work is dropped, and none follows.
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
        yield GeneratedImage(image, mask, caption, used, made_with(painter, used, [caption], [(used.seed, 0)]))


# --- infer: One mask and one or more prompts to an image, or a grid of them, that holds the settings it was made with.

AT_ONCE = 8  # images


def infer(config: InferConfig) -> Path:
    """Paint every prompt with every seed and write one PNG: a row of images for each prompt."""
    out, mask_path = check(config)
    palette = palette_of(mask_path, config)
    framed = palette and read_framed_mask(mask_path, palette, config.resolution, config.fit)
    painter = load_pipeline(config, palette)
    mask, frame = framed or read_framed_mask(mask_path, painter.palette, config.resolution, config.fit)
    lines = [[frame.of(image) for image in line] for line in generate_grid(painter, mask, config)]
    told = made_with(painter, config, config.prompt, columns_of(config)) | {"control": mask_path.name}
    sheet = Image.fromarray(np.concatenate([np.concatenate(line, axis=1) for line in lines]))
    write_whole(out, lambda path: sheet.save(path, format="PNG", pnginfo=in_chunk(told)))
    return out


def check(config: InferConfig) -> tuple[Path, Path]:
    """The PNG to write and the mask; UserError for what would fail only after the image is painted."""
    out, mask = Path(config.out), Path(config.control)
    if not (config.control and config.prompt and config.out):
        raise UserError("segcn infer needs --control MASK.png --prompt TEXT --out OUT.png")
    if config.num_images < 1:
        raise UserError(f"--num_images: expected 1 or more, found {config.num_images}")
    if not mask.is_file():
        raise UserError(f"--control {mask}: expected a mask file, found none")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png, which holds the settings too")
    if out.exists():
        raise UserError(f"--out {out} exists: choose another name, or move it away")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside(out).touch()
        aside(out).unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    return out, mask


def columns_of(config: InferConfig) -> list[tuple[int, int]]:
    """(seed, row) of each image of a prompt: its noise depends on these alone."""
    return [(seed, 0) for seed in config.seeds] or [(config.seed, row) for row in range(config.num_images)]


def generate_grid(painter: Pipeline, mask: np.ndarray, config: InferConfig) -> list[list[np.ndarray]]:
    """A list of images, uint8 [H, W, 3], for each prompt."""
    columns = columns_of(config)
    painted: dict[tuple[str, int, int], np.ndarray] = {}
    for seed in dict.fromkeys(seed for seed, _ in columns):
        cells = [(text, row) for text in config.prompt for own, row in dict.fromkeys(columns) if own == seed]
        for first in range(0, len(cells), AT_ONCE):
            texts, rows = zip(*cells[first : first + AT_ONCE], strict=True)
            settings = dataclasses.replace(config, seed=seed)
            images = generate(painter, np.stack([mask] * len(rows)), list(texts), list(rows), settings)
            painted |= {(text, seed, row): image for text, row, image in zip(texts, rows, images, strict=True)}
    return [[painted[text, *column] for column in columns] for text in config.prompt]


def palette_of(mask_path: Path, config: InferConfig) -> Palette | None:
    """--palette, else the one beside or above the mask's folder, else None: the ControlNet's own."""
    if config.palette:
        return Palette.load(config.palette)
    for folder in (mask_path.parent, mask_path.absolute().parent.parent):
        try:
            found = find_palette(folder)
        except UserError:
            continue
        return Palette.load(found)
    return None
