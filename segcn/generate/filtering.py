"""Images scored while they are generated: one that does not follow its mask is regenerated, in the end dropped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from segcn.data import visualize
from segcn.data.dataset import PairedDataset, to_image, to_uint8
from segcn.data.files import read_image
from segcn.data.importers.palettes import is_dataset
from segcn.data.masks import colorize, read_mask, resize_mask
from segcn.data.metadata import read_named_split, read_row, read_split
from segcn.data.palette import IGNORE, Palette
from segcn.data.sampler import COUNTED_ROWS, class_pixels, repeat_factors
from segcn.data.transforms import AUGMENTS, Box, Draw, apply, boxes
from segcn.evaluate.metrics import confusion_matrix, iou
from segcn.generate.conditions import Conditions
from segcn.generate.config import GenerateConfig
from segcn.models.base import Base, reconstruct
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, open_segmenter, predict, segmenter_of
from segcn.utils.errors import UserError

FILTER_SEED = 7001  # of the segmenter that filters; the one that scores has --seed, 0 by default
RARE_BELOW = 0.5  # classes that a smaller share of the rows shows count as rare for --hard_first
MEASURED_REAL = 256  # real rows at most, on which --hard_first measures the segmenter
CAUSE_ROWS = 16  # real rows that are looked at where no image was kept
BASE_SHARE = 0.9  # of the real images' score, that reconstructions reach with a base that fits
SHEET_IMAGES = 3  # images of each kind in the figure


@dataclass(frozen=True)
class Filter:
    """A segmenter, and what its predictions must reach."""

    segmenter: AnySegmenter
    min_miou: float  # below it an image is generated again; 0: never
    max_attempts: int

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class ids, uint8 [H, W], of images, uint8 [H, W, 3] of any size; 255 where the segmenter sees nothing."""
        squares, places = zip(*map(self._square, images), strict=True)
        found, predicted = predict(self.segmenter, torch.stack(squares)).numpy(), []
        for ids, image, (source, frame) in zip(found, images, places, strict=True):
            predicted.append(np.full(image.shape[:2], IGNORE, np.uint8))
            source.cut(predicted[-1])[:] = resize_mask(np.ascontiguousarray(frame.cut(ids)), source[2:])
        return predicted

    def _square(self, image: np.ndarray) -> tuple[torch.Tensor, tuple[Box, Box]]:
        """An image, uint8 [H, W, 3], as in the segmenter's training: as its `fit` says, at its resolution.

        [3, S, S] in [-1, 1]; what of the image it holds, and where.
        """
        side, fit = self.segmenter.settings["resolution"], self.segmenter.settings.get("fit", SegmenterConfig.fit)
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        square = apply(pixels, torch.zeros_like(pixels[:1]), Draw(fit=fit), side)[0]
        return to_image(square), boxes(Draw(fit=fit), image.shape[:2], side)

    def confusion(self, predicted: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        """Counts as of `confusion_matrix` of class ids, uint8 [H, W]; pixels that are 255 in either are left out."""
        mask = np.where(predicted == IGNORE, predicted, mask)
        return confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(mask), self.segmenter.num_classes)

    def score(self, predicted: np.ndarray, mask: np.ndarray) -> float:
        """The mIoU of one image over the classes of its mask, uint8 [H, W]; 1 where nothing is labelled in both."""
        confusion = self.confusion(predicted, mask)
        return round(float(iou(confusion).nanmean()), 4) if confusion.any() else 1.0


@dataclass
class Generated:
    """An image, uint8 [H, W, 3], and the scores of its attempts."""

    image: np.ndarray
    attempt: int = 0
    kept: bool = True
    scores: list[float] = field(default_factory=list)


class Attempt(NamedTuple):
    """The best attempt so far."""

    score: float
    number: int
    image: np.ndarray


def generate_filtered(
    generate: Callable[[list[int], int], list[np.ndarray]], masks: Sequence[np.ndarray], criterion: Filter | None
) -> list[Generated]:
    """Generate an image for each mask; those that fail again with other noise. The best of each is returned.

    generate(which, attempt): images of the masks of these numbers. An image that fails in every attempt is not kept.
    """
    left = list(range(len(masks)))
    if criterion is None:
        return [Generated(image) for image in generate(left, 0)]
    best: dict[int, Attempt] = {}
    scores: list[list[float]] = [[] for _ in masks]
    for number in range(criterion.max_attempts):
        images = generate(left, number)
        for one, image, predicted in zip(left, images, criterion.predict(images), strict=True):
            score = criterion.score(predicted, masks[one])
            scores[one].append(score)
            if one not in best or score > best[one].score:
                best[one] = Attempt(score, number, image)
        left = [one for one in left if best[one].score < criterion.min_miou]
        if not left:
            break
    return [Generated(best[one].image, best[one].number, best[one].score >= criterion.min_miou, scores[one])
            for one in range(len(masks))]  # fmt: skip


def open_filter(config: GenerateConfig, conditions: Conditions, log: Callable[[str], None]) -> Filter | None:
    """The segmenter that the flags ask for, loaded or trained on the real images; None where they ask for none.

    It is not the one of `segcn evaluate`, which must not score what it has chosen: it has another seed. (Tried with 102
    and 1,024 rows beside a segmenter of 2,048 other rows: by the filter's own segmenter scores rose by 0.032 and 0.009
    of the ceiling more than they should, by one of another seed by 0.021 and 0.004, by one of the other half of the
    rows by 0.032 and 0.004.) UserError where there are no real images, or the segmenter has other classes.
    """
    if config.min_miou is None:
        if config.hard_first:
            raise UserError("--hard_first: the filter's segmenter says what is hard: give --min_miou 0.5 or another")
        return None
    shape = conditions.read_mask(0, 0, "")[0].shape
    side = config.resolution if config.buckets else max(shape) if config.fit == "pad" else min(shape)
    assert side is not None
    if config.segmenter:
        segmenter = open_segmenter(config.segmenter, conditions.palette, side, config.fit)
        palette = Path(config.segmenter) / "palette.json"
        if palette.is_file() and Palette.load(palette).fingerprint != conditions.palette.fingerprint:
            raise UserError(f"--segmenter {config.segmenter}: it was trained with another palette than the masks have")
    elif is_dataset(Path(config.controls)):
        settings = SegmenterConfig(
            resolution=side, fit=config.fit, seed=FILTER_SEED, architecture=config.segmenter_architecture
        )
        cache = Path(config.output_dir).absolute().parent / "cache"
        segmenter = segmenter_of(read_split(config.controls, "train"), settings, cache, log)
    else:
        raise UserError(
            f"--controls {config.controls} holds masks alone, and no real images to train a segmenter on: give a"
            " trained one by --segmenter DIR"
        )
    return Filter(segmenter, config.min_miou, config.max_attempts)


def images_of_rows(config: GenerateConfig, conditions: Conditions, criterion: Filter) -> list[int]:
    """How many images --hard_first gives each row: rows x replicates in all, in proportion to how hard its mask is.

    That is the mean of 1 - IoU over the classes of the mask (after FreeMask, arXiv:2310.15160, 3.4, and SyntheticGen,
    arXiv:2602.04749) times the repeat factor of its rarest class: what few rows show the segmenter may know by heart,
    and so not miss in them. The IoU is the segmenter's on the rows' real images; of two replicates and more each row
    gets one at least. What is left of whole numbers goes to the largest remainders. UserError where there are no real
    images.
    """
    if not is_dataset(Path(config.controls)):
        raise UserError(f"--hard_first needs real images, and --controls {config.controls} holds masks alone")
    split, files = read_named_split(config.controls, config.split), set(conditions.files)
    used = tuple(record for record in split.records if str(record.mask) in files)[: len(conditions)]
    split = replace(split, palette=conditions.palette, records=used)
    pixels, confusion = class_pixels(split), torch.zeros(1, dtype=torch.int64)
    for row in range(min(MEASURED_REAL, len(split))):
        image, mask = read_row(split, row)
        confusion = confusion + criterion.confusion(criterion.predict([image])[0], mask)
    missed = 1 - iou(confusion)
    weak = torch.where(missed.isnan(), missed.nanmean(), missed).numpy().round(3)  # machines differ in the last digits
    shown = pixels > 0
    hardness = shown @ weak / np.maximum(shown.sum(1), 1)
    return allocate(hardness * repeat_factors(pixels, RARE_BELOW), config.replicates)


def allocate(hardness: np.ndarray, replicates: int) -> list[int]:
    """Whole numbers in proportion to hardness [N], N x replicates in all; 1 at least where replicates are 2 or more."""
    hardness = np.maximum(np.nan_to_num(hardness), 1e-6)
    free, left = np.ones(len(hardness), bool), len(hardness) * replicates
    shares = left * hardness / hardness.sum()
    while replicates > 1 and (low := free & (shares < 1)).any():
        free &= ~low
        shares = np.where(free, (left - (~free).sum()) * hardness / hardness[free].sum(), 1.0)
    counts = np.floor(shares + 1e-9).astype(int)
    counts[np.argsort(-np.round(shares - counts, 9), kind="stable")[: left - counts.sum()]] += 1
    return counts.tolist()


def likely_cause(config: GenerateConfig, base: Base, criterion: Filter, scored: Sequence[dict[str, Any]]) -> str:
    """Why no image was kept: the threshold, the base or the ControlNet, by the scores of real images of these masks.

    scored: the records of the manifest that have a score.
    """
    generated = float(np.mean([record["miou"] for record in scored]))
    if not is_dataset(Path(config.controls)):
        return f"The images reach {generated:.2f} on average; real ones, to compare with, are not in --controls."
    split = read_named_split(config.controls, config.split).first(CAUSE_ROWS)
    side = config.resolution or min(read_mask(split[0].mask, split.palette).shape)
    samples = list(PairedDataset(split, side, AUGMENTS["none"], 0, config.fit))
    images, masks = torch.stack([sample.image for sample in samples]), [sample.mask.numpy() for sample in samples]

    def mean_score(some: torch.Tensor) -> float:
        predicted = criterion.predict(list(to_uint8(some)))
        return float(np.mean([criterion.score(*pair) for pair in zip(predicted, masks, strict=True)]))

    real, seen = mean_score(images), mean_score(reconstruct(base.vae, images).float().cpu())
    found = (
        f"mIoU of real images {real:.2f}, of their reconstructions by the base {seen:.2f}, generated {generated:.2f}"
    )
    if real < criterion.min_miou:
        return f"The threshold is the likely cause, no real image passes either: {found}. Lower --min_miou."
    if seen < max(criterion.min_miou, BASE_SHARE * real):
        return f"The base is the likely cause, it cannot draw these images: {found}. See segcn check {config.controls}."
    return f"The ControlNet is the likely cause, it does not follow the masks: {found}. Train it longer."


def mostly_dropped(out: Path, records: Sequence[dict[str, Any]], palette: Palette) -> list[str]:
    """The classes of which more images were dropped than kept, by up to COUNTED_ROWS of the masks.

    A segmenter that has seen a class in few rows does not find it, and drops what another one should learn from.
    """
    kept, dropped = (np.zeros(256, int) for _ in range(2))
    for record in records[:: -(-len(records) // COUNTED_ROWS) or 1]:
        mask = out / record["conditioning_image_file_name"]
        if mask.is_file():  # rejected/ can be removed
            (kept if record["kept"] else dropped)[np.unique(read_mask(mask, palette))] += 1
    return [label.name for label in palette.labels if not label.ignore and dropped[label.id] > kept[label.id]]


def draw_filtering(out: Path, scored: Iterable[dict[str, Any]], palette: Palette) -> Figure:
    """The best, median and rejected images of a set: mask, image, and the mask's outlines in the image.

    scored: the records of the manifest that have a score.
    """
    ordered = sorted(scored, key=lambda record: (-record["miou"], record["image"]))
    kept = [record for record in ordered if record["kept"]]
    dropped = sorted((one for one in ordered if not one["kept"]), key=lambda one: (one["miou"], one["image"]))
    middle = max(SHEET_IMAGES, (len(kept) - SHEET_IMAGES) // 2)  # so that none of the best is shown again
    kinds = {
        "best": kept[:SHEET_IMAGES],
        "median": kept[middle : middle + SHEET_IMAGES],
        "rejected": dropped[:SHEET_IMAGES],
    }
    kinds = {kind: records for kind, records in kinds.items() if records}

    def strip(record: dict[str, Any]) -> np.ndarray:
        image = read_image(out / record["file_name"])
        mask = read_mask(out / record["conditioning_image_file_name"], palette)
        return visualize.side_by_side(colorize(mask, palette), image, visualize.outlined(image, mask))

    def caption(record: dict[str, Any]) -> str:
        attempts = len(record["scores"])
        best_of = f", the best of {attempts}" if attempts > 1 else ""
        return f"image {record['image']}: mIoU {record['miou']:.2f}{best_of}"

    strips = [list(map(strip, records)) for records in kinds.values()]
    captions = [list(map(caption, records)) for records in kinds.values()]
    with matplotlib.rc_context(visualize.STYLE):
        return visualize.grid(strips, left=list(kinds), below=captions, width=3.6)
