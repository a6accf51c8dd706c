"""Are the generated images any good: do they obey their masks, how far are they from real ones, are they copies?"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from segcn import bootstrap
from segcn.atomic import write_text, write_whole
from segcn.augment import AUGMENTS
from segcn.bootstrap import Estimate, draws_of, intervals_of, values_of
from segcn.copies import copying
from segcn.dataset import PairedDataset
from segcn.devices import one_core
from segcn.distance import COMPARED, few_images, frechet_estimate, kernel_distance, neighbourhoods
from segcn.errors import UserError
from segcn.faithfulness import calibration, confusion, faithfulness_of, iou, pixels_of
from segcn.features import Extractor
from segcn.labels import Palette
from segcn.observe import LEAST_CROP, Observer, Seen
from segcn.records import Split
from segcn.segmenter import AnySegmenter, Segmenter, SegmenterConfig, predict

ROWS = {
    "real": "real (ceiling)",
    "reconstructions": "reconstructions",
    "synthetic": "with mask",
    "floor": "no mask (floor)",
}
PARTS_OF = {"real": ("faithfulness", "features", "crops", "text"), "train": ("features",)}
PARTS_OF |= {"synthetic": PARTS_OF["real"], "reconstructions": ("faithfulness",), "floor": ("faithfulness", "text")}
LEAST_CROPS = 10  # of a class in each set, below which no distance is taken between them
METRICS, DRAWS = "metrics.json", "draws.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """What came out, and what it was taken from."""

    metrics: dict  # fit for JSON; `intervals` mirrors it with [low, high] of each number that has them
    splits: dict[str, Split]
    seen: dict[str, Seen]
    observer: Observer
    draws: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)  # by the place of the number

    def write(self, folder: str | Path) -> Path:
        """Store metrics.json and, for comparisons, the bootstrap's draws; each whole or not at all."""
        folder = Path(folder)
        write_metrics(self.metrics, folder / METRICS)
        write_whole(folder / DRAWS, lambda file: save_file(self.draws, file))
        return folder / METRICS


def evaluate(
    real: Split,
    synthetic: Split,
    observer: Observer,
    floor: Split | None = None,
    reconstructions: Split | None = None,
    train: Split | None = None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Measure faithfulness to the masks, distance from the real images, what captions ask for, copies and colours.

    real: held-out images, which give the ceiling; synthetic: painted from masks; floor: painted without,
    beside the masks that they were not shown; reconstructions: real images through the VAE alone; train: the rows that
    the painter learned from, to look for copies. Every image is seen the way the segmenter was trained: made square as
    its `fit` says, resized once to its resolution. UserError names the row of a broken image, or says which palettes or
    classes differ.
    """
    given = {"real": real, "reconstructions": reconstructions, "synthetic": synthetic, "floor": floor, "train": train}
    splits = {name: split for name, split in given.items() if split is not None}
    for name, split in splits.items():
        check_classes(split, real.palette, observer.segmenter)
        if len(split) < 2 and name in ("real", "synthetic"):
            raise UserError(f"{split.metadata}: the distances need at least 2 images, found {len(split)}")
    seen = {name: observer.observe(split, PARTS_OF[name], log) for name, split in splits.items()}
    with one_core():
        told = measured(splits, seen, observer)
    metrics = values_of(told) | {"intervals": intervals_of(told)}
    for name, found in metrics["faithfulness"].items():
        value = "-" if found["miou"] is None else f"{found['miou']:.3f}"
        log(f"evaluate: {ROWS[name]}: mIoU {value} on {found['images']} images")
    return Evaluation(metrics, splits, seen, observer, draws_of(told))


def measured(splits: dict[str, Split], seen: dict[str, Seen], observer: Observer) -> dict:
    """Every number as an Estimate, in the nest that metrics.json has."""
    palette, judged = splits["real"].palette, [name for name in ROWS if name in splits]
    found = {name: faithfulness_of(seen[name], palette) for name in judged}
    shares = {name: {kind: bootstrap.ratio(found[name][kind], found["real"][kind]) for kind in ("miou", "boundary_f")}
              for name in judged[1:]}  # fmt: skip
    told: dict[str, Any] = {
        "segmenter": observer.segmenter.settings,
        "sets": {name: {"folder": str(split.folder), "images": len(split), "fingerprint": split.fingerprint}
                 for name, split in splits.items()},
        "settings": {"bootstrap_draws": bootstrap.DRAWS, "level": bootstrap.LEVEL, "least_crop": LEAST_CROP},
        "classes": list(palette.class_names),
        "faithfulness": found,
        "of_ceiling": shares["synthetic"]["miou"],
        "shares_of_ceiling": shares,
        "confusion": {name: seen[name]["confusion"].tolist() for name in judged},
        "reliability": {name: calibration(seen[name]["bins"]) for name in judged},
        "distance": distance_of(seen["real"]["features"], seen["synthetic"]["features"], observer),
        "crops": crop_distances(seen["real"], seen["synthetic"], palette, observer.extractor),
        "text": text_of(seen, observer),
        "colour": colour_of(seen["real"], seen["synthetic"]),
        "copies": None,
    }  # fmt: skip
    if "train" in seen:
        features = (seen[name]["features"] for name in ("synthetic", "real", "train"))
        told["copies"] = {"extractor": observer.extractor.name} | copying(*features)
    count, width = min(len(splits["real"]), len(splits["synthetic"])), told["distance"]["features"]
    return told | {"warnings": list(filter(None, [few_images(count, width, observer.extractor.name)]))}


def distance_of(near: torch.Tensor, far: torch.Tensor, observer: Observer) -> dict:
    """Distances between features of real and generated images, [N, D] and [M, D], with every setting."""
    frechet = frechet_estimate(near, far)
    return {
        "extractor": observer.extractor.name,
        "names": list(observer.extractor.names),
        "features": near.shape[1],
        "images_real": len(near),
        "images_synthetic": len(far),
        "resolution": observer.segmenter.settings["resolution"],
        "frechet_draws": len(frechet.draws),
        "compared_in_pairs": COMPARED,
        "frechet_distance": frechet,
        "kernel_distance": kernel_distance(near, far),
    } | neighbourhoods(near, far)


def crop_distances(near: Seen, far: Seen, palette: Palette, extractor: Extractor) -> dict:
    """The kernel distance between what each class looks like, cut out, in real and in generated images."""
    per_class, counts = {}, {}
    for label in palette.labels:
        if label.ignore:
            continue
        one, other = (seen["crops"][seen["crop_classes"] == label.id] for seen in (near, far))
        counts[label.name] = [len(one), len(other)]
        enough = min(counts[label.name]) >= LEAST_CROPS
        per_class[label.name] = kernel_distance(one, other) if enough else None
    return {"extractor": extractor.name, "kernel_distance": per_class, "crops": counts}


def text_of(seen: dict[str, Seen], observer: Observer) -> dict:
    """Of each set the mean of what each reader says; empty without readers."""
    names = [name for reader in observer.readers for name in reader.names]
    sets = {name: one["text"] for name, one in seen.items() if "text" in one}
    return {name: {title: bootstrap.mean(values[:, place]) for place, title in enumerate(names)}
            for name, values in sets.items()}  # fmt: skip


def colour_of(real: Seen, synthetic: Seen) -> dict:
    """Mean CIE L*a*b* of the generated images less that of the real ones, of the same masks where they have them."""
    rows = {key: row for row, key in reversed(list(enumerate(real["mask"].tolist())))}
    partners = [rows.get(key) for key in synthetic["mask"].tolist()]
    same = None not in partners
    if same:
        apart = synthetic["colour"] - real["colour"][partners]
        found = bootstrap.bootstrap(len(apart), lambda weights: _shift(weights @ apart / len(apart)))
    else:
        both = [_means(one["colour"], name) for one, name in ((real, "real"), (synthetic, "synthetic"))]
        values, draws = (_shift(far - near) for near, far in zip(*both, strict=True))
        found = {name: Estimate(float(values[name][0]), draws[name]) for name in draws}
    return {"same_masks": same} | found


def _means(colours: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.cat([weights @ colours / len(colours) for weights in bootstrap.resamples(len(colours), name)])
    return colours.mean(0, keepdim=True), drawn


def _shift(apart: torch.Tensor) -> dict[str, torch.Tensor]:
    """Lab differences [b, 3] and their norm, which is delta E of CIE 1976."""
    return dict(zip("Lab", apart.unbind(1), strict=True)) | {"delta_e": apart.norm(dim=1)}


def faithfulness(split: Split, segmenter: Segmenter, batch_size: int = 32) -> dict:
    """mIoU of what the segmenter sees in the images against the masks beside them.

    Intersections and unions are counted over the whole set; 255 is left out; the mean is over the classes
    that occur in the masks, the others are None in `per_class`. `miou` is None where no class occurs; `images` counts.
    """
    return measure(_batches(split, segmenter, batch_size), segmenter, split.palette)


def measure(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], segmenter: Segmenter, palette: Palette) -> dict:
    """As `faithfulness`, of batches of (images [B, 3, R, R] in [-1, 1], masks uint8 [B, R, R])."""
    classes, count = segmenter.num_classes, 0
    confused = torch.zeros(classes, classes, dtype=torch.int64)
    for images, masks in pairs:
        confused += confusion(predict(segmenter, images), masks, classes)
        count += len(images)
    each = iou(pixels_of(confused))
    values = [None if value != value else value for value in each.tolist()]
    labels = [label for label in palette.labels if not label.ignore]
    return {
        "miou": None if each.isnan().all() else each.nanmean().item(),
        "images": count,
        "per_class": {label.name: values[label.id] for label in labels},
    }


@torch.no_grad()
def features(split: Split, segmenter: Segmenter, extractor: Extractor, batch_size: int = 32) -> torch.Tensor:
    """The features of each image as the segmenter would see it, float64 [N, D]; UserError below two images."""
    if len(split) < 2:
        raise UserError(f"{split.metadata}: the distances need at least 2 images, found {len(split)}")
    return torch.cat([extractor.extract(images).cpu() for images, _ in _batches(split, segmenter, batch_size)]).double()


def _batches(split: Split, segmenter: Segmenter, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images [B, 3, R, R] in [-1, 1], masks uint8 [B, R, R]), the rows in order, not augmented."""
    settings = segmenter.settings
    fit, resolution = settings.get("fit", SegmenterConfig.fit), settings.get("resolution", SegmenterConfig.resolution)
    pairs = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit)
    for start in range(0, len(pairs), batch_size):
        batch = [pairs.sample(row, 0) for row in range(start, min(start + batch_size, len(pairs)))]
        yield torch.stack([sample.image for sample in batch]), torch.stack([sample.mask for sample in batch])


def check_classes(split: Split, palette: Palette, segmenter: AnySegmenter) -> None:
    """UserError where the palette is another one, or the segmenter knows another number of classes."""
    if split.palette.fingerprint != palette.fingerprint:
        raise UserError(f"{split.folder}: its palette differs from the one of the real images, {palette.names}")
    if split.palette.num_classes != segmenter.num_classes:
        raise UserError(
            f"{split.folder}: expected the {segmenter.num_classes} classes of the segmenter, found "
            f"{split.palette.num_classes}; train a segmenter on this data set"
        )


def write_metrics(metrics: dict, path: str | Path) -> None:
    """Store the metrics as JSON, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), json.dumps(metrics, indent=1, allow_nan=False) + "\n")
