"""Images scored while they are made: painted again where they do not obey their mask, or dropped in the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from segcn.data import visualize
from segcn.data.dataset import to_image
from segcn.data.files import read_image
from segcn.data.importers.palettes import is_dataset
from segcn.data.masks import colorize, read_mask, resize_mask
from segcn.data.metadata import read_split
from segcn.data.palette import IGNORE, Palette
from segcn.data.transforms import Draw, apply, boxes
from segcn.generate import manifest
from segcn.generate.conditions import Controls
from segcn.generate.config import GenerateConfig
from segcn.generate.manifest import records_of
from segcn.models.segmenter import Segmenter, SegmenterConfig, load_segmenter, predict, shared_folder, train_segmenter
from segcn.utils.errors import UserError
from segcn.utils.io import one_at_a_time

SHOWN = 3  # images of each kind in vetting.png


@dataclass(frozen=True)
class Filter:
    """Who judges, and what is asked for."""

    segmenter: Segmenter
    min_miou: float  # below it an image is painted again; 0: never
    max_attempts: int
    ignore_disagreement: bool

    def see(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Images, uint8 [H, W, 3] of any size, as class ids, uint8 [H, W]; 255 where the segmenter does not look.

        It sees them the way it was trained: made square as its `fit` says, at its resolution.
        """
        side, fit = self.segmenter.settings["resolution"], self.segmenter.settings.get("fit", SegmenterConfig.fit)
        squares = [_square(image, side, fit) for image in images]
        found = predict(self.segmenter, to_image(torch.stack(squares))).numpy()
        return [_unsquared(ids, image.shape[:2], fit) for ids, image in zip(found, images, strict=True)]

    def score(self, seen: np.ndarray, mask: np.ndarray) -> float:
        """mIoU of one image: the mean over the classes of its mask; 1 where nothing is labelled.

        seen, mask: class ids, uint8 [H, W]; pixels that are 255 in either are left out.
        """
        classes, judged = self.segmenter.num_classes, (mask != IGNORE) & (seen != IGNORE)
        pairs = mask[judged].astype(np.int64) * classes + seen[judged]
        confusion = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
        asked, both = confusion.sum(1), confusion.diagonal()
        iou = both[asked > 0] / (asked + confusion.sum(0) - both)[asked > 0]
        return round(float(iou.mean()), 4) if len(iou) else 1.0


@dataclass
class Generated:
    """An image, uint8 [H, W, 3], the mask to write beside it, uint8 [H, W], and what its attempts scored."""

    image: np.ndarray
    mask: np.ndarray
    attempt: int = 0
    kept: bool = True
    scores: list[float] = field(default_factory=list)
    ignored: float = 0.0  # share of the pixels that --ignore_disagreement took out of the mask


class Verdict(NamedTuple):
    """What the manifest says of an image that was scored."""

    image: int
    kept: bool
    miou: float
    attempts: int
    ignored: float


class Tried(NamedTuple):
    """The best attempt so far."""

    score: float
    attempt: int
    image: np.ndarray
    seen: np.ndarray


def generate_filtered(
    paint: Callable[[list[int], int], list[np.ndarray]], masks: Sequence[np.ndarray], vetter: Filter | None
) -> list[Generated]:
    """Paint an image for each mask, those that fail again with other noise, and keep the best of each.

    paint(which, attempt): images of the masks of these numbers. One that fails to the last is not kept.
    """
    left = list(range(len(masks)))
    if vetter is None:
        return [Generated(image, mask) for image, mask in zip(paint(left, 0), masks, strict=True)]
    best: dict[int, Tried] = {}
    scores: list[list[float]] = [[] for _ in masks]
    for attempt in range(vetter.max_attempts):
        images = paint(left, attempt)
        for one, image, seen in zip(left, images, vetter.see(images), strict=True):
            score = vetter.score(seen, masks[one])
            scores[one].append(score)
            if one not in best or score > best[one].score:
                best[one] = Tried(score, attempt, image, seen)
        left = [one for one in left if best[one].score < vetter.min_miou]
        if not left:
            break
    return [_scored(best[one], scores[one], mask, vetter) for one, mask in enumerate(masks)]


def _scored(best: Tried, scores: list[float], mask: np.ndarray, vetter: Filter) -> Generated:
    """The best image, its mask without what the segmenter sees otherwise where that is asked for."""
    kept = best.score >= vetter.min_miou
    if not (kept and vetter.ignore_disagreement):
        return Generated(best.image, mask, best.attempt, kept, scores)
    wrong = (best.seen != mask) & (best.seen != IGNORE) & (mask != IGNORE)
    ignored = round(float(wrong.mean()), 4)
    return Generated(best.image, np.where(wrong, np.uint8(IGNORE), mask), best.attempt, kept, scores, ignored)


def open_filter(config: GenerateConfig, controls: Controls, log: Callable[[str], None]) -> Filter | None:
    """Load the segmenter that the flags ask for, or train it on the real images; None where they ask for none.

    UserError where there are no real images, or the segmenter knows other classes.
    """
    if config.min_miou is None and not config.ignore_disagreement:
        return None
    folder = Path(config.segmenter) if config.segmenter else _trained(config, controls, log)
    segmenter = load_segmenter(folder)
    if Palette.load(folder / "palette.json").fingerprint != controls.palette.fingerprint:
        raise UserError(f"--segmenter {folder}: it was trained with another palette than that of the masks")
    return Filter(segmenter, config.min_miou or 0.0, config.max_attempts, config.ignore_disagreement)


def _trained(config: GenerateConfig, controls: Controls, log: Callable[[str], None]) -> Path:
    """The folder of a segmenter of the train split, where `segcn evaluate` finds it too; one process trains it."""
    if not is_dataset(Path(config.controls)):
        raise UserError(
            f"--controls {config.controls} holds masks alone, and no real images to train a segmenter on: give a"
            " trained one by --segmenter DIR"
        )
    train, shape = read_split(config.controls, "train"), controls.read(0, 0, "")[0].shape
    side = max(shape) if config.fit == "pad" else min(shape)
    settings = SegmenterConfig(resolution=side, fit=config.fit)
    folder = shared_folder(Path(config.output_dir).absolute().parent / "cache", train, settings)
    with one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        train_segmenter(train, settings, folder, log)
    return folder


def verdicts_of(out: Path) -> list[Verdict]:
    """Of every image of a finished set that was scored."""
    scored = (record for record in records_of(out) if "miou" in record)
    return [Verdict(one["image"], one["kept"], one["miou"], len(one["scores"]), one["ignored"]) for one in scored]


def draw_filtering(out: Path, job: manifest.Job, verdicts: Sequence[Verdict], palette: Palette) -> Figure:
    """The best, median and rejected images of a finished set: mask, image, and the mask's borders in it."""
    kept = sorted((one for one in verdicts if one.kept), key=lambda one: (-one.miou, one.image))
    dropped = sorted((one for one in verdicts if not one.kept), key=lambda one: (one.miou, one.image))
    middle = max(SHOWN, (len(kept) - SHOWN) // 2)  # none of the best once more
    kinds = {"best": kept[:SHOWN], "median": kept[middle : middle + SHOWN], "rejected": dropped[:SHOWN]}
    kinds = {kind: some for kind, some in kinds.items() if some}
    strips = [[_strip(out, job, one, palette) for one in some] for some in kinds.values()]
    texts = [[_score_line(one) for one in some] for some in kinds.values()]
    with matplotlib.rc_context(visualize.STYLE):
        return visualize.grid(strips, left=list(kinds), below=texts, width=3.6)


def _score_line(verdict: Verdict) -> str:
    tries = f", the best of {verdict.attempts}" if verdict.attempts > 1 else ""
    return f"image {verdict.image}: mIoU {verdict.miou:.2f}{tries}"


def _strip(out: Path, job: manifest.Job, verdict: Verdict, palette: Palette) -> np.ndarray:
    image_name, mask_name = job.pair(verdict.image, verdict.kept)
    image, mask = read_image(out / image_name), read_mask(out / mask_name, palette)
    return visualize.side_by_side(colorize(mask, palette), image, visualize.outlined(image, mask))


def _square(image: np.ndarray, side: int, fit: str) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [3, side, side]."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return apply(pixels, torch.zeros((1, *pixels.shape[1:]), dtype=torch.uint8), Draw(fit=fit), side)[0]


def _unsquared(ids: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """What was seen in the square, uint8 [R, R], in the image's own (height, width); 255 where it was cut off."""
    source, frame = boxes(Draw(fit=fit), size, len(ids))
    seen = np.full(size, IGNORE, np.uint8)
    source.cut(seen)[:] = resize_mask(np.ascontiguousarray(frame.cut(ids)), source[2:])
    return seen
