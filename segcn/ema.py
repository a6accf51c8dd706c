"""The exponential moving average of the trained weights, by diffusers' EMAModel: stored, resumed, painted with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ControlNetModel
from diffusers.training_utils import EMAModel

from segcn.models import load_controlnet

FOLDER = "controlnet_ema"  # in a checkpoint


def make_ema(controlnet: ControlNetModel, decay: float) -> EMAModel:
    """An average that starts at the present weights, float32, on their device."""
    return EMAModel(controlnet.parameters(), decay=decay, foreach=True)


@contextmanager
def averaged(controlnet: ControlNetModel, ema: EMAModel | None) -> Iterator[ControlNetModel]:
    """The ControlNet with the averaged weights for a while; without an average as it is."""
    if ema is None:
        yield controlnet
        return
    ema.store(controlnet.parameters())
    ema.copy_to(controlnet.parameters())
    try:
        yield controlnet
    finally:
        ema.restore(controlnet.parameters())


def save_ema(controlnet: ControlNetModel, ema: EMAModel, folder: Path) -> None:
    """Write checkpoint folder/controlnet_ema, which `ControlNetModel.from_pretrained` opens."""
    with averaged(controlnet, ema):
        controlnet.save_pretrained(folder / FOLDER)


@torch.no_grad()
def load_ema(ema: EMAModel, folder: Path, step: int) -> None:
    """Go on from a checkpoint at an optimizer step: from its average, or where it has none from its weights."""
    ema.optimization_step = step
    stored = next(folder / name for name in (FOLDER, "controlnet") if (folder / name).is_dir())
    for shadow, weight in zip(ema.shadow_params, load_controlnet(stored).parameters(), strict=True):
        shadow.copy_(weight)
