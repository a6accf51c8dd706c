"""One mask and one or more prompts to images, whose PNG records the settings that they were made with."""

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from segcn.data.dataset import read_framed_mask
from segcn.data.files import open_image
from segcn.data.metadata import save_row
from segcn.data.palette import IGNORE, Palette, find_palette
from segcn.data.transforms import check_buckets
from segcn.generate.config import InferConfig, SampleConfig
from segcn.generate.pipeline import OnGuess, Pipeline, check_sampling, generate, load_pipeline
from segcn.utils.errors import UserError
from segcn.utils.io import aside, write_whole
from segcn.utils.progress import Progress

CHUNK = "segcn"  # the text chunk of a PNG that holds the settings
BATCH_SIZE = 8  # images of `infer` that are generated at once

Order = tuple[np.ndarray, str, SampleConfig]  # class ids uint8 [H, W], caption and settings of one image


def made_with(
    pipeline: Pipeline, settings: SampleConfig, prompts: Sequence[str], seeds: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """All that images of these prompts depend on but their mask; seeds: (seed, row) of each image of a prompt."""
    return {
        "settings": {field.name: getattr(settings, field.name) for field in dataclasses.fields(SampleConfig)},
        "prompt": list(prompts),
        "seeds": list(seeds),
        "base_fingerprint": pipeline.base.fingerprint,
        "controlnet": pipeline.controlnet_folder,
        "controlnet_weights": pipeline.controlnet_digest,
        "palette_fingerprint": pipeline.palette.fingerprint,
    }


def in_chunk(record: dict[str, Any]) -> PngInfo:
    """What Pillow writes into a PNG."""
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(record))
    return chunks


def read_settings(path: str | Path) -> dict[str, Any]:
    """What the images of a PNG were made with: settings (those of SampleConfig), prompt, seeds, fingerprints."""
    with open_image(path) as image:
        image.load()
        text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        raise UserError(f"{path}: expected an image that segcn infer or the panel wrote, found no settings in it")
    return json.loads(text)


@dataclass(eq=False)
class GeneratedImage:
    """An image, uint8 [H, W, 3], and what it was generated from."""

    image: np.ndarray
    mask: np.ndarray  # uint8 [H, W] class ids
    caption: str
    settings: SampleConfig
    record: dict[str, Any]  # see `made_with`; stopped: the step after which it was not generated further

    def png(self) -> bytes:
        """The image as a PNG file that holds its settings."""
        file = io.BytesIO()
        Image.fromarray(self.image).save(file, format="PNG", pnginfo=in_chunk(self.record))
        return file.getvalue()

    def save(self, folder: str | Path, palette: Palette) -> int:
        """Append image, mask, caption and settings to a data set folder; returns the row's number. See `save_row`."""
        return save_row(folder, self.image, self.mask, self.caption, palette, in_chunk(self.record))


def generate_each(
    pipeline: Pipeline, orders: Iterable[Order], on_guess: OnGuess | None = None
) -> Iterator[GeneratedImage]:
    """Generate one image after the other, so that the first is seen early and masks may differ in size.

    A mask that is unlabelled everywhere has no effect: its image is generated from the text alone. on_guess: see
    `generate`; True stops: the image at work is the last, as it is in this step, and its record says so.
    """
    stopped = 0

    def after_step(step: int, guess: Callable[[], np.ndarray]) -> bool:
        nonlocal stopped
        stopped = step if on_guess and on_guess(step, guess) else 0
        return stopped > 0

    for mask, caption, settings in orders:
        masks = None if (mask == IGNORE).all() else mask[None]
        image = generate(pipeline, masks, [caption], [0], settings, mask.shape, on_guess=after_step)[0]
        used = dataclasses.replace(settings, controlnet_model_name_or_path=pipeline.controlnet_folder)
        record = made_with(pipeline, used, [caption], [(used.seed, 0)])
        record |= ({} if masks is not None else {"without_control": True}) | ({"stopped": stopped} if stopped else {})
        yield GeneratedImage(image, mask, caption, used, record)
        if stopped:
            return


def infer(config: InferConfig) -> Path:
    """Generate every prompt with every seed, and write one PNG: a row of images for each prompt."""
    out, mask_path = _check_files(config)
    palette = _palette_of(mask_path, config)
    framed = palette and read_framed_mask(mask_path, palette, config.square, config.framing)
    pipeline = load_pipeline(config, palette)
    check_buckets(config, pipeline.base.side_factor)
    mask, frame = framed or read_framed_mask(mask_path, pipeline.palette, config.square, config.framing)
    columns = [(seed, 0) for seed in config.seeds] or [(config.seed, row) for row in range(config.num_images)]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for seed, _ in columns))
    print(f"Generating with {pipeline}, seed {seeds}.", file=sys.stderr)
    images: dict[tuple[str, int, int], np.ndarray] = {}
    batches: list[tuple[int, list[tuple[str, int]]]] = []
    at_once = 1 if config.tiled else BATCH_SIZE
    for seed in dict.fromkeys(seed for seed, _ in columns):
        cells = [(prompt, row) for prompt in config.prompt for own, row in dict.fromkeys(columns) if own == seed]
        batches += [(seed, cells[first : first + at_once]) for first in range(0, len(cells), at_once)]
    steps = config.num_inference_steps
    progress = Progress("denoising steps", steps * len(batches), file=sys.stderr)

    def count(before: int, step: int) -> None:
        progress(before + step)

    for number, (seed, batch) in enumerate(batches):
        prompts, rows = map(list, zip(*batch, strict=True))
        made = generate(
            pipeline, np.stack([mask] * len(rows)), prompts, rows, dataclasses.replace(config, seed=seed),
            on_step=partial(count, number * steps),
        )  # fmt: skip
        images |= {(prompt, seed, row): image for prompt, row, image in zip(prompts, rows, made, strict=True)}
    lines = [[frame.of(images[prompt, *column]) for column in columns] for prompt in config.prompt]
    grid = Image.fromarray(np.concatenate([np.concatenate(line, axis=1) for line in lines]))
    record = made_with(pipeline, config, config.prompt, columns) | {"control": mask_path.name}
    write_whole(out, lambda path: grid.save(path, format="PNG", pnginfo=in_chunk(record)))
    return out


def _check_files(config: InferConfig) -> tuple[Path, Path]:
    """The PNG to write and the mask; UserError for what would fail only after the images are generated."""
    out, mask = Path(config.out), Path(config.control)
    if not (config.control and config.prompt and config.out):
        raise UserError("segcn infer needs --control MASK.png --prompt TEXT --out OUT.png")
    check_sampling(config)
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


def _palette_of(mask: Path, config: InferConfig) -> Palette | None:
    """--palette, else the one beside or above the mask's folder, else None: the ControlNet's own."""
    if config.palette:
        return Palette.load(config.palette)
    for folder in (mask.parent, mask.absolute().parent.parent):
        try:
            found = find_palette(folder)
        except UserError:
            continue
        return Palette.load(found)
    return None
