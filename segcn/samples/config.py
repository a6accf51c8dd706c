"""How good is the embedded base? Its autoencoder, its text, its ControlNet and its speed, on images held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from segcn.generate.config import SampleConfig
from segcn.models.segmenter import SegmenterConfig
from segcn.samples.recognizer import RecognizerRecipe
from segcn.utils.args import flag
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS


@dataclass(frozen=True)
class MeasureConfig(SampleConfig):
    """Measure the embedded base and its ControlNet on held-out landscapes and tiles of the Earth."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = SampleConfig.PRESETS | {
        "tiny": {"num_inference_steps": 10, "guidance_scale": 2.5, "scheduler": "dpm"}  # as the base was chosen
    }

    controlnet_model_name_or_path: str | None = flag(None, "ControlNet folder; none: the one shipped with the base")
    resolution: int = flag(128, "pixels a side")
    count: int = flag(500, "held-out landscapes to measure on")
    held_out: int = flag(512, "landscapes painted for it, of which --count are the first")
    earth_count: int = flag(128, "held-out tiles of the Earth, for their style; 0: none")
    batch_size: int = flag(16, "images painted at once")
    output_dir: str = flag(str(OUTPUTS / "measure"), "where everything goes; the same command goes on there")
    segmenter_steps: int = flag(SegmenterConfig.steps, "training steps of the network that judges the masks")
    recogniser_steps: int = flag(RecognizerRecipe.steps, "of those that judge season, time of day and style")
    timings: int = flag(3, "how often the painting of one image, and of --batch_size at once, is timed")

    def __post_init__(self):
        if not 2 <= self.count <= self.held_out:
            raise UserError(f"--count {self.count}: expected 2 to {self.held_out}; more need a higher --held_out")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)
