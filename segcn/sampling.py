"""The sampling loop: noise to latents under a text and a mask.

It paints what diffusers' StableDiffusionControlNetPipeline paints, and a test holds it to that. Besides, it guides only
in a window of the steps (Kynkäänniemi et al. 2024, arXiv:2404.07724), outside of which each picture passes through the
networks once and not twice, and it leaves the ControlNet out where the mask does not act.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from segcn.config import SampleConfig
from segcn.errors import UserError
from segcn.models import Base

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler}
CONTROL_SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps that are done -> of the mask's weight
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
SHARES = ("guidance_rescale", "noise_prior_strength")
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
    for name in SHARES:
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"--{name}: expected 0 to 1, found {getattr(settings, name)}")


class EmbeddedOnce(torch.nn.Module):
    """Embeds the control in the first step and keeps it: it is the same in each step and in both halves of guidance."""

    def __init__(self, embedding: torch.nn.Module, pictures: int):
        super().__init__()
        self.embedding, self.pictures = embedding, pictures
        self.kept: torch.Tensor | None = None

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        """control [B or 2B, 3, H, W], B the number of pictures -> [B or 2B, C, h, w]."""
        if self.kept is None:
            self.kept = self.embedding(control[: self.pictures])
        return torch.cat([self.kept] * (len(control) // self.pictures))


def embedding_once(controlnet: ControlNetModel, pictures: int) -> ControlNetModel:
    """The ControlNet, its weights shared, for pictures whose control does not change; a compiled one as it is."""
    if controlnet._compiled_call_impl is not None:
        return controlnet
    shared = copy.copy(controlnet)
    embedding = EmbeddedOnce(controlnet.controlnet_cond_embedding, pictures)
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
    prior: torch.Tensor | None = None,
    on_step: Callable[[int], bool | None] | None = None,
) -> torch.Tensor:
    """Noise float32 [B, C, h, w] -> scaled latents [B, C, h, w].

    negative and text: embeddings [B, L, D] of the negative prompts and of the captions. prior: latents [B, C, h, w]
    from which, noised, the last `noise_prior_strength` of the steps set out. `on_step(step)`: True stops.
    """
    scheduler = make_scheduler(base, settings)
    scheduler.set_timesteps(settings.num_inference_steps, device=noise.device)
    steps, both = len(scheduler.timesteps), torch.cat([negative, text])
    first, latents = 0, noise
    if prior is not None:
        first = steps - max(1, int(steps * settings.noise_prior_strength))  # as the img2img pipelines count
        latents = base.scheduler.add_noise(prior, noise, scheduler.timesteps[first].expand(len(noise)))
    for step in range(first, steps):
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
