"""Masks and captions to images. Widget, notebook, command line and validation all come here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from segcn import seeds
from segcn.claim import RUN_FILE
from segcn.config import OUTPUTS, WEIGHTS, SampleConfig
from segcn.dataset import to_control, to_uint8
from segcn.devices import keep_freed_memory, pick_device
from segcn.errors import UserError
from segcn.frozen import DTYPES
from segcn.labels import Palette
from segcn.models import Base, decode, encode_text, load_base, load_controlnet, weights_digest
from segcn.noise_prior import NoisePrior, open_prior, prior_noise
from segcn.sampling import Control, check_sampling, embedding_once, make_scheduler, sample

KEPT_CAPTIONS = 256  # embeddings that stay with a painter: 60 MB of Stable Diffusion 1.5's


@dataclass
class Painter:
    """A base, a ControlNet and the palette that it understands."""

    base: Base
    controlnet: ControlNetModel | None
    palette: Palette
    controlnet_folder: str

    @cached_property
    def controlnet_digest(self) -> str:
        """What tells its weights, which do not change any more, from others."""
        assert self.controlnet is not None
        return weights_digest(self.controlnet)

    @cached_property
    def embedding(self) -> Callable[[str], torch.Tensor]:
        """A caption to its embedding [L, D], kept for the next time.

        Each is encoded alone: it depends on nothing else that is painted, so neither does an image.
        """
        return lru_cache(KEPT_CAPTIONS)(lambda caption: encode_text(self.base, [caption])[0])

    @cached_property
    def prior(self) -> Callable[[str, int, str], NoisePrior]:
        """(data set or file, pixels a side, fit) to a noise prior, kept for the next time."""
        return lru_cache(1)(lambda source, side, fit: open_prior(source, self.base, self.palette, side, fit))


def load_painter(settings: SampleConfig, palette: Palette | None = None) -> Painter:
    """Load base and ControlNet for a palette; without one, the ControlNet's own palette is used.

    UserError where one of them is missing, or was made for another palette, or a setting cannot be.
    """
    check_sampling(settings)
    device = pick_device()
    dtype = DTYPES[settings.mixed_precision]
    if settings.torch_compile and device == "cpu":
        raise UserError("--torch_compile: expected a GPU, found none: a CPU compiles for minutes and gains a tenth")
    folder = settings.controlnet_model_name_or_path or find_controlnet(settings.pretrained_model_name_or_path, palette)
    own = Path(folder) / "palette.json"
    if palette is None and not Path(folder).is_dir():
        raise UserError(f"--controlnet_model_name_or_path {folder}: expected a ControlNet's folder, found none")
    if palette is None:
        if not own.is_file():
            raise UserError(f"{folder} holds no palette.json: name the masks' palette by --palette")
        palette = Palette.load(own)
    elif own.is_file() and Palette.load(own).fingerprint != palette.fingerprint:
        raise UserError(f"{folder} was trained with another palette than the masks' one: compare {own}")
    base = load_base(settings.pretrained_model_name_or_path, device, dtype)
    if (Path(folder) / "scheduler").is_dir():  # trained under another noise schedule than the base says
        base.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    controlnet = load_controlnet(folder, device, dtype).eval()
    if settings.torch_compile:
        assert base.vae is not None
        for network in (base.unet, controlnet, base.vae.decoder):
            network.compile()
    keep_freed_memory(device)
    return Painter(base, controlnet, palette, str(folder))


def find_controlnet(base_folder: str, palette: Palette | None = None) -> str:
    """The newest finished ControlNet below outputs/ for this base and palette, else the one shipped with the base.

    UserError where there is neither.
    """
    candidates = []
    for run in OUTPUTS.glob(f"**/{RUN_FILE}"):
        folder, made_for = run.parent, json.loads(run.read_text())
        finished = (folder / WEIGHTS).is_file()
        same_base = Path(made_for["pretrained_model_name_or_path"]).absolute() == Path(base_folder).absolute()
        same_palette = palette is None or made_for["palette_fingerprint"] == palette.fingerprint
        if finished and same_base and same_palette:
            candidates.append((run.stat().st_mtime, str(folder)))
    if candidates:
        return max(candidates)[1]
    shipped = Path(base_folder) / "controlnet"
    if shipped.is_dir():
        return str(shipped)
    raise UserError(
        f"no ControlNet for {base_folder} and this palette: train one, or --controlnet_model_name_or_path DIR"
    )


def generate(
    painter: Painter,
    masks: np.ndarray | None,
    captions: list[str],
    rows: list[int],
    settings: SampleConfig,
    size: tuple[int, int] | None = None,
    on_step: Callable[[int], bool | None] | None = None,
) -> np.ndarray:
    """Paint one image per caption: uint8 [N,H,W,3].

    masks: uint8 [N,H,W] class ids, or None to paint without (then `size` is (H,W)). The noise of an image depends on
    (settings.seed, its entry in rows) alone. `on_step(step)` is called after each denoising step; True stops.
    UserError for settings that cannot be, a size that the base does not take, and a noise prior of another base.
    """
    check_sampling(settings)
    if not size:
        assert masks is not None
        size = masks.shape[1:]
    noise = first_noise(painter.base, rows, settings, size)
    negative = torch.stack([painter.embedding(settings.negative_prompt)] * len(captions))
    text = torch.stack([painter.embedding(caption) for caption in captions])
    control = prior = None
    if masks is not None:
        condition = to_control(masks, painter.palette).to(noise.device, painter.base.dtype)
        control = Control(embedding_once(painter.controlnet, len(captions)), condition)
    if masks is not None and settings.noise_prior:
        drawn = prior_noise(noise.shape[1:], settings.seed, rows).to(noise.device)
        prior = painter.prior(settings.noise_prior, min(size), settings.fit).draw(masks, drawn)
    latents = sample(painter.base, noise, negative, text, settings, control, prior, on_step)
    return to_uint8(decode(painter.base.vae, latents))


def first_noise(base: Base, rows: list[int], settings: SampleConfig, size: tuple[int, int]) -> torch.Tensor:
    """What images of size (H,W) begin as, float32 [N,C,h,w]; UserError where the base has no such size."""
    (height, width), factor = size, base.latent_factor
    if height % factor or width % factor:
        raise UserError(
            f"expected masks with sides that are multiples of {factor}, found {width} x {height}: "
            "--resolution paints their centred square at a size of your own"
        )
    shape = (base.unet.config.in_channels, height // factor, width // factor)
    return torch.stack([seeds.normal(shape, "paint", settings.seed, row) for row in rows]).to(base.unet.device)


def make_pipeline(base: Base, settings: SampleConfig, controlnet: ControlNetModel | None = None):
    """diffusers' own pipeline around the loaded parts, without a safety checker (it blacks pictures out)."""
    check_sampling(settings)
    parts = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": make_scheduler(base, settings),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if controlnet is not None:
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    else:
        pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
