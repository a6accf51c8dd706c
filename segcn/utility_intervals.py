"""IoU over seeds and test images, and 95 % intervals of it and of differences, by bootstrap."""

import numpy as np

COVERED = (2.5, 97.5)  # percentiles: an interval of 95 %
METHOD = (
    "95 % percentile intervals of a bootstrap that draws test images and, independently, seeds, each with replacement"
    " (the pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1(2), 386-411); of differences the"
    " same images and seeds are drawn for both sides. They tell what another sample of test images and other seeds of"
    " the segmenter might have given; which rows were drawn, and the one ControlNet of each fraction, are taken as they"
    " are."
)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersections and unions [..., 2 or 3, K] -> IoU [..., K], NaN where a class is neither found nor there."""
    both, either = counts[..., 0, :].astype(float), counts[..., 1, :].astype(float)
    return np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)


def with_mean(per_class: np.ndarray) -> np.ndarray:
    """IoU [..., K] -> [..., K + 1]: the mean over the classes that have one comes last."""
    known = ~np.isnan(per_class)
    mean = np.nansum(per_class, -1) / known.sum(-1).clip(1)
    return np.concatenate([per_class, np.where(known.any(-1), mean, np.nan)[..., None]], -1)


def estimate(counts: np.ndarray) -> np.ndarray:
    """What was found, float [K + 1]: IoU over all test images, averaged over seeds; the mean over classes comes last.

    counts: int [seeds, images, 2 or 3, K], the intersections and unions of each image; only classes that occur.
    """
    return with_mean(iou(counts.sum(1))).mean(0)


def resampled(counts: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """`estimate` of each resample of images and seeds, float [resamples, K + 1].

    The same number of seeds and images and the same `seed` give the same draws: what two arms differ by is paired.
    """
    seeds, images = counts.shape[:2]
    drawn = np.random.default_rng(seed)
    of_images = drawn.multinomial(images, np.full(images, 1 / images), resamples)  # how often each was drawn [B, N]
    of_seeds = drawn.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # [B, S]
    summed = of_images.astype(float) @ counts.reshape(seeds, images, -1).astype(float)  # [S, B, 2 K or 3 K]
    found = with_mean(iou(summed.reshape(seeds, resamples, *counts.shape[2:])))  # [S, B, K + 1]
    return np.einsum("bs,sbk->bk", of_seeds, found)


def interval(resamples: np.ndarray) -> np.ndarray:
    """Lower and upper end, float [2, K + 1], of what `resampled` gives, or of the difference of two such.

    Resamples in which a class is NaN are left out of its interval.
    """
    return np.nanpercentile(resamples, COVERED, axis=0)
