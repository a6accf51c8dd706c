"""Masks and captions to images: the base and its ControlNet, and the denoising loop with classifier-free guidance.

It gives the images of diffusers' StableDiffusionControlNetPipeline, and a test compares them. Besides, guidance can act
in a window of the steps alone (Kynkäänniemi et al. 2024, arXiv:2404.07724), and nothing is computed twice: outside of
the window each image passes through the networks once, and the ControlNet runs only where its weight is not 0."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from segcn.data.dataset import in_batches, to_control, to_image, to_uint8
from segcn.data.palette import Palette
from segcn.data.transforms import Box, check_buckets
from segcn.generate.config import SampleConfig
from segcn.generate.tiling import Windows
from segcn.models.base import (
    DTYPES,
    Base,
    base_fingerprint,
    decode,
    encode_mean,
    encode_text,
    keep_freed_memory,
    load_base,
    pick_device,
    plain_pipeline,
    weights_digest,
)
from segcn.models.controlnet import ControlNet, is_finished_controlnet, load_controlnet
from segcn.models.family import Residuals, each_residual
from segcn.utils import rng
from segcn.utils.args import check_values
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS, RUN_FILE

CONTROL_SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps that are done -> factor of the weight
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
WINDOWS_AT_ONCE = 8  # of --tiled, where there is no --batch_size
STRIP = 64  # rows of a large image that become bytes at once
KEPT_CAPTIONS = 256  # embeddings that a pipeline keeps: 60 MB with Stable Diffusion 1.5
Sampler = Callable[[Callable[[torch.Tensor, int], torch.Tensor], torch.Tensor, Any], torch.Tensor]  # see `generate`
OnStep = Callable[[int], bool | None]
Tiles = tuple[Windows, Callable[[Sequence[Box]], torch.Tensor | None]]  # and the control of some of them
OnGuess = Callable[[int, Callable[[], np.ndarray]], bool | None]


@dataclass
class Pipeline:
    """A base, a ControlNet, and the palette whose colors it was trained with."""

    base: Base
    controlnet: ControlNet | None
    palette: Palette
    controlnet_folder: str

    def __str__(self) -> str:
        lora = f" with {self.base.lora}" if self.base.lora else ""
        return f"base {self.base.folder}{lora}, ControlNet {self.controlnet_folder or 'none'}"

    @cached_property
    def controlnet_digest(self) -> str:
        """A digest of its weights, which must not change any more."""
        assert self.controlnet is not None
        return weights_digest(self.controlnet)

    @cached_property
    def embedding(self) -> Callable[[str], torch.Tensor]:
        """A function from a caption to its embedding [L, D], which is kept.

        Each caption is encoded alone, so that no image depends on the captions of others.
        """
        return lru_cache(KEPT_CAPTIONS)(lambda caption: encode_text(self.base, [caption])[0])

    def negative(self, prompt: str) -> torch.Tensor:
        """The embedding [L, D] that guidance leads away from; without a prompt zeros, where the base learned it so."""
        found = self.embedding(prompt)
        return found if prompt or not self.base.zeros_without_prompt else torch.zeros_like(found)


class Start(NamedTuple):
    """Real images that generated ones start from, in place of noise alone."""

    images: np.ndarray  # uint8 [B, H, W, 3]
    strength: float = 1.0  # share of the steps that are done, in (0, 1]; 1: from noise alone
    region: np.ndarray | None = None  # bool [B, H, W], the pixels to regenerate; none: all


def load_pipeline(settings: SampleConfig, palette: Palette | None = None) -> Pipeline:
    """Load base and ControlNet for a palette; without one, the ControlNet's own palette is used.

    UserError where one of them is missing or was made for another palette, and for settings out of range.
    """
    check_sampling(settings)
    device, dtype = pick_device(), DTYPES[settings.mixed_precision]
    if settings.torch_compile and device == "cpu":
        raise UserError("--torch_compile: expected a GPU, found none: a CPU compiles for minutes and gains a tenth")
    base_folder, lora = settings.pretrained_model_name_or_path, settings.lora
    folder = settings.controlnet_model_name_or_path or find_controlnet(base_folder, palette, lora)
    own = Path(folder) / "palette.json"
    if palette is None:
        if not Path(folder).is_dir():
            raise UserError(f"--controlnet_model_name_or_path {folder}: expected a ControlNet's folder, found none")
        if not own.is_file():
            raise UserError(f"{folder} holds no palette.json: name the masks' palette by --palette")
        palette = Palette.load(own)
    elif own.is_file() and Palette.load(own).fingerprint != palette.fingerprint:
        raise UserError(f"{folder} was trained with another palette than that of the masks: compare {own}")
    base = load_base(base_folder, device, dtype, lora=lora)
    check_trained_together(folder, base)
    if (Path(folder) / "scheduler").is_dir():  # it was trained with another noise schedule than the base
        base.scheduler = type(base.scheduler).from_pretrained(folder, subfolder="scheduler")
    controlnet = load_controlnet(folder, device, dtype, base.unet).eval()
    if settings.torch_compile:
        assert base.vae is not None
        for network in (base.unet, controlnet, base.vae.decoder):
            network.compile()
    keep_freed_memory(device)
    return Pipeline(base, controlnet, palette, str(folder))


def find_controlnet(base_folder: str, palette: Palette | None = None, lora: str | None = None) -> str:
    """The newest finished ControlNet below outputs/ for this base and palette, else the one shipped with the base.

    lora: what is added to the base. UserError where there is neither.
    """
    found, base = [], base_fingerprint(base_folder, lora)
    for run in OUTPUTS.glob(f"**/{RUN_FILE}"):
        settings = json.loads(run.read_text())
        same_palette = palette is None or settings["palette_fingerprint"] == palette.fingerprint
        finished = is_finished_controlnet(run.parent)
        if finished and same_palette and trained_for(run.parent, settings, base_folder) == base:
            found.append((run.stat().st_mtime, str(run.parent)))
    if found:
        return max(found)[1]
    shipped = Path(base_folder) / "controlnet"
    if shipped.is_dir():
        return str(shipped)
    raise UserError(
        f"no ControlNet for {base_folder} and this palette: train one, or name one by --controlnet_model_name_or_path"
    )


def trained_for(run: Path, settings: dict[str, Any], base_folder: str) -> str | None:
    """The fingerprint of the base that a run's ControlNet belongs to: with --train_unet, what became of the base."""
    kind = settings.get("train_unet")
    if kind and not (run / {"lora": "lora", "decoder": "base"}[kind]).is_dir():
        return None
    if kind == "decoder":
        return base_fingerprint(run / "base")
    return base_fingerprint(base_folder, str(run / "lora")) if kind else settings["base_fingerprint"]


def check_trained_together(folder: str | Path, base: Base) -> None:
    """UserError for a ControlNet that was trained with its U-Net, without what was trained of that."""
    record = Path(folder) / RUN_FILE
    settings = json.loads(record.read_text()) if record.is_file() else {}
    kind = settings.get("train_unet")
    if kind and settings["base_fingerprint"] == base.fingerprint:
        use = f"--lora {folder}/lora" if kind == "lora" else f"--pretrained_model_name_or_path {folder}/base"
        raise UserError(f"{folder}: this ControlNet was trained together with its U-Net: add {use}")


def check_sampling(settings: SampleConfig) -> None:
    """UserError for a setting out of its range."""
    check_values(settings)
    for start, end in (("guidance_start", "guidance_end"), ("control_guidance_start", "control_guidance_end")):
        first, last = getattr(settings, start), getattr(settings, end)
        if first > last:
            raise UserError(f"--{start} and --{end}: expected 0 <= start <= end <= 1, found {first} and {last}")
    check_buckets(settings)
    if settings.tiled and settings.buckets:
        raise UserError("--tiled leaves masks as large as they are, --buckets makes them smaller: leave one out")
    if settings.tiled and settings.resolution is None:
        raise UserError("--tiled: expected --resolution, the side of its windows, at which the ControlNet was trained")


def generate(
    pipeline: Pipeline,
    masks: np.ndarray | None,
    captions: list[str],
    rows: list[int],
    settings: SampleConfig,
    size: tuple[int, int] | None = None,
    on_step: OnStep | None = None,
    sampler: Sampler | None = None,
    on_guess: OnGuess | None = None,
    start: Start | None = None,
) -> np.ndarray:
    """Generate an image for each mask and caption: uint8 [B, H, W, 3].

    masks: class ids, uint8 [B, H, W]; None: without masks, `size` is (H, W). rows: the noise of an image depends on
    (settings.seed, its entry in rows) alone. on_step: called with the number of each finished step; True stops.
    sampler(denoise, noise, scheduler): replaces the loop over the steps, and returns latents [B, C, h, w], where
    denoise(latents, step) is the guided prediction at scheduler.timesteps[step] and noise is float32 [B, C, h, w]; it
    is not asked for `on_step`. on_guess: as on_step, and called also with a function that gives the images as the
    network guesses them in this step, uint8 [B, H, W, 3]; where it stops, these are the images. start: real images to
    start from, noised (SDEdit, Meng et al. 2022, arXiv:2108.01073); the steps before that noise are skipped, and
    windows and schedules are shares of the others, as in diffusers. Outside of its region the images stay the real
    ones, byte for byte (blended latent diffusion, Avrahami et al. 2022, arXiv:2206.02779; RePaint, Lugmayr et al. 2022,
    arXiv:2201.09865). It cannot be combined with a sampler. With settings.tiled, images larger than
    settings.resolution are generated one by one, at any size (`tiling`), from noise alone. UserError for settings out
    of range and a size that the base cannot have.
    """
    check_sampling(settings)
    base = pipeline.base
    if masks is not None:
        size = masks.shape[1:]
    assert size is not None
    if settings.tiled and (max(size) > (settings.resolution or 0) or any(side % base.side_factor for side in size)):
        assert start is None, "--tiled starts from noise"
        images = zip([None] * len(rows) if masks is None else masks, captions, rows, strict=True)
        tiled = partial(
            generate_tiled, settings=settings, size=size, on_step=on_step, sampler=sampler, on_guess=on_guess
        )
        return np.stack([tiled(pipeline, mask, caption, row) for mask, caption, row in images])
    noise = first_noise(base, rows, settings, size)
    negative = torch.stack([pipeline.negative(settings.negative_prompt)] * len(captions))
    text = torch.stack([pipeline.embedding(caption) for caption in captions])
    control = None if masks is None else to_control(masks, pipeline.palette).to(noise.device, base.dtype)
    latents = denoising_loop(pipeline, noise, negative, text, control, settings, on_step, sampler, on_guess, start)
    made = decoded(base, latents)
    return made if start is None or start.region is None else blended(start, made, base.latent_factor)


def generate_shapes(
    pipeline: Pipeline,
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    rows: Sequence[int],
    settings: SampleConfig,
    on_step: OnStep | None = None,
) -> list[np.ndarray]:
    """As `generate`, of masks uint8 [H, W] that may differ in shape: those of one shape are generated together."""

    def make(places: list[int]) -> np.ndarray:
        some, noise = [captions[place] for place in places], [rows[place] for place in places]
        return generate(pipeline, np.stack([masks[place] for place in places]), some, noise, settings, None, on_step)

    return in_batches(masks, make)


def generate_tiled(
    pipeline: Pipeline,
    mask: np.ndarray | None,
    caption: str,
    row: int,
    settings: SampleConfig,
    size: tuple[int, int],
    on_step: OnStep | None = None,
    sampler: Sampler | None = None,
    on_guess: OnGuess | None = None,
) -> np.ndarray:
    """One image of any size, uint8 [H, W, 3], from windows of settings.resolution; its noise is one field.

    mask: uint8 [H, W]. What the sides lack to a multiple of a latent cell repeats the mask's edge, and is cut off.
    Beside arrays of the image's size the memory is that of a batch of windows.
    """
    base, factor, whole = pipeline.base, pipeline.base.latent_factor, pipeline.base.side_factor
    assert settings.resolution is not None
    if settings.resolution % whole:
        raise UserError(f"--resolution: expected a multiple of {whole} with --tiled, found {settings.resolution}")
    cells = (-(-size[0] // whole) * (whole // factor), -(-size[1] // whole) * (whole // factor))
    windows = Windows(cells, settings.resolution // factor, getattr(settings, "batch_size", WINDOWS_AT_ONCE))
    noise = first_noise(base, [row], settings, (cells[0] * factor, cells[1] * factor))
    padded = None if mask is None else np.pad(mask, [(0, -side % whole) for side in size], mode="edge")

    def control_of(boxes: Sequence[Box]) -> torch.Tensor | None:
        """Of windows in cells: [N, 3, h, w] in [0, 1]."""
        if padded is None:
            return None
        parts = np.stack([Box(*(factor * each for each in box)).cut(padded) for box in boxes])
        return to_control(parts, pipeline.palette).to(noise.device, base.dtype)

    negative, text = pipeline.negative(settings.negative_prompt)[None], pipeline.embedding(caption)[None]
    tiles = windows, control_of
    latents = denoising_loop(pipeline, noise, negative, text, None, settings, on_step, sampler, on_guess, tiles=tiles)
    return decoded(base, latents, windows)[0, : size[0], : size[1]]


def decoded(base: Base, latents: torch.Tensor, windows: Windows | None = None) -> np.ndarray:
    """Scaled latents [B, C, h, w] -> uint8 [B, H, W, 3]; of a large image (B = 1) window by window, blended."""
    if windows is None:
        return to_uint8(decode(base.vae, latents))
    image = windows.blend(
        lambda boxes: decode(base.vae, torch.cat([box.cut(latents) for box in boxes])), 3, base.latent_factor
    )
    return np.concatenate([to_uint8(strip) for strip in image.split(STRIP, dim=2)], axis=1)


def noise_of(row: int, replicate: int, attempt: int) -> int:
    """What the noise of an image depends on besides the seed: for the first image of a row, the row itself."""
    return rng.seed_of("picture", row, replicate, attempt) if replicate or attempt else row


def first_noise(base: Base, rows: list[int], settings: SampleConfig, size: tuple[int, int]) -> torch.Tensor:
    """The noise of images of size (H, W), float32 [B, C, h, w]; UserError where the base has no such size."""
    (height, width), factor = size, base.latent_factor
    if height % base.side_factor or width % base.side_factor:
        raise UserError(
            f"expected masks with sides that are multiples of {base.side_factor}, found {width} x {height}:"
            " --resolution makes them square"
        )
    shape = (base.latent_channels, height // factor, width // factor)
    return torch.stack([rng.normal(shape, "paint", settings.seed, row) for row in rows]).to(base.unet.device)


@torch.no_grad()
def denoising_loop(
    pipeline: Pipeline,
    noise: torch.Tensor,
    negative: torch.Tensor,
    text: torch.Tensor,
    control: torch.Tensor | None,
    settings: SampleConfig,
    on_step: OnStep | None = None,
    sampler: Sampler | None = None,
    on_guess: OnGuess | None = None,
    start: Start | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Noise float32 [B, C, h, w] to scaled latents [B, C, h, w].

    negative, text: embeddings [B, L, D] of the negative prompts and of the captions. control: [B, 3, H, W] in [0, 1].
    tiles: of a large image (B = 1), its windows and their control, in place of `control`.
    """
    base, controlnet = pipeline.base, pipeline.controlnet
    if control is not None and controlnet is not None:
        controlnet = embedding_once(controlnet, len(control))
        control = base.encode_control(control, controlnet).to(base.dtype)
    scheduler = base.process.sampler(settings.scheduler)
    scheduler.set_timesteps(settings.num_inference_steps, device=noise.device)
    skipped = 0 if start is None else len(scheduler.timesteps) - int(len(scheduler.timesteps) * start.strength)
    both, factor = torch.cat([negative, text]), base.latent_factor

    def predict(latents: torch.Tensor, step: int, control: torch.Tensor | None) -> torch.Tensor:
        """The prediction for latents [N, C, h, w], guided (arXiv:2207.12598) and rescaled (arXiv:2305.08891)."""
        timestep, done = scheduler.timesteps[step], (step - skipped, len(scheduler.timesteps) - skipped)
        guidance, weight = guidance_at(settings, *done), control_at(settings, *done)
        prompts = (both if guidance > 1 else text).repeat_interleave(len(latents) // len(text), 0)  # windows share one
        copies = len(prompts) // len(latents)  # 2 with guidance
        size = latents.shape[2] * factor, latents.shape[3] * factor  # of a window where there are some
        noisy = torch.cat([latents] * copies).to(base.dtype)
        residuals: Residuals = {}
        if controlnet is not None and control is not None and weight:
            halved = copies == 2 and settings.guided_by == "text_and_mask"
            first = len(latents) if halved else 0  # of those that get the mask
            shown = torch.cat([control] * copies)[first:]
            residuals = base.residuals(controlnet, noisy[first:], timestep, prompts[first:], size, shown, weight)
            if first:
                residuals = each_residual(residuals, without_and_with)
        prediction = base.predict(noisy, timestep, prompts, size, residuals).float()
        if copies == 1:
            return prediction
        without_text, with_text = prediction.chunk(2)
        guided = without_text + guidance * (with_text - without_text)
        return rescale_noise_cfg(guided, with_text, settings.guidance_rescale) if settings.guidance_rescale else guided

    def denoise(latents: torch.Tensor, step: int) -> torch.Tensor:
        """The prediction for all latents, [B, C, h, w]."""
        if tiles is None:
            return predict(latents, step, control)
        windows, control_of = tiles

        def predict_windows(boxes: Sequence[Box]) -> torch.Tensor:
            shown = control_of(boxes)
            if shown is not None and controlnet is not None:
                shown = base.encode_control(shown, controlnet).to(base.dtype)
            return predict(torch.cat([box.cut(latents) for box in boxes]), step, shown)

        return windows.blend(predict_windows, latents.shape[1])

    if sampler is not None:
        assert start is None, "a sampler of one's own starts from noise"
        return sampler(denoise, noise, scheduler)
    latents, cells = noise, None
    if start is not None:
        real = encode_mean(base.vae, to_image(torch.from_numpy(start.images).movedim(-1, 1))).float()
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        latents = base.process.noised(scheduler, real, noise, skipped) if skipped else noise
        if start.region is not None:
            cells = redrawn_cells(start.region, factor).to(noise.device)
    for step, timestep in enumerate(scheduler.timesteps[skipped:], skipped):
        noisy, prediction = latents, denoise(latents, step)
        latents = scheduler.step(prediction, timestep, noisy).prev_sample
        if cells is not None:
            latents = torch.where(cells, latents, base.process.noised(scheduler, real, noise, step + 1))
        if on_step and on_step(step + 1):
            break
        if on_guess:
            guess = base.process.guess(scheduler, noisy, prediction, step)
            if on_guess(step + 1, partial(decoded, base, guess, tiles and tiles[0])):
                return guess
    return latents


def redrawn_cells(region: np.ndarray, factor: int) -> torch.Tensor:
    """The cells that hold a pixel of the region, and their neighbors: bool [B, H, W] -> [B, 1, H / factor, W / factor].

    So an outline may move by the width of a cell.
    """
    held = F.max_pool2d(torch.from_numpy(region)[:, None].float(), factor)
    return F.max_pool2d(held, 3, 1, 1).bool()


def blended(start: Start, images: np.ndarray, factor: int) -> np.ndarray:
    """Generated images in the cells that are redrawn, the real ones around them, as they are: uint8 [B, H, W, 3].

    The seam, the width of a cell, lies inside the redrawn cells and outside of the region.
    """
    assert start.region is not None
    half = factor // 2
    window = (2 * half + 1, 1, half)  # pixels, stride and padding
    kept = F.interpolate((~redrawn_cells(start.region, factor)).float(), scale_factor=factor)
    inside = 1 - F.max_pool2d(kept, *window)
    weight = F.avg_pool2d(inside, *window, count_include_pad=False).movedim(1, -1).numpy()
    return (start.images + weight * (images.astype(np.float32) - start.images)).round().astype(np.uint8)


def without_and_with(residual: torch.Tensor) -> torch.Tensor:
    """A residual of the ControlNet, [B, ...], for guidance of which one half knows no mask: zeros, then itself.

    So guidance strengthens the mask as it strengthens the text (Zhang et al. 2023, arXiv:2302.05543, section 3.4).
    """
    return torch.cat([torch.zeros_like(residual), residual])


def guidance_at(settings: SampleConfig, step: int, steps: int) -> float:
    """The weight of the text in a step: 1 outside of its window."""
    acts = step / steps >= settings.guidance_start and (step + 1) / steps <= settings.guidance_end
    return settings.guidance_scale if acts else 1.0


def control_at(settings: SampleConfig, step: int, steps: int) -> float:
    """The weight of the mask in a step: 0 outside of its window, where it falls as the schedule says."""
    acts = step / steps >= settings.control_guidance_start and (step + 1) / steps <= settings.control_guidance_end
    factor = CONTROL_SCHEDULES[settings.control_schedule](step / steps) if acts else 0.0
    return settings.controlnet_conditioning_scale * factor


class EmbeddedOnce(torch.nn.Module):
    """Embeds the control in the first step: it is the same in each step and in both halves of guidance."""

    def __init__(self, embedding: torch.nn.Module, images: int):
        super().__init__()
        self.embedding, self.images = embedding, images
        self.kept: torch.Tensor | None = None

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        """control [B or 2B, 3, H, W], B the number of images -> [B or 2B, C, h, w]."""
        if self.kept is None:
            self.kept = self.embedding(control[: self.images])
        return torch.cat([self.kept] * (len(control) // self.images))


def embedding_once(controlnet: ControlNet, images: int) -> ControlNet:
    """The ControlNet, its weights shared, for images whose control does not change.

    As it is where it is compiled, or where its control comes from the autoencoder.
    """
    if controlnet._compiled_call_impl is not None or not hasattr(controlnet, "controlnet_cond_embedding"):
        return controlnet
    shared = copy.copy(controlnet)
    embedding = EmbeddedOnce(controlnet.controlnet_cond_embedding, images)
    shared._modules = {**controlnet._modules, "controlnet_cond_embedding": embedding}
    return shared


def diffusers_pipeline(base: Base, settings: SampleConfig, controlnet: ControlNet | None = None):
    """diffusers' own pipeline around the loaded parts, without the safety checker, which blackens images."""
    check_sampling(settings)
    pipe = plain_pipeline(base, base.process.sampler(settings.scheduler), controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe
