"""One look at each image: what a segmenter finds in it, its features, its colors; kept on disk, image by image alone.

Every network sees one image at a time, on one core: no number depends on the size of a batch, on the number of threads
or on that of processes, and what was seen before a kill is used after it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from segcn.data.dataset import PairedDataset, Sample, to_uint8
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette
from segcn.data.transforms import AUGMENTS
from segcn.evaluate import bootstrap
from segcn.evaluate.bootstrap import Estimate, draws_of, intervals_of, values_of
from segcn.evaluate.metrics import (
    COMPARED,
    boundary_counts,
    calibration,
    confidence_bins,
    confusion,
    copying,
    faithfulness_of,
    few_images,
    frechet_estimate,
    iou,
    kernel_distance,
    neighbourhoods,
    pixels_of,
    to_lab,
)
from segcn.models.base import one_core, weights_digest
from segcn.models.features import Extractor, Reader
from segcn.models.segmenter import AnySegmenter, Segmenter, SegmenterConfig, predict
from segcn.utils.errors import UserError
from segcn.utils.io import write_text, write_whole
from segcn.utils.progress import Progress

# --- observe: One look at each image: what a segmenter finds in it, its features, its colors; kept on disk, image by image alone.
#
# Every network sees one image at a time, on one core: no number depends on the size of a batch, on the number of threads
# or on that of processes, and what was seen before a kill is used after it.

FORMAT = 1  # of what is kept; a change of any number here needs another one
SUMMED, JOINED = ("confusion",), ("crops", "crop_classes")  # over the images of a group; the rest is a line an image
LEAST_CROP = 16  # pixels of a class in an image, below which it is not cut out
PARTS = ("faithfulness", "features", "crops", "text")
Seen = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Observer:
    """What looks at images, and where it keeps what it saw."""

    segmenter: AnySegmenter
    extractor: Extractor
    readers: tuple[Reader, ...] = ()
    cache: Path | None = None  # none: nothing is kept
    batch_size: int = 32  # images that are read and kept together; no result depends on it
    process: tuple[int, int] = (0, 1)  # of so many: each looks at its share of the groups

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that change with anything that looks."""
        told = [FORMAT, weights_digest(self.segmenter), self.segmenter.settings, self.extractor.key]
        text = json.dumps([*told, [reader.key for reader in self.readers], torch.__version__])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def observe(self, split: Split, parts: tuple[str, ...] = PARTS, log: Callable[[str], None] = print) -> Seen:
        """What was seen of this process's share of the rows, in their order; UserError names a broken row.

        parts: of PARTS; colors are always seen.
        """
        pairs = self.pairs(split)
        rank, processes = self.process
        groups = [range(first, min(first + self.batch_size, len(pairs)))
                  for first in range(0, len(pairs), self.batch_size)]  # fmt: skip
        told, found = Progress("images seen", len(pairs), log), []
        with one_core() as cores, ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for rows in groups[rank::processes]:
                found.append(self._group(pairs, rows, parts, pool))
                told(rows[-1] + 1)
        return merged(found)

    def pairs(self, split: Split) -> PairedDataset:
        """The rows as they are seen, not augmented."""
        settings = self.segmenter.settings
        return PairedDataset(split, settings["resolution"], AUGMENTS["none"], 0, settings.get("fit", "crop"))

    def _group(self, pairs: PairedDataset, rows: range, parts: tuple[str, ...], pool: ThreadPoolExecutor) -> Seen:
        path = self.cache / "seen" / f"{self.key}-{digest(pairs, rows, parts)}.safetensors" if self.cache else None
        if path and path.is_file():
            with suppress(SafetensorError):  # cut short by a full disk or a power failure: looked at again
                return load_file(path)
        seen = merged([_line(one) for one in pool.map(lambda row: self.look(pairs.sample(row, 0), parts), rows)])
        if path:
            kept = {name: tensor.contiguous() for name, tensor in seen.items()}
            write_whole(path, lambda file: save_file(kept, file))
        return seen

    @torch.no_grad()
    def look(self, sample: Sample, parts: tuple[str, ...]) -> Seen:
        """Everything that is counted of one image."""
        image, wanted = sample.image[None], sample.mask
        seen = {"color": torch.from_numpy(to_lab(to_uint8(sample.image)).mean((0, 1))), "mask": mask_key(wanted)}
        if "faithfulness" in parts:
            seen |= self._judge(image, wanted)
        if "features" in parts:
            seen["features"] = self.extractor.extract(image)[0].float().cpu()
        if "crops" in parts:
            classes, cut = crops(sample.image, wanted)
            seen["crop_classes"] = classes
            none = torch.zeros(0, len(seen["features"]))
            seen["crops"] = self.extractor.extract(torch.stack(cut)).float().cpu() if cut else none
        if "text" in parts and self.readers:
            told = [value for reader in self.readers for value in reader.read(image, sample.caption)]
            seen["text"] = torch.tensor(told, dtype=torch.float64)
        return seen

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image [1, 3, R, R] in [-1, 1] -> class ids, uint8 [R, R], and the probability of each, [R, R]."""
        logits = self.segmenter(image.to(next(self.segmenter.parameters()).device))
        sure, found = logits.float().softmax(1).max(1)
        return found[0].byte().cpu(), sure[0].cpu()

    def _judge(self, image: torch.Tensor, wanted: torch.Tensor) -> Seen:
        count = self.segmenter.num_classes
        found, sure = self.predict(image)
        confused, labelled = confusion(found, wanted, count), wanted != IGNORE
        bins = confidence_bins(sure[labelled], (found == wanted)[labelled])
        edges = boundary_counts(found, wanted, count)
        return {"confusion": confused, "pixels": pixels_of(confused), "edges": edges, "bins": bins}


def crops(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each class of an image [3, R, R] on grey, its box stretched to a square of R / 2: ids [C], [3, S, S] each."""
    classes, cut, side = [], [], max(32, image.shape[-1] // 2)
    for label in mask.unique().tolist():
        own = mask == label
        if label == IGNORE or own.sum() < LEAST_CROP:
            continue
        (top, bottom), (left, right) = (torch.where(own.any(axis))[0][[0, -1]].tolist() for axis in (1, 0))
        box = torch.where(own, image, 0.0)[:, top : bottom + 1, left : right + 1]
        cut.append(F.interpolate(box[None], (side, side), mode="bilinear", antialias=True)[0])
        classes.append(label)
    return torch.tensor(classes, dtype=torch.int64), cut


def mask_key(mask: torch.Tensor) -> torch.Tensor:
    """A number that two different masks do not share, int64."""
    digest = hashlib.blake2b(mask.contiguous().numpy().tobytes(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def digest(pairs: PairedDataset, rows: range, parts: tuple[str, ...]) -> str:
    """16 hexadecimal digits that change with any byte of the rows' files, their captions and what is looked for."""
    found = hashlib.sha256(json.dumps([parts, pairs.resolution, pairs.fit, pairs.split.palette.fingerprint]).encode())
    for row in rows:
        record = pairs.split[row]
        for path in (record.image, record.mask):
            with suppress(OSError):  # the look at it names the row
                found.update(hashlib.sha256(path.read_bytes()).digest())
        found.update(repr(record.captions).encode())
    return found.hexdigest()[:16]


def merged(found: list[Seen]) -> Seen:
    """Groups one after the other."""
    names = found[0] if found else ()
    return {
        name: torch.stack([one[name] for one in found]).sum(0)
        if name in SUMMED
        else torch.cat([one[name] for one in found])
        for name in names
    }


def _line(seen: Seen) -> Seen:
    """One image as a group of its own."""
    return {name: value if name in SUMMED + JOINED else value[None] for name, value in seen.items()}


# --- evaluate: Are the generated images any good: do they obey their masks, how far are they from real ones, are they copies?

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
    """Measure faithfulness to the masks, distance from the real images, what captions ask for, copies and colors.

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
        "text": text_metrics(seen, observer),
        "color": color_metrics(seen["real"], seen["synthetic"]),
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


def text_metrics(seen: dict[str, Seen], observer: Observer) -> dict:
    """Of each set the mean of what each reader says; empty without readers."""
    names = [name for reader in observer.readers for name in reader.names]
    sets = {name: one["text"] for name, one in seen.items() if "text" in one}
    return {name: {title: bootstrap.mean(values[:, place]) for place, title in enumerate(names)}
            for name, values in sets.items()}  # fmt: skip


def color_metrics(real: Seen, synthetic: Seen) -> dict:
    """Mean CIE L*a*b* of the generated images less that of the real ones, of the same masks where they have them."""
    rows = {key: row for row, key in reversed(list(enumerate(real["mask"].tolist())))}
    partners = [rows.get(key) for key in synthetic["mask"].tolist()]
    same = None not in partners
    if same:
        apart = synthetic["color"] - real["color"][partners]
        found = bootstrap.bootstrap(len(apart), lambda weights: _shift(weights @ apart / len(apart)))
    else:
        both = [_means(one["color"], name) for one, name in ((real, "real"), (synthetic, "synthetic"))]
        values, draws = (_shift(far - near) for near, far in zip(*both, strict=True))
        found = {name: Estimate(float(values[name][0]), draws[name]) for name in draws}
    return {"same_masks": same} | found


def _means(colors: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.cat([weights @ colors / len(colors) for weights in bootstrap.resamples(len(colors), name)])
    return colors.mean(0, keepdim=True), drawn


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
