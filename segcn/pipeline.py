"""Masks and captions to images. Widget, notebook, command line and validation all come here."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from segcn import seeds
from segcn.config import OUTPUTS, SampleConfig
from segcn.dataset import to_control
from segcn.devices import keep_freed_memory, pick_device
from segcn.errors import UserError
from segcn.frozen import DTYPES
from segcn.labels import Palette
from segcn.models import Base, load_base, load_controlnet

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler}


@dataclass
class Painter:
    """A base, a ControlNet and the palette that it understands."""

    base: Base
    controlnet: ControlNetModel | None
    palette: Palette
    controlnet_folder: str


def load_painter(settings: SampleConfig, palette: Palette | None = None) -> Painter:
    """Load base and ControlNet for a palette; without one, the ControlNet's own palette is used."""
    device = pick_device()
    dtype = DTYPES[settings.mixed_precision]
    folder = settings.controlnet_model_name_or_path or find_controlnet(settings.pretrained_model_name_or_path, palette)
    own = Path(folder) / "palette.json"
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
    keep_freed_memory(device)
    return Painter(base, controlnet, palette, str(folder))


def find_controlnet(base_folder: str, palette: Palette | None = None) -> str:
    """The newest finished ControlNet below outputs/ for this base and palette, else the one shipped with the base."""
    candidates = []
    for run in OUTPUTS.glob("**/train_config.json"):
        folder, made_for = run.parent, json.loads(run.read_text())
        finished = (folder / "diffusion_pytorch_model.safetensors").is_file()
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
    """
    height, width = size or masks.shape[1:]
    factor = painter.base.latent_factor
    if height % factor or width % factor:
        raise UserError(
            f"expected masks with sides that are multiples of {factor}, found {width} x {height}: "
            "--resolution paints their centred square at a size of your own"
        )
    shape = (painter.base.unet.config.in_channels, height // factor, width // factor)
    noise = torch.stack([seeds.normal(shape, "paint", settings.seed, row) for row in rows])
    controlnet = None if masks is None else embedding_once(painter.controlnet, len(captions))
    pipe = make_pipeline(painter.base, settings, controlnet)
    control = {}
    if masks is not None:
        control = {
            "image": to_control(masks, painter.palette).to(painter.base.dtype),
            "controlnet_conditioning_scale": settings.controlnet_conditioning_scale,
            "control_guidance_start": settings.control_guidance_start,
            "control_guidance_end": settings.control_guidance_end,
        }

    def after_step(pipe, step, timestep, values):
        pipe._interrupt = bool(on_step and on_step(step + 1))
        return values

    images = pipe(
        prompt=list(captions),
        negative_prompt=[settings.negative_prompt] * len(captions),
        height=height,
        width=width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        latents=noise.to(painter.base.unet.device, painter.base.dtype),
        output_type="np",
        callback_on_step_end=after_step,
        **control,
    ).images
    return (images * 255).round().astype(np.uint8)


class EmbeddedOnce(torch.nn.Module):
    """Embeds the control in the first step and keeps it: it is the same in each step and in both halves of guidance."""

    def __init__(self, embedding: torch.nn.Module, pictures: int):
        super().__init__()
        self.embedding, self.pictures, self.kept = embedding, pictures, None

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        """control [B or 2B, 3, H, W], B the number of pictures -> [B or 2B, C, h, w]."""
        if self.kept is None:
            once = self.embedding(control[: self.pictures])
            self.kept = torch.cat([once] * (len(control) // self.pictures))
        return self.kept


def embedding_once(controlnet: ControlNetModel, pictures: int) -> ControlNetModel:
    """The ControlNet, its weights shared, for a single call of a pipeline: its control must not change."""
    shared = copy.copy(controlnet)
    embedding = EmbeddedOnce(controlnet.controlnet_cond_embedding, pictures)
    shared._modules = {**controlnet._modules, "controlnet_cond_embedding": embedding}
    return shared


def make_pipeline(base: Base, settings: SampleConfig, controlnet: ControlNetModel | None = None):
    """diffusers' own pipeline around the loaded parts, without a safety checker (it blacks pictures out)."""
    if settings.scheduler not in SCHEDULERS:
        raise UserError(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, found {settings.scheduler!r}")
    parts = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": SCHEDULERS[settings.scheduler].from_config(base.scheduler.config),
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
