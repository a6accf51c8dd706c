"""How good the embedded base is (`segcn samples measure`), and what failures look like (`segcn samples failures`)."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from segcn.data import visualize
from segcn.data.captions import SEASONS, TIMES
from segcn.data.dataset import to_image
from segcn.data.masks import colorize
from segcn.data.metadata import Split, read_named_split, read_split
from segcn.evaluate.evaluator import faithfulness, features, write_metrics
from segcn.evaluate.metrics import frechet_distance
from segcn.generate.config import GenerateConfig, SampleConfig
from segcn.generate.pipeline import Pipeline, generate, load_pipeline
from segcn.generate.writer import generate_dataset, reconstruct_dataset
from segcn.models.features import open_extractor
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, predict, segmenter_of
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

MEASURED_SEED = 4242  # of held-out landscapes: of no sample set, and not of the base's images
GRID_MASKS = 8
STEPS = 20  # of the timings
MEASURED_SETS: dict[str, dict[str, Any]] = {  # the sets that are generated from masks and captions of held-out rows
    "with_mask": {},
    "without_classes": {"without_class_words": True},
    "without_captions": {"prompt": ""},
    "captions_alone": {"without_control": True},
}
NAMES = {"real": "real (ceiling)", "reconstructions": "reconstructions", "with_mask": "with mask",
         "without_classes": "its captions without classes", "without_captions": "without a caption",
         "captions_alone": "captions alone"}  # fmt: skip
ADDED, ADDED_COUNT = "house", 20  # the class that is drawn into masks without it, and into how many of them
GROUND = ("grass", "tree", "mountain", "sky")  # what it may cover; below it must be the first of them
FOUND = 0.5  # IoU from which on it counts as found
Log = Callable[[str], None]


def measure_sample_base(config: MeasureConfig, train: Split, log: Log = print) -> dict:
    """Measure everything; writes measure.json, table.txt and grid.png, and returns the metrics.

    train: landscapes, none of them held out, on which the networks that score masks, seasons and times are trained.
    """
    held_out = write_landscapes(config.folder / "held_out", config.held_out, config.resolution, MEASURED_SEED)
    real = read_named_split(held_out, f"train[:{config.count}]")
    pipeline = open_generator(config)
    reconstructed = reconstruct_dataset(real, pipeline.base, config.folder / "reconstructions", config.resolution)
    sets = {"real": real, "reconstructions": read_split(reconstructed)}
    for name, changes in MEASURED_SETS.items():
        log(f"Generating {len(real)} images: {NAMES[name]}.")
        sets[name] = generate_set(config, real, name, pipeline, log, **changes)
    save_grid(draw_grid(config, real, pipeline), config.folder / "grid.png")
    metrics: dict[str, Any] = {"settings": dataclasses.asdict(config) | {"base_fingerprint": pipeline.base.fingerprint}}
    metrics["autoencoder"] = reconstruction_quality(real, sets["reconstructions"])
    segmenter_settings = SegmenterConfig(steps=config.segmenter_steps, resolution=config.resolution)
    segmenter = segmenter_of(train, segmenter_settings, config.folder / "cache", log)
    metrics |= mask_metrics(sets, segmenter, log)
    metrics["added"] = added_objects(config, real, pipeline, segmenter)
    recipe, folder = RecognizerRecipe(steps=config.recognizer_steps), config.folder / "recognizer"
    recognizer = train_recognizer(train, OF_LANDSCAPES, folder, recipe, log)
    metrics["recognized"] = {
        name: recognized(split, recognizer) for name, split in sets.items() if name != "without_captions"
    }
    metrics["recognized_earth"] = earth_styles(config, recipe, pipeline, log)
    metrics["seconds"] = time_generation(config, real, pipeline, log)
    write_metrics(metrics, config.folder / "measure.json")
    (config.folder / "table.txt").write_text(measure_table(metrics) + "\n", encoding="utf-8")
    log(f"\n{measure_table(metrics)}\n\nWrote measure.json, table.txt and grid.png to {config.folder}.")
    return metrics


def open_generator(config: MeasureConfig) -> Pipeline:
    """The base with the ControlNet named, or shipped with it; UserError if there is none for landscapes."""
    folder = config.controlnet_model_name_or_path or f"{config.pretrained_model_name_or_path}/controlnet"
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: expected a ControlNet, found no config.json in it")
    return load_pipeline(replace(config, controlnet_model_name_or_path=folder), palette())


def generate_set(config: MeasureConfig, real: Split, name: str, pipeline: Pipeline, log: Log, **changes: Any) -> Split:
    """Images from the masks and captions of a split, in the folder `name`; `changes`: of GenerateConfig."""
    sampling = {field.name: getattr(config, field.name) for field in dataclasses.fields(SampleConfig)}
    settings = GenerateConfig(
        **sampling, controls=str(real.folder), output_dir=str(config.folder / name), limit=len(real),
        batch_size=config.batch_size, **changes,
    )  # fmt: skip
    return read_named_split(generate_dataset(settings, pipeline, log), f"train[:{len(real)}]")


@torch.no_grad()
def reconstruction_quality(real: Split, reconstructions: Split) -> dict[str, float]:
    """PSNR in dB and SSIM (Wang et al. 2004) of the reconstructions, the means over the images."""
    metrics = {
        "psnr": PeakSignalNoiseRatio(data_range=2.0, dim=(1, 2, 3)),
        "ssim": StructuralSimilarityIndexMeasure(data_range=2.0),
    }
    for wanted, found in zip(read_images(real).split(32), read_images(reconstructions).split(32), strict=True):
        for metric in metrics.values():
            metric.update(to_pixels(found), to_pixels(wanted))
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def mask_metrics(sets: dict[str, Split], segmenter: AnySegmenter, log: Log) -> dict:
    """IoU of the classes that a segmenter finds in each set, as shares of those in real images, and the distance."""
    found, shares = {}, {}
    for name, split in sets.items():
        one = found[name] = faithfulness(split, segmenter)
        log(f"measure: {name.replace('_', ' ')}: mIoU {one['miou']:.3f} on {len(split)} images")
        ceiling = found["real"]
        shares[name] = {"mean": one["miou"] / ceiling["miou"]}
        shares[name] |= {label: one["per_class"][label] / iou if iou else None
                         for label, iou in ceiling["per_class"].items()}  # fmt: skip
    extractor = open_extractor(segmenter)
    near, far = (features(sets[name], segmenter, extractor) for name in ("real", "with_mask"))
    distance = {"extractor": extractor.name, "frechet_distance": frechet_distance(near, far)}
    return {"segmenter": segmenter.settings, "faithfulness": found, "share_of_ceiling": shares, "distance": distance}


def added_objects(config: MeasureConfig, real: Split, pipeline: Pipeline, segmenter: AnySegmenter) -> dict:
    """Into how many masks a house of another row was drawn, and in how many images it was found; captions as they are.

    It is drawn where it was, on grass; the image holds it where the segmenter's IoU of its pixels is 0.5 or more.
    """
    added, *ground = (real.palette.names.index(name) for name in (ADDED, *GROUND))
    masks = np.stack([visualize.read_pair(real, row)[1] for row in range(len(real))])
    donors = [mask == added for mask in masks if (mask == added).sum() >= 40]
    rows, places = list[int](), list[np.ndarray]()
    for row, mask in enumerate(masks):
        feet = (donor & ~np.roll(donor, -1, axis=0) for donor in donors)
        fitting = (donor for donor, foot in zip(donors, feet, strict=True)
                   if np.isin(mask[donor], ground).all() and (mask[foot] == ground[0]).mean() > 0.5)  # fmt: skip
        place = None if (mask == added).any() else next(fitting, None)
        if place is not None and len(rows) < ADDED_COUNT:
            rows.append(row)
            places.append(place)
    if not rows:
        return {"masks": 0, "found": 0}
    changed = np.stack([np.where(place, added, masks[row]) for row, place in zip(rows, places, strict=True)])
    images = generate(pipeline, changed.astype(np.uint8), [real[row].caption for row in rows], rows, config)
    seen = predict(segmenter, to_image(torch.from_numpy(images).permute(0, 3, 1, 2))).numpy() == added
    ious = [(one & place).sum() / (one | place).sum() for one, place in zip(seen, places, strict=True)]
    return {"masks": len(rows), "found": int(sum(iou >= FOUND for iou in ious)), "ious": [float(iou) for iou in ious]}


def earth_styles(config: MeasureConfig, recipe: RecognizerRecipe, pipeline: Pipeline, log: Log) -> dict | None:
    """The share of held-out tiles, and of images from their captions, with the style named; None without the maps."""
    if not config.earth_count:
        return None
    try:
        earth = write_earth(config.folder / "earth", 1024, config.resolution, test=config.earth_count)
    except UserError as error:
        log(f"The style of the Earth's tiles is left out: {error}")
        return None
    real = read_split(earth, "test")
    alone = generate_set(config, real, "earth_captions_alone", pipeline, log, without_control=True)
    sets = {"real": real, "captions_alone": alone}
    recognizer = train_recognizer(read_split(earth, "train"), OF_EARTH, config.folder / "recognizer", recipe, log)
    return {name: recognized(split, recognizer) for name, split in sets.items()}


def time_generation(config: MeasureConfig, real: Split, pipeline: Pipeline, log: Log) -> dict:
    """Seconds of one image, and of each of `config.batch_size` in one call: medians, a first call left out.

    20 steps with mask and guidance, as `config` has it otherwise. The seconds of CPU time of all threads, `cpu_...`,
    are valid on a busy machine, too.
    """
    settings = replace(config, num_inference_steps=STEPS)
    gpu = pipeline.base.unet.device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    found = {"machine": machine, "steps": STEPS, "timings": config.timings, "at_once": config.batch_size}
    found["load"] = os.getloadavg()[0]
    for name, count in (("one", 1), ("each_of_many", config.batch_size)):
        log(f"Timing {count} in one call.")
        rows = [row % len(real) for row in range(count)]
        masks = np.stack([visualize.read_pair(real, row)[1] for row in rows])
        captions, seconds, cpu_seconds = [real[row].caption for row in rows], [], []
        for _ in range(1 + config.timings):
            began, cpu_began = time.monotonic(), time.process_time()
            generate(pipeline, masks, captions, rows, settings)
            seconds.append((time.monotonic() - began) / count)
            cpu_seconds.append((time.process_time() - cpu_began) / count)
        found[name], found[f"cpu_{name}"] = statistics.median(seconds[1:]), statistics.median(cpu_seconds[1:])
    return found


def draw_grid(config: MeasureConfig, real: Split, pipeline: Pipeline) -> Figure:
    """The first masks, uncurated, in four seasons and hours: a mask in each row, a season and an hour in each column.

    Captions also name what the mask holds, as in training: what a caption leaves out is left out of the image.
    """
    starts = [describe(season, hour, []) for season, hour in zip(SEASONS, TIMES, strict=True)]
    lines, below = [], []
    for row in range(min(GRID_MASKS, len(real))):
        mask, named = visualize.read_pair(real, row)[1], "".join(real[row].caption.partition(" with ")[1:])
        captions = [start + named for start in starts]
        images = generate(pipeline, np.stack([mask] * len(captions)), captions, [row] * len(captions), config)
        lines.append([colorize(mask, real.palette), *images])
        below.append([f"...{named}", *[""] * len(captions)])
    return visualize.grid(lines, ["mask", *starts], below=below, width=2.56)


def save_grid(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG a third smaller: colors are rounded to multiples of 3, at most 1 of 255 off."""
    figure.savefig(path, dpi=100)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16)
    Image.fromarray(((pixels + 1) // 3 * 3).astype(np.uint8)).save(path, optimize=True)


def measure_table(metrics: dict) -> str:
    """Faithfulness and its share of the ceiling, what was recognized, the autoencoder, and speed."""
    scores, shares = metrics["faithfulness"], metrics["share_of_ceiling"]
    number, percent = "{:.3f}".format, "{:.1%}".format
    iou = {name: {"mean": one["miou"], **one["per_class"]} for name, one in scores.items()}
    quality, timing, distance = (metrics[name] for name in ("autoencoder", "seconds", "distance"))
    blocks = [
        _table(f"IoU, {scores['real']['images']} images each", iou, number),
        _table("share of the ceiling", {name: one for name, one in shares.items() if name != "real"}, percent),
        _table("recognized", metrics["recognized"], percent),
        _table("recognized, Earth", metrics["recognized_earth"] or {}, percent),
        f"autoencoder: PSNR {quality['psnr']:.1f} dB, SSIM {quality['ssim']:.3f}\n"
        f"a {ADDED} drawn into masks without one, captions as they are: found in {metrics['added']['found']} of "
        f"{metrics['added']['masks']} images\n"
        f"Fréchet distance of with mask to real: {distance['frechet_distance']:.4g} ({distance['extractor']})\n"
        f"{timing['steps']} steps with guidance and mask: {timing['one']:.2f} s for one image, "
        f"{timing['each_of_many']:.2f} s for each of {timing['at_once']} in one call\n"
        f"(CPU time {timing['cpu_one']:.2f} s and {timing['cpu_each_of_many']:.2f} s; {timing['machine']}; "
        f"load before it {timing['load']:.1f}; median of {timing['timings']} after a warm-up)",
    ]
    return "\n\n".join(filter(None, blocks))


def _table(title: str, rows: dict[str, dict], text: Callable[[float], str]) -> str:
    """A row for each set of images, by its name; empty where nothing was measured."""
    if not rows:
        return ""
    frame = pandas.DataFrame.from_dict({NAMES[name]: one for name, one in rows.items()}, orient="index", dtype=float)
    return frame.rename_axis(title, axis=1).to_string(float_format=text, na_rep="-")


@dataclass(frozen=True)
class FailureRecipe:
    """How long the two ControlNets that fail are trained, and on how many rows."""

    early_steps: int = 40  # too few to follow masks well
    early_rows: int = 64
    copying_steps: int = 250  # too many for so few rows
    copied_rows: int = 4


FAILURES: dict[str, tuple[dict, str, str]] = {  # settings, ControlNet, and split of its rows
    "not yet\nconverged": ({}, "early", "test"),
    "mask\nignored": ({"controlnet_conditioning_scale": 0.0}, "shipped", "test"),
    "text\nignored": ({}, "shipped", "test"),
    "color\nshift": ({"guidance_scale": 7.5, "guidance_end": 1.0}, "shipped", "test"),
    "copied": ({}, "copying", "train"),
}
EXAMPLES = 2  # rows that each failure is shown on
HEADS = ("mask", "real image", "as it should be", "as it fails")


def write_failures(out: Path, work: Path, dataset: Path, recipe: FailureRecipe = FailureRecipe()) -> Path:
    """Train the ControlNets that fail in `work` (resumable), draw every failure, and write the PNG `out`."""
    visualize.quiet()
    folders = {"shipped": str(BASE / "controlnet"), "early": str(work / "early"), "copying": str(work / "copying")}
    kinds: tuple[tuple[str, int, int, dict], ...]
    kinds = (("early", recipe.early_rows, recipe.early_steps, {}),
             ("copying", recipe.copied_rows, recipe.copying_steps, {"augment": "none"}))  # fmt: skip
    for name, count, steps, more in kinds:
        shared = {"dataset_name": str(dataset), "cache_dir": str(work / "cache"), "output_dir": folders[name]}
        sizes = {"max_train_samples": count, "max_train_steps": steps, "reward_weight": 0.0}
        train(make(TrainConfig, "tiny", resolution=128, cache_draws=1, **shared, **sizes, **more))
    splits = {name: read_split(dataset, name) for name in ("train", "test")}
    settings = make(SampleConfig, "tiny", controlnet_model_name_or_path=folders["shipped"])
    pipelines = {
        name: load_pipeline(SampleConfig(controlnet_model_name_or_path=folder), splits["test"].palette)
        for name, folder in folders.items()
    }
    lines, below = [], []
    for name, (changes, controlnet, rows) in FAILURES.items():
        split, wrong, images, texts = splits[rows], replace(settings, **changes), [], []
        for row in range(EXAMPLES):
            (image, mask), caption = visualize.read_pair(split, row), split[row].caption
            prompt = "" if name.startswith("text") else caption
            good = generate(pipelines["shipped"], mask[None], [caption], [row], settings)[0]
            bad = generate(pipelines[controlnet], mask[None], [prompt], [row], wrong)[0]
            images += [colorize(mask, split.palette), image, good, bad]
            texts += ["", caption, "", ""]
        lines.append(images)
        below.append(texts)
    save_grid(visualize.grid(lines, HEADS * EXAMPLES, list(FAILURES), below, 1.28), out)
    print(f"Wrote {out}.")
    return out
