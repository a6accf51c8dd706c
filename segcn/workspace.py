"""Where a notebook run keeps its things: one folder below outputs/, the same names in every notebook."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from segcn.arguments import make
from segcn.claim import RUN_FILE
from segcn.config import BASE, OUTPUTS, ROOT, WEIGHTS
from segcn.errors import UserError
from segcn.records import METADATA, Split, read_named_split, read_split
from segcn.samples.landscapes import write_landscapes
from segcn.train_config import TrainConfig

NOTEBOOKS = ROOT / "notebooks"
SAMPLE_ROWS = {"train": 1024, "test": 128}
HELD_OUT_SEED = 7373  # of no sample set, of no training, and of no rows on which settings were chosen
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
        """Pixels a side of the painted pictures: those of the training in `controlnet`, else the preset's."""
        return self._trained("resolution")

    def fit(self) -> str:
        """How pictures become square: as in that training."""
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


def sample_landscapes() -> Path:
    """data/landscapes, painted if it is not there."""
    folder = ROOT / "data" / "landscapes"
    write_landscapes(folder, SAMPLE_ROWS["train"], test=SAMPLE_ROWS["test"])
    return folder


def held_out_landscapes(rows: int) -> Path:
    """Landscapes of a seed that no training used, painted below outputs/ if they are not there."""
    return write_landscapes(OUTPUTS / "held_out" / f"landscapes-{rows}-{HELD_OUT_SEED}", rows, seed=HELD_OUT_SEED)


def from_root(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository's root."""
    return ROOT / Path(path).expanduser()
