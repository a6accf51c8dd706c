"""Settings of `segcn run` and `segcn app`: the parameters of notebooks 01 to 05, and of 08."""

from dataclasses import dataclass

from segcn.data.config import FITS
from segcn.utils.args import PRECISIONS, flag
from segcn.utils.paths import BASE, OUTPUTS, ROOT


@dataclass(frozen=True)
class RunConfig:
    """Run notebooks 01 to 05: inspect, augment, train, generate, evaluate."""

    preset: str = flag("tiny", "tiny (embedded base, landscapes, ten minutes on two cores) or sd15", ("tiny", "sd15"))
    pretrained_model_name_or_path: str = flag("", "base model folder; none: the embedded base")
    dataset_name: str = flag("", "data set folder, or its metadata.csv; none: the sample landscapes")
    output_dir: str = flag("", "output folder; none: outputs/PRESET")
    resolution: int | None = flag(None, "image size in pixels; none: 128, or 512 of sd15", low=1)
    fit: str | None = flag(None, "how images become square: crop, pad or stretch; none: crop", FITS)
    augment: str | None = flag(None, "affine or none, and changes: affine,degrees=20,fill=cover; none: affine")
    class_balance: float | None = flag(None, "repeat rows with classes rarer than this share; none: 0", low=0, high=1)
    row: int | None = flag(None, "notebook 02: row to augment; none: 0", low=0)
    draws: int | None = flag(None, "notebook 02: augmentations of it; none: 10", low=1)
    counted_rows: int | None = flag(None, "notebook 02: rows in which classes are counted; none: 200", low=1)
    max_train_steps: int | None = flag(None, "optimizer steps; none: 800, or one epoch with sd15", low=1)
    train_batch_size: int | None = flag(None, "rows in each step; none: 8, or 4 with sd15", low=1)
    faithfulness_rows: int | None = flag(None, "held-out masks generated from and scored in training; none: 12", low=0)
    num_processes: int | None = flag(None, "processes that train together; none: 1", low=1)
    more_flags: str = flag("", "more flags of segcn train, as one text")
    controlnet_model_name_or_path: str = flag("", "ControlNet to generate with; none: the one that notebook 03 trained")
    num_inference_steps: int | None = flag(None, "denoising steps; none: the preset's", low=1)
    guidance_scale: float | None = flag(None, "weight of the text; none: the preset's")
    controlnet_conditioning_scale: float | None = flag(None, "weight of the mask; none: the preset's")
    batch_size: int | None = flag(None, "images generated at once; none: 16", low=1)
    mixed_precision: str | None = flag(None, "for training and generation; none: no", PRECISIONS)
    limit: int | None = flag(None, "held-out masks to generate from and to score; none: 128", low=1)
    floor_limit: int | None = flag(
        None, "rows to generate without their mask, and with other captions; none: 48", low=1
    )
    segmenter_steps: int | None = flag(None, "training steps of the segmenter; none: its default", low=1)
    inception_weights: str = flag("", "file for FID and KID as published; none: torch.hub's, if there")
    clip: str = flag("", "folder of a CLIPModel, for CLIPScore; none: without")
    seed: int | None = flag(None, "seed of training and generation; none: 0")
    replace: bool = flag(False, "delete data sets of other settings, which are otherwise kept under another name")
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    only: str = flag("", "some of the notebooks, such as 03,04")


@dataclass(frozen=True)
class AppConfig:
    """Draw masks and generate images in the browser. Ctrl+C ends it."""

    dataset_name: str = flag(str(ROOT / "data" / "examples"), "data set whose masks and captions can be chosen")
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion's layout (1.x, 2.x, XL or 3)"
    )
    lora: str = flag("", "LoRA of the base; none: none")
    controlnet_model_name_or_path: str = flag(
        "", "ControlNet folder; none: the newest trained one whose palette matches, else the shipped one"
    )
    segmenter: str = flag("", "segmenter folder; none: the one beside the base, where its classes are the palette's")
    output_dir: str = flag(str(OUTPUTS / "app"), "data set that Save writes to; nothing is written before")
    resolution: int = flag(0, "image size in pixels; 0: each mask's own", low=0)
    fit: str = flag("crop", "how --resolution makes a mask square: crop, pad or stretch", FITS)
    mixed_precision: str = flag("no", "no, fp16 or bf16", PRECISIONS)
    port: int = flag(8866, "of the address in the browser; the next free one where it is taken", low=1, high=65535)
    no_browser: bool = flag(False, "print the address, and open no browser")
