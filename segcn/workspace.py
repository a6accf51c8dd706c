"""Where a notebook run keeps its things: one folder below outputs/, the same names in every notebook."""

from dataclasses import dataclass
from pathlib import Path

from segcn.config import BASE, OUTPUTS, ROOT
from segcn.errors import UserError
from segcn.records import Split, read_split
from segcn.samples.landscapes import write_landscapes

SAMPLE_ROWS = {"train": 1024, "test": 128}


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
    def segmenter(self) -> Path:
        return self.folder / "segmenter"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def story(self) -> Path:
        return self.folder / "story.png"

    def train_split(self) -> Split:
        """The rows to train on."""
        return read_split(self.dataset, "train")

    def test_split(self) -> Split:
        """The rows held out; UserError if the data set has no test/ folder."""
        return read_split(self.dataset, "test")


def open_workspace(
    preset: str = "tiny", pretrained_model_name_or_path: str = "", dataset_name: str = "", output_dir: str = ""
) -> Workspace:
    """Resolve notebook parameters; "" means the embedded base, the sample landscapes and outputs/PRESET.

    Relative paths count from the repository's root, wherever the kernel started. The landscapes are painted into
    data/landscapes at the first use.
    """
    folder = from_root(output_dir) if output_dir else OUTPUTS / preset
    if preset == "sd15" and not (pretrained_model_name_or_path and dataset_name):
        raise UserError("--preset sd15 needs --pretrained_model_name_or_path DIR and --dataset_name DIR of your own")
    base = from_root(pretrained_model_name_or_path) if pretrained_model_name_or_path else BASE
    dataset = from_root(dataset_name) if dataset_name else sample_landscapes()
    folder.mkdir(parents=True, exist_ok=True)
    return Workspace(preset, dataset, base, folder)


def sample_landscapes() -> Path:
    """data/landscapes, painted if it is not there."""
    folder = ROOT / "data" / "landscapes"
    write_landscapes(folder, SAMPLE_ROWS["train"], test=SAMPLE_ROWS["test"])
    return folder


def from_root(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository's root."""
    return ROOT / Path(path).expanduser()
