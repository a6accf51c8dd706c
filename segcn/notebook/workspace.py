"""How every notebook begins: quietly, and with the parameters that it has, of the types that it has."""

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from IPython import get_ipython

from segcn.data.metadata import METADATA, Split, read_named_split, read_split
from segcn.data.visualize import quiet
from segcn.generate.config import MODELS, GenerateConfig, SampleConfig
from segcn.generate.pipeline import Pipeline, load_pipeline
from segcn.generate.writer import SETTINGS_FILE, generate_dataset
from segcn.samples.landscapes.scene import sample_landscapes
from segcn.train.config import TrainConfig
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE, OUTPUTS, ROOT, RUN_FILE, WEIGHTS, from_root

# --- notebook: How every notebook begins: quietly, and with the parameters that it has, of the types that it has.

INJECTED = "# Parameters\n"  # how papermill begins the cell that it puts behind the one tagged `parameters`
TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def begin() -> None:
    """Set the figures' style, silence notices, and check what papermill put behind the parameters cell.

    To be called soon after that cell. UserError names an unknown parameter, of which papermill itself only warns, and
    one of another type.
    """
    quiet()
    shell = get_ipython()
    if shell is not None:
        check_cells(shell.user_ns["In"][1:3])


def check_cells(cells: Sequence[str]) -> None:
    """The same, of the first two cells that were executed."""
    if len(cells) < 2 or not cells[1].startswith(INJECTED):
        return
    types, given = types_of(cells[0]), values_of(cells[1])
    unknown = [name for name in given if name not in types]
    if unknown:
        raise UserError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(types)}")
    for name, value in given.items():
        fits = isinstance(value, TYPES[types[name]]) and isinstance(value, bool) == (types[name] == "bool")
        if not fits:
            raw = f"; papermill takes texts as they are by -r {name} VALUE" if types[name] == "str" else ""
            raise UserError(f"parameter {name}: expected {types[name]}, found {value!r}{raw}")


def types_of(cell: str) -> dict[str, str]:
    """The name and the type of every line such as `limit: int = 16  # rows`."""
    return dict(re.findall(r"^(\w+): (\w+) = ", cell, re.MULTILINE))


def values_of(cell: str) -> dict[str, Any]:
    """The name and the value of every assignment of a literal."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip


# --- workspace: Where a notebook run keeps its things: one folder below outputs/, the same names in every notebook.

NOTEBOOKS = ROOT / "notebooks"
HELD_OUT = 128  # rows at most, of a data set without test/


@dataclass(frozen=True)
class Workspace:
    """The data, the base and the run folder that notebooks 01 to 05 share."""

    preset: str
    dataset: Path
    base: Path
    folder: Path

    @property
    def controlnet(self) -> Path:
        return self.folder / "controlnet"

    @property
    def generated(self) -> Path:
        return self.folder / "generated"

    @property
    def floor(self) -> Path:
        return self.folder / "generated_without_mask"

    @property
    def reconstructions(self) -> Path:
        return self.folder / "reconstructions"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def story(self) -> Path:
        return self.folder / "story.png"

    @cached_property
    def split_names(self) -> tuple[str, str]:
        """The rows to train on and those held out: train and test, or else train without its last eighth, and that."""
        if any((self.dataset / "test" / name).is_file() for name in METADATA):
            return "train", "test"
        rows = len(read_split(self.dataset, "train"))
        kept = rows - max(2, min(HELD_OUT, rows // 8))
        if kept < 1:
            raise UserError(f"{self.dataset}: expected at least 3 rows, some of them to hold out, found {rows}")
        return f"train[:{kept}]", f"train[{kept}:]"

    def train_split(self) -> Split:
        """The rows to train on."""
        return read_named_split(self.dataset, self.split_names[0])

    def test_split(self) -> Split:
        """The rows held out."""
        return read_named_split(self.dataset, self.split_names[1])

    def trained_controlnet(self) -> str | None:
        """The ControlNet of this run, once its training is finished."""
        finished = (self.controlnet / WEIGHTS).is_file()
        return str(self.controlnet) if finished else None

    def resolution(self) -> int:
        """Pixels a side of the painted images: those of the training in `controlnet`, else the preset's."""
        return self._trained("resolution")

    def fit(self) -> str:
        """How images become square: as in that training."""
        return self._trained("fit")

    def _trained(self, name: str):
        """A setting of the training in `controlnet`, else the preset's."""
        recorded, default = self.controlnet / RUN_FILE, getattr(make(TrainConfig, self.preset), name)
        return json.loads(recorded.read_text()).get(name, default) if recorded.is_file() else default


def open_workspace(
    preset: str = "tiny", pretrained_model_name_or_path: str = "", dataset_name: str = "", output_dir: str = ""
) -> Workspace:
    """Resolve notebook parameters; "" means the embedded base, the sample landscapes and outputs/PRESET.

    Relative paths count from the repository's root, wherever the kernel started. The landscapes are painted into
    data/landscapes at the first use. Of a data set without test/, the last rows are held out, and that is said.
    """
    folder = from_root(output_dir) if output_dir else OUTPUTS / preset
    if preset == "sd15" and not (pretrained_model_name_or_path and dataset_name):
        raise UserError("--preset sd15 needs --pretrained_model_name_or_path DIR and --dataset_name DIR of your own")
    base = from_root(pretrained_model_name_or_path) if pretrained_model_name_or_path else BASE
    dataset = from_root(dataset_name) if dataset_name else sample_landscapes()
    folder.mkdir(parents=True, exist_ok=True)
    ws = Workspace(preset, dataset, base, folder)
    if ws.split_names[1] != "test":
        print(f"{dataset} has no test/: its last {len(ws.test_split())} rows are held out, and not trained on")
    return ws


# --- paint: The painting that notebooks 04 and 05 share: which ControlNet, with which settings, and what stands already.


def notebook_generate_config(ws: Workspace, **settings) -> GenerateConfig:
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


def as_generated(config: GenerateConfig) -> GenerateConfig:
    """The config with the sampling settings that the data set in its output_dir records, if one stands there."""
    record = Path(config.output_dir) / SETTINGS_FILE
    if not record.is_file():
        return config
    names = {field.name for field in dataclasses.fields(SampleConfig)} - MODELS | {"prompt"}
    recorded = json.loads(record.read_text())
    return dataclasses.replace(config, **{name: recorded[name] for name in names & set(recorded)})


def open_pipeline(config: GenerateConfig, split: Split, log=print) -> Pipeline:
    """The base with this run's ControlNet, or else the one that `find_controlnet` chooses; says which."""
    painter = load_pipeline(config, split.palette)
    log(f"ControlNet: {painter.controlnet_folder}")
    return painter


def generate_once(config: GenerateConfig, painter: Pipeline, log=print) -> Split:
    """The data set in output_dir, as it stands where it has enough rows, else painted now.

    UserError if it was painted by other weights, from other masks or with other settings.
    """
    return read_split(generate_dataset(config, painter, log))


def generate_floor(config: GenerateConfig, painter: Pipeline, folder: Path, limit: int, log=print) -> Split:
    """The same as `config`, but painted without being shown the mask: a data set in `folder`."""
    floor = dataclasses.replace(config, output_dir=str(folder), without_control=True, limit=limit)
    return generate_once(floor, painter, log)
