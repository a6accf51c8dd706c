"""Settings of the study of usefulness: `segcn evaluate utility`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from segcn.data.config import FITS
from segcn.utils.args import flag
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE, OUTPUTS


@dataclass(frozen=True)
class UtilityConfig:
    """Do synthetic images help a segmenter? Trained on real, synthetic and both, it is tested on held-out real ones.

    For each fraction of the real rows a ControlNet, the filter of its images and the segmenters learn from these rows
    alone. Rerun the same command to resume.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {},
        "sd15": {
            "controlnet_steps": 10_000, "controlnet_more_steps": 2000, "num_inference_steps": 20,
            "segmenter_steps": 4000, "resolution": 512, "segmenter_resolution": 256,
        },
    }  # fmt: skip
    SECTIONS: ClassVar[dict[str, str]] = {
        "preset": "data and models", "fractions": "what is compared", "images": "the synthetic images",
        "segmenter_steps": "the segmenters",
    }  # fmt: skip

    preset: str = flag("tiny", "defaults: tiny (embedded base) or sd15; none: what fits the base", ("tiny", "sd15"))
    dataset_name: str = flag("", "data set of real images with train/ and test/")
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion 1.x/2.x layout", aliases=("--base",)
    )
    lora: str | None = flag(None, "LoRA of the base: a folder that segcn adapt or diffusers wrote")
    output_dir: str = flag(str(OUTPUTS / "utility"), "folder of the study; everything is kept there")
    resolution: int = flag(128, "image size in pixels", low=1)
    fit: str = flag("crop", "how images become square: crop, pad or stretch", FITS)
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    fractions: str = flag("0.05,0.1,0.25,1", "fractions of the real rows; each contains the rows of the smaller ones")
    ratios: str = flag("1", "synthetic images for each real one in a batch, such as 0.5,1,2; for the largest fraction")
    few_real_ratio: float = flag(1.0, "the same for every fraction; one of --ratios", above=0)
    seeds: int = flag(5, "segmenters of each kind; with one, their spread would be unknown", low=2)
    seed: int = flag(0, "seed of the choice of rows, the ControlNets and the images")
    resamples: int = flag(2000, "bootstrap resamples for each interval", low=1)
    images: int = flag(512, "images generated for each fraction, equally many from each of its rows", low=1)
    controlnet_steps: int = flag(1000, "optimizer steps of the smallest fraction's ControlNet", low=1)
    controlnet_more_steps: int = flag(100, "steps of each larger fraction's, begun with the next smaller one", low=1)
    augment: str = flag("affine,degrees=15,scale_min=0.8,scale_max=1.5", "augmentation of its rows, as in segcn train")
    num_inference_steps: int = flag(6, "denoising steps", low=1)
    controlnet_conditioning_scale: float = flag(1.0, "weight of the mask")
    prompt: str | None = flag(None, "prompt of the images in place of their captions, as in segcn generate")
    vary: list[str] = flag([], "words of the captions to exchange, as in segcn generate")
    augment_masks: str = flag("affine", "how new layouts are drawn from the rows' masks, as in segcn generate")
    min_miou: float = flag(0.6, "regenerate an image whose mIoU with its mask is lower", low=0, high=1)
    max_attempts: int = flag(3, "times that an image is generated before it is dropped", low=1)
    ignore_disagreement: bool = flag(False, "leave out pixels in which that segmenter finds another class")
    batch_size: int = flag(16, "images generated at once", low=1)
    segmenter_steps: int = flag(2400, "optimizer steps of every segmenter", low=1)
    segmenter_batch_size: int = flag(8, "images in each of them, real and synthetic together", low=1)
    segmenter_learning_rate: float = flag(2e-2, "peak of the one-cycle schedule of every segmenter", above=0)
    segmenter_resolution: int = flag(64, "size in pixels to which every image is resized for them", low=1)
    segmenter_width: int = flag(24, "channels of the segmenter at half resolution", low=1)
    synthetic_weight: float = flag(1.0, "weight of a synthetic image's pixels; real ones have 1", low=0, high=1)
    real_last: float = flag(0.25, "share of the steps, the last ones, with real images alone", low=0, high=1)

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
