"""Painted landscapes with exact masks and captions: the built-in sample set.

Season and time of day are told by the caption alone and the layout by the mask alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcn.captions import SEASONS, TIMES, article_of, listed
from segcn.labels import Palette
from segcn.samples.painting import paint_scene
from segcn.samples.scene import compose
from segcn.samples.things import CLOUD, HOUSE, MOUNTAIN, TREE
from segcn.samples.writing import Kind, SampleSet, as_palette, write_set

PALETTE = (
    (0, "sky", (70, 130, 180)),
    (1, "cloud", (220, 220, 220)),
    (2, "sun", (255, 210, 40)),
    (3, "mountain", (122, 98, 88)),
    (4, "grass", (80, 160, 70)),
    (5, "water", (30, 90, 200)),
    (6, "road", (90, 90, 90)),
    (7, "tree", (20, 85, 40)),
    (8, "house", (195, 60, 50)),
)


@dataclass(frozen=True)
class Landscape:
    """A picture (uint8 [R, R, 3]), its class ids (uint8 [R, R]) and what its caption says."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    season: str
    time: str


def contents(things):
    """What the caption names, in the order it is named."""
    labels = [thing.label for thing in things]
    kinds = {thing.label: thing.kind for thing in things}
    named = ["clouds"] if CLOUD in labels else []
    named += ["mountains"] if MOUNTAIN in labels else []
    named += [f"a {thing.kind}" for thing in things if thing.kind in ("lake", "river", "road")]
    if TREE in labels:
        tree = "pine tree" if kinds[TREE] == "pine" else "leafy tree"
        named.append(f"a {tree}" if labels.count(TREE) == 1 else f"{tree}s")
    if HOUSE in labels:
        named.append(f"a {kinds[HOUSE]} house" if labels.count(HOUSE) == 1 else f"{kinds[HOUSE]} houses")
    return named


def describe(season, time, named):
    """The caption: "a winter landscape at dusk with mountains, a lake and a red house"."""
    caption = f"{article_of(season)} {season} landscape {TIMES[time]}"
    return f"{caption} with {listed(named)}" if named else caption


def paint(seed, index, resolution=128):
    """Paint landscape `index` of the set `seed`; a pure function of its arguments."""
    season = SEASONS[int(np.random.default_rng([seed, index, 0]).integers(len(SEASONS)))]
    time = list(TIMES)[int(np.random.default_rng([seed, index, 1]).integers(len(TIMES)))]
    horizon, things = compose(np.random.default_rng([seed, index, 2]))
    rng = np.random.default_rng([seed, index, 3])
    image, mask = paint_scene(rng, resolution, horizon, things, season, time)
    return Landscape(image, mask, describe(season, time, contents(things)), season, time)


def palette() -> Palette:
    """The palette of the nine classes."""
    return as_palette(PALETTE)


def write_landscapes(
    out: str | Path,
    count: int,
    resolution: int = 128,
    seed: int = 0,
    test: int | None = None,
    workers: int | None = None,
) -> Path:
    """Write `count` pairs to `out`, or with `test` to out/train and out/test; returns `out`.

    A finished set of the same settings is reused and an unfinished one painted again; UserError if the
    settings make no sense or the folder holds something else.
    """
    kind = Kind("landscapes", palette(), lambda split: paint)
    return write_set(out, SampleSet(count, resolution, seed, test, kind.name), kind, workers)
