"""Settings of the commands that generate images: infer and generate."""

from dataclasses import dataclass
from typing import Any, ClassVar

from segcn.data.config import ARCHITECTURE, BUCKET, BUCKETS, FITS, SMALL
from segcn.utils.args import PRECISIONS, flag
from segcn.utils.paths import BASE

MODELS = {
    "preset",
    "pretrained_model_name_or_path",
    "lora",
    "controlnet_model_name_or_path",
    "palette",
}  # fields: which models


@dataclass(frozen=True)
class SampleConfig:
    """Settings that every command shares that generates images."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {"num_inference_steps": 20, "guidance_scale": 7.5, "scheduler": "unipc"},
        "tiny": {
            "num_inference_steps": 10,
            "guidance_scale": 3.5,
            "guidance_end": 0.4,
            "scheduler": "unipc",
            "guided_by": "text_and_mask",
            "controlnet_conditioning_scale": 1.3,
        },
    }

    preset: str = flag("tiny", "defaults: tiny (embedded base) or sd15; none: what fits the base", ("tiny", "sd15"))
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion's layout (1.x, 2.x, XL or 3)"
    )
    lora: str | None = flag(None, "LoRA of the base: a folder that segcn adapt or diffusers wrote")
    controlnet_model_name_or_path: str | None = flag(
        None, "ControlNet folder; none: the newest trained one whose palette matches, else the shipped one"
    )
    palette: str | None = flag(None, "palette.json of the masks; none: found beside them, else the ControlNet's")
    resolution: int | None = flag(None, "image size in pixels, made by --fit; none: the mask's own size", low=1)
    tiled: bool = flag(False, "masks keep their size: overlapping windows of --resolution are blended into one image")
    fit: str = flag("crop", "how --resolution makes a mask square: crop, pad or stretch, as in training", FITS)
    buckets: bool = flag(False, BUCKETS + ", as in training")
    num_inference_steps: int = flag(20, "denoising steps", low=1)
    guidance_scale: float = flag(4.0, "weight of the text (classifier-free guidance); 1: off")
    guidance_start: float = flag(0.0, "guidance acts from this share of the steps on", low=0, high=1)
    guidance_end: float = flag(1.0, "guidance acts up to this share; later steps are faster", low=0, high=1)
    guidance_rescale: float = flag(0.0, "rescale guidance to the conditional spread; 0: off", low=0, high=1)
    guided_by: str = flag("text", "guidance leads away from an image without these", ("text", "text_and_mask"))
    controlnet_conditioning_scale: float = flag(1.0, "weight of the mask; 0: ignored")
    control_guidance_start: float = flag(0.0, "the mask acts from this share of the steps on", low=0, high=1)
    control_guidance_end: float = flag(1.0, "the mask acts up to this share of the steps", low=0, high=1)
    control_schedule: str = flag(
        "constant", "weight of the mask from the first step to the last", ("constant", "linear", "cosine")
    )
    negative_prompt: str = flag("", "what the image should not show")
    scheduler: str = flag("dpm", "sampler: dpm (DPM-Solver++), unipc or ddim", ("dpm", "unipc", "ddim"))
    seed: int = flag(0, "each image's noise depends on this and its row alone")
    mixed_precision: str = flag("no", "no, fp16 or bf16", PRECISIONS)
    torch_compile: bool = flag(False, "compile the networks: minutes at the start, faster steps; needs a GPU")

    @property
    def square(self) -> int | None:
        """The side of the square that --fit makes of a mask, or of one as large as its bucket; None: as it is."""
        return None if self.tiled else self.resolution

    @property
    def framing(self) -> str:
        """How a mask gets its shape: as --fit says, or by --buckets."""
        return BUCKET if self.buckets else self.fit


@dataclass(frozen=True)
class InferConfig(SampleConfig):
    """One mask and one or more prompts to images in one PNG, which records its settings."""

    control: str = flag("", "mask: class ids or palette colors")
    prompt: list[str] = flag([], "one or more prompts")
    seeds: list[int] = flag([], "one image of each prompt for each seed; replaces --seed and --num_images")
    num_images: int = flag(1, "images of each prompt, each from other noise", low=1)
    out: str = flag("", "PNG to write; several images form a grid")


@dataclass(frozen=True)
class GenerateConfig(SampleConfig):
    """A folder of masks, or a data set, to a data set of new images. Rerun the same command to resume."""

    SECTIONS: ClassVar[dict[str, str]] = {
        "preset": "models and sampling", "controls": "input and output", "min_miou": "filter",
    }  # fmt: skip

    controls: str = flag("", "data set, or a folder of mask files")
    split: str = flag("test", "split of a data set that has several; train[24:]: its rows from the 25th on")
    output_dir: str = flag("", "data set folder to write")
    prompt: str | None = flag(
        None,
        "one prompt for all, '' for no text; {classes} becomes those in the mask, {caption} the row's caption,"
        " {by day|at night} one of these, drawn for each image; none: the captions of the data set",
    )
    mix_prompts: bool = flag(False, "give each row the caption of another, so that no text describes its mask")
    without_class_words: bool = flag(
        False, "captions without the phrases that name classes: by palette.json's names and words"
    )
    vary: list[str] = flag(
        [],
        "words of the prompts that can replace each other, one drawn for each image: 'by day|at night'; what they"
        " change must not be in the mask",
    )
    limit: int | None = flag(None, "use only the first rows", low=1)
    replicates: int = flag(1, "images of each row", low=1)
    hard_first: bool = flag(
        False, "as many images in all, more of rows that are rare, or hard to the filter's segmenter, less of others"
    )
    augment_masks: str | None = flag(None, "draw a new layout for each image as in training: affine,degrees=20")
    from_images: float | None = flag(
        None,
        "start from the row's own image, noised, in place of noise alone, and do this share of the steps: near 0 the"
        " image stays as it is, 1 is generated from noise alone",
        above=0, high=1,
    )  # fmt: skip
    inpaint: list[str] = flag(
        [], "regenerate only the pixels of these classes, in the rows that have one; the rest of the row's own image"
        " stays as it is",
    )  # fmt: skip
    batch_size: int = flag(16, "images generated at once", low=1)
    reconstruct: bool = flag(False, "the real images through the autoencoder: for segcn evaluate --reconstructions")
    without_control: bool = flag(False, "ignore the mask: the floor of an evaluation")
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    min_miou: float | None = flag(None, "regenerate an image with a lower mIoU; none: keep all", low=0, high=1)
    max_attempts: int = flag(4, "times that a row is generated before its best image goes to rejected/", low=1)
    segmenter: str | None = flag(
        None,
        "trained segmenter: ours, or any AutoModelForSemanticSegmentation folder; none: trained on the real train rows",
    )
    segmenter_architecture: str = flag(SMALL, ARCHITECTURE)


@dataclass(frozen=True)
class LayoutsConfig:
    """New masks for segcn generate --controls: rows stretched, their objects exchanged. Rerun the command to resume."""

    dataset_name: str = flag("", "data set whose masks are recombined", required=True)
    output_dir: str = flag("", "folder of masks to write", required=True)
    count: int = flag(256, "layouts", low=1)
    split: str = flag("train", "split of a data set that has several")
    seed: int = flag(0, "layout i depends on this, i and the rows alone")
    ratios: str = flag("", "share of the pixels that some classes have: road=0.2,house=0.1; none: as in the rows")
    things: str = flag("", "classes whose objects are exchanged: house,tree; none: those that lie inside the images")
    resolution: int | None = flag(None, "side of the masks; none: the shorter side of the first row's", low=16)
    fit: str = flag("crop", "how a mask becomes square: crop or stretch", ("crop", "stretch"))
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
