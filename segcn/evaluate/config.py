"""Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one."""

from dataclasses import dataclass

from segcn.data.config import FITS
from segcn.utils.args import flag


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
