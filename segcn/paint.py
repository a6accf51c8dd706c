"""The painting that notebooks 04 and 05 share: which ControlNet, with which settings, and what stands already."""

import dataclasses
import json
from pathlib import Path

from segcn.arguments import make
from segcn.config import MODELS, GenerateConfig, SampleConfig
from segcn.generate import SETTINGS_FILE, generate_dataset
from segcn.pipeline import Painter, load_painter
from segcn.records import Split, read_split
from segcn.workspace import Workspace, from_root


def painting_config(ws: Workspace, **settings) -> GenerateConfig:
    """How a notebook's run paints its held-out masks: the preset's settings, changed by those that are not 0 or ""."""
    given = {name: value for name, value in settings.items() if value or name == "seed"}
    if "controlnet_model_name_or_path" in given:
        given["controlnet_model_name_or_path"] = str(from_root(given["controlnet_model_name_or_path"]))
    own = {"controlnet_model_name_or_path": ws.trained_controlnet(), "resolution": ws.resolution(), "fit": ws.fit()}
    return make(
        GenerateConfig,
        ws.preset,
        pretrained_model_name_or_path=str(ws.base),
        controls=str(ws.dataset),
        split=ws.split_names[1],
        output_dir=str(ws.generated),
        **own | given,
    )


def as_painted(config: GenerateConfig) -> GenerateConfig:
    """The config with the sampling settings that the data set in its output_dir records, if one stands there."""
    record = Path(config.output_dir) / SETTINGS_FILE
    if not record.is_file():
        return config
    names = {field.name for field in dataclasses.fields(SampleConfig)} - MODELS | {"prompt"}
    recorded = json.loads(record.read_text())
    return dataclasses.replace(config, **{name: recorded[name] for name in names & set(recorded)})


def open_painter(config: GenerateConfig, split: Split, log=print) -> Painter:
    """The base with this run's ControlNet, or else the one that `find_controlnet` chooses; says which."""
    painter = load_painter(config, split.palette)
    log(f"ControlNet: {painter.controlnet_folder}")
    return painter


def paint_once(config: GenerateConfig, painter: Painter, log=print) -> Split:
    """The data set in output_dir, as it stands where it has enough rows, else painted now.

    UserError if it was painted by other weights, from other masks or with other settings.
    """
    return read_split(generate_dataset(config, painter, log))


def paint_floor(config: GenerateConfig, painter: Painter, folder: Path, limit: int, log=print) -> Split:
    """The same as `config`, but painted without being shown the mask: a data set in `folder`."""
    floor = dataclasses.replace(config, output_dir=str(folder), without_control=True, limit=limit)
    return paint_once(floor, painter, log)
