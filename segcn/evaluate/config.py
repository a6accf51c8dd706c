"""Settings of `segcn evaluate` and `segcn evaluate compare`."""

from dataclasses import dataclass

from segcn.data.config import ARCHITECTURE, FITS, SMALL
from segcn.utils.args import flag
from segcn.utils.paths import BASE, OUTPUTS


@dataclass(frozen=True)
class EvaluateConfig:
    """Do generated images follow their masks, how far are they from real ones, are they copies? Metrics and a report.

    segcn evaluate compare RUN RUN puts two evaluations side by side; segcn study measures the use of generated images
    for training a segmenter. Several processes share the work:
    torchrun --nproc_per_node N -m segcn.cli evaluate ...
    """

    real: str = flag("", "data set of real images; its test split, or else its last eighth, is compared with")
    synthetic: str = flag("", "generated data set")
    floor: str | None = flag(None, "the same rows generated without their masks (segcn generate --without_control)")
    without_classes: str | None = flag(
        None, "the same rows, their captions without class names (segcn generate --without_class_words)"
    )
    other_captions: str | None = flag(
        None, "the same rows, each with another one's caption (segcn generate --mix_prompts)"
    )
    reconstructions: str | None = flag(None, "the real images through the base's autoencoder")
    segmenter: str | None = flag(
        None,
        "trained segmenter: ours, or any AutoModelForSemanticSegmentation folder; none: trained on real train rows",
    )
    segmenter_architecture: str = flag(SMALL, ARCHITECTURE)
    inception_weights: str | None = flag(
        None, "weights-inception-2015-12-05-6726825d.pth, for FID and KID as published; none: torch.hub's, if there"
    )
    clip: str | None = flag(None, "folder of a CLIPModel, for CLIPScore and CMMD")
    features: str | None = flag(None, "folder of a vision backbone, such as DINOv2: distances by its features, too")
    output_dir: str | None = flag(None, "folder of metrics.json and report.html; none: the one above --synthetic")
    cache_dir: str | None = flag(None, "folder for the measurements of each image; none: cache/ in the output folder")
    batch_size: int = flag(32, "images read and kept together; no result depends on it", low=1)
    resolution: int | None = flag(None, "image size for the segmenter in pixels; none: that of --synthetic", low=1)
    fit: str = flag("crop", "how images become square: crop, pad or stretch; with --segmenter: as it was trained", FITS)
    seed: int = flag(0, "seed of the segmenter's training")
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")


@dataclass(frozen=True)
class CheckConfig:
    """Does a base fit a data set? Reconstructions, captions, small classes; then memory and time of a training.

    A segmenter that is trained on the training rows compares reconstructions of held-out rows with their originals; the
    same one is used by segcn train --faithfulness_rows and segcn evaluate.
    """

    dataset_name: str = flag("", "data set folder", required=True)
    pretrained_model_name_or_path: str = flag(
        str(BASE), "base model: a folder in Stable Diffusion's layout (1.x, 2.x, XL or 3)"
    )
    resolution: int | None = flag(None, "image size in pixels; none: that of the preset that fits the base", low=1)
    fit: str = flag("crop", "how images become square: crop, pad or stretch", FITS)
    output_dir: str = flag(str(OUTPUTS / "check"), "folder of base_check.png")
    allow_symlinks: bool = flag(False, "follow links to files outside of the data set folder")
    lora: str | None = flag(None, "LoRA of the base: a folder that segcn adapt or diffusers wrote")


@dataclass(frozen=True)
class CompareConfig:
    """Put two evaluations side by side; where both saw the same rows, image by image."""

    one: str = flag("", "folder of an evaluation, or its metrics.json", required=True)
    other: str = flag("", "the other one", required=True)
