"""Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]  # the repository; every default path is below it
OUTPUTS = ROOT / "outputs"
BASE = ROOT / "data" / "base"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a ControlNet: written last, so it is whole where this stands
FITS = ("crop", "pad", "stretch")
PRECISIONS = ("no", "fp16", "bf16")
MAX_PIXELS = 89_478_485  # of an image: Pillow's limit, 256 MiB of RGB
MODELS = {"preset", "pretrained_model_name_or_path", "controlnet_model_name_or_path", "palette"}  # what paints


def flag(default: Any, help: str, choices: tuple | None = None, aliases: tuple = ()) -> Any:
    """A dataclass field with its meaning, shown by --help; aliases: older flags that are still read."""
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    return dataclasses.field(default=default, metadata=metadata | ({"aliases": list(aliases)} if aliases else {}))


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
    noise_prior: str | None = flag(
        None, "start from the class statistics of a data set's training rows, or of a noise prior's file; none: noise"
    )
    noise_prior_strength: float = flag(0.8, "share of the steps that are taken from the noise prior on, 0 to 1")
    negative_prompt: str = flag("", "what the picture should not show")
    scheduler: str = flag("dpm", "sampler: dpm (DPM-Solver++), unipc or ddim", ("dpm", "unipc", "ddim"))
    seed: int = flag(0, "each picture's noise depends on this and its row alone")
    mixed_precision: str = flag("no", "no, fp16 or bf16", PRECISIONS)
    torch_compile: bool = flag(False, "compile the networks: minutes at the start, quicker steps; needs a GPU")


@dataclass(frozen=True)
class InferConfig(SampleConfig):
    """One mask and one or more prompts to pictures."""

    control: str = flag("", "mask: class ids or palette colours", aliases=("--control_image",))
    prompt: list[str] = dataclasses.field(default_factory=list, metadata={"help": "one or more texts"})
    seeds: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "one picture a prompt for each, in place of --seed and --num_images"}
    )
    num_images: int = flag(1, "pictures a prompt, each with noise of its own")
    out: str = flag("", "PNG to write; several pictures are laid out as a grid", aliases=("--output",))


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
        " {by day|at night} for one of these, drawn for each picture; none: the data set's captions",
    )
    mix_prompts: bool = flag(False, "give each row the caption of another, so that text does not tell the layout")
    vary: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "words of the texts that may stand for one another, one drawn for each picture: 'by day|at"
                          " night' 'a summer|a winter'; what they change must not be in the mask"},
    )  # fmt: skip
    limit: int | None = flag(None, "use only the first rows")
    replicates: int = flag(1, "pictures a row")
    augment_masks: str | None = flag(
        None, "draw a new layout for each picture as in training: affine,degrees=20; nothing leaves the frame"
    )
    batch_size: int = flag(16, "pictures painted at once")
    without_control: bool = flag(False, "ignore the mask: the floor of an evaluation")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    min_miou: float | None = flag(None, "a picture in which a segmenter finds less of its mask is painted anew, 0 to 1")
    max_attempts: int = flag(4, "times a row is painted before it is dropped: its best picture goes to rejected/")
    ignore_disagreement: bool = flag(False, "mark pixels in which the segmenter sees another class as ignored")
    segmenter: str | None = flag(
        None, "trained segmenter folder; none: trained on the real data's train split, as segcn evaluate does"
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Do generated images obey their masks, how far are they from real ones, are they copies? metrics and a report.

    segcn evaluate compare RUN RUN puts two such evaluations side by side. Many processes share the work:
    torchrun --nproc_per_node N -m segcn.cli evaluate ...
    """

    real: str = flag("", "data set of real images; its test split, where it has one, is what they are compared with")
    synthetic: str = flag("", "generated data set")
    floor: str | None = flag(None, "the same masks painted without being shown (segcn generate --without_control)")
    reconstructions: str | None = flag(None, "the real images through the base's autoencoder")
    segmenter: str | None = flag(
        None,
        "trained segmenter: ours, or any AutoModelForSemanticSegmentation folder; none: trained on real train rows",
    )
    inception_weights: str | None = flag(
        None, "weights-inception-2015-12-05-6726825d.pth, for FID and KID as published; none: torch.hub's, if there"
    )
    clip: str | None = flag(None, "folder of a CLIPModel, for CLIPScore")
    output_dir: str | None = flag(
        None, "folder of metrics.json and report.html; none: the one above the synthetic data set"
    )
    cache_dir: str | None = flag(None, "where what was seen of each image is kept; none: cache/ in the output folder")
    batch_size: int = flag(32, "images read and kept together; no result depends on it")
    resolution: int | None = flag(None, "pixels a side that the segmenter sees; none: those of the generated images")
    fit: str = flag("crop", "how images become square: crop, pad or stretch; with --segmenter: as it was trained", FITS)
    seed: int = flag(0, "of the segmenter's training")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")


@dataclass(frozen=True)
class DoctorConfig:
    """Decode every file of a data set and report what is wrong with it; exit code 1 where training would be wrong."""

    dataset_name: str = flag("", "data set folder, or its metadata.csv; may stand first without the flag")
    output_dir: str | None = flag(
        None, "folder of doctor.html and doctor.json; none: outputs/doctor/<data set>-<fingerprint>"
    )
    quarantine: str | None = flag(
        None, "OUT.csv to write the good rows to; the bad ones go to OUT.bad.csv with the reason"
    )
    pretrained_model_name_or_path: str = flag(str(BASE), "base model, for the length of captions in its tokens")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    max_pixels: int = flag(MAX_PIXELS, "pixels of an image that are refused unread; the default is Pillow's limit")
    examples: int = flag(4, "pictures in the report of each kind of fault")


@dataclass(frozen=True)
class PaletteConfig:
    """Write a palette.json for masks that have none: a ready one that they fit, or one proposed from what they hold."""

    dataset_name: str = flag("", "folder of masks, or data set folder; may stand first without the flag")
    ready: str | None = flag(
        None, "ready palette: ade20k, cityscapes, voc, coco-stuff, binary ...; an unknown name lists all"
    )
    names: str | None = flag(None, "names of the proposed classes in the order of their ids: sky,grass,lake")
    output: str | None = flag(None, "PALETTE.json to write; none: palette.json in the folder")


@dataclass(frozen=True)
class ImportConfig:
    """Write a data set of the contract (data/README.md) from pairs of files, a metadata file or a saved `datasets`."""

    source: str = flag("", "folder, or a .csv, .jsonl, .json or .parquet file; may stand first without the flag")
    out: str = flag("", "data set folder to write, empty or absent; may stand second without the flag")
    files: str = flag(
        "copy",
        "copy: bytes unchanged; symlink: link to them; rewrite: leave them, write metadata to OUT, a folder above them",
        ("copy", "symlink", "rewrite"),
    )
    palette: str | None = flag(
        None, "a ready palette's name (segcn palette), or a palette.json; none: found at SOURCE, else proposed"
    )
    caption: str | None = flag(
        None, "for rows without one; {classes} stands for those in the mask, largest first: 'a scene of {classes}'"
    )
    test: int = flag(0, "rows to hold out in test/, drawn at random from a SOURCE without splits; 0: none")
    image_column: str | None = flag(None, "column of the images; none: file_name, or image")
    conditioning_image_column: str | None = flag(
        None, "column of the masks; none: conditioning_image_file_name, or conditioning_image"
    )
    caption_column: str | None = flag(None, "column of the captions; none: text")
    image_suffix: str = flag("", "ending of the pictures' names that their masks lack: _leftImg8bit")
    mask_suffix: str = flag("", "ending of the masks' names that their pictures lack: _mask")
