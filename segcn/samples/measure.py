"""What `segcn samples measure` found, as the text that stands on the model card."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from segcn.data import visualize
from segcn.data.captions import SEASONS, TIMES
from segcn.data.masks import colorize
from segcn.data.metadata import Split, read_named_split, read_split
from segcn.data.visualize import read_pair
from segcn.evaluate.evaluator import faithfulness, features, write_metrics
from segcn.evaluate.metrics import frechet_distance
from segcn.generate.config import GenerateConfig, SampleConfig
from segcn.generate.pipeline import Pipeline, generate, load_pipeline
from segcn.generate.writer import generate_dataset, reconstruct_dataset
from segcn.models.features import open_extractor
from segcn.models.segmenter import Segmenter, SegmenterConfig, segmenter_of
from segcn.samples.base_model.training import to_pixels
from segcn.samples.config import MeasureConfig
from segcn.samples.earth import write_earth
from segcn.samples.landscapes.scene import describe, palette, write_landscapes
from segcn.samples.recognizer import (
    OF_EARTH,
    OF_LANDSCAPES,
    RecognizerRecipe,
    read_images,
    recognized,
    train_recognizer,
)
from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE

# --- samples.card: What `segcn samples measure` found, as the text that stands on the model card.

NAMES = {
    "real": "real (ceiling)",
    "reconstructions": "reconstructions",
    "with_mask": "with mask",
    "captions_alone": "captions alone",
}
LEAD = 20  # letters of a line's name


def report(metrics: dict) -> str:
    """Faithfulness and its share of the ceiling, what was recognized, the autoencoder, speed, and the targets."""
    blocks = [faithfulness_lines(metrics), share_lines(metrics), recognized_lines(metrics["recognized"])]
    if metrics["recognized_earth"]:
        blocks.append(recognized_lines(metrics["recognized_earth"], "recognized, Earth"))
    return "\n\n".join("\n".join(block) for block in [*blocks, other_lines(metrics), target_lines(metrics)])


def faithfulness_lines(metrics: dict) -> list[str]:
    """Intersection over union for each set and class."""
    found = metrics["faithfulness"]
    lines = [row("IoU", ["images", "mean", *found["real"]["per_class"]])]
    for name, one in found.items():
        values = [one["miou"], *one["per_class"].values()]
        lines.append(row(NAMES[name], [str(one["images"]), *("-" if v is None else f"{v:.3f}" for v in values)]))
    return lines


def share_lines(metrics: dict) -> list[str]:
    """The same as shares of what the segmenter finds in the real images."""
    shares = metrics["share_of_ceiling"]
    lines = [row("share of the ceiling", ["", *shares["real"]])]
    others = [name for name in shares if name != "real"]
    return lines + [row(NAMES[name], ["", *map(percent, shares[name].values())]) for name in others]


def recognized_lines(recognized: dict, title: str = "recognized") -> list[str]:
    """The share of images of which a classifier tells what their caption says."""
    lines = [row(title, list(recognized["real"]), 12)]
    return lines + [row(NAMES[name], list(map(percent, found.values())), 12) for name, found in recognized.items()]


def other_lines(metrics: dict) -> list[str]:
    """Autoencoder, distance and speed."""
    likeness, timing, apart = (metrics[name] for name in ("autoencoder", "seconds", "distance"))
    return [
        f"autoencoder: PSNR {likeness['psnr']:.1f} dB, SSIM {likeness['ssim']:.3f}",
        f"Fréchet distance of with mask to real: {apart['frechet_distance']:.4g} ({apart['extractor']})",
        f"{timing['steps']} steps with guidance and mask: {timing['one']:.2f} s for one image, "
        f"{timing['each_of_many']:.2f} s for each of {timing['at_once']} in one call",
        f"(CPU time {timing['cpu_one']:.2f} s and {timing['cpu_each_of_many']:.2f} s; {timing['machine']}; "
        f"load before it {timing['load']:.1f}; median of {timing['timings']} after a warm-up)",
    ]


def target_lines(metrics: dict) -> list[str]:
    """Each figure that has a target, and whether it is met."""
    lines = [f"{'target':48}{'found':>9}{'wanted':>10}"]
    for what, found, wanted, unit in targets(metrics):
        is_met = found <= wanted if unit == "s" else found >= wanted
        shown = (f"{found:.2f} s", f"<= {wanted:.1f} s") if unit == "s" else (percent(found), f">= {wanted:.0%}")
        lines.append(f"{what:48}{shown[0]:>9}{shown[1]:>10}  {'met' if is_met else 'MISSED'}")
    return lines


def targets(metrics: dict) -> Iterator[tuple[str, float, float, str]]:
    """(what, found, wanted, unit): shares are wanted at least, seconds at most."""
    for name, mean, least in (("reconstructions", 0.9, 0.6), ("with_mask", 0.75, 0.45)):
        shares = metrics["share_of_ceiling"][name]
        per_class = {label: share for label, share in shares.items() if label != "mean" and share is not None}
        worst = min(per_class, key=lambda label: per_class[label])
        yield f"{NAMES[name]}: mIoU, of the ceiling", shares["mean"], mean, ""
        yield f"{NAMES[name]}: worst class ({worst}), of its own", per_class[worst], least, ""
    for name, wanted in (("real", 0.98), ("captions_alone", 0.9), ("with_mask", 0.85)):
        for head, found in metrics["recognized"][name].items():
            yield f"{NAMES[name]}: {head} recognized", found, wanted, ""
    if metrics["recognized_earth"]:
        yield (
            "Earth, captions alone: style recognized",
            metrics["recognized_earth"]["captions_alone"]["style"],
            0.95,
            "",
        )
    yield "one image", metrics["seconds"]["one"], 2.0, "s"
    yield f"each of {metrics['seconds']['at_once']} images in one call", metrics["seconds"]["each_of_many"], 0.7, "s"


def row(name: str, cells: list[str], width: int = 8) -> str:
    """One line of a table."""
    return (f"{name:{LEAD}}" + "".join(f"{cell:>{width}} " for cell in cells)).rstrip()


def percent(share: float | None) -> str:
    """ "93.1%"."""
    return "-" if share is None else f"{share:.1%}"


# --- samples.speed: How long painting takes: one image, and several in one call.

STEPS = 20


def seconds(config, real: Split, painter: Pipeline, log=print) -> dict:
    """Seconds of one image, and of each of `config.batch_size` in one call: medians, a first call left out.

    20 steps with mask and guidance, as `config` has it otherwise. The seconds of CPU time of all threads, `cpu_...`,
    hold on a busy machine too.
    """
    settings = replace(config, num_inference_steps=STEPS)
    found = {"machine": machine(painter), "steps": STEPS, "timings": config.timings, "at_once": config.batch_size}
    found["load"] = os.getloadavg()[0]
    for name, count in (("one", 1), ("each_of_many", config.batch_size)):
        log(f"Timing {count} in one call.")
        rows = [row % len(real) for row in range(count)]
        masks = np.stack([read_pair(real, row)[1] for row in rows])
        captions = [real[row].caption for row in rows]
        taken = []
        for _ in range(1 + config.timings):
            began = np.array([time.monotonic(), time.process_time()])
            generate(painter, masks, captions, rows, settings)
            taken.append((np.array([time.monotonic(), time.process_time()]) - began) / count)
        found[name], found[f"cpu_{name}"] = (
            statistics.median(map(float, column[1:])) for column in zip(*taken, strict=True)
        )
    return found


def machine(painter: Pipeline) -> str:
    """What it runs on: a GPU's name, or CPU cores and PyTorch's threads."""
    if painter.base.unet.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


# --- samples.measure: How good is the embedded base? Its autoencoder, its text, its ControlNet and its speed, on images held out.

HELD_OUT_SEED = 4242  # of no sample set, and not of the base's images
GRID_MASKS = 8
Log = Callable[[str], None]


def measure(config: MeasureConfig, train: Split, log: Log = print) -> dict:
    """Measure everything; writes measure.json, table.txt and grid.png, and returns the metrics.

    train: landscapes, none of them held out, from which the judges of masks, seasons and times of day learn.
    """
    held_out = write_landscapes(config.folder / "held_out", config.held_out, config.resolution, HELD_OUT_SEED)
    painter = open_generator(config)
    sets = generated_sets(config, read_named_split(held_out, f"train[:{config.count}]"), painter, log)
    save_grid(draw_grid(config, sets["real"], painter), config.folder / "grid.png")
    judges = SegmenterConfig(steps=config.segmenter_steps, resolution=config.resolution)
    segmenter = segmenter_of(train, judges, config.folder / "cache", log)
    metrics: dict[str, Any] = {"settings": dataclasses.asdict(config) | {"base_fingerprint": painter.base.fingerprint}}
    metrics["autoencoder"] = likeness(sets["real"], sets["reconstructions"])
    metrics |= faithful(sets, segmenter, log)
    metrics["recognized"] = season_and_time(config, train, sets, log)
    metrics["recognized_earth"] = style(config, painter, log)
    metrics["seconds"] = seconds(config, sets["real"], painter, log)
    write_metrics(metrics, config.folder / "measure.json")
    (config.folder / "table.txt").write_text(report(metrics) + "\n", encoding="utf-8")
    log(f"\n{report(metrics)}\n\nWrote measure.json, table.txt and grid.png to {config.folder}.")
    return metrics


def open_generator(config: MeasureConfig) -> Pipeline:
    """The base with the ControlNet named, or shipped with it; UserError if there is none for landscapes."""
    folder = config.controlnet_model_name_or_path or f"{config.pretrained_model_name_or_path}/controlnet"
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: expected a ControlNet, found no config.json in it")
    return load_pipeline(dataclasses.replace(config, controlnet_model_name_or_path=folder), palette())


def generated_sets(config: MeasureConfig, real: Split, painter: Pipeline, log: Log) -> dict[str, Split]:
    """The real images, these through the autoencoder, images painted from their masks, and from captions alone."""
    seen = config.folder / "reconstructions"
    sets = {"real": real}
    sets["reconstructions"] = read_split(reconstruct_dataset(real, painter.base, seen, config.resolution))
    for name in ("with_mask", "captions_alone"):
        log(f"Painting {len(real)} images: {name.replace('_', ' ')}.")
        sets[name] = generate_set(config, real, config.folder / name, painter, name == "captions_alone", log)
    return sets


def generate_set(config: MeasureConfig, real: Split, folder: Path, painter: Pipeline, alone: bool, log: Log) -> Split:
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
    recipe = RecognizerRecipe(steps=config.recognizer_steps)
    recognizer = train_recognizer(train, OF_LANDSCAPES, config.folder / "recognizer", recipe, log)
    return {name: recognized(split, recognizer) for name, split in sets.items()}


def style(config: MeasureConfig, painter: Pipeline, log: Log) -> dict | None:
    """The same for the style of held-out tiles and of images from their captions alone; None without the maps."""
    if not config.earth_count:
        return None
    try:
        earth = write_earth(config.folder / "earth", 1024, config.resolution, test=config.earth_count)
    except UserError as error:
        log(f"The style of the Earth's tiles is left out: {error}")
        return None
    real, folder = read_split(earth, "test"), config.folder / "earth_captions_alone"
    sets = {"real": real, "captions_alone": generate_set(config, real, folder, painter, True, log)}
    recipe = RecognizerRecipe(steps=config.recognizer_steps)
    recognizer = train_recognizer(read_split(earth, "train"), OF_EARTH, config.folder / "recognizer", recipe, log)
    return {name: recognized(split, recognizer) for name, split in sets.items()}


def draw_grid(config: MeasureConfig, real: Split, painter: Pipeline) -> Figure:
    """The first masks, uncurated, each painted in four seasons and hours: a mask a row, a season and an hour a column.

    Captions also name what the mask holds, as in training: what a caption leaves out is left out of the image.
    """
    starts = [describe(season, hour, []) for season, hour in zip(SEASONS, TIMES, strict=True)]
    lines, below = [], []
    for row in range(min(GRID_MASKS, len(real))):
        mask, named = visualize.read_pair(real, row)[1], "".join(real[row].caption.partition(" with ")[1:])
        captions = [start + named for start in starts]
        images = generate(painter, np.stack([mask] * len(captions)), captions, [row] * len(captions), config)
        lines.append([colorize(mask, real.palette), *images])
        below.append([f"...{named}", *[""] * len(captions)])
    return visualize.grid(lines, ["mask", *starts], below=below, width=2.56)


def save_grid(figure: Figure, path: Path, step: int = 3) -> None:
    """Write the figure as a PNG a third smaller: colors are rounded to multiples of 3, at most 1 of 255 off."""
    figure.savefig(path, dpi=100)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16)
    Image.fromarray(((pixels + step // 2) // step * step).astype(np.uint8)).save(path, optimize=True)


# --- samples.failures: What the usual failures look like: each provoked on the sample data, beside the image as it should be.

EXAMPLES = 2  # rows that each failure is shown on
HEADS = ("mask", "real image", "as it should be", "as it fails")


@dataclass(frozen=True)
class Recipe:
    """How long the two ControlNets that fail are trained, and on how many rows."""

    early_steps: int = 40  # too few to obey well
    early_rows: int = 64
    copying_steps: int = 250  # too many for so few rows
    copied_rows: int = 4


@dataclass(frozen=True)
class Failure:
    """One line of the image: settings that paint it, which ControlNet, and which rows of which split."""

    name: str
    settings: dict
    controlnet: str = "shipped"  # or one of `controlnets`
    split: str = "test"
    without_text: bool = False


FAILURES = (
    Failure("not yet\nconverged", {}, "early"),
    Failure("mask\nignored", {"controlnet_conditioning_scale": 0.0}),
    Failure("text\nignored", {}, without_text=True),
    Failure("color\nshift", {"guidance_scale": 7.5, "guidance_end": 1.0}),
    Failure("copied", {}, "copying", "train"),
)


def write_failures(out: Path, work: Path, dataset: Path, recipe: Recipe = Recipe()) -> Path:
    """Train what fails in `work`, where the same command goes on, paint every failure, and write the PNG `out`."""
    visualize.quiet()
    folders = controlnets(work, dataset, recipe)
    splits = {name: read_split(dataset, name) for name in ("train", "test")}
    settings = make(SampleConfig, "tiny", controlnet_model_name_or_path=folders["shipped"])
    healthy = load_pipeline(settings, splits["test"].palette)
    painters = {name: pipeline_with(healthy, folder) for name, folder in folders.items()}
    lines = [cells(failure, splits[failure.split], healthy, painters[failure.controlnet], settings)
             for failure in FAILURES]  # fmt: skip
    save_grid(figure(lines), out)
    print(f"Wrote {out}.")
    return out


def controlnets(work: Path, dataset: Path, recipe: Recipe) -> dict[str, str]:
    """Folders: the one shipped with the base, one stopped too early, and one that saw a few rows too often."""
    few: dict[str, Any]
    few = {"max_train_samples": recipe.copied_rows, "max_train_steps": recipe.copying_steps, "augment": "none"}
    kinds = {"early": {"max_train_samples": recipe.early_rows, "max_train_steps": recipe.early_steps}, "copying": few}
    for name, changes in kinds.items():
        shared = {"dataset_name": str(dataset), "cache_dir": str(work / "cache"), "output_dir": str(work / name)}
        train(make(TrainConfig, "tiny", resolution=128, cache_draws=1, **shared, **changes))
    return {"shipped": str(BASE / "controlnet")} | {name: str(work / name) for name in kinds}


def pipeline_with(painter: Pipeline, folder: str) -> Pipeline:
    """The same base with another ControlNet."""
    settings = SampleConfig(controlnet_model_name_or_path=folder)
    return dataclasses.replace(load_pipeline(settings, painter.palette), base=painter.base)


def cells(failure: Failure, split: Split, healthy: Pipeline, failing: Pipeline, settings: SampleConfig) -> list:
    """Of each example: mask, real image, painted as it should be and as it fails, uint8 [H, W, 3], and its caption."""
    wrong, told = dataclasses.replace(settings, **failure.settings), []
    for row in range(EXAMPLES):
        (image, mask), caption = visualize.read_pair(split, row), split[row].caption
        good = generate(healthy, mask[None], [caption], [row], settings)[0]
        bad = generate(failing, mask[None], ["" if failure.without_text else caption], [row], wrong)[0]
        told.append(((colorize(mask, split.palette), image, good, bad), caption))
    return told


def figure(lines: list) -> Figure:
    """A failure a row, its examples side by side."""
    images = [[image for shown, _ in line for image in shown] for line in lines]
    below = [[text for _, caption in line for text in ("", caption, "", "")] for line in lines]
    names = [failure.name for failure in FAILURES]
    return visualize.grid(images, HEADS * EXAMPLES, names, below, 1.28)
