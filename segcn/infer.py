"""One mask and one or more prompts to a picture, or a grid of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from segcn.config import InferConfig
from segcn.dataset import read_framed_mask
from segcn.errors import UserError
from segcn.labels import Palette, find_palette
from segcn.pipeline import generate, load_painter


def infer(config: InferConfig) -> Path:
    """Paint every prompt num_images times and write one PNG: a row of pictures for each prompt."""
    if not (config.control_image and config.prompt and config.output):
        raise UserError("segcn infer needs --control_image MASK.png --prompt TEXT --output OUT.png")
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output} exists: choose another name, or move it away")
    mask_path = Path(config.control_image)
    if not mask_path.is_file():
        raise UserError(f"--control_image {mask_path}: expected a mask file, found none")
    painter = load_painter(config, palette_of(mask_path, config))
    mask, frame = read_framed_mask(mask_path, painter.palette, config.resolution, config.fit)
    captions = [prompt for prompt in config.prompt for _ in range(config.num_images)]
    rows = list(range(config.num_images)) * len(config.prompt)
    images = np.concatenate(
        [
            generate(painter, np.stack([mask] * len(captions[i : i + 8])), captions[i : i + 8], rows[i : i + 8], config)
            for i in range(0, len(captions), 8)
        ]
    )
    images = np.stack([frame.of(image) for image in images])
    lines = images.reshape(len(config.prompt), config.num_images, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(line), axis=1) for line in lines])
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(output)
    return output


def palette_of(mask_path: Path, config: InferConfig) -> Palette | None:
    """--palette, else the one beside or above the mask's folder, else None: the ControlNet's own."""
    if config.palette:
        return Palette.load(config.palette)
    for folder in (mask_path.parent, mask_path.absolute().parent.parent):
        try:
            return Palette.load(find_palette(folder))
        except UserError:
            continue
    return None
