"""How every notebook begins: its parameters are checked, its errors are one line, its folders have one place each."""

import ast
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from IPython import get_ipython

from segcn.data.metadata import Split, hold_out, read_named_split, read_split
from segcn.data.visualize import quiet
from segcn.generate.config import MODELS, GenerateConfig, SampleConfig
from segcn.generate.pipeline import Pipeline, load_pipeline
from segcn.generate.writer import SETTINGS_FILE, differences, generate_dataset
from segcn.models.controlnet import is_finished_controlnet
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, load_segmenter, shared_folder, shipped_segmenter
from segcn.samples.landscapes.scene import sample_landscapes
from segcn.train.config import TrainConfig
from segcn.utils import io
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE, OUTPUTS, ROOT, RUN_FILE, from_root

NOTEBOOKS = ROOT / "notebooks"
INJECTED = "# Parameters\n"  # how papermill begins the cell that it puts behind the one tagged `parameters`
TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def begin() -> None:
    """Set the figures' style, show errors of the user's as one line, and check what papermill put in.

    To be called soon after the parameters cell. UserError names an unknown parameter, of which papermill itself only
    warns, and one of another type.
    """
    quiet()
    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((UserError,), show_user_error)
        check_cells(shell.user_ns["In"][1:3])


def show_user_error(shell, kind, error, trace, tb_offset=None) -> list[str]:
    """The message of the command line in place of a traceback, with the notebook's parameters in place of flags."""
    error.args = (with_parameters(str(error), shell.user_ns),)
    shown = [f"Error: {error}"]
    shell._showtraceback(kind, error, shown)  # what JupyterLab, papermill and nbconvert read as a failed cell
    return shown


def with_parameters(message: str, names) -> str:
    """A message with `limit` in place of `--limit` where that is one of the names, but not within a command."""
    return re.sub(
        r"(segcn \w+ .*|-m segcn.*)|--(\w+)", lambda found: found[2] if found[2] in names else found[0], message
    )


def check_cells(cells: Sequence[str]) -> None:
    """Check the parameters that papermill put in, of the first two cells that were executed."""
    if len(cells) < 2 or not cells[1].startswith(INJECTED):
        return
    types = dict(re.findall(r"^(\w+): (\w+) = ", cells[0], re.MULTILINE))  # of lines such as `limit: int = 16  # rows`
    given = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cells[1]).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    unknown = [name for name in given if name not in types]
    if unknown:
        raise UserError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(types)}")
    for name, value in given.items():
        fits = isinstance(value, TYPES[types[name]]) and isinstance(value, bool) == (types[name] == "bool")
        if not fits:
            raw = f"; papermill takes texts as they are by -r {name} VALUE" if types[name] == "str" else ""
            raise UserError(f"parameter {name}: expected {types[name]}, found {value!r}{raw}")


@dataclass(frozen=True)
class Workspace:
    """The data, the base and the run folder that notebooks 01 to 05 share, with the same names in every notebook."""

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
    def without_classes(self) -> Path:
        return self.folder / "generated_without_class_words"

    @property
    def other_captions(self) -> Path:
        return self.folder / "generated_with_other_captions"

    @property
    def saved(self) -> Path:
        """What is kept in the panel."""
        return self.folder / "saved"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @cached_property
    def split_names(self) -> tuple[str, str]:
        """The rows to train on and those held out."""
        return hold_out(self.dataset)

    def train_split(self) -> Split:
        return read_named_split(self.dataset, self.split_names[0])

    def test_split(self) -> Split:
        return read_named_split(self.dataset, self.split_names[1])

    def trained_controlnet(self) -> str | None:
        """The ControlNet of this run, once its training is finished."""
        return str(self.controlnet) if is_finished_controlnet(self.controlnet) else None

    def trained_base(self) -> dict[str, str | None]:
        """The base that this run's ControlNet was trained on or with, and its LoRA."""
        kind, own = self.trained("train_unet"), {"lora": self.controlnet / "lora", "decoder": self.controlnet / "base"}
        base = own["decoder"] if kind == "decoder" and own["decoder"].is_dir() else self.base
        made = str(own["lora"]) if kind == "lora" and own["lora"].is_dir() else self.trained("lora")
        return {"pretrained_model_name_or_path": str(base), "lora": made}

    def trained(self, name: str):
        """A setting of the training in `controlnet`, such as its resolution or fit; without one, the preset's."""
        recorded, default = self.controlnet / RUN_FILE, getattr(make(TrainConfig, self.preset), name)
        return json.loads(recorded.read_text()).get(name, default) if recorded.is_file() else default


def open_workspace(
    preset: str = "tiny", pretrained_model_name_or_path: str = "", dataset_name: str = "", output_dir: str = ""
) -> Workspace:
    """Resolve notebook parameters; "" means the embedded base, the sample landscapes and outputs/PRESET.

    Relative paths count from the repository's root, wherever the kernel started. The landscapes are drawn into
    data/landscapes at the first use. Of a data set without test/, the last rows are held out, and a line says so.
    """
    if preset == "sd15" and not (pretrained_model_name_or_path and dataset_name):
        raise UserError("--preset sd15 needs --pretrained_model_name_or_path DIR and --dataset_name DIR of your own")
    folder = from_root(output_dir) if output_dir else OUTPUTS / preset
    base = from_root(pretrained_model_name_or_path) if pretrained_model_name_or_path else BASE
    dataset = from_root(dataset_name) if dataset_name else sample_landscapes()
    folder.mkdir(parents=True, exist_ok=True)
    ws = Workspace(preset, dataset, base, folder)
    if ws.split_names[1] != "test":
        print(f"{dataset} has no test/: its last {len(ws.test_split())} rows are held out, and not trained on")
    return ws


def generate_config(ws: Workspace, **settings) -> GenerateConfig:
    """How a run generates from its held-out masks: the preset's settings, changed by those that are not 0 or ""."""
    given = {name: value for name, value in settings.items() if value or name == "seed"}
    if "controlnet_model_name_or_path" in given:
        given["controlnet_model_name_or_path"] = str(from_root(given["controlnet_model_name_or_path"]))
    own = {**ws.trained_base(), "controlnet_model_name_or_path": ws.trained_controlnet(),
           "controls": str(ws.dataset), "split": ws.split_names[1], "output_dir": str(ws.generated),
           **{name: ws.trained(name) for name in ("resolution", "fit", "buckets")}}  # fmt: skip
    return make(GenerateConfig, ws.preset, **own | given)


def as_generated(config: GenerateConfig) -> GenerateConfig:
    """The config with the sampling settings that the data set in its output_dir records, if there is one."""
    record = Path(config.output_dir) / SETTINGS_FILE
    names = {field.name for field in dataclasses.fields(SampleConfig)} - MODELS
    recorded = json.loads(record.read_text()) if record.is_file() else {}
    return dataclasses.replace(config, **{name: recorded[name] for name in names & set(recorded)})


def open_pipeline(config: GenerateConfig, split: Split) -> Pipeline:
    """The base with this run's ControlNet, or else the one that `find_controlnet` chooses; says which."""
    pipeline = load_pipeline(config, split.palette)
    print(f"ControlNet: {pipeline.controlnet_folder}")
    return pipeline


def ready_segmenter(ws: Workspace) -> AnySegmenter | None:
    """The one of these rows where a notebook trained it, or the base's own where it has these classes; else None."""
    train, settings = ws.train_split(), SegmenterConfig(resolution=ws.trained("resolution"), fit=ws.trained("fit"))
    folder = shared_folder(ws.cache, train, settings)
    trained = folder.is_dir() and io.problem(folder) is None
    return load_segmenter(folder) if trained else shipped_segmenter(ws.base, train.palette)


def generate_once(config: GenerateConfig, pipeline: Pipeline, replace: bool = False) -> Split:
    """The data set in output_dir: as it is where it is complete, else generated now.

    One that was made with other settings, such as another seed or a ControlNet trained longer, is renamed to NAME-1 and
    so on first, or deleted where `replace`; one of these settings that was renamed so gets its name back.
    """
    folder = Path(config.output_dir)
    changed = differences(folder, config, pipeline) if (folder / SETTINGS_FILE).is_file() else []
    if changed:
        io.lock(folder, print, "generates")  # nothing is moved while another process is at work in it
        if replace:
            shutil.rmtree(folder)
        else:
            names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            folder.rename(kept)
            print(f"{folder} was made with other settings ({'; '.join(changed)}): it is {kept.name} now")
        io.release()
    for record in sorted(folder.parent.glob(f"{folder.name}-[0-9]*/{SETTINGS_FILE}")):
        if not folder.exists() and not differences(record.parent, config, pipeline):
            record.parent.rename(folder)
    return read_split(generate_dataset(config, pipeline))
