"""One mask and one or more prompts to a picture, or a grid of them, that holds the settings it was made with."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.atomic import aside, write_whole
from segcn.config import InferConfig
from segcn.dataset import read_framed_mask
from segcn.errors import UserError
from segcn.labels import Palette, find_palette
from segcn.made_with import in_chunk, made_with
from segcn.pipeline import Painter, generate, load_painter

AT_ONCE = 8  # pictures


def infer(config: InferConfig) -> Path:
    """Paint every prompt with every seed and write one PNG: a row of pictures for each prompt."""
    out, mask_path = check(config)
    palette = palette_of(mask_path, config)
    framed = palette and read_framed_mask(mask_path, palette, config.resolution, config.fit)
    painter = load_painter(config, palette)
    mask, frame = framed or read_framed_mask(mask_path, painter.palette, config.resolution, config.fit)
    lines = [[frame.of(image) for image in line] for line in paint_lines(painter, mask, config)]
    told = made_with(painter, config, config.prompt, columns_of(config)) | {"control": mask_path.name}
    sheet = Image.fromarray(np.concatenate([np.concatenate(line, axis=1) for line in lines]))
    write_whole(out, lambda path: sheet.save(path, format="PNG", pnginfo=in_chunk(told)))
    return out


def check(config: InferConfig) -> tuple[Path, Path]:
    """The PNG to write and the mask; UserError for what would fail only after the picture is painted."""
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
    """(seed, row) of each picture of a prompt: its noise depends on these alone."""
    return [(seed, 0) for seed in config.seeds] or [(config.seed, row) for row in range(config.num_images)]


def paint_lines(painter: Painter, mask: np.ndarray, config: InferConfig) -> list[list[np.ndarray]]:
    """A list of pictures, uint8 [H, W, 3], for each prompt."""
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
