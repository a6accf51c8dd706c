"""The landscapes, the built-in sample set: rendered images with exact masks and captions.

Only the caption holds season and time of day, and only the mask holds the layout.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcn.data.captions import SEASONS, TIMES, article_of, listed
from segcn.data.palette import Label, Palette
from segcn.samples.landscapes.rendering import Renderer
from segcn.samples.landscapes.shapes import (
    CLOUD,
    HOUSE,
    MOUNTAIN,
    SUN,
    TREE,
    cloud,
    ground,
    house,
    mountains,
    rasterize,
    sun,
    tree,
    water_and_roads,
)
from segcn.samples.writer import SampleKind, write_set
from segcn.utils.paths import OUTPUTS, ROOT

REFERENCE = 128  # resolution at which visibility is decided, px
SMALLEST = 30  # an object showing less is left out, px at the reference resolution
SHOWING = 0.45  # an object of which a smaller share shows is left out
LANDSCAPE_CLASSES = (
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
SAMPLE_ROWS = {"train": 1024, "test": 128}
HELD_OUT_SEED = 7373  # of no sample set, of no training, and of no rows on which settings were chosen


@dataclass(frozen=True)
class Landscape:
    """An image (uint8 [R, R, 3]), its class ids (uint8 [R, R]), its caption, and the season and time in it."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    season: str
    time: str


def draw(seed, index, resolution=128):
    """Render landscape `index` of the set `seed`; a pure function of its arguments."""
    season = SEASONS[int(np.random.default_rng([seed, index, 0]).integers(len(SEASONS)))]
    time = list(TIMES)[int(np.random.default_rng([seed, index, 1]).integers(len(TIMES)))]
    horizon, things = compose(np.random.default_rng([seed, index, 2]))
    renderer = Renderer(np.random.default_rng([seed, index, 3]), resolution, horizon, season, time)
    return Landscape(*renderer.render(things), describe(season, time, contents(things)), season, time)


def compose(rng):
    """Draw a layout: (horizon, things, the far ones first), each of them visibly there."""
    horizon = rng.uniform(0.35, 0.70)
    clouds = [cloud(rng, horizon) for _ in range(rng.choice(4, p=[0.3, 0.32, 0.24, 0.14]))]
    meadow = ground(rng, horizon)
    on_ground = water_and_roads(rng, horizon, meadow)
    things = sun(rng, horizon) + clouds + mountains(rng, horizon) + [meadow] + on_ground
    things += houses_and_trees(rng, horizon, on_ground)
    while gone := hidden(things):
        things = [thing for index, thing in enumerate(things) if index not in gone]
    return horizon, things


def houses_and_trees(rng, horizon, obstacles):
    """Houses of one color and trees of one kind, the far ones first."""
    taken = []
    color = str(rng.choice(["red", "blue", "yellow", "white"]))
    kind = str(rng.choice(["pine", "round"]))
    houses, trees = rng.choice(3, p=[0.4, 0.42, 0.18]), rng.choice(6, p=[0.25, 0.15, 0.2, 0.18, 0.12, 0.1])
    places = free_places(rng, horizon, obstacles, taken, houses, lambda near: 0.08 + 0.07 * near)
    things = [house(rng, x, y, 0.18 + 0.17 * near, color) for x, y, near in places]
    places = free_places(rng, horizon, obstacles, taken, trees, lambda near: 0.04 + 0.04 * near)
    things += [tree(rng, x, y, 0.19 + 0.19 * near, kind) for x, y, near in places]
    return sorted(things, key=lambda thing: thing.about["y"])


def free_places(rng, horizon, obstacles, taken, count, half_of):
    """Up to `count` free places (x, y, nearness in 0..1), with room half_of(nearness) on either side."""
    places = []
    for _ in range(14 * count):
        near = rng.uniform(0, 1)
        x, y = rng.uniform(0.03, 0.97), horizon + 0.05 + near * (0.97 - horizon - 0.05)
        half = half_of(near)
        if is_dry(x, y, 0.75 * half, obstacles) and all(abs(x - tx) > half + th for tx, th in taken):
            places.append((x, y, near))
            taken.append((x, half))
        if len(places) == count:
            break
    return places


def is_dry(x, y, half, things):
    """Whether nothing that reaches `half` to each side of (x, y) is in water or on a road."""
    for thing in things:
        if thing.kind == "lake":
            low, high = thing.polygons[0].min(axis=0), thing.polygons[0].max(axis=0)
            if low[0] - half < x < high[0] + half and low[1] - 0.01 < y < high[1] + 0.02:
                return False
        else:
            middle, width = (np.interp(y, thing.about["y"], thing.about[name]) for name in ("middle", "half"))
            if abs(x - middle) < half + width:
                return False
    return True


def hidden(things):
    """The things, in drawing order, of which too little shows, as a set of indices."""
    owners = np.full((REFERENCE, REFERENCE), -1, np.int16)
    areas = np.zeros(len(things), int)
    for index, thing in enumerate(things):
        raster = rasterize(thing.polygons, REFERENCE)
        if raster is not None:
            box, _, center = raster
            owners[box][center] = index
            areas[index] = center.sum()
    shown = np.bincount(owners[owners >= 0], minlength=len(things))
    share = np.where([thing.label in (CLOUD, SUN, TREE, HOUSE) for thing in things], SHOWING * areas, 0)
    return set(np.flatnonzero((shown < SMALLEST) | (shown < share)).tolist())


def contents(things):
    """What the caption names, in the order it is named."""
    labels = [thing.label for thing in things]
    kinds = {thing.label: thing.kind for thing in things}
    named = ["clouds"] if CLOUD in labels else []
    named += ["mountains"] if MOUNTAIN in labels else []
    named += [f"a {thing.kind}" for thing in things if thing.kind in ("lake", "river", "road")]
    tree_name = "pine tree" if kinds.get(TREE) == "pine" else "leafy tree"
    for label, name in ((TREE, tree_name), (HOUSE, f"{kinds.get(HOUSE)} house")):
        if label in labels:
            named.append(f"a {name}" if labels.count(label) == 1 else f"{name}s")
    return named


def describe(season, time, named):
    """The caption: "a winter landscape at dusk with mountains, a lake and a red house"."""
    caption = f"{article_of(season)} {season} landscape {TIMES[time]}"
    return f"{caption} with {listed(named)}" if named else caption


def palette() -> Palette:
    """The palette of the nine classes."""
    return Palette(tuple(Label(*entry) for entry in LANDSCAPE_CLASSES))


def write_landscapes(
    out: str | Path, count: int, resolution: int = 128, seed: int = 0, test: int | None = None, workers: int = 0
) -> Path:
    """Write `count` pairs to `out`, or with `test` to out/train and out/test, as `writer.write_set` does."""
    kind = SampleKind("landscapes", palette(), {"train": draw, "test": draw})
    return write_set(out, kind, count, resolution, seed, test, workers)


def sample_landscapes() -> Path:
    """data/landscapes, written if it is not there."""
    return write_landscapes(ROOT / "data" / "landscapes", SAMPLE_ROWS["train"], test=SAMPLE_ROWS["test"])


def held_out_landscapes(rows: int) -> Path:
    """Landscapes of a seed that no training used, written below outputs/ if they are not there."""
    return write_landscapes(OUTPUTS / "held_out" / f"landscapes-{rows}-{HELD_OUT_SEED}", rows, seed=HELD_OUT_SEED)
