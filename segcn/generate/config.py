"""Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from segcn.data.config import FITS
from segcn.utils.args import PRECISIONS, flag
from segcn.utils.paths import BASE

MODELS = {"preset", "pretrained_model_name_or_path", "controlnet_model_name_or_path", "palette"}  # what paints


@dataclass(frozen=True)
class SampleConfig:
    """What every command that paints shares."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {"num_inference_steps": 20, "guidance_scale": 7.5, "scheduler": "unipc"},
        "tiny": {"num_inference_steps": 14, "guidance_scale": 3.5, "guidance_end": 0.4, "scheduler": "unipc"},
    }

    preset: str = flag("tiny", "defaults to start from: tiny (the embedded base) or sd15", ("tiny", "sd15"))
    pretrained_model_name_or_path: str = flag(str(BASE), "base model: a folder in Stable Diffusion 1.x/2.x layout")
    controlnet_model_name_or_path: str | None = flag(
        None, "ControlNet folder; none: the newest trained one whose palette matches, else the shipped one"
    )
    palette: str | None = flag(None, "palette.json of the masks; none: found beside them, else the ControlNet's")
    resolution: int | None = flag(None, "pixels a side of the square that --fit makes of a mask; none: as it is")
    fit: str = flag("crop", "how --resolution makes a mask square: crop, pad or stretch, as in training", FITS)
    num_inference_steps: int = flag(20, "denoising steps")
    guidance_scale: float = flag(4.0, "weight of the text (classifier-free guidance); 1: off")
    guidance_start: float = flag(0.0, "share of the steps before guidance acts, 0 to 1")
    guidance_end: float = flag(1.0, "share of the steps after which guidance is off, 0 to 1; such steps are quicker")
    guidance_rescale: float = flag(0.0, "0 to 1: how far guidance keeps the spread of what is predicted; 0: not at all")
    controlnet_conditioning_scale: float = flag(1.0, "weight of the mask; 0: ignored")
    control_guidance_start: float = flag(0.0, "share of the steps before the mask acts, 0 to 1")
    control_guidance_end: float = flag(1.0, "share of the steps after which the mask no longer acts, 0 to 1")
    control_schedule: str = flag(
        "constant", "weight of the mask from the first step to the last", ("constant", "linear", "cosine")
    )
    negative_prompt: str = flag("", "what the image should not show")
    scheduler: str = flag("dpm", "sampler: dpm (DPM-Solver++), unipc or ddim", ("dpm", "unipc", "ddim"))
    seed: int = flag(0, "each image's noise depends on this and its row alone")
    mixed_precision: str = flag("no", "no, fp16 or bf16", PRECISIONS)
    torch_compile: bool = flag(False, "compile the networks: minutes at the start, quicker steps; needs a GPU")


@dataclass(frozen=True)
class InferConfig(SampleConfig):
    """One mask and one or more prompts to images."""

    control: str = flag("", "mask: class ids or palette colors", aliases=("--control_image",))
    prompt: list[str] = dataclasses.field(default_factory=list, metadata={"help": "one or more texts"})
    seeds: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "one image a prompt for each, in place of --seed and --num_images"}
    )
    num_images: int = flag(1, "images a prompt, each with noise of its own")
    out: str = flag("", "PNG to write; several images are laid out as a grid", aliases=("--output",))


@dataclass(frozen=True)
class GenerateConfig(SampleConfig):
    """A folder of masks, or a data set, to a data set of new images; the same command goes on where it was stopped."""

    SECTIONS: ClassVar[dict[str, str]] = {"controls": "from what to what", "min_miou": "scored while made"}

    controls: str = flag("", "data set, or a folder of mask files")
    split: str = flag("test", "which split of a data set that has several; train[24:]: its rows from the 25th on")
    output_dir: str = flag("", "data set folder to write")
    prompt: str | None = flag(
        None,
        "one text for all; in it {classes} stands for those in the mask, {caption} for the row's caption, and"
        " {by day|at night} for one of these, drawn for each image; none: the data set's captions",
    )
    mix_prompts: bool = flag(False, "give each row the caption of another, so that text does not tell the layout")
    vary: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "words of the texts that may stand for one another, one drawn for each image: 'by day|at"
                          " night' 'a summer|a winter'; what they change must not be in the mask"},
    )  # fmt: skip
    limit: int | None = flag(None, "use only the first rows")
    replicates: int = flag(1, "images a row")
    augment_masks: str | None = flag(
        None, "draw a new layout for each image as in training: affine,degrees=20; nothing leaves the frame"
    )
    batch_size: int = flag(16, "images painted at once")
    without_control: bool = flag(False, "ignore the mask: the floor of an evaluation")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    min_miou: float | None = flag(None, "an image in which a segmenter finds less of its mask is painted anew, 0 to 1")
    max_attempts: int = flag(4, "times a row is painted before it is dropped: its best image goes to rejected/")
    ignore_disagreement: bool = flag(False, "mark pixels in which the segmenter sees another class as ignored")
    segmenter: str | None = flag(
        None, "trained segmenter folder; none: trained on the real data's train split, as segcn evaluate does"
    )
