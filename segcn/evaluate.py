"""Are the generated images any good: do they obey their masks, and how far are they from real ones?"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torchmetrics.classification import MulticlassJaccardIndex

from segcn.atomic import write_text
from segcn.augment import AUGMENTS
from segcn.config import EvaluateConfig
from segcn.dataset import PairedDataset
from segcn.distance import (
    KERNEL_SUBSETS,
    find_inception,
    frechet_distance,
    inception_features,
    kernel_distance,
)
from segcn.errors import UserError
from segcn.labels import IGNORE, Palette
from segcn.records import Split, read_image, read_named_split, read_split
from segcn.segmenter import Segmenter, SegmenterConfig, load_segmenter, predict, shared_folder, train_segmenter

ROWS = {
    "real": "real (ceiling)",
    "reconstructions": "reconstructions",
    "synthetic": "with mask",
    "floor": "no mask (floor)",
}
WIDEST = 100  # characters a line of the table


def evaluate(
    real: Split,
    synthetic: Split,
    segmenter: Segmenter,
    floor: Split | None = None,
    reconstructions: Split | None = None,
    batch_size: int = 32,
    inception: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Measure faithfulness to the masks and distance from the real images; returns metrics fit for JSON.

    real: held-out images, which give the ceiling; synthetic: painted from masks; floor: painted without,
    beside the masks that they were not shown; reconstructions: real images through the VAE alone. Every image is seen
    the way the segmenter was trained: made square as its `fit` says, resized once to its resolution.
    inception: weights for FID and KID (see `find_inception`); without them the segmenter's features are used.
    UserError names the row of a broken image, or says which palettes or classes differ.
    """
    splits = {"real": real, "reconstructions": reconstructions, "synthetic": synthetic, "floor": floor}
    splits = {name: split for name, split in splits.items() if split is not None}
    for split in splits.values():
        check_classes(split, real.palette, segmenter)
    measured = {}
    for name, split in splits.items():
        measured[name] = faithfulness(split, segmenter, batch_size)
        log(f"evaluate: {ROWS[name]}: mIoU {_number(measured[name]['miou'])} on {len(split)} images")
    return {
        "segmenter": segmenter.settings,
        "faithfulness": measured,
        "of_ceiling": _ratio(measured["synthetic"]["miou"], measured["real"]["miou"]),
        "distance": distance(real, synthetic, segmenter, batch_size, inception),
    }


def evaluate_folders(config: EvaluateConfig, log: Callable[[str], None] = print) -> dict:
    """`segcn evaluate`: read the data sets, load or train the segmenter, measure, and write the metrics as JSON."""
    real, synthetic = read_named_split(config.real, "test"), read_split(config.synthetic)
    output = Path(config.output) if config.output else Path(config.synthetic).absolute().parent / "metrics.json"
    resolution = config.resolution or _side(synthetic, config.fit)
    segmenter = _segmenter_for(config, real, resolution, output.parent / "cache", log)
    others = [read_split(folder) if folder else None for folder in (config.floor, config.reconstructions)]
    metrics = evaluate(real, synthetic, segmenter, *others, inception=config.inception_weights, log=log)
    write_metrics(metrics, output)
    log(f"Wrote {output}.")
    return metrics


def _segmenter_for(config: EvaluateConfig, real: Split, resolution: int, cache: Path, log: Callable) -> Segmenter:
    """The one given, or one trained on the real images that are not tested on."""
    if config.segmenter:
        return load_segmenter(config.segmenter)
    train = read_split(config.real, "train")
    if train.metadata == real.metadata:
        raise UserError(
            f"--real {config.real} has no train/ and test/: the segmenter must not be trained on the images that it is "
            "tested on. Split the data set, or give a trained segmenter by --segmenter."
        )
    settings = SegmenterConfig(resolution=resolution, seed=config.seed, fit=config.fit)
    return train_segmenter(train, settings, shared_folder(cache, train, settings), log)


def faithfulness(split: Split, segmenter: Segmenter, batch_size: int = 32) -> dict:
    """mIoU of what the segmenter sees in the images against the masks beside them.

    Intersections and unions are counted over the whole set; 255 is left out; the mean is over the classes
    that occur in the masks, the others are None in `per_class`.
    """
    return measure(_batches(split, segmenter, batch_size), segmenter, split.palette)


def measure(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], segmenter: Segmenter, palette: Palette) -> dict:
    """As `faithfulness`, of batches of (images [B, 3, R, R] in [-1, 1], masks uint8 [B, R, R])."""
    alone = {"sync_on_compute": False}  # of several processes that train, one scores
    jaccard, count = MulticlassJaccardIndex(segmenter.num_classes, "none", ignore_index=IGNORE, **alone), 0
    for images, masks in pairs:
        jaccard.update(predict(segmenter, images).long(), masks.long())
        count += len(images)
    occurs = (jaccard.confmat.sum(1) > 0).tolist()
    values = jaccard.compute().tolist()
    iou = [value if wanted else None for value, wanted in zip(values, occurs, strict=True)]
    found = [value for value in iou if value is not None]
    classes = [label for label in palette.labels if not label.ignore]
    return {
        "miou": sum(found) / len(found) if found else None,
        "images": count,
        "per_class": {label.name: iou[label.id] for label in classes},
    }


def distance(
    real: Split,
    synthetic: Split,
    segmenter: Segmenter,
    batch_size: int = 32,
    inception: str | Path | None = None,
) -> dict:
    """Fréchet and kernel distance between the real and the generated images, with every setting.

    They are called fid and kid only where Inception's weights are at hand; otherwise they are taken between
    the segmenter's features, which know this data set but compare with no published number.
    """
    weights = find_inception(inception)
    extract = inception_features(weights) if weights else segmenter_features(segmenter)
    names = ("fid", "kid") if weights else ("frechet_distance", "kernel_distance")
    near, far = (features(split, segmenter, batch_size, extract) for split in (real, synthetic))
    mean, deviation, subset_size = kernel_distance(near, far)
    return {
        "extractor": "Inception v3, 2015-12-05" if weights else "segmenter features",
        "features": near.shape[1],
        "images_real": len(near),
        "images_synthetic": len(far),
        "resolution": _resolution(segmenter),
        names[0]: frechet_distance(near, far),
        f"{names[1]}_mean": mean,
        f"{names[1]}_std": deviation,
        "kernel_subsets": KERNEL_SUBSETS,
        "kernel_subset_size": subset_size,
    }


def segmenter_features(segmenter: Segmenter) -> Callable[[torch.Tensor], torch.Tensor]:
    """image [B, 3, H, W] in [-1, 1] -> the segmenter's pooled bottleneck [B, D]."""
    device = segmenter.head.weight.device
    return lambda image: segmenter.features(image.to(device)).cpu()


def table(metrics: dict) -> str:
    """The metrics as plain text, at most 100 columns wide; many classes take several blocks of lines."""
    measured = metrics["faithfulness"]
    ceiling = measured["real"]["miou"]
    names = [name for name in ROWS if name in measured]
    columns = [["", *(ROWS[name] for name in names)]]
    columns.append(["images", *(str(measured[name]["images"]) for name in names)])
    columns.append(["mIoU", *(_number(measured[name]["miou"]) for name in names)])
    columns.append(["of ceiling", *(_number(_ratio(measured[name]["miou"], ceiling)) for name in names)])
    for label in measured["real"]["per_class"]:
        columns.append([label[:12], *(_number(measured[name]["per_class"][label]) for name in names)])
    return "\n\n".join([*_blocks(columns), _distance_lines(metrics["distance"])]) + "\n"


def write_metrics(metrics: dict, path: str | Path) -> None:
    """Store the metrics as JSON, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def _batches(split: Split, segmenter: Segmenter, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images [B, 3, R, R] in [-1, 1], masks uint8 [B, R, R]), the rows in order, not augmented."""
    fit = segmenter.settings.get("fit", SegmenterConfig.fit)
    pairs = PairedDataset(split, _resolution(segmenter), AUGMENTS["none"], 0, fit)
    for start in range(0, len(pairs), batch_size):
        batch = [pairs.sample(row, 0) for row in range(start, min(start + batch_size, len(pairs)))]
        yield torch.stack([sample.image for sample in batch]), torch.stack([sample.mask for sample in batch])


@torch.no_grad()
def features(split: Split, segmenter: Segmenter, batch_size: int, extract: Callable) -> torch.Tensor:
    """What `extract` makes of each image, [N, D], row by row; UserError where there are fewer than two."""
    if len(split) < 2:
        raise UserError(f"{split.metadata}: the distances need at least 2 images, found {len(split)}")
    segmenter.eval()
    return torch.cat([extract(images) for images, _ in _batches(split, segmenter, batch_size)])


def check_classes(split: Split, palette: Palette, segmenter: Segmenter) -> None:
    """UserError where the palette is another one, or the segmenter knows another number of classes."""
    if split.palette.fingerprint != palette.fingerprint:
        raise UserError(f"{split.folder}: its palette differs from the one of the real images, {palette.names}")
    if split.palette.num_classes != segmenter.num_classes:
        raise UserError(
            f"{split.folder}: expected the {segmenter.num_classes} classes of the segmenter, found "
            f"{split.palette.num_classes}; train a segmenter on this data set"
        )


def _side(split: Split, fit: str) -> int:
    """Pixels a side of the square that was painted: what is padded was cut off again."""
    return (max if fit == "pad" else min)(read_image(split[0].image).shape[:2])


def _resolution(segmenter: Segmenter) -> int:
    return segmenter.settings.get("resolution", SegmenterConfig.resolution)


def _ratio(value: float | None, ceiling: float | None) -> float | None:
    return value / ceiling if value is not None and ceiling else None


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _blocks(columns: list[list[str]]) -> list[str]:
    """Columns of cells side by side, in as many blocks as the width asks for; the first column leads each."""
    lead, *rest = [_aligned(column, str.rjust if index else str.ljust) for index, column in enumerate(columns)]
    blocks, block = [], [lead]
    for column in rest:
        if sum(len(cells[0]) + 1 for cells in [*block, column]) > WIDEST + 1:
            blocks.append(block)
            block = [lead]
        block.append(column)
    return ["\n".join(" ".join(cells).rstrip() for cells in zip(*block, strict=True)) for block in [*blocks, block]]


def _aligned(column: list[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [justify(cell, width) for cell in column]


def _distance_lines(found: dict) -> str:
    frechet, kernel = ("FID", "KID") if "fid" in found else ("Fréchet distance", "kernel distance")
    value = found.get("fid", found.get("frechet_distance"))
    mean, deviation = (found.get(f"kid_{part}", found.get(f"kernel_distance_{part}")) for part in ("mean", "std"))
    return (
        f"{frechet} {value:.4g}, {kernel} {mean:.4g} +- {deviation:.4g}\n"
        f"({found['extractor']}, {found['images_real']} real and {found['images_synthetic']} generated images,"
        f" {found['kernel_subsets']} subsets of {found['kernel_subset_size']})"
    )
