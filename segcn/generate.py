"""A data set, or a folder of masks, to a data set of new images."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segcn.arguments import main_guard, parse
from segcn.augment import AUGMENTS
from segcn.checkpoint import write_text
from segcn.config import GenerateConfig
from segcn.dataset import PairedDataset, read_framed_mask, to_uint8
from segcn.errors import UserError
from segcn.geometry import boxes
from segcn.labels import Palette, find_palette
from segcn.masks import write_mask
from segcn.models import Base, reconstruct, weights_digest
from segcn.pipeline import Painter, generate, load_painter
from segcn.progress import Progress
from segcn.records import Split, read_named_split, write_metadata

MASK_SUFFIXES = {".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"}
SETTINGS_FILE = "generation.json"
CHANGE_NO_IMAGE = ("allow_symlinks", "batch_size", "controlnet_model_name_or_path", "limit", "output_dir")


def generate_dataset(config: GenerateConfig, painter: Painter | None = None, log: Callable = print) -> Path:
    """Paint every row of a data set or folder of masks and write the result as a data set; the same command goes on."""
    paths, captions, palette = read_controls(config)
    painter = painter or load_painter(config, palette)
    out = claim_output(config, painter)
    framed = [read_framed_mask(path, palette, config.resolution, config.fit) for path in paths]
    masks, frames = [mask for mask, _ in framed], [frame for _, frame in framed]
    names = [f"images/{row:06d}.png" for row in range(len(paths))]
    todo = [row for row, name in enumerate(names) if not (out / name).is_file()]
    if len(todo) < len(names):
        log(f"{out}: {len(names) - len(todo)} of {len(names)} images stand already and are kept.")
    told, done = Progress("painted", len(todo), log), 0
    for group in batches_of(todo, masks, config.batch_size):
        stack = np.stack([masks[row] for row in group])
        shown = None if config.without_control else stack
        images = generate(painter, shown, [captions[row] for row in group], group, config, stack.shape[1:])
        for row, image in zip(group, images, strict=True):
            write_pair(out, row, frames[row].of(image), frames[row].cut(masks[row]), palette)
        done += len(group)
        told(done)
    return finish_dataset(out, captions, palette)


def batches_of(rows: list[int], masks: list[np.ndarray], batch_size: int):
    """Consecutive rows of one mask size, at most batch_size together."""
    group: list[int] = []
    for row in rows:
        if group and (len(group) == batch_size or masks[row].shape != masks[group[0]].shape):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def read_controls(config: GenerateConfig) -> tuple[list[Path], list[str], Palette]:
    """Mask files, captions and palette of --controls, cut at --limit."""
    folder = Path(config.controls)
    is_dataset = folder.is_file() or any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*"))
    if is_dataset:
        split = read_named_split(folder, config.split)
        paths, captions = [r.mask for r in split.records], [r.caption for r in split.records]
        palette = Palette.load(config.palette) if config.palette else split.palette
    else:
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in MASK_SUFFIXES)
        if not paths:
            raise UserError(f"--controls {folder}: expected a data set or a folder of masks (PNG), found neither")
        if config.prompt is None:
            raise UserError(f"--controls {folder} has no captions: give one by --prompt")
        palette, captions = Palette.load(config.palette or find_palette(folder)), [""] * len(paths)
    captions = [config.prompt] * len(paths) if config.prompt is not None else captions
    return paths[: config.limit], captions[: config.limit], palette


def claim_output(config: GenerateConfig, painter: Painter) -> Path:
    """Write the settings to the output folder, or hold them against those that stand there."""
    if not config.output_dir:
        raise UserError("--output_dir: expected a folder to write to, found nothing")
    out = Path(config.output_dir)
    settings = asdict(config) | {"base_fingerprint": painter.base.fingerprint}
    for name in CHANGE_NO_IMAGE:
        settings.pop(name)
    if not config.without_control:
        settings |= {"controlnet": painter.controlnet_folder, "controlnet_weights": weights_digest(painter.controlnet)}
    path = out / SETTINGS_FILE
    if path.is_file():
        old = asdict(GenerateConfig()) | json.loads(path.read_text())
        changed = [
            f"{name}: was {old.get(name)!r}, is {settings[name]!r}"
            for name in settings
            if old.get(name) != settings[name]
        ]
        if changed:
            raise UserError(f"{out} holds images made with other settings:\n  " + "\n  ".join(changed)
                            + "\nMove it away, or choose another --output_dir.")  # fmt: skip
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--output_dir {out} is not empty and was not written by segcn generate: choose another.")
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return out


def write_pair(out: Path, row: int, image: np.ndarray, mask: np.ndarray, palette: Palette) -> None:
    """Write mask, then image, each in one step: an image that stands is whole and has its mask."""
    for folder, save in (
        ("masks", lambda path: write_mask(path, mask, palette)),
        ("images", lambda path: Image.fromarray(image).save(path, format="PNG")),
    ):
        aside = out / folder / f".{row:06d}.staged"
        save(aside)
        os.replace(aside, out / folder / f"{row:06d}.png")


def finish_dataset(out: Path, captions: list[str], palette: Palette) -> Path:
    """The palette and, last, the metadata that makes the folder a data set."""
    palette.save(out / "palette.json")
    write_metadata(out, [(f"images/{k:06d}.png", f"masks/{k:06d}.png", text) for k, text in enumerate(captions)])
    return out


def reconstruct_dataset(
    split: Split, base: Base, out: Path, resolution: int, batch_size: int = 16, fit: str = "crop"
) -> Path:
    """The real images through the autoencoder and back, as a data set: the ceiling of a latent model."""
    pairs = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit)
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pairs), batch_size):
        samples = [pairs.sample(row, 0) for row in range(first, min(first + batch_size, len(pairs)))]
        images = to_uint8(reconstruct(base.vae, torch.stack([sample.image for sample in samples])))
        for row, (sample, image) in enumerate(zip(samples, images, strict=True), first):
            frame = boxes(sample.draw, tuple(sample.original.shape[1:]), resolution)[1]
            write_pair(out, row, frame.of(image), frame.cut(sample.mask.numpy()), split.palette)
    return finish_dataset(out, [record.caption for record in split.records], split.palette)


def main() -> None:
    """Command line: the same as `segcn generate`."""
    main_guard(lambda: print(generate_dataset(parse(GenerateConfig, sys.argv[1:], "segcn generate"))))


if __name__ == "__main__":
    main()
