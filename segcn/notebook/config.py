"""`segcn run`: execute notebooks 01 to 05 in order with papermill, and say what came out."""

from dataclasses import dataclass

from segcn.utils.args import PRECISIONS, flag


@dataclass(frozen=True)
class RunConfig:
    """Run notebooks 01 to 05: inspect, augment, train, generate, evaluate."""

    preset: str = flag("tiny", "tiny (embedded base, landscapes, ten minutes on two cores) or sd15", ("tiny", "sd15"))
    pretrained_model_name_or_path: str = flag("", "base model folder; none: the embedded base")
    dataset_name: str = flag("", "data set folder, or its metadata.csv; none: the sample landscapes")
    output_dir: str = flag("", "where everything goes; none: outputs/PRESET")
    resolution: int | None = flag(None, "pixels a side, of training and painting; none: 128, or 512 of sd15")
    fit: str | None = flag(None, "what makes an image square: crop, pad or stretch; none: crop")
    augment: str | None = flag(None, "affine or none, and changes: affine,degrees=20,fill=cover; none: affine")
    class_balance: float | None = flag(None, "repeat rows with classes that fewer rows show than this share; none: 0")
    row: int | None = flag(None, "of notebook 02: which row to augment; none: 0")
    draws: int | None = flag(None, "of notebook 02: augmentations of it; none: 10")
    counted_rows: int | None = flag(None, "of notebook 02: rows in which to count classes; none: 200")
    max_train_steps: int | None = flag(None, "optimizer steps; none: 400, or one pass over the data of sd15")
    train_batch_size: int | None = flag(None, "rows a step; none: 16, or 4 of sd15")
    faithfulness_rows: int | None = flag(None, "held-out masks painted and scored while it trains; none: 12")
    num_processes: int | None = flag(None, "that train together; none: 1")
    more_flags: str = flag("", "more flags of segcn train, as one text")
    controlnet_model_name_or_path: str = flag("", "ControlNet to paint with; none: the one that notebook 03 trained")
    num_inference_steps: int | None = flag(None, "denoising steps; none: the preset's")
    guidance_scale: float | None = flag(None, "weight of the text; none: the preset's")
    controlnet_conditioning_scale: float | None = flag(None, "weight of the mask; none: the preset's")
    batch_size: int | None = flag(None, "images painted at once; none: 16")
    mixed_precision: str | None = flag(None, "of training and painting; none: no", PRECISIONS)
    limit: int | None = flag(None, "held-out masks to paint and score; none: 128")
    floor_limit: int | None = flag(None, "rows to paint without their mask; none: 48")
    segmenter_steps: int | None = flag(None, "training steps of the judge; none: its default")
    inception_weights: str = flag("", "file for FID and KID as published; none: torch.hub's, if there")
    clip: str = flag("", "folder of a CLIPModel, for CLIPScore; none: without")
    seed: int | None = flag(None, "of training and painting; none: 0")
    allow_symlinks: bool = flag(False, "open files outside of the data set folder through links in it")
    only: str = flag("", "a part of the notebooks, such as 03,04")
