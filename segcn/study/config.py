"""What a study of usefulness consists of: its settings, the rows of each fraction, the runs, and how long they take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from segcn.data.config import FITS
from segcn.utils.args import flag
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE, OUTPUTS


@dataclass(frozen=True)
class UtilityConfig:
    """Do synthetic images help a segmenter? Trained on real, synthetic and both, it is tested on held-out real ones.

    For each fraction of the real rows a ControlNet, the vetting of its images and the segmenters learn from these rows
    alone. Whatever is finished is kept, and the same command goes on.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {},
        "sd15": {
            "controlnet_steps": 10_000,
            "controlnet_more_steps": 2000,
            "num_inference_steps": 20,
            "segmenter_steps": 4000,
            "resolution": 512,
            "segmenter_resolution": 256,
        },
    }
    SECTIONS: ClassVar[dict[str, str]] = {
        "preset": "data and models",
        "fractions": "what is compared",
        "images": "the synthetic images",
        "segmenter_steps": "the segmenters",
    }

    preset: str = flag("tiny", "defaults to start from: tiny (the embedded base) or sd15", ("tiny", "sd15"))
    dataset_name: str = flag("", "data set of real images with train/ and test/")
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion 1.x/2.x layout", aliases=("--base",)
    )
    output_dir: str = flag(str(OUTPUTS / "utility"), "folder of the study: everything is kept there")
    resolution: int = flag(128, "pixels a side")
    fit: str = flag("crop", "how images become square: crop, pad or stretch", FITS)
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    fractions: str = flag("0.05,0.1,0.25,1", "of the real rows, each holding the rows of the smaller ones")
    ratios: str = flag("1", "synthetic images for each real one in a batch, as in 0.5,1,2: at the largest fraction")
    few_real_ratio: float = flag(1.0, "the same for every fraction")
    seeds: int = flag(5, "segmenters of each kind")
    seed: int = flag(0, "of the choice of rows, the ControlNets and the images")
    resamples: int = flag(2000, "bootstrap resamples behind each interval")
    images: int = flag(512, "painted for each fraction, as many from each of its rows")
    controlnet_steps: int = flag(1000, "optimizer steps of the smallest fraction's ControlNet")
    controlnet_more_steps: int = flag(100, "of each larger one's, which goes on from that of the next smaller fraction")
    augment: str = flag(
        "affine,degrees=15,scale_min=0.8,scale_max=1.5", "how its rows are augmented, as segcn train does"
    )
    num_inference_steps: int = flag(6, "denoising steps")
    controlnet_conditioning_scale: float = flag(1.0, "weight of the mask")
    prompt: str | None = flag(None, "what the images are told in place of their captions, as segcn generate takes it")
    vary: list[str] = field(
        default_factory=list, metadata={"help": "words of the captions to exchange, as segcn generate does"}
    )
    augment_masks: str = flag("affine", "how layouts are drawn from the masks of the rows, as segcn generate does")
    min_miou: float = flag(0.6, "an image in which the segmenter of these rows finds less of its mask is painted anew")
    max_attempts: int = flag(3, "times an image is painted before it is dropped")
    ignore_disagreement: bool = flag(False, "pixels in which that segmenter sees another class do not count")
    batch_size: int = flag(16, "images painted at once")
    segmenter_steps: int = flag(2400, "optimizer steps of every segmenter")
    segmenter_batch_size: int = flag(8, "images in each of them, real and synthetic together")
    segmenter_learning_rate: float = flag(2e-2, "peak of the one-cycle schedule of every segmenter")
    segmenter_resolution: int = flag(64, "pixels a side to which every image is resized for them")
    segmenter_width: int = flag(24, "channels of the segmenter at half resolution")
    synthetic_weight: float = flag(1.0, "weight of a synthetic image's pixels beside real ones, 0 to 1")
    real_last: float = flag(0.25, "share of the steps, the last ones, that real images have to themselves, 0 to 1")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).absolute()

    @property
    def some(self) -> tuple[float, ...]:
        """The fractions, the smallest first."""
        return tuple(sorted(set(_numbers("fractions", self.fractions, 1))))

    @property
    def shares(self) -> tuple[float, ...]:
        """The ratios, the smallest first."""
        return tuple(sorted(set(_numbers("ratios", self.ratios, 100))))

    @property
    def mixing(self) -> tuple[float, float]:
        """How synthetic images are mixed with real ones: their weight, and for how long the real ones end alone."""
        return self.synthetic_weight, self.real_last


def _numbers(name: str, text: str, most: float) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number <= most for number in found):
        raise UserError(f"--{name}: expected numbers above 0 and up to {most:g} as in 0.5,1, found {text!r}")
    return found
