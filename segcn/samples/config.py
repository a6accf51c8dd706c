"""Settings of `segcn samples`: sample data sets, the embedded base, and its figures on held-out images."""

from dataclasses import dataclass
from pathlib import Path

from segcn.generate.config import SampleConfig
from segcn.utils.args import flag
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS


@dataclass(frozen=True)
class SampleSetConfig:
    """Write a sample data set."""

    out: str = flag("", "data set folder to write", required=True)
    count: int = flag(1024, "rows (of the train split, with --test)", low=1)
    resolution: int = flag(128, "image size in pixels")
    seed: int = flag(0, "another seed gives other images", low=0)
    test: int | None = flag(None, "rows of a test split: writes OUT/train and OUT/test", low=1)


@dataclass(frozen=True)
class LandscapesConfig(SampleSetConfig):
    """Write drawn landscapes."""

    rare: list[str] = flag([], "classes that are in 3 % of the rows alone, as house road; those of test/ are as always")


@dataclass(frozen=True)
class EarthConfig(SampleSetConfig):
    """Write tiles of the Earth."""

    styles: list[str] = flag(
        ["satellite", "shaded relief", "topographic"], "how the images look; land cover shows in satellite alone"
    )


@dataclass(frozen=True)
class BaseConfig:
    """Train the embedded base model: hours on a CPU. Rerun the same command to resume."""

    out: str = flag("", "model folder to write", required=True)
    work: str = flag(str(OUTPUTS / "base"), "folder of its training state")
    smoke: bool = flag(False, "three steps of everything, to see that it runs")


@dataclass(frozen=True)
class LargeBaseConfig:
    """Write a base model of Stable Diffusion 1.5's size with random weights, for timings."""

    out: str = flag("", "model folder to write, 4.3 GB", required=True)
    seed: int = flag(0, "seed of the weights")


@dataclass(frozen=True)
class BaseXLConfig:
    """Write a base model of Stable Diffusion XL's size with random weights, for timings; or a toy one, for tests."""

    out: str = flag("", "model folder to write, 13.9 GB", required=True)
    toy: bool = flag(False, "the same layout with a few channels: 2 MB")
    seed: int = flag(0, "seed of the weights")


@dataclass(frozen=True)
class BaseSD3Config:
    """Write a base model of Stable Diffusion 3.5 medium's size with random weights, or a toy one, for tests."""

    out: str = flag("", "model folder to write, 31.6 GB", required=True)
    toy: bool = flag(False, "the same layout with a few channels: 1 MB")
    seed: int = flag(0, "seed of the weights")


@dataclass(frozen=True)
class FailuresConfig:
    """Draw what typical failures look like, provoked on the landscapes."""

    out: str = flag("", "PNG to write", required=True)
    work: str = flag(str(OUTPUTS / "failures"), "folder of the ControlNets that are trained for it")


@dataclass(frozen=True)
class MeasureConfig(SampleConfig):
    """Measure the embedded base and its ControlNet on held-out landscapes and tiles of the Earth."""

    controlnet_model_name_or_path: str | None = flag(None, "ControlNet folder; none: the one shipped with the base")
    resolution: int = flag(128, "image size in pixels", low=1)
    count: int = flag(256, "held-out landscapes to measure on", low=2)
    held_out: int = flag(256, "landscapes written for it, of which --count are the first", low=2)
    earth_count: int = flag(128, "held-out tiles of the Earth, for their style; 0: none", low=0)
    batch_size: int = flag(16, "images generated at once", low=1)
    output_dir: str = flag(str(OUTPUTS / "measure"), "output folder; rerun the same command to resume")
    segmenter_steps: int = flag(600, "training steps of the segmenter that scores the masks", low=1)
    recognizer_steps: int = flag(300, "training steps of the networks that see season, time of day and style", low=1)
    timings: int = flag(3, "repetitions of the timings of one image and of --batch_size images", low=1)

    def __post_init__(self):
        if not 2 <= self.count <= self.held_out:
            raise UserError(f"--count {self.count}: expected 2 to {self.held_out}; more need a higher --held_out")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)
