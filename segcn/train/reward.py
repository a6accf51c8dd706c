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
from segcn.evaluate.evaluator import check_classes
from segcn.models.base import Base, decode_latents, weights_digest
from segcn.models.segmenter import (
    REWARD_FOLDER,
    REWARD_SEGMENTER,
    AnySegmenter,
    Segmenter,
    SegmenterConfig,
    load_segmenter,
    open_segmenter,
    reward_record,
    segmenter_of,
    shared_folder,
    write_segmenter,
)
from segcn.train.config import TrainConfig
from segcn.train.latent_cache import cache_root
from segcn.utils import io
from segcn.utils.errors import UserError

if TYPE_CHECKING:
    from segcn.train.log import Log

REWARD_SEED = 8001  # of the segmenter that rewards; the one that scores has --seed, 0 by default


def open_reward_segmenter(
    config: TrainConfig, split: Split, output_dir: Path, accelerator, log: Log
) -> AnySegmenter | None:
    """The frozen segmenter of --reward_weight: given, or trained on the training rows with a seed of its own.

    The run folder keeps which one it is, and one of ours whole, so that an evaluation can tell it from the one that
    scores and show the figures of both; a resumed run goes on with it. UserError where it is the one that scores.
    """
    if not config.reward_weight:
        if accelerator.is_main_process:
            _inherit(config, output_dir)
        return None
    with accelerator.main_process_first():
        device = str(accelerator.device)
        if config.reward_segmenter:
            segmenter = _given(config, split, device)
        else:
            settings = SegmenterConfig(resolution=config.resolution, seed=REWARD_SEED, fit=config.fit)
            kept = _kept(output_dir, shared_folder(cache_root(config), split, settings).name, device)
            segmenter = kept or segmenter_of(split, settings, cache_root(config), log.say, device)
        check_apart(config, split, segmenter)
        if accelerator.is_main_process:
            _keep(config, split, segmenter, output_dir)
    return segmenter.requires_grad_(False).eval()


def _given(config: TrainConfig, split: Split, device: str) -> AnySegmenter:
    """The one of --reward_segmenter; UserError where it has other classes, or was trained at another resolution."""
    folder = config.reward_segmenter
    assert folder is not None
    try:
        segmenter = open_segmenter(folder, split.palette, config.resolution, config.fit, device)
    except UserError as error:
        raise UserError(str(error).replace("--segmenter", "--reward_segmenter")) from None
    check_classes(split, split.palette, segmenter)
    if segmenter.settings["resolution"] != config.resolution:
        raise UserError(
            f"--reward_segmenter {folder}: expected one trained at {config.resolution} px, as --resolution says, found "
            f"{segmenter.settings['resolution']} px; without the flag one is trained"
        )
    return segmenter


def _kept(output_dir: Path, name: str, device: str) -> AnySegmenter | None:
    """The one that the run folder holds, where it is whole and its rows and settings are those of this cache entry."""
    folder = output_dir / REWARD_FOLDER
    if io.problem(folder) is not None:
        return None
    segmenter = load_segmenter(folder, device)
    return segmenter if name.endswith(f"-{segmenter.settings['fingerprint']}") else None


def _keep(config: TrainConfig, split: Split, segmenter: AnySegmenter, output_dir: Path) -> None:
    """Commit it to the run folder, unless it is there; then say which one it is."""
    io.restore_replaced(output_dir, REWARD_FOLDER)
    digest, folder = weights_digest(segmenter), output_dir / REWARD_FOLDER
    whole = io.problem(folder) is None and weights_digest(load_segmenter(folder, "cpu")) == digest
    if isinstance(segmenter, Segmenter) and not whole:
        io.commit(output_dir, REWARD_FOLDER, lambda staged: write_segmenter(segmenter, split.palette, staged))
    given = config.reward_segmenter and str(Path(config.reward_segmenter).absolute())
    found = {"weights": digest, "folder": given, "weight": config.reward_weight}
    io.write_text(output_dir / REWARD_SEGMENTER, json.dumps(found, indent=1) + "\n")


def _inherit(config: TrainConfig, output_dir: Path) -> None:
    """A training that begins with a ControlNet that was rewarded keeps by which segmenter."""
    begun = config.controlnet_model_name_or_path
    found = reward_record(begun) if begun else None
    if found and not (output_dir / REWARD_SEGMENTER).is_file():
        folder = found[0] / REWARD_FOLDER
        record = found[1] | ({"folder": str(folder)} if folder.is_dir() else {})
        io.write_text(output_dir / REWARD_SEGMENTER, json.dumps(record, indent=1) + "\n")


def check_apart(config: TrainConfig, split: Split, segmenter: AnySegmenter) -> None:
    """UserError where the segmenter that rewards is the one that scores held-out rows, by --segmenter or by default."""
    if not config.faithfulness_rows:
        return
    if config.segmenter:
        same = weights_digest(load_segmenter(config.segmenter, "cpu")) == weights_digest(segmenter)
    else:
        settings = SegmenterConfig(resolution=config.resolution, seed=config.seed, fit=config.fit)
        trained = segmenter.settings.get("fingerprint")
        same = shared_folder("", split, settings).name == f"segmenter-{trained}"
    if same:
        raise UserError(
            f"--reward_segmenter {config.reward_segmenter or '(the one that is trained)'} has the weights of the "
            f"segmenter that scores the held-out rows ({config.segmenter or f'trained with --seed {config.seed}'}): "
            "expected two, as what rewards must not score. Leave out --reward_segmenter, or give another --segmenter."
        )


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
