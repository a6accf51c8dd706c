"""The consistency reward: a frozen segmenter looks for the mask in the image that a noisy latent is taken for.

ControlNet++ (Li et al. 2024, arXiv:2404.07987): at low noise the one-step estimate of the clean image is good enough to
be segmented, and the cross entropy against the mask goes back into the ControlNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from segcn.data.metadata import Split
from segcn.data.palette import IGNORE
from segcn.models.base import Base, decode_latents, weights_digest
from segcn.models.segmenter import REWARD_SEGMENTER, AnySegmenter, SegmenterConfig, open_segmenter, segmenter_of
from segcn.train.config import TrainConfig
from segcn.train.latent_cache import cache_root
from segcn.utils import io

if TYPE_CHECKING:
    from segcn.train.log import Log

REWARD_SEED = 8001  # of the segmenter that rewards; the one that scores has --seed, 0 by default


def open_reward_segmenter(
    config: TrainConfig, split: Split, output_dir: Path, accelerator, log: Log
) -> AnySegmenter | None:
    """The frozen segmenter of --reward_weight: given, or trained on the training rows with a seed of its own.

    One of ours is kept in the run folder, so that an evaluation can tell it from the one that scores.
    """
    if not config.reward_weight:
        return None
    with accelerator.main_process_first():
        if config.reward_segmenter:
            args = config.reward_segmenter, split.palette, config.resolution, config.fit
            segmenter = open_segmenter(*args, str(accelerator.device))
        else:
            settings = SegmenterConfig(resolution=config.resolution, seed=REWARD_SEED, fit=config.fit)
            segmenter = segmenter_of(split, settings, cache_root(config), log.say, str(accelerator.device))
    if accelerator.is_main_process:
        found = {
            "weights": weights_digest(segmenter),
            "folder": config.reward_segmenter,
            "weight": config.reward_weight,
        }
        io.write_text(output_dir / REWARD_SEGMENTER, json.dumps(found, indent=1) + "\n")
    return segmenter.requires_grad_(False).eval()


def clean_estimate(
    scheduler: DDPMScheduler, noisy: torch.Tensor, prediction: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """The one-step estimate of the clean latents, [B,C,h,w] (Song et al. 2020, arXiv:2010.02502, equation 12).

    noisy: [B,C,h,w]; prediction: of the U-Net, noise or v (arXiv:2202.00512), [B,C,h,w]; timestep: int [B].
    """
    alpha = scheduler.alphas_cumprod.to(noisy.device)[timestep].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
    return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()


def reward_losses(base: Base, segmenter: AnySegmenter, clean: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of what the segmenter sees in decoded latents, float32 [B]; 0 where no pixel is labelled.

    clean: latents [B,C,h,w]; mask: uint8 [B,R,R], 255 where unlabelled or out of frame.
    """
    logits = segmenter(decode_latents(base.vae, clean)).float()
    error = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="none")
    return error.sum((1, 2)) / (mask != IGNORE).sum((1, 2)).clamp(min=1)
