"""How latents become noise, what a base predicts of that, and its samplers: diffusion, or flow matching.

A timestep is a whole number from 0 (hardly any noise) to the last of the schedule (noise alone), in both."""

from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from segcn.utils import rng
from segcn.utils.errors import UserError


class Diffusion:
    """Denoising diffusion (Ho et al. 2020, arXiv:2006.11239): the base predicts noise, or v (arXiv:2202.00512)."""

    kind: ClassVar[Any] = DDPMScheduler  # of the schedule in a base's folder
    refused: ClassVar[tuple[str, ...]] = ()  # settings of a training that mean nothing here

    def __init__(self, scheduler: Any, folder: str = ""):
        """folder: the base's, for errors."""
        self.scheduler, self.folder = scheduler, folder

    @property
    def predicts(self) -> str:
        """What the base predicts, noise or v; UserError for anything else."""
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"{self.folder}/scheduler: expected epsilon or v_prediction, found {kind}")
        return "v" if kind == "v_prediction" else "noise"

    draw = staticmethod(rng.integer)  # (number of timesteps, *key) -> that of a training sample

    def times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Timesteps [B] as the networks read them."""
        return timestep

    def levels(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma), each [B,1,1,1]: noisy latents are alpha clean + sigma noise."""
        alpha = self.scheduler.alphas_cumprod.to(timestep.device)[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Clean latents [B,C,h,w] with the noise of their timesteps."""
        return self.scheduler.add_noise(clean, noise, timestep)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the base should predict, [B,C,h,w]."""
        return self.scheduler.get_velocity(clean, noise, timestep) if self.predicts == "v" else noise

    def clean(self, noisy: torch.Tensor, prediction: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The one-step estimate of the clean latents (Song et al. 2020, arXiv:2010.02502, equation 12)."""
        alpha, sigma = self.levels(timestep)
        return alpha * noisy - sigma * prediction if self.predicts == "v" else (noisy - sigma * prediction) / alpha

    def sampler(self, name: str) -> Any:
        """The scheduler of diffusers for --scheduler dpm, unipc or ddim."""
        kinds: dict[str, Any] = {
            "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler,
        }  # fmt: skip
        return kinds[name].from_config(self.scheduler.config)

    def noised(self, sampler: Any, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Clean latents [B,C,h,w] with the noise that they have before a step of a sampler; after the last one none."""
        timestep = sampler.timesteps[step : step + 1]
        return sampler.add_noise(latents, noise, timestep) if len(timestep) else latents

    def guess(self, sampler: Any, noisy: torch.Tensor, prediction: torch.Tensor, step: int) -> torch.Tensor:
        """What a prediction says that latents [B,C,h,w] are without their noise, before a step of a sampler."""
        alpha = sampler.alphas_cumprod[int(sampler.timesteps[step])].to(noisy).sqrt()
        sigma, kind = (1 - alpha**2).sqrt(), sampler.config.prediction_type
        if kind == "sample":
            return prediction
        return alpha * noisy - sigma * prediction if kind == "v_prediction" else (noisy - sigma * prediction) / alpha


class Flow(Diffusion):
    """Flow matching on straight lines from images to noise (Esser et al. 2024, arXiv:2403.03206).

    The base predicts their direction, noise - clean. The levels of noise are those of the base's scheduler, shifted.
    """

    kind = FlowMatchEulerDiscreteScheduler
    refused = ("prediction_type", "rescale_betas_zero_snr", "snr_gamma")

    @property
    def predicts(self) -> str:
        return "noise - clean"

    @staticmethod
    def draw(timesteps: int, *key: str | int) -> int:
        """Logit-normal: levels in the middle are drawn more often, in place of weights of the loss (section 3.1)."""
        return timesteps - 1 - min(timesteps - 1, int(rng.normal((1,), *key).sigmoid().item() * timesteps))

    def times(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.scheduler.config.num_train_timesteps * self._sigma(timestep)

    def levels(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = self._sigma(timestep).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.levels(timestep)
        return alpha * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return noise - clean

    def clean(self, noisy: torch.Tensor, prediction: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return noisy - self.levels(timestep)[1] * prediction

    def sampler(self, name: str) -> Any:
        """The same solvers on straight lines, on which a step of DDIM is one of Euler's method."""
        config = self.scheduler.config
        if name == "ddim":
            return FlowMatchEulerDiscreteScheduler.from_config(config)
        kinds: dict[str, Any] = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
        flow = {"use_flow_sigmas": True, "flow_shift": config.shift, "prediction_type": "flow_prediction"}
        return kinds[name](num_train_timesteps=config.num_train_timesteps, **flow)

    def noised(self, sampler: Any, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        sigma = sampler.sigmas[step].to(latents)
        return (1 - sigma) * latents + sigma * noise

    def guess(self, sampler: Any, noisy: torch.Tensor, prediction: torch.Tensor, step: int) -> torch.Tensor:
        return noisy - sampler.sigmas[step].to(noisy) * prediction

    def _sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The share of noise at timesteps [B]."""
        return self.scheduler.sigmas.to(timestep.device).flip(0)[timestep]
