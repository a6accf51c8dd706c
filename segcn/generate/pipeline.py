"""The sampling loop: noise to latents under a text and a mask.

It paints what diffusers' StableDiffusionControlNetPipeline paints, and a test holds it to that. Besides, it guides only
in a window of the steps (Kynkäänniemi et al. 2024, arXiv:2404.07724), outside of which each image passes through the
networks once and not twice, and it leaves the ControlNet out where the mask does not act."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from segcn.data.dataset import to_control, to_uint8
from segcn.data.palette import Palette
from segcn.generate.config import SampleConfig
from segcn.models.base import (
    DTYPES,
    Base,
    decode,
    encode_text,
    keep_freed_memory,
    load_base,
    pick_device,
    weights_digest,
)
from segcn.models.controlnet import load_controlnet
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS, RUN_FILE, WEIGHTS

# --- sampling: The sampling loop: noise to latents under a text and a mask.
#
# It paints what diffusers' StableDiffusionControlNetPipeline paints, and a test holds it to that. Besides, it guides only
# in a window of the steps (Kynkäänniemi et al. 2024, arXiv:2404.07724), outside of which each image passes through the
# networks once and not twice, and it leaves the ControlNet out where the mask does not act.

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler}
CONTROL_SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps that are done -> of the mask's weight
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
WINDOWS = (("guidance_start", "guidance_end"), ("control_guidance_start", "control_guidance_end"))


def check_sampling(settings: SampleConfig) -> None:
    """UserError for a setting out of its range."""
    for name, known in (("scheduler", SCHEDULERS), ("control_schedule", CONTROL_SCHEDULES)):
        if getattr(settings, name) not in known:
            raise UserError(f"--{name}: expected one of {', '.join(known)}, found {getattr(settings, name)!r}")
    if settings.num_inference_steps < 1:
        raise UserError(f"--num_inference_steps: expected at least 1, found {settings.num_inference_steps}")
    for start, end in WINDOWS:
        found = getattr(settings, start), getattr(settings, end)
        if not 0 <= found[0] <= found[1] <= 1:
            raise UserError(f"--{start} and --{end}: expected 0 <= start <= end <= 1, found {found[0]} and {found[1]}")
    if not 0 <= settings.guidance_rescale <= 1:
        raise UserError(f"--guidance_rescale: expected 0 to 1, found {settings.guidance_rescale}")


class EmbeddedOnce(torch.nn.Module):
    """Embeds the control in the first step and keeps it: it is the same in each step and in both halves of guidance."""

    def __init__(self, embedding: torch.nn.Module, images: int):
        super().__init__()
        self.embedding, self.images = embedding, images
        self.kept: torch.Tensor | None = None

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        """control [B or 2B, 3, H, W], B the number of images -> [B or 2B, C, h, w]."""
        if self.kept is None:
            self.kept = self.embedding(control[: self.images])
        return torch.cat([self.kept] * (len(control) // self.images))


def embedding_once(controlnet: ControlNetModel, images: int) -> ControlNetModel:
    """The ControlNet, its weights shared, for images whose control does not change; a compiled one as it is."""
    if controlnet._compiled_call_impl is not None:
        return controlnet
    shared = copy.copy(controlnet)
    embedding = EmbeddedOnce(controlnet.controlnet_cond_embedding, images)
    shared._modules = {**controlnet._modules, "controlnet_cond_embedding": embedding}
    return shared


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it is shown."""

    network: ControlNetModel
    condition: torch.Tensor  # [B, 3, H, W] in [0, 1]

    def residuals(self, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, weight: float) -> dict:
        """What the U-Net is given of the mask, as its keywords; noisy [B or 2B, C, h, w], text [B or 2B, L, D]."""
        if weight == 0:
            return {}
        condition = torch.cat([self.condition] * (len(noisy) // len(self.condition)))
        down, middle = self.network(noisy, timestep, text, condition, weight, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def make_scheduler(base: Base, settings: SampleConfig):
    """The sampler, under the base's noise schedule."""
    return SCHEDULERS[settings.scheduler].from_config(base.scheduler.config)


@torch.no_grad()
def sample(
    base: Base,
    noise: torch.Tensor,
    negative: torch.Tensor,
    text: torch.Tensor,
    settings: SampleConfig,
    control: Control | None = None,
    on_step: Callable[[int], bool | None] | None = None,
) -> torch.Tensor:
    """Noise float32 [B, C, h, w] -> scaled latents [B, C, h, w].

    negative and text: embeddings [B, L, D] of the negative prompts and of the captions. `on_step(step)`: True stops.
    """
    scheduler = make_scheduler(base, settings)
    scheduler.set_timesteps(settings.num_inference_steps, device=noise.device)
    steps, both = len(scheduler.timesteps), torch.cat([negative, text])
    latents = noise
    for step in range(steps):
        timestep, guidance = scheduler.timesteps[step], guidance_at(settings, step, steps)
        seen = both if guidance > 1 else text
        noisy = torch.cat([latents] * (len(seen) // len(latents))).to(base.dtype)
        mask = control.residuals(noisy, timestep, seen, control_at(settings, step, steps)) if control else {}
        prediction = base.unet(noisy, timestep, seen, **mask).sample.float()
        latents = scheduler.step(guided(prediction, guidance, settings), timestep, latents).prev_sample
        if on_step and on_step(step + 1):
            break
    return latents


def guidance_at(settings: SampleConfig, step: int, steps: int) -> float:
    """The weight of the text in a step: 1 outside of the window."""
    return settings.guidance_scale if acts(step, steps, settings.guidance_start, settings.guidance_end) else 1.0


def control_at(settings: SampleConfig, step: int, steps: int) -> float:
    """The weight of the mask in a step: 0 outside of the window, and falling in it as the schedule says."""
    if not acts(step, steps, settings.control_guidance_start, settings.control_guidance_end):
        return 0.0
    return settings.controlnet_conditioning_scale * CONTROL_SCHEDULES[settings.control_schedule](step / steps)


def acts(step: int, steps: int, start: float, end: float) -> bool:
    """Whether a step lies in a window given in shares of all steps, as diffusers counts it."""
    return step / steps >= start and (step + 1) / steps <= end


def guided(prediction: torch.Tensor, guidance: float, settings: SampleConfig) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598) of [2B, C, h, w], rescaled after arXiv:2305.08891 -> [B, C, h, w].

    Without guidance [B, C, h, w] as it is.
    """
    if guidance <= 1:
        return prediction
    plain, told = prediction.chunk(2)
    strengthened = plain + guidance * (told - plain)
    rescale = settings.guidance_rescale
    return rescale_noise_cfg(strengthened, told, rescale) if rescale else strengthened


# --- pipeline: Masks and captions to images. Widget, notebook, command line and validation all come here.

KEPT_CAPTIONS = 256  # embeddings that stay with a painter: 60 MB of Stable Diffusion 1.5's


@dataclass
class Pipeline:
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


def load_pipeline(settings: SampleConfig, palette: Palette | None = None) -> Pipeline:
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
    return Pipeline(base, controlnet, palette, str(folder))


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
    painter: Pipeline,
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
    UserError for settings that cannot be, and a size that the base does not take.
    """
    check_sampling(settings)
    if not size:
        assert masks is not None
        size = masks.shape[1:]
    noise = first_noise(painter.base, rows, settings, size)
    negative = torch.stack([painter.embedding(settings.negative_prompt)] * len(captions))
    text = torch.stack([painter.embedding(caption) for caption in captions])
    control = None
    if masks is not None:
        condition = to_control(masks, painter.palette).to(noise.device, painter.base.dtype)
        control = Control(embedding_once(painter.controlnet, len(captions)), condition)
    latents = sample(painter.base, noise, negative, text, settings, control, on_step)
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
    return torch.stack([rng.normal(shape, "paint", settings.seed, row) for row in rows]).to(base.unet.device)


def diffusers_pipeline(base: Base, settings: SampleConfig, controlnet: ControlNetModel | None = None):
    """diffusers' own pipeline around the loaded parts, without a safety checker (it blacks images out)."""
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
