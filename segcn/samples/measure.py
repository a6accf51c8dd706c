"""How good is the embedded base? Its autoencoder, its text, its ControlNet and its speed, on pictures held out."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from segcn import show
from segcn.captions import SEASONS, TIMES
from segcn.config import OUTPUTS, GenerateConfig, SampleConfig, flag
from segcn.distance import frechet_distance
from segcn.errors import UserError
from segcn.evaluate import faithfulness, features, write_metrics
from segcn.features import open_extractor
from segcn.generate import generate_dataset, reconstruct_dataset
from segcn.masks import colourise
from segcn.pipeline import Painter, generate, load_painter
from segcn.records import Split, read_named_split, read_split
from segcn.samples.card import report
from segcn.samples.earth import write_earth
from segcn.samples.landscapes import describe, palette, write_landscapes
from segcn.samples.learning import to_pixels
from segcn.samples.recogniser import (
    OF_EARTH,
    OF_LANDSCAPES,
    RecogniserRecipe,
    read_images,
    recognised,
    train_recogniser,
)
from segcn.samples.speed import seconds
from segcn.segmenter import Segmenter, SegmenterConfig, train_segmenter

HELD_OUT_SEED = 4242  # of no sample set, and not of the base's pictures
GRID_MASKS = 8
Log = Callable[[str], None]


@dataclass(frozen=True)
class MeasureConfig(SampleConfig):
    """Measure the embedded base and its ControlNet on held-out landscapes and tiles of the Earth."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = SampleConfig.PRESETS | {
        "tiny": {"num_inference_steps": 10, "guidance_scale": 2.5, "scheduler": "dpm"}  # as the base was chosen
    }

    controlnet_model_name_or_path: str | None = flag(None, "ControlNet folder; none: the one shipped with the base")
    resolution: int = flag(128, "pixels a side")
    count: int = flag(500, "held-out landscapes to measure on")
    held_out: int = flag(512, "landscapes painted for it, of which --count are the first")
    earth_count: int = flag(128, "held-out tiles of the Earth, for their style; 0: none")
    batch_size: int = flag(16, "pictures painted at once")
    output_dir: str = flag(str(OUTPUTS / "measure"), "where everything goes; the same command goes on there")
    segmenter_steps: int = flag(SegmenterConfig.steps, "training steps of the network that judges the masks")
    recogniser_steps: int = flag(RecogniserRecipe.steps, "of those that judge season, time of day and style")
    timings: int = flag(3, "how often the painting of one image, and of --batch_size at once, is timed")

    def __post_init__(self):
        if not 2 <= self.count <= self.held_out:
            raise UserError(f"--count {self.count}: expected 2 to {self.held_out}; more need a higher --held_out")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def measure(config: MeasureConfig, train: Split, log: Log = print) -> dict:
    """Measure everything; writes measure.json, table.txt and grid.png, and returns the metrics.

    train: landscapes, none of them held out, from which the judges of masks, seasons and times of day learn.
    """
    held_out = write_landscapes(config.folder / "held_out", config.held_out, config.resolution, HELD_OUT_SEED)
    painter = open_painter(config)
    sets = painted_sets(config, read_named_split(held_out, f"train[:{config.count}]"), painter, log)
    save_grid(draw_grid(config, sets["real"], painter), config.folder / "grid.png")
    judges = SegmenterConfig(steps=config.segmenter_steps, resolution=config.resolution)
    segmenter = train_segmenter(train, judges, config.folder / "segmenter", log)
    metrics: dict[str, Any] = {"settings": dataclasses.asdict(config) | {"base_fingerprint": painter.base.fingerprint}}
    metrics["autoencoder"] = likeness(sets["real"], sets["reconstructions"])
    metrics |= faithful(sets, segmenter, log)
    metrics["recognised"] = season_and_time(config, train, sets, log)
    metrics["recognised_earth"] = style(config, painter, log)
    metrics["seconds"] = seconds(config, sets["real"], painter, log)
    write_metrics(metrics, config.folder / "measure.json")
    (config.folder / "table.txt").write_text(report(metrics) + "\n", encoding="utf-8")
    log(f"\n{report(metrics)}\n\nWrote measure.json, table.txt and grid.png to {config.folder}.")
    return metrics


def open_painter(config: MeasureConfig) -> Painter:
    """The base with the ControlNet named, or shipped with it; UserError if there is none for landscapes."""
    folder = config.controlnet_model_name_or_path or f"{config.pretrained_model_name_or_path}/controlnet"
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: expected a ControlNet, found no config.json in it")
    return load_painter(dataclasses.replace(config, controlnet_model_name_or_path=folder), palette())


def painted_sets(config: MeasureConfig, real: Split, painter: Painter, log: Log) -> dict[str, Split]:
    """The real images, these through the autoencoder, images painted from their masks, and from captions alone."""
    seen = config.folder / "reconstructions"
    sets = {"real": real}
    sets["reconstructions"] = read_split(reconstruct_dataset(real, painter.base, seen, config.resolution))
    for name in ("with_mask", "captions_alone"):
        log(f"Painting {len(real)} images: {name.replace('_', ' ')}.")
        sets[name] = paint_set(config, real, config.folder / name, painter, name == "captions_alone", log)
    return sets


def paint_set(config: MeasureConfig, real: Split, folder: Path, painter: Painter, alone: bool, log: Log) -> Split:
    """The masks and captions of a split painted into `folder`; `alone`: its captions without its masks."""
    sampling = {field.name: getattr(config, field.name) for field in dataclasses.fields(SampleConfig)}
    where: dict[str, Any] = {"controls": str(real.folder), "output_dir": str(folder), "limit": len(real)}
    painting = GenerateConfig(**sampling, **where, batch_size=config.batch_size, without_control=alone)
    return read_named_split(generate_dataset(painting, painter, log), f"train[:{len(real)}]")


@torch.no_grad()
def likeness(real: Split, reconstructions: Split, batch_size: int = 32) -> dict[str, float]:
    """PSNR in dB and SSIM (Wang et al. 2004) of the reconstructions, the means over the images."""
    metrics = {
        "psnr": PeakSignalNoiseRatio(data_range=2.0, dim=(1, 2, 3)),
        "ssim": StructuralSimilarityIndexMeasure(data_range=2.0),
    }
    pairs = zip(read_images(real).split(batch_size), read_images(reconstructions).split(batch_size), strict=True)
    for wanted, seen in pairs:
        for metric in metrics.values():
            metric.update(to_pixels(seen), to_pixels(wanted))
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def faithful(sets: dict[str, Split], segmenter: Segmenter, log: Log) -> dict:
    """IoU of the classes that the segmenter finds in each set, and their shares of what it finds in real images."""
    found = {}
    for name, split in sets.items():
        found[name] = faithfulness(split, segmenter)
        log(f"measure: {name.replace('_', ' ')}: mIoU {found[name]['miou']:.3f} on {len(split)} images")
    shares = {name: dict(shares_of(one, found["real"])) for name, one in found.items()}
    extractor = open_extractor(segmenter)
    near, far = (features(sets[name], segmenter, extractor) for name in ("real", "with_mask"))
    apart = {"extractor": extractor.name, "frechet_distance": frechet_distance(near, far)}
    return {"segmenter": segmenter.settings, "faithfulness": found, "share_of_ceiling": shares, "distance": apart}


def shares_of(found: dict, ceiling: dict) -> Iterator[tuple[str, float | None]]:
    """("mean", share) and (class, share) of a set's faithfulness; None where the ceiling is none or zero."""
    yield "mean", found["miou"] / ceiling["miou"]
    for label, value in ceiling["per_class"].items():
        yield label, found["per_class"][label] / value if value else None


def season_and_time(config: MeasureConfig, train: Split, sets: dict[str, Split], log: Log) -> dict:
    """For each set the share of its images that show the season, and the time of day, of their captions."""
    recipe = RecogniserRecipe(steps=config.recogniser_steps)
    recogniser = train_recogniser(train, OF_LANDSCAPES, config.folder / "recogniser", recipe, log)
    return {name: recognised(split, recogniser) for name, split in sets.items()}


def style(config: MeasureConfig, painter: Painter, log: Log) -> dict | None:
    """The same for the style of held-out tiles and of images from their captions alone; None without the maps."""
    if not config.earth_count:
        return None
    try:
        earth = write_earth(config.folder / "earth", 1024, config.resolution, test=config.earth_count)
    except UserError as error:
        log(f"The style of the Earth's tiles is left out: {error}")
        return None
    real, folder = read_split(earth, "test"), config.folder / "earth_captions_alone"
    sets = {"real": real, "captions_alone": paint_set(config, real, folder, painter, True, log)}
    recipe = RecogniserRecipe(steps=config.recogniser_steps)
    recogniser = train_recogniser(read_split(earth, "train"), OF_EARTH, config.folder / "recogniser", recipe, log)
    return {name: recognised(split, recogniser) for name, split in sets.items()}


def draw_grid(config: MeasureConfig, real: Split, painter: Painter) -> Figure:
    """The first masks, uncurated, each painted in four seasons and hours: a mask a row, a season and an hour a column.

    Captions also name what the mask holds, as in training: what a caption leaves out is left out of the picture.
    """
    starts = [describe(season, hour, []) for season, hour in zip(SEASONS, TIMES, strict=True)]
    lines, below = [], []
    for row in range(min(GRID_MASKS, len(real))):
        mask, named = show.read_pair(real, row)[1], "".join(real[row].caption.partition(" with ")[1:])
        captions = [start + named for start in starts]
        images = generate(painter, np.stack([mask] * len(captions)), captions, [row] * len(captions), config)
        lines.append([colourise(mask, real.palette), *images])
        below.append([f"...{named}", *[""] * len(captions)])
    return show.grid(lines, ["mask", *starts], below=below, width=2.56)


def save_grid(figure: Figure, path: Path, step: int = 3) -> None:
    """Write the figure as a PNG a third smaller: colours are rounded to multiples of 3, at most 1 of 255 off."""
    figure.savefig(path, dpi=100)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16)
    Image.fromarray(((pixels + step // 2) // step * step).astype(np.uint8)).save(path, optimize=True)
