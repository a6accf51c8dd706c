"""The one engine of every evaluation: look at each image once, count, and turn the counts into numbers with intervals.

Every network sees one image at a time, on one core: no number depends on the batch size or on the number of threads or
processes, and what was computed of an image is kept on disk and used after an interruption."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from segcn.data.colors import to_lab
from segcn.data.dataset import PairedDataset, Sample, to_uint8
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette
from segcn.data.transforms import AUGMENTS
from segcn.evaluate import bootstrap, metrics
from segcn.evaluate.provenance import (
    RECAPTIONED,
    filtering_of,
    generation_of,
    recaption_command,
    starts_from_images,
    unlike,
)
from segcn.models.base import one_core, weights_digest
from segcn.models.features import Extractor, Reader
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, open_rewarding, predict
from segcn.utils.errors import UserError
from segcn.utils.io import Process, write_text, write_whole
from segcn.utils.progress import Progress

Log = Callable[[str], None]
Metric = Callable[[np.ndarray, np.ndarray], float]  # (predicted, mask), class ids, uint8 [R, R] -> a number
Seen = dict[str, torch.Tensor]  # what was counted of each image of a set
FORMAT = 1  # of what is kept; a change of any number here needs another one
SUMMED, JOINED = ("confusion",), ("crops", "crop_classes")  # over the images of a group; the rest is a line an image
LEAST_CROP = 16  # pixels of a class in an image, below which it is not cut out
LEAST_CROPS = 10  # of a class in each set, below which no distance is taken between them
ROWS = {
    "real": "real (ceiling)",
    "reconstructions": "reconstructions",
    "synthetic": "with mask",
    "without_classes": "captions without classes",
    "other_captions": "another row's caption",
    "floor": "no mask (floor)",
}
REWARD_LOOKS_AT = ("real", "synthetic")  # looked at by the segmenter that rewarded, too
EVERYTHING = ("faithfulness", "features", "crops", "text")
PARTS_OF = {
    "real": EVERYTHING,
    "synthetic": EVERYTHING,
    "reconstructions": ("faithfulness",),
    "without_classes": ("faithfulness", "text"),
    "other_captions": ("faithfulness", "text"),
    "floor": ("faithfulness", "text"),
    "train": ("features",),
}
PARTED = 0.02  # of the ceiling, by which the segmenter that rewarded a training and the one that scores may differ
METRICS_FILE, DRAWS_FILE = "metrics.json", "draws.safetensors"


@dataclass(frozen=True)
class Observer:
    """The networks that look at images, and where their findings are kept."""

    segmenter: AnySegmenter
    extractor: Extractor | None = None
    readers: tuple[Reader, ...] = ()
    cache: Path | None = None  # none: nothing is kept
    batch_size: int = 32  # images that are read and kept together; no result depends on it
    process: Process = Process()  # looks at its share of the groups
    others: tuple[Extractor, ...] = ()  # of features for more distances, between real and generated images alone

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that change with any network."""
        extractor = self.extractor.key if self.extractor else None
        networks = [FORMAT, weights_digest(self.segmenter), self.segmenter.settings, extractor]
        others = [[other.name, other.key] for other in self.others]
        return _digest([*networks, [reader.key for reader in self.readers], torch.__version__, *others])

    def observe(self, split: Split, parts: tuple[str, ...] = EVERYTHING, log: Log = print) -> Seen:
        """What is counted of this process's share of the rows, in their order; UserError names a broken row.

        parts: of faithfulness, features, crops and text; colors are always counted.
        """
        pairs, size = self.pairs(split), self.batch_size
        groups = [range(first, min(first + size, len(pairs))) for first in range(0, len(pairs), size)]
        progress, found = Progress("images seen", len(pairs), log), []
        with one_core() as cores, ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for number in self.process.share(len(groups)):
                found.append(self._group(pairs, groups[number], parts, pool))
                progress(groups[number][-1] + 1)
        return _merged(found)

    def pairs(self, split: Split) -> PairedDataset:
        """The rows as the segmenter sees them: made square as its `fit` says, at its resolution, not augmented."""
        settings = self.segmenter.settings
        resolution = settings.get("resolution", SegmenterConfig.resolution)
        return PairedDataset(split, resolution, AUGMENTS["none"], 0, settings.get("fit", SegmenterConfig.fit))

    def _group(self, pairs: PairedDataset, rows: range, parts: tuple[str, ...], pool: ThreadPoolExecutor) -> Seen:
        path = (
            self.cache / "seen" / f"{self.key}-{_rows_digest(pairs, rows, parts)}.safetensors" if self.cache else None
        )
        if path and path.is_file():
            with suppress(SafetensorError):  # cut short by a full disk or a power failure: counted again
                return load_file(path)
        lines = pool.map(lambda row: self.look(pairs.sample(row, 0), parts), rows)
        seen = _merged([{name: value if name in SUMMED + JOINED else value[None] for name, value in line.items()}
                        for line in lines])  # fmt: skip
        if path:
            kept = {name: tensor.contiguous() for name, tensor in seen.items()}
            write_whole(path, lambda file: save_file(kept, file))
        return seen

    @torch.no_grad()
    def look(self, sample: Sample, parts: tuple[str, ...]) -> Seen:
        """Everything that is counted of one image."""
        image, mask, classes, extractor = sample.image[None], sample.mask, self.segmenter.num_classes, self.extractor
        seen = {"color": torch.from_numpy(to_lab(to_uint8(sample.image)).mean((0, 1))), "mask": _mask_key(mask)}
        if "faithfulness" in parts:
            predicted, sure = self.predict(image)
            labelled = mask != IGNORE
            seen["confusion"] = metrics.confusion_matrix(predicted, mask, classes)
            seen["pixels"] = metrics.class_counts(seen["confusion"])
            seen["edges"] = metrics.boundary_counts(predicted, mask, classes)
            seen["bins"] = metrics.confidence_bins(sure[labelled], (predicted == mask)[labelled])
        if "features" in parts:
            assert extractor is not None
            seen["features"] = extractor.extract(image)[0].float().cpu()
        if "crops" in parts:
            assert extractor is not None
            seen["crop_classes"], cut = crops(sample.image, mask)
            none = torch.zeros(0, len(seen["features"]))
            seen["crops"] = extractor.extract(torch.stack(cut)).float().cpu() if cut else none
            seen |= {f"features of {other.name}": other.extract(image)[0].float().cpu() for other in self.others}
        if "text" in parts and self.readers:
            values = [value for reader in self.readers for value in reader.read(image, sample.caption)]
            seen["text"] = torch.tensor(values, dtype=torch.float64)
        return seen

    @torch.no_grad()
    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image [1, 3, R, R] in [-1, 1] -> class ids, uint8 [R, R], and the probability of each, [R, R]."""
        logits = self.segmenter(image.to(next(self.segmenter.parameters()).device))
        sure, predicted = logits.float().softmax(1).max(1)
        return predicted[0].byte().cpu(), sure[0].cpu()

    def mean_metrics(self, split: Split, functions: dict[str, Metric]) -> dict[str, bootstrap.Estimate]:
        """The mean of each function of (predicted, mask) over the images of a set."""
        values = []
        with one_core():
            for sample in self.pairs(split):
                pair = self.predict(sample.image[None])[0].numpy(), sample.mask.numpy()
                values.append([float(function(*pair)) for function in functions.values()])
        columns = torch.tensor(values, dtype=torch.float64).T
        return {name: bootstrap.mean(column) for name, column in zip(functions, columns, strict=True)}


def crops(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each class of an image [3, R, R] on gray, its box stretched to a square of R / 2: ids [C], [3, S, S] each."""
    classes, cut, size = [], [], max(32, image.shape[-1] // 2)
    for label in mask.unique().tolist():
        own = mask == label
        if label == IGNORE or own.sum() < LEAST_CROP:
            continue
        (top, bottom), (left, right) = (torch.where(own.any(axis))[0][[0, -1]].tolist() for axis in (1, 0))
        box = torch.where(own, image, 0.0)[:, top : bottom + 1, left : right + 1]
        cut.append(F.interpolate(box[None], (size, size), mode="bilinear", antialias=True)[0])
        classes.append(label)
    return torch.tensor(classes, dtype=torch.int64), cut


def _mask_key(mask: torch.Tensor) -> torch.Tensor:
    """A number that two different masks do not share, int64."""
    digest = hashlib.blake2b(mask.contiguous().numpy().tobytes(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def _rows_digest(pairs: PairedDataset, rows: range, parts: tuple[str, ...]) -> str:
    """Changes with any byte of the rows' files, their captions and what is counted."""
    records = [pairs.split[row] for row in rows]
    files = []
    for path in (path for record in records for path in (record.image, record.mask)):
        with suppress(OSError):  # reading the row names it
            files.append(hashlib.sha256(path.read_bytes()).hexdigest())
    captions = [record.captions for record in records]
    return _digest([parts, pairs.resolution, pairs.fit, pairs.split.palette.fingerprint, files, captions])


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _merged(found: list[Seen]) -> Seen:
    """Groups one after the other."""
    columns = {name: [one[name] for one in found] for name in (found[0] if found else ())}
    return {name: torch.stack(each).sum(0) if name in SUMMED else torch.cat(each) for name, each in columns.items()}


# mIoU and features alone, for validation while training, benchmarks and sweeps


def faithfulness(split: Split, segmenter: AnySegmenter) -> dict:
    """miou, images and per_class of what the segmenter finds in the images of a set; see `metrics.IOU_RULE`.

    A class that no mask holds is None in `per_class`; `miou` is None where no class is there.
    """
    seen = Observer(segmenter).observe(split, ("faithfulness",), lambda line: None)
    return _scores(seen["confusion"], len(split), split.palette)


def measure(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], segmenter: AnySegmenter, palette: Palette) -> dict:
    """As `faithfulness`, of batches of (images [B, 3, R, R] in [-1, 1], masks uint8 [B, R, R])."""
    classes, count = segmenter.num_classes, 0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for images, masks in pairs:
        confusion += metrics.confusion_matrix(predict(segmenter, images), masks, classes)
        count += len(images)
    return _scores(confusion, count, palette)


def _scores(confusion: torch.Tensor, images: int, palette: Palette) -> dict:
    each = metrics.iou(confusion)
    values = [None if value != value else value for value in each.tolist()]
    return {
        "miou": None if each.isnan().all() else each.nanmean().item(),
        "images": images,
        "per_class": {label.name: values[label.id] for label in palette.labels if not label.ignore},
    }


def features(split: Split, segmenter: AnySegmenter, extractor: Extractor) -> torch.Tensor:
    """The features of each image as the segmenter would see it, float64 [N, D]; UserError below two images."""
    check_count(split)
    return Observer(segmenter, extractor).observe(split, ("features",), lambda line: None)["features"].double()


def check_count(split: Split) -> None:
    """UserError where a set is too small for a distance."""
    if len(split) < 2:
        raise UserError(f"{split.metadata}: the distances need at least 2 images, found {len(split)}")


def check_classes(split: Split, palette: Palette, segmenter: AnySegmenter) -> None:
    """UserError where the palette is another one, or the segmenter knows another number of classes."""
    if split.palette.fingerprint != palette.fingerprint:
        raise UserError(f"{split.folder}: its palette differs from the one of the real images, {palette.names}")
    if split.palette.num_classes != segmenter.num_classes:
        raise UserError(
            f"{split.folder}: expected the {segmenter.num_classes} classes of the segmenter, found "
            f"{split.palette.num_classes}; train a segmenter on this data set"
        )


# The whole evaluation


@dataclass(frozen=True)
class Evaluation:
    """The numbers, and what they were computed from."""

    metrics: dict  # fit for JSON; `intervals` mirrors it with [low, high] of each number that has them
    splits: dict[str, Split]
    seen: dict[str, Seen]
    observer: Observer
    draws: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)  # by the place of the number

    def write(self, folder: str | Path) -> Path:
        """Store metrics.json and, for comparisons, the bootstrap's draws; each completely or not at all."""
        folder = Path(folder)
        write_metrics(self.metrics, folder / METRICS_FILE)
        write_whole(folder / DRAWS_FILE, lambda file: save_file(self.draws, file))
        return folder / METRICS_FILE


def evaluate(
    real: Split,
    synthetic: Split,
    observer: Observer,
    floor: Split | None = None,
    reconstructions: Split | None = None,
    train: Split | None = None,
    log: Log = print,
    metrics: dict[str, Metric] | None = None,
    without_classes: Split | None = None,
    other_captions: Split | None = None,
) -> Evaluation:
    """Measure agreement with masks and captions, distances from real images, memorization, and colors.

    real: held-out images, which give the ceiling; synthetic: generated from masks; floor: generated without them;
    reconstructions: real images through the autoencoder alone; train: the rows that the ControlNet learned from, to
    look for copies. metrics: functions of your own by name, each of (predicted, mask), class ids uint8 [R, R], one
    image at a time; their means are reported with intervals. without_classes, other_captions: generated from the masks
    and captions that name no class, or those of other rows. UserError names the row of a broken image, or says which
    palettes or classes differ.
    """
    given = {"real": real, "reconstructions": reconstructions, "synthetic": synthetic,
             "without_classes": without_classes, "other_captions": other_captions, "floor": floor, "train": train,
    }  # fmt: skip
    splits = {name: split for name, split in given.items() if split is not None}
    for name, split in splits.items():
        check_classes(split, real.palette, observer.segmenter)
        if name in ("real", "synthetic"):
            check_count(split)
    seen = {name: observer.observe(split, PARTS_OF[name], log) for name, split in splits.items()}
    rewarding = rewarding_observer(synthetic, observer)
    by_reward = (
        {name: rewarding.observe(splits[name], ("faithfulness",), log) for name in REWARD_LOOKS_AT} if rewarding else {}
    )
    custom = {name: observer.mean_metrics(splits[name], metrics) for name in ROWS if name in splits and metrics}
    with one_core():
        nest = estimates(splits, seen, observer, by_reward) | {"custom": custom}
    found = bootstrap.values_of(nest) | {"intervals": bootstrap.intervals_of(nest)}
    for name, scores in found["faithfulness"].items():
        value = "-" if scores["miou"] is None else f"{scores['miou']:.3f}"
        log(f"evaluate: {ROWS[name]}: mIoU {value} on {scores['images']} images")
    return Evaluation(found, splits, seen, observer, bootstrap.draws_of(nest))


def estimates(splits: dict[str, Split], seen: dict[str, Seen], observer: Observer, by_reward: dict[str, Seen]) -> dict:
    """Every number as an Estimate, nested as in metrics.json.

    by_reward: what the segmenter that rewarded the training saw in the real and the generated images, where it is kept.
    """
    palette, scored = splits["real"].palette, [name for name in ROWS if name in splits]
    near, far, extractor = seen["real"], seen["synthetic"], observer.extractor
    assert extractor is not None
    found = {name: metrics.mask_scores(seen[name]["pixels"], seen[name]["edges"], palette) for name in scored}
    shares = {name: {kind: bootstrap.ratio(found[name][kind], found["real"][kind]) for kind in ("miou", "boundary_f")}
              for name in scored[1:]}  # fmt: skip
    frechet = metrics.frechet_estimate(near["features"], far["features"])
    distance = {
        "extractor": extractor.name, "names": list(extractor.names), "features": near["features"].shape[1],
        "images_real": len(near["features"]), "images_synthetic": len(far["features"]),
        "resolution": observer.segmenter.settings["resolution"], "frechet_draws": len(frechet.draws),
        "compared_in_pairs": metrics.COMPARED, "frechet_distance": frechet,
        "kernel_distance": metrics.kernel_distance(near["features"], far["features"]),
    } | metrics.neighborhoods(near["features"], far["features"])  # fmt: skip
    by_others = {one: [seen[name][f"features of {one.name}"] for name in ("real", "synthetic")]
                 for one in observer.others}  # fmt: skip
    copies = None
    if "train" in seen:
        vectors = (seen[name]["features"] for name in ("synthetic", "real", "train"))
        copies = {"extractor": extractor.name, "from_images": starts_from_images(splits["synthetic"])}
        copies |= metrics.memorization(*vectors)
    scorer = weights_digest(observer.segmenter)
    few = metrics.few_images(min(len(splits["real"]), len(splits["synthetic"])), distance["features"], extractor.name)
    result: dict[str, Any] = {
        "segmenter": observer.segmenter.settings,
        "sets": {name: {"folder": str(split.folder), "images": len(split), "fingerprint": split.fingerprint}
                 for name, split in splits.items()},
        "settings": {"bootstrap_draws": bootstrap.DRAWS, "level": bootstrap.LEVEL, "least_crop": LEAST_CROP},
        "notes": {"iou": metrics.IOU_RULE},
        "classes": list(palette.class_names),
        "faithfulness": found,
        "of_ceiling": shares["synthetic"]["miou"],
        "shares_of_ceiling": shares,
        "shares_of_with_mask": _shares_of_with_mask(seen, found, palette),
        "confusion": {name: seen[name]["confusion"].tolist() for name in scored},
        "reliability": {name: metrics.calibration(seen[name]["bins"]) for name in scored},
        "distance": distance,
        "distances": {one.name: _other_distances(one, *both) for one, both in by_others.items()},
        "crops": _crop_distances(near, far, palette, extractor),
        "text": _text_scores(seen, observer.readers),
        "color": _color_shift(near, far),
        "copies": copies,
        "filtering": filtering_of(splits["synthetic"], far["pixels"][:, :, 0] > 0, scorer),
        "reward": _reward(splits["synthetic"], scorer, shares["synthetic"]["miou"], by_reward, palette),
        "not_given": {name: recaption_command(splits, name) for name in RECAPTIONED if name not in splits},
    }  # fmt: skip
    result["recaptioned"] = {name: unlike(splits, name) for name in RECAPTIONED if name in splits}
    fews = [few, *(metrics.few_images(min(map(len, both)), both[0].shape[1], one.name)
                   for one, both in by_others.items() if not one.of_clip)]  # fmt: skip
    return result | {"warnings": [*filter(None, fews), *_doubts(result)]}


def _other_distances(extractor: Extractor, near: torch.Tensor, far: torch.Tensor) -> dict[str, bootstrap.Estimate]:
    """CMMD of CLIP's features, else the Fréchet and the kernel distance and the rest, by the titles to report."""
    if extractor.of_clip:
        return {"CMMD": metrics.cmmd(near, far)}
    both = {"FD": metrics.frechet_estimate(near, far), "KD": metrics.kernel_distance(near, far)}
    return both | metrics.neighborhoods(near, far)


def rewarding_observer(synthetic: Split, observer: Observer) -> Observer | None:
    """Looks with the segmenter that rewarded the training; None: none did, it is gone, or it scores."""
    made, settings = generation_of(synthetic), observer.segmenter.settings
    digest = made.get("reward_segmenter_weights")
    if digest in (None, weights_digest(observer.segmenter)) or not made.get("controlnet"):
        return None
    look = (settings.get("resolution", SegmenterConfig.resolution), settings.get("fit", SegmenterConfig.fit))
    found = open_rewarding(made["controlnet"], made.get("pretrained_model_name_or_path", ""), synthetic.palette, *look)
    if found is None or weights_digest(found) != digest:
        return None
    return replace(observer, segmenter=found, extractor=None, readers=(), others=())


def _reward(
    split: Split, scorer: str, of_ceiling: bootstrap.Estimate, by_reward: dict[str, Seen], palette: Palette
) -> dict | None:
    """The share of the ceiling by the segmenter that rewarded the training, beside the score; None: none rewarded."""
    digest, share = generation_of(split).get("reward_segmenter_weights"), None
    if digest is None:
        return None
    if by_reward:
        near, far = (metrics.mask_scores(one["pixels"], one["edges"], palette)["miou"] for one in by_reward.values())
        share = bootstrap.ratio(far, near)
    return {"weights": digest, "scored_by": scorer, "of_ceiling_by_reward": share, "of_ceiling": of_ceiling}


def _shares_of_with_mask(seen: dict[str, Seen], found: dict, palette: Palette) -> dict:
    """mIoU and boundary F of images with other captions as a share of those with the captions as they are.

    Where the latter hold an image of each of these masks, these alone are compared, image by image.
    """
    shares, usual = {}, seen["synthetic"]
    for name in RECAPTIONED:
        if name in seen:
            rows, scores = _partners(usual, seen[name]), found["synthetic"]
            if rows is not None:
                scores = metrics.mask_scores(usual["pixels"][rows], usual["edges"][rows], palette)
            shares[name] = {kind: bootstrap.ratio(found[name][kind], scores[kind]) for kind in ("miou", "boundary_f")}
    return shares


def _partners(candidates: Seen, others: Seen) -> list[int] | None:
    """For each image of `others` the row of one with the same mask; None where any has none."""
    rows = {key: row for row, key in reversed(list(enumerate(candidates["mask"].tolist())))}
    found = [rows[key] for key in others["mask"].tolist() if key in rows]
    return found if len(found) == len(others["mask"]) else None


def _doubts(found: dict) -> Iterator[str]:
    """Why a number is better than it may be believed, a sentence each."""
    filtering, scored = found["filtering"], found["faithfulness"]["synthetic"]["miou"].value
    if filtering and filtering["segmenter_weights"] == filtering["scored_by"]:
        yield (
            "The segmenter that scores these images has filtered them: the scores flatter them. Leave out --segmenter, "
            "or give another one."
        )
    reward = found["reward"]
    if reward and reward["weights"] == reward["scored_by"]:
        yield (
            "The segmenter that scores these images has rewarded the training of their ControlNet: the scores flatter "
            "them. Leave out --segmenter, or give another one."
        )
    elif reward and reward["of_ceiling_by_reward"]:
        share, by_reward = (reward[key].value for key in ("of_ceiling", "of_ceiling_by_reward"))
        if None not in (share, by_reward) and abs(by_reward - share) > PARTED:
            yield (
                f"By the segmenter that rewarded the training the images reach {by_reward:.3f} of the ceiling, by the "
                f"one that scores {share:.3f}: they part by more than {PARTED}. The ControlNet may have learnt to "
                "please the former; the score alone counts."
            )
    for name, reasons in found["recaptioned"].items():
        if reasons:
            yield f"The row {ROWS[name]!r} may mislead: {'; '.join(reasons)}."
    share = found["of_ceiling"].value
    if share is not None and (share >= 1 or scored > 0.995):
        reason = "they were filtered by a segmenter, and " if filtering else ""
        yield (
            f"The images reach {share:.3f} of the ceiling (mIoU {scored:.3f}): {reason}they are as easy to segment as "
            "real ones, or easier, for want of variety, noise and hard cases. This is no sign of quality: look at the "
            "images, and at recall and coverage."
        )


def _crop_distances(near: Seen, far: Seen, palette: Palette, extractor: Extractor) -> dict:
    """The kernel distance between what each class looks like, cut out, in real and in generated images."""
    per_class, counts = {}, {}
    for label in palette.labels:
        if label.ignore:
            continue
        one, other = (seen["crops"][seen["crop_classes"] == label.id] for seen in (near, far))
        counts[label.name] = [len(one), len(other)]
        enough = min(counts[label.name]) >= LEAST_CROPS
        per_class[label.name] = metrics.kernel_distance(one, other) if enough else None
    return {"extractor": extractor.name, "kernel_distance": per_class, "crops": counts}


def _text_scores(seen: dict[str, Seen], readers: tuple[Reader, ...]) -> dict:
    """The mean score of each reader on each set; empty without readers."""
    names = [name for reader in readers for name in reader.names]
    sets = {name: one["text"] for name, one in seen.items() if "text" in one}
    return {name: {title: bootstrap.mean(values[:, place]) for place, title in enumerate(names)}
            for name, values in sets.items()}  # fmt: skip


def _color_shift(real: Seen, synthetic: Seen) -> dict:
    """Of images of the same masks where each generated one has a real partner, else of all images."""
    partners = _partners(real, synthetic)
    shift = metrics.color_estimate(real["color"], synthetic["color"], partners)
    return {"same_masks": partners is not None} | shift


def write_metrics(found: dict, path: str | Path) -> None:
    """Store metrics as JSON, completely or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), json.dumps(found, indent=1, allow_nan=False) + "\n")
