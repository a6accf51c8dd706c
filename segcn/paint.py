"""The painting that notebooks 04 and 05 share: which ControlNet, with which settings, and what stands already."""

import dataclasses
import json
from pathlib import Path

from segcn.config import GenerateConfig, make
from segcn.errors import UserError
from segcn.generate import SETTINGS_FILE, Painter, generate_dataset, load_painter
from segcn.models import weights_digest
from segcn.records import Split, read_split
from segcn.workspace import Workspace


def painting_config(ws: Workspace, **settings) -> GenerateConfig:
    """How a notebook's run paints its held-out masks: the preset's settings, changed by those that are not 0 or ""."""
    finished = (ws.controlnet / "diffusion_pytorch_model.safetensors").is_file()
    given = {name: value for name, value in settings.items() if value or name == "seed"}
    return make(
        GenerateConfig,
        ws.preset,
        pretrained_model_name_or_path=str(ws.base),
        controlnet_model_name_or_path=str(ws.controlnet) if finished else None,
        controls=str(ws.dataset),
        split="test",
        output_dir=str(ws.generated),
        **given,
    )


def open_painter(config: GenerateConfig, split: Split, log=print) -> Painter:
    """The base with this run's ControlNet, or else the one that `find_controlnet` chooses; says which."""
    painter = load_painter(config, split.palette)
    log(f"ControlNet: {painter.controlnet_folder}")
    return painter


def paint_once(config: GenerateConfig, painter: Painter, output_dir: Path, log=print, **changes) -> Split:
    """The data set in `output_dir`: as it stands, where it has enough rows, else painted now.

    What notebook 04 painted with settings of its own is thus taken as it is; UserError if other weights painted it.
    """
    settings = output_dir / SETTINGS_FILE
    if (output_dir / "metadata.csv").is_file() and settings.is_file():
        standing = read_split(output_dir)
        weights = json.loads(settings.read_text()).get("controlnet_weights")
        if weights not in (None, weights_digest(painter.controlnet)):
            raise UserError(f"{output_dir} was painted by another ControlNet: move it away and run notebook 04 again")
        if config.limit is not None and len(standing) >= config.limit:
            log(f"{output_dir}: {len(standing)} images stand already.")
            return standing
    generate_dataset(dataclasses.replace(config, output_dir=str(output_dir), **changes), painter, log)
    return read_split(output_dir)
