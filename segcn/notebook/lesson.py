"""What notebook 00 shows of latent diffusion: each part of the embedded base by itself, as images."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from segcn.data.dataset import to_uint8
from segcn.data.visualize import grid
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline, diffusers_pipeline, generate
from segcn.models.base import Base, decode, encode_mean, encode_text, load_base, reconstruct
from segcn.samples.base_model.recipe import SMOKE, BaseRecipe, build_base
from segcn.samples.base_model.training import to_pixels
from segcn.samples.landscapes.scene import draw_landscape, palette
from segcn.utils import rng

SEED = 4343  # of images that are in no training
RESOLUTION = 128  # px


def landscapes(count: int) -> tuple[torch.Tensor, list[str]]:
    """Images float32 [N, 3, 128, 128] in [-1, 1] that the base never saw, and their captions."""
    scenes = [draw_landscape(SEED, row, RESOLUTION) for row in range(count)]
    return to_pixels(torch.from_numpy(np.stack([one.image for one in scenes]))), [one.caption for one in scenes]


def to_latents(base: Base, image: torch.Tensor) -> torch.Tensor:
    """image [B, 3, H, W] in [-1, 1] -> the posterior's mean, scaled, [B, C, h, w]."""
    assert base.vae is not None
    return encode_mean(base.vae, image)


def channels(image: torch.Tensor, latents: torch.Tensor) -> Figure:
    """An image [3, H, W] and each channel of its latents [C, h, w] in grey, black at -3 and white at 3."""
    grey = ((latents + 3) / 6 * 255).clamp(0, 255).byte().numpy()
    size, tiles = (RESOLUTION, RESOLUTION), [to_uint8(image)]
    for channel in grey:
        tiles.append(np.asarray(Image.fromarray(channel).convert("RGB").resize(size, Image.Resampling.NEAREST)))
    notes = ["image", *(f"channel {number}" for number in range(len(grey)))]
    lines = [slice(at, at + 7) for at in range(0, len(tiles), 7)]
    return grid([tiles[line] for line in lines], below=[notes[line] for line in lines], width=1.2)


def psnr(image: torch.Tensor, seen: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each image [B, 3, H, W] in [-1, 1], in dB."""
    error = (seen.clamp(-1, 1) - image).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).tolist()


def lost(image: torch.Tensor, *versions: torch.Tensor, names: Sequence[str] = ("reconstruction",)) -> Figure:
    """Images, what autoencoders make of them with the PSNR beneath, and the last one's error five times as strong."""
    error = ((versions[-1] - image).abs() * 5 - 1).clamp(-1, 1)
    rows = zip(*(to_uint8(part) for part in (image, *versions, error)), strict=True)
    values = zip(*(psnr(image, version) for version in versions), strict=True)
    notes = [["", *(f"{value:.1f} dB" for value in line), ""] for line in values]
    return grid([list(row) for row in rows], ["image", *names, "error x 5"], below=notes)


def tokens(base: Base, caption: str) -> list[str]:
    """The tokens of a caption, without the padding."""
    return base.tokenizer.convert_ids_to_tokens(base.tokenizer(caption).input_ids)


def caption_distances(base: Base, captions: Sequence[str]) -> Figure:
    """Cosine distances between captions at their last token, which has read all the others, as a table of colors."""
    embeddings = encode_text(base, list(captions))  # [B, L, D]
    ends = [len(base.tokenizer(caption).input_ids) - 1 for caption in captions]
    pooled = torch.nn.functional.normalize(embeddings[range(len(captions)), ends], dim=1)
    distances = (1 - pooled @ pooled.T).clamp(min=0)
    figure = Figure(figsize=(8, 0.42 * len(captions) + 0.3))
    axes = figure.add_axes((0.5, 0.05, 0.48, 0.9))
    axes.imshow(distances, cmap="Blues", vmax=2 * distances.max().item(), aspect="auto")
    axes.set(xticks=[], yticks=range(len(captions)), yticklabels=captions)
    for row, line in enumerate(distances.tolist()):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    return figure


@torch.no_grad()
def one_step(base: Base, image: torch.Tensor, caption: str, timesteps: Sequence[int]) -> Figure:
    """An image [3, H, W] with more and more noise, and what the U-Net makes of each in a single step.

    From v = alpha noise - sigma clean (Salimans and Ho 2022, arXiv:2202.00512) follows clean = alpha noisy - sigma v.
    """
    process = base.process
    clean, when = to_latents(base, image[None]), torch.tensor(timesteps)
    noise = rng.normal(tuple(clean.shape), "lesson noise")
    alpha, sigma = process.levels(when)
    noisy = alpha * clean + sigma * noise  # [T, C, h, w]
    text, size = encode_text(base, [caption] * len(when)), (image.shape[1], image.shape[2])
    guess = process.clean(noisy, base.predict(noisy, process.times(when), text, size), when)
    errors, shares = (guess - clean).square().mean((1, 2, 3)).tolist(), sigma.flatten().square().tolist()
    notes = [[f"t = {step}, {share:.0%} noise" for step, share in zip(timesteps, shares, strict=True)],
             [f"squared error {error:.2f}" for error in errors]]  # fmt: skip
    return grid([to_uint8(decode(base.vae, part)) for part in (noisy, guess)], left=["noisy", "guess"], below=notes)


def denoising(base: Base, caption: str, settings: SampleConfig) -> Figure:
    """The latents after each step of the sampler, decoded."""
    side = RESOLUTION // base.latent_factor
    noise = rng.normal((1, base.latent_channels, side, side), "paint", settings.seed, 0)
    states = [noise]

    def after_step(pipe, step, timestep, values):
        states.append(values["latents"])
        return values

    diffusers_pipeline(base, settings)(
        prompt=caption, negative_prompt="", height=RESOLUTION, width=RESOLUTION, latents=noise, output_type="latent",
        num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
        callback_on_step_end=after_step,
    )  # fmt: skip
    images = list(to_uint8(decode(base.vae, torch.cat(states))))
    notes = ["noise", *(f"step {step}" for step in range(1, len(images)))]
    half = -(-len(images) // 2)
    return grid([images[:half], images[half:]], below=[notes[:half], notes[half:]], width=1.4)


def generated(base: Base, captions: Sequence[str], settings: SampleConfig) -> np.ndarray:
    """Captions alone to images, uint8 [N, 128, 128, 3], all from the same noise."""
    pipeline = Pipeline(base, None, palette(), "")
    return generate(pipeline, None, list(captions), [0] * len(captions), settings, (RESOLUTION, RESOLUTION))


def guided(base: Base, captions: Sequence[str], settings: SampleConfig, scales: Sequence[float]) -> Figure:
    """The same captions and noise under several weights of the text: a weight a row."""
    rows = [generated(base, captions, dataclasses.replace(settings, guidance_scale=scale)) for scale in scales]
    return grid(rows, left=[f"guidance\n{scale:g}" for scale in scales], below=[captions] * len(scales), width=1.7)


def small_recipe(steps: int) -> BaseRecipe:
    """The recipe's smoke preset with a given number of steps for both trainings."""
    vae, unet = dataclasses.replace(SMOKE.vae, steps=steps), dataclasses.replace(SMOKE.unet, steps=steps)
    return dataclasses.replace(SMOKE, vae=vae, unet=unet)


def empty_folder(folder: Path) -> Path:
    """The folder without what an earlier run of the lesson left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def build_until(words: str, work: Path, out: Path, recipe: BaseRecipe) -> None:
    """Build a base until it prints a line that starts with `words`, as if the power failed then."""

    def log(line: str) -> None:
        if line.startswith(words):
            raise InterruptedError(words)
        print(line.replace(f"{work}/", ""))

    try:
        build_base(work, out, recipe, log)
    except InterruptedError:
        print(f"(stopped before: {words} ...)")


def scratch_and_shipped(scratch: Path, base: Base, image: torch.Tensor) -> Figure:
    """Images through the autoencoder that was just trained, and through the embedded one."""
    seen = [reconstruct(part.vae, image) for part in (load_base(scratch), base)]
    return lost(image, *seen, names=("a few steps", "embedded base"))


def beside(small: BaseRecipe, whole: BaseRecipe) -> str:
    """Where two recipes differ, a line each."""
    lines = [f"{'':22}{'here':>16}{'embedded base':>18}"]
    pairs: list[tuple[str, Any, Any]]
    pairs = [("images: ", small, whole), ("vae: ", small.vae, whole.vae), ("unet: ", small.unet, whole.unet)]
    for part, *both in pairs:
        for name in (field.name for field in dataclasses.fields(both[0])):
            values = [getattr(one, name) for one in both]
            if values[0] != values[1] and isinstance(values[0], int | float | tuple):
                texts = [" ".join(map(str, v)) if isinstance(v, tuple) else f"{v:,}" for v in values]
                lines.append(f"{part + name:22}{texts[0]:>16}{texts[1]:>18}")
    return "\n".join(lines)
