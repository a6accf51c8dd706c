"""The consistency reward: a frozen segmenter looks for the mask in the image that a noisy latent is taken for.

ControlNet++ (Li et al. 2024, arXiv:2404.07987): at low noise the one-step estimate of the clean image is good enough to
be segmented, and the cross entropy against the mask goes back into the ControlNet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from segcn.data.metadata import Split
from segcn.data.palette import IGNORE
from segcn.data.sampler import COUNTED_ROWS, class_pixels, class_weights
from segcn.evaluate.evaluator import check_classes
from segcn.models.base import Base, decode_latents, encode_moments, sample_latents, weights_digest
from segcn.models.segmenter import (
    REWARD_FOLDER,
    REWARD_SEGMENTER,
    AnySegmenter,
    ForeignSegmenter,
    LatentSegmenter,
    SegmenterConfig,
    fit,
    load_latent_segmenter,
    load_segmenter,
    open_segmenter,
    reward_record,
    shared_folder,
    write_segmenter,
)
from segcn.train.batches import Examples, Plan
from segcn.train.config import TrainConfig
from segcn.utils import io, rng
from segcn.utils.errors import UserError

if TYPE_CHECKING:
    from segcn.train.log import Log

REWARD_SEED = 8001  # of the segmenter that rewards; the one that scores has --seed, 0 by default
LATENT_STEPS, LATENT_WIDTH = 400, 96  # of one that looks at latents; at most half of the training's steps


def open_reward_segmenter(
    config: TrainConfig, base: Base, examples: Examples, output_dir: Path, accelerator, log: Log
) -> AnySegmenter | None:
    """The frozen segmenter of --reward_weight: given, or trained on the latents of the training rows.

    The run folder keeps which one it is, and one of ours whole, so that an evaluation can show its figure beside that
    of the one that scores; a resumed run keeps it. UserError where it is the one that scores.
    """
    if not config.reward_weight:
        if accelerator.is_main_process:
            _inherit(config, output_dir)
        return None
    split = examples.dataset.split
    with accelerator.main_process_first():
        if config.reward_segmenter:
            segmenter = _given(config, split, str(accelerator.device))
            check_apart(config, split, segmenter)
        else:
            segmenter = _kept(config, base, examples, output_dir) or train_latent_segmenter(config, base, examples, log)
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


def train_latent_segmenter(config: TrainConfig, base: Base, examples: Examples, log: Log) -> LatentSegmenter:
    """A segmenter of the latents that the ControlNet is trained on: rows and augmentation are those of `examples`."""
    settings, split = _latent_settings(config), examples.dataset.split
    channels, device = base.vae_config["latent_channels"], base.unet.device
    log.say(f"The reward's segmenter, of latents, is trained on the {len(split)} training rows.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("segmenter", REWARD_SEED, "weights"))
        segmenter = LatentSegmenter(split.palette.num_classes, settings.width, channels, base.latent_factor, base.vae)
    segmenter.to(device).to(memory_format=torch.channels_last)
    shapes = examples.dataset.shapes if config.buckets else None
    plan = Plan(len(split), REWARD_SEED, 0, settings.steps, 1, settings.batch_size, shapes=shapes)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for keys in plan:
            rows = default_collate([examples[key] for key in keys])
            moments = rows["moments"] if "moments" in rows else encode_moments(base.vae, rows["image"]).cpu()
            yield sample_latents(base.vae_config, moments, rows["posterior"]), rows["mask"]

    weights = class_weights(class_pixels(split.first(COUNTED_ROWS)))
    fit(segmenter.network, batches(), weights, settings, log.say)
    found = {"num_classes": segmenter.num_classes, "rows": len(split), "latents": [channels, base.latent_factor]}
    segmenter.settings = settings.content | found | {"fingerprint": _fingerprint(config, base, examples)}
    return segmenter


def _latent_settings(config: TrainConfig) -> SegmenterConfig:
    assert config.max_train_steps is not None
    steps = max(1, min(LATENT_STEPS, config.max_train_steps // 2))
    return SegmenterConfig(
        steps=steps, width=LATENT_WIDTH, seed=REWARD_SEED, resolution=config.resolution, fit=config.fit
    )


def _fingerprint(config: TrainConfig, base: Base, examples: Examples) -> str:
    """16 hexadecimal digits that change with the rows, images and latents that a segmenter of latents is trained on."""
    seen = [examples.dataset.split.fingerprint, base.fingerprint, config.augment, config.cache, config.cache_draws]
    text = json.dumps([*seen, config.seed, config.resolution, config.framing], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept(config: TrainConfig, base: Base, examples: Examples, output_dir: Path) -> AnySegmenter | None:
    """The one of latents that the run folder holds, where it is whole and was trained on these rows and this base."""
    folder = output_dir / REWARD_FOLDER
    io.restore_replaced(output_dir, REWARD_FOLDER)
    if io.problem(folder) is not None:
        return None
    settings = json.loads((folder / "config.json").read_text())
    if settings.get("fingerprint") != _fingerprint(config, base, examples):
        return None
    segmenter = load_latent_segmenter(folder, base.vae, str(base.unet.device))
    return segmenter.to(memory_format=torch.channels_last)  # as it was trained: another layout rounds otherwise


def _keep(config: TrainConfig, split: Split, segmenter: AnySegmenter, output_dir: Path) -> None:
    """Commit it to the run folder, unless it is there; then say which one it is."""
    io.restore_replaced(output_dir, REWARD_FOLDER)
    digest, folder, file = weights_digest(segmenter), output_dir / REWARD_FOLDER, output_dir / REWARD_SEGMENTER
    known = file.is_file() and json.loads(file.read_text())["weights"] == digest
    if not isinstance(segmenter, ForeignSegmenter) and not (known and io.problem(folder) is None):
        io.commit(output_dir, REWARD_FOLDER, lambda staged: write_segmenter(segmenter, split.palette, staged))
    given = config.reward_segmenter and str(Path(config.reward_segmenter).absolute())
    io.write_text(
        file, json.dumps({"weights": digest, "folder": given, "weight": config.reward_weight}, indent=1) + "\n"
    )


def _inherit(config: TrainConfig, output_dir: Path) -> None:
    """A training that begins with a ControlNet that was rewarded keeps by which segmenter."""
    begun = config.controlnet_model_name_or_path
    found = reward_record(begun) if begun else None
    if found and not (output_dir / REWARD_SEGMENTER).is_file():
        folder = found[0] / REWARD_FOLDER
        record = found[1] | ({"folder": str(folder)} if folder.is_dir() else {})
        io.write_text(output_dir / REWARD_SEGMENTER, json.dumps(record, indent=1) + "\n")


def check_apart(config: TrainConfig, split: Split, segmenter: AnySegmenter) -> None:
    """UserError where the one of --reward_segmenter is the one that scores, by --segmenter or by default."""
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
            f"--reward_segmenter {config.reward_segmenter} has the weights of the segmenter that scores the held-out "
            f"rows ({config.segmenter or f'trained with --seed {config.seed}'}): expected two, as what rewards must not"
            " score. Leave out --reward_segmenter, or give another --segmenter."
        )


def reward_losses(base: Base, segmenter: AnySegmenter, clean: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of what the segmenter sees in latents, or in their images, float32 [B]; 0 where none is labelled.

    clean: latents [B,C,h,w]; mask: uint8 [B,R,R], 255 where unlabelled or out of frame.
    """
    if isinstance(segmenter, LatentSegmenter):
        logits = segmenter.network(clean).float()
    else:
        logits = segmenter(decode_latents(base.vae, clean)).float()
    error = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="none")
    return error.sum((1, 2)) / (mask != IGNORE).sum((1, 2)).clamp(min=1)
