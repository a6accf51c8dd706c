"""Every setting of every command as frozen dataclasses: command line, notebook parameters and run folder share them.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # the repository; every default path is below it
OUTPUTS = ROOT / "outputs"
BASE = ROOT / "data" / "base"
FITS = ("crop", "pad", "stretch")


def flag(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field with its meaning, shown by --help."""
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Train a ControlNet on a frozen Stable Diffusion."""

    preset: str = flag(
        "sd15", "defaults to start from: sd15 (diffusers' own) or tiny (the embedded base)", ("sd15", "tiny")
    )
    # data and models
    pretrained_model_name_or_path: str = flag(str(BASE), "base model: a folder in Stable Diffusion 1.x/2.x layout")
    controlnet_model_name_or_path: str | None = flag(
        None, "ControlNet to go on from; none: a copy of the base's encoder"
    )
    tokenizer_name: str | None = flag(None, "tokenizer folder, where it is not the base's")
    revision: str | None = flag(None, "revision of the base on the hub")
    variant: str | None = flag(None, "variant of the base's weight files, such as fp16")
    dataset_name: str | None = flag(None, "data set folder, or its metadata.csv")
    train_data_dir: str | None = flag(None, "the same as --dataset_name")
    max_train_samples: int | None = flag(None, "use only the first rows")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    output_dir: str = flag("outputs/controlnet", "run folder: checkpoints, log and the finished ControlNet")
    cache_dir: str | None = flag(None, "folder of the latent caches; none: outputs/cache")
    cache: str = flag(
        "latents",
        "latents: encode each draw once, before step 0; none: encode in every step",
        ("latents", "none"),
    )
    cache_draws: int = flag(4, "augmented draws kept per row; epoch e uses draw e modulo this")
    # the picture and its augmentation
    resolution: int = flag(512, "pixels a side")
    fit: str = flag("crop", "what makes a picture square: crop cuts its middle, pad adds a border, stretch", FITS)
    augment: str = flag(
        "affine",
        "paired augmentation: affine or none, and changes to it, as in affine,degrees=20,fill=cover; its fields are "
        "degrees=10 translate=0.1 scale_min=0.9 scale_max=1.2 shear=5 hflip=0.5 crop_min=1 crop_shift=1 "
        "brightness=0.1 contrast=0.1 saturation=0.1 hue=0 fill=ignore|cover sided_captions=skip|rewrite",
    )
    class_balance: float = flag(
        0.0, "repeat rows with classes that a smaller share of the rows shows than this, such as 0.3; 0: off"
    )
    proportion_empty_prompts: float = flag(0.0, "share of captions replaced by the empty one, 0 to 1")
    # optimization
    max_train_steps: int | None = flag(None, "optimizer steps; none: --num_train_epochs")
    num_train_epochs: int = flag(1, "passes over the data where --max_train_steps is not given")
    train_batch_size: int = flag(4, "rows a step and process")
    gradient_accumulation_steps: int = flag(1, "micro-batches an optimizer step")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    learning_rate: float = flag(5e-6, "peak learning rate")
    scale_lr: bool = flag(False, "multiply the learning rate by processes, accumulation and batch size")
    lr_scheduler: str = flag("constant", "diffusers' schedule by name: linear, cosine, constant_with_warmup, ...")
    lr_warmup_steps: int = flag(500, "optimizer steps of warm-up, for schedules that have one")
    lr_num_cycles: int = flag(1, "hard resets of cosine_with_restarts")
    lr_power: float = flag(1.0, "power of the polynomial schedule")
    use_8bit_adam: bool = flag(False, "bitsandbytes' 8-bit AdamW")
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.999, "decay of the second moment")
    adam_weight_decay: float = flag(1e-2, "weight decay")
    adam_epsilon: float = flag(1e-8, "epsilon of Adam")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    seed: int = flag(0, "of rows, noise, timesteps, captions and augmentation")
    # checkpoints
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int | None = flag(None, "keep this many; none: all")
    resume_from_checkpoint: str = flag("latest", "latest, or a checkpoint-N folder of this run")
    allow_changes: bool = flag(False, "go on although settings or data differ from the run's own")
    # watching it
    logging_steps: int = flag(10, "optimizer steps between lines of log.jsonl")
    validation_image: list[str] | None = flag(None, "masks to paint from while training")
    validation_prompt: list[str] | None = flag(None, "a prompt for each mask, or one for all")
    validation_steps: int = flag(100, "optimizer steps between validation pictures")
    num_validation_images: int = flag(1, "pictures a mask and prompt")
    report_to: str = flag(
        "none",
        "trackers: tensorboard, wandb, comet_ml, all or none",
        ("none", "tensorboard", "wandb", "comet_ml", "all"),
    )
    tracker_project_name: str = flag("train_controlnet", "name of the run in the trackers")
    logging_dir: str = flag("logs", "tracker files, below the run folder")
    # the machine
    mixed_precision: str | None = flag(
        None, "no, fp16 (V100) or bf16; none: as accelerate is configured", ("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere and newer")
    dataloader_num_workers: int = flag(0, "processes that read data, a training process")
    push_to_hub: bool = flag(False, "upload the finished ControlNet")
    hub_token: str | None = flag(None, "token for the upload")
    hub_model_id: str | None = flag(None, "repository to upload to")
    # accepted for old command lines: each is answered by one line that says what happens instead
    enable_xformers_memory_efficient_attention: bool = flag(False, "PyTorch's own attention is used")
    set_grads_to_none: bool = flag(False, "always so in PyTorch 2")
    dataset_config_name: str | None = flag(None, "data sets are folders")
    image_column: str = flag("image", "metadata.csv names it file_name")
    conditioning_image_column: str = flag("conditioning_image", "metadata.csv names it conditioning_image_file_name")
    caption_column: str = flag("text", "metadata.csv names it text")
    image_interpolation_mode: str = flag("bilinear", "images are resized bilinear with antialias, masks NEAREST")


OBSOLETE = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own attention is used: as fast, nothing to install",
    "set_grads_to_none": "gradients are always set to None",
    "dataset_config_name": "a data set is a folder: give its path as --dataset_name",
    "image_column": "the column is called file_name",
    "conditioning_image_column": "the column is called conditioning_image_file_name",
    "caption_column": "the column is called text",
    "image_interpolation_mode": "images are resized bilinear with antialias, masks NEAREST",
}

# What may differ when a run goes on: it changes neither the data nor the mathematics of a step.
FREE_TO_CHANGE = {
    "allow_changes", "allow_symlinks", "cache_dir", "checkpointing_steps", "checkpoints_total_limit",
    "dataloader_num_workers", "hub_model_id", "hub_token", "logging_dir", "logging_steps", "max_train_steps",
    "num_train_epochs", "num_validation_images", "output_dir", "push_to_hub", "report_to", "resume_from_checkpoint",
    "tracker_project_name", "validation_image", "validation_prompt", "validation_steps", *OBSOLETE,
}  # fmt: skip


@dataclass(frozen=True)
class SampleConfig:
    """What every command that paints shares."""

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
    controlnet_conditioning_scale: float = flag(1.0, "weight of the mask; 0: ignored")
    control_guidance_start: float = flag(0.0, "share of the steps before the mask acts, 0 to 1")
    control_guidance_end: float = flag(1.0, "share of the steps after which the mask no longer acts, 0 to 1")
    negative_prompt: str = flag("", "what the picture should not show")
    scheduler: str = flag("dpm", "sampler: dpm (DPM-Solver++), unipc or ddim", ("dpm", "unipc", "ddim"))
    seed: int = flag(0, "each picture's noise depends on this and its row alone")
    mixed_precision: str = flag("no", "no, fp16 or bf16", ("no", "fp16", "bf16"))


@dataclass(frozen=True)
class InferConfig(SampleConfig):
    """One mask and one or more prompts to pictures."""

    control_image: str = flag("", "mask: class ids or palette colours")
    prompt: list[str] = dataclasses.field(default_factory=list, metadata={"help": "one or more texts"})
    num_images: int = flag(1, "pictures a prompt, each with its own seed")
    output: str = flag("", "PNG to write; several pictures are laid out as a grid")


@dataclass(frozen=True)
class GenerateConfig(SampleConfig):
    """A folder of masks, or a data set, to a data set of new images."""

    controls: str = flag("", "data set, or a folder of mask files")
    split: str = flag("test", "which split of a data set that has several; train[24:]: its rows from the 25th on")
    output_dir: str = flag("", "data set folder to write")
    prompt: str | None = flag(None, "one text for all; none: the captions of the data set")
    limit: int | None = flag(None, "use only the first rows")
    batch_size: int = flag(16, "pictures painted at once")
    without_control: bool = flag(False, "ignore the mask: the floor of an evaluation")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")


@dataclass(frozen=True)
class EvaluateConfig:
    """Distance and mask faithfulness of generated images."""

    real: str = flag("", "data set of real images; its test split, where it has one, is what they are compared with")
    synthetic: str = flag("", "generated data set")
    floor: str | None = flag(None, "the same masks painted without being shown (segcn generate --without_control)")
    reconstructions: str | None = flag(None, "the real images through the base's autoencoder")
    segmenter: str | None = flag(None, "trained segmenter folder; none: trained on the real data's train split")
    inception_weights: str | None = flag(
        None, "weights-inception-2015-12-05-6726825d.pth, for FID and KID as published"
    )
    output: str | None = flag(None, "metrics.json to write; none: beside the synthetic data set")
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
    max_pixels: int = flag(89_478_485, "pixels of an image that are refused unread; the default is Pillow's limit")
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
    image_column: str | None = flag(None, "column of the images; none: file_name, or image")
    conditioning_image_column: str | None = flag(
        None, "column of the masks; none: conditioning_image_file_name, or conditioning_image"
    )
    caption_column: str | None = flag(None, "column of the captions; none: text")
    image_suffix: str = flag("", "ending of the pictures' names that their masks lack: _leftImg8bit")
    mask_suffix: str = flag("", "ending of the masks' names that their pictures lack: _mask")


# What a preset changes. sd15 keeps diffusers' training defaults.
PRESETS: dict[type, dict[str, dict[str, Any]]] = {
    TrainConfig: {
        "sd15": {},
        "tiny": {
            "resolution": 128,
            "train_batch_size": 16,
            "max_train_steps": 400,
            "learning_rate": 2e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 20,
            "proportion_empty_prompts": 0.1,
            "cache_draws": 2,
            "checkpointing_steps": 200,
            "checkpoints_total_limit": 2,
            "validation_steps": 100,
        },
    },
    SampleConfig: {
        "sd15": {"num_inference_steps": 20, "guidance_scale": 7.5, "scheduler": "unipc"},
        "tiny": {
            "num_inference_steps": 10,
            "guidance_scale": 2.5,
            "scheduler": "dpm",
        },
    },
}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each setting that differs and may not, when a run goes on; unrecorded: the default."""
    old = dataclasses.asdict(TrainConfig()) | old
    names = [name for name in new if name not in FREE_TO_CHANGE and name != "hub_token"]
    return [f"{name}: was {old.get(name)!r}, is {new[name]!r}" for name in names if old.get(name) != new[name]]


def total_steps(config: TrainConfig, shown: int, num_processes: int = 1) -> int:
    """Optimizer steps of a whole training; `shown`: rows in all its epochs, repeated ones counted each time."""
    per_step = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    return config.max_train_steps or math.ceil(shown / per_step)
