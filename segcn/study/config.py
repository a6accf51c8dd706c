"""Settings of the study of usefulness: `segcn study`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from segcn.data.config import ARCHITECTURE, FITS, SMALL
from segcn.utils.args import flag
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE, OUTPUTS

FLIP = "none,hflip=0.5,brightness=0.2,contrast=0.2,saturation=0.2"
AFFINE = "affine,scale_min=0.75,scale_max=1.5"


@dataclass(frozen=True)
class StudyConfig:
    """Are synthetic images worth training on? Segmenters learn with and without them, tested on held-out real rows.

    Arms: the real rows alone until a plateau; pretraining on synthetic images, then finetuning on the real rows; both
    mixed; synthetic alone; and other real rows in place of the synthetic ones, the upper bound. Each is compared with
    as many real images and with as much computing spent on the real rows. Rerun the same command to resume.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {},
        "sd15": {
            "controlnet_steps": 10_000, "controlnet_more_steps": 2000, "num_inference_steps": 20,
            "segmenter_steps": 12_000, "resolution": 512, "segmenter_resolution": 256,
        },
    }  # fmt: skip
    TIERS: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"fractions": "0.05", "draws": 1, "seeds": 3, "images": "512"},
        "full": {"fractions": "0.025,0.05,0.1", "draws": 3, "seeds": 3, "images": "256,512,1024"},
    }
    SECTIONS: ClassVar[dict[str, str]] = {
        "preset": "data and models", "fractions": "what is compared", "controlnet_steps": "the synthetic images",
        "segmenter_architecture": "the segmenters",
    }  # fmt: skip

    preset: str = flag("tiny", "defaults: tiny (embedded base) or sd15; none: what fits the base", ("tiny", "sd15"))
    tier: str = flag(
        "quick", "quick: one draw of rows, 45 minutes on two cores; full: three draws, hours", ("quick", "full")
    )
    dataset_name: str = flag("", "data set of real images with train/ and test/")
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion's layout (1.x, 2.x, XL or 3)"
    )
    lora: str | None = flag(None, "LoRA of the base: a folder that segcn adapt or diffusers wrote")
    output_dir: str = flag(str(OUTPUTS / "study"), "folder of the study; everything is kept there")
    resolution: int = flag(128, "image size in pixels", low=1)
    fit: str = flag("crop", "how images become square: crop, pad or stretch", FITS)
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    fractions: str | None = flag(None, "fractions of the real rows; none: 0.05 in quick, 0.025,0.05,0.1 in full")
    draws: int | None = flag(None, "draws of rows, each with its ControlNets; none: 1 in quick, 3 in full", low=1)
    seeds: int | None = flag(None, "segmenters of each arm and draw; none: 3", low=2)
    images: str | None = flag(
        None, "synthetic images to pretrain on; the most are mixed, too; none: 512 in quick, 256,512,1024 in full"
    )
    ratio: float = flag(1.0, "synthetic images for each real one in a mixed batch", above=0)
    seed: int = flag(0, "seed of the choice of rows, the ControlNets and the images")
    resamples: int = flag(2000, "bootstrap resamples for each interval", low=1)
    controlnet_steps: int = flag(2000, "optimizer steps of the smallest fraction's ControlNet", low=1)
    controlnet_more_steps: int = flag(200, "steps of each larger fraction's, begun with the next smaller one", low=1)
    augment: str = flag("affine,degrees=15,scale_min=0.8,scale_max=1.5", "augmentation of its rows, as in segcn train")
    num_inference_steps: int = flag(6, "denoising steps", low=1)
    controlnet_conditioning_scale: float = flag(1.0, "weight of the mask")
    prompt: str | None = flag(None, "prompt of the images in place of their captions, as in segcn generate")
    vary: list[str] = flag([], "words of the captions to exchange, as in segcn generate")
    from_images: float | None = flag(
        None, "start from the rows' own images and do this share of the steps, as in segcn generate", above=0, high=1
    )
    inpaint: list[str] = flag([], "regenerate only these classes in the rows' own images, as in segcn generate")
    hard_first: bool = flag(False, "more images of the rows that are hard or rare, as in segcn generate")
    layouts: bool = flag(False, "generate for new masks, as segcn layouts makes them of the rows")
    augment_masks: str = flag("affine", "how new layouts are drawn from the rows' masks, as in segcn generate")
    min_miou: float = flag(0.6, "regenerate an image whose mIoU with its mask is lower", low=0, high=1)
    max_attempts: int = flag(3, "times that an image is generated before it is dropped", low=1)
    batch_size: int = flag(16, "images generated at once", low=1)
    segmenter_architecture: str = flag(SMALL, ARCHITECTURE)
    segmenter_steps: int = flag(3000, "steps until the plateau at most, before the learning rate falls", low=1)
    validation_steps: int = flag(100, "steps between two looks at the validation rows", low=1)
    patience: int = flag(5, "looks without a new best mIoU, at least, that make a plateau", low=1)
    segmenter_batch_size: int = flag(8, "images in each batch, real and synthetic together", low=2)
    learning_rates: list[float] = flag(
        [], "of which one is chosen for real alone; none: what fits the network", above=0
    )
    segmenter_augments: list[str] = flag([FLIP, AFFINE], "augmentations of which one is chosen for real alone")
    segmenter_resolution: int = flag(64, "size in pixels to which every image is resized for them", low=1)
    segmenter_width: int = flag(24, "channels of the small network at half resolution", low=1)

    @property
    def filled(self) -> "StudyConfig":
        """With the tier's value of each setting that is none; UserError for an unknown tier."""
        if self.tier not in self.TIERS:
            raise UserError(f"--tier: expected one of {', '.join(self.TIERS)}, found {self.tier!r}")
        missing = {name: value for name, value in self.TIERS[self.tier].items() if getattr(self, name) is None}
        rates = [5e-3, 2e-2] if self.segmenter_architecture == SMALL else [2e-4, 1e-3]
        return dataclasses.replace(self, **missing, learning_rates=self.learning_rates or rates)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).absolute()

    @property
    def some(self) -> tuple[float, ...]:
        """The fractions, the smallest first."""
        return tuple(sorted(set(_numbers("fractions", self.fractions or "", 1))))

    @property
    def amounts(self) -> tuple[int, ...]:
        """How many synthetic images are pretrained on, the fewest first."""
        return tuple(sorted({round(number) for number in _numbers("images", self.images or "", 1e6)}))


def _numbers(name: str, text: str, most: float) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number <= most for number in found):
        raise UserError(f"--{name}: expected numbers above 0 and up to {most:g} as in 0.5,1, found {text!r}")
    return found
