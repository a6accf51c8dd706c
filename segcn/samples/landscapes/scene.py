"""What stands where in a landscape; nothing here knows the season or the time of day."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcn.data.captions import SEASONS, TIMES, article_of, listed
from segcn.data.palette import Palette
from segcn.samples.landscapes.rendering import render_scene
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
    rasterise,
    sun,
    tree,
    ways,
)
from segcn.samples.writer import Kind, SampleSet, as_palette, write_set
from segcn.utils.paths import OUTPUTS, ROOT

# --- samples.scene: What stands where in a landscape; nothing here knows the season or the time of day.

REFERENCE = 128  # resolution at which visibility is decided, px
SMALLEST = 30  # an object showing less is left out, px at the reference resolution
SHOWING = 0.45  # an object of which a smaller share shows is left out


def stands_dry(x, y, half, things):
    """Whether nothing wide `half` on each side of (x, y) stands in water or on a road."""
    for thing in things:
        if thing.kind == "lake":
            low, high = thing.polygons[0].min(axis=0), thing.polygons[0].max(axis=0)
            if low[0] - half < x < high[0] + half and low[1] - 0.01 < y < high[1] + 0.02:
                return False
        elif thing.about and abs(x - np.interp(y, thing.about["y"], thing.about["middle"])) < (
            half + np.interp(y, thing.about["y"], thing.about["half"])
        ):
            return False
    return True


def stand(rng, horizon, obstacles, taken, count, half_of):
    """Up to `count` free places (x, y, nearness in 0..1), with room half_of(nearness) on either side."""
    places = []
    for _ in range(14 * count):
        near = rng.uniform(0, 1)
        x, y = rng.uniform(0.03, 0.97), horizon + 0.05 + near * (0.97 - horizon - 0.05)
        half = half_of(near)
        if stands_dry(x, y, 0.75 * half, obstacles) and all(abs(x - tx) > half + th for tx, th in taken):
            places.append((x, y, near))
            taken.append((x, half))
        if len(places) == count:
            break
    return places


def standing(rng, horizon, obstacles):
    """Houses of one color and trees of one kind, the far ones first."""
    taken = []
    color = str(rng.choice(["red", "blue", "yellow", "white"]))
    kind = str(rng.choice(["pine", "round"]))
    houses, trees = rng.choice(3, p=[0.4, 0.42, 0.18]), rng.choice(6, p=[0.25, 0.15, 0.2, 0.18, 0.12, 0.1])
    spots = stand(rng, horizon, obstacles, taken, houses, lambda near: 0.08 + 0.07 * near) if houses else []
    things = [house(rng, x, y, 0.18 + 0.17 * near, color) for x, y, near in spots]
    spots = stand(rng, horizon, obstacles, taken, trees, lambda near: 0.04 + 0.04 * near) if trees else []
    things += [tree(rng, x, y, 0.19 + 0.19 * near, kind) for x, y, near in spots]
    return sorted(things, key=lambda thing: thing.about["y"])


def hidden(things):
    """The things of which too little shows, as a set of indices; `things` lie in painting order."""
    owners = np.full((REFERENCE, REFERENCE), -1, np.int16)
    areas = np.zeros(len(things), int)
    for index, thing in enumerate(things):
        raster = rasterise(thing.polygons, REFERENCE)
        if raster is not None:
            box, _, centre = raster
            owners[box][centre] = index
            areas[index] = centre.sum()
    shown = np.bincount(owners[owners >= 0], minlength=len(things))
    share = np.where([thing.label in (CLOUD, SUN, TREE, HOUSE) for thing in things], SHOWING * areas, 0)
    return set(np.flatnonzero((shown < SMALLEST) | (shown < share)).tolist())


def compose(rng):
    """Draw a layout: (horizon, things in painting order), each of them visibly there."""
    horizon = rng.uniform(0.35, 0.70)
    clouds = [cloud(rng, horizon) for _ in range(rng.choice(4, p=[0.3, 0.32, 0.24, 0.14]))]
    meadow = ground(rng, horizon)
    on_ground = ways(rng, horizon, meadow)
    things = sun(rng, horizon) + clouds + mountains(rng, horizon) + [meadow] + on_ground
    things += standing(rng, horizon, on_ground)
    while gone := hidden(things):
        things = [thing for index, thing in enumerate(things) if index not in gone]
    return horizon, things


# --- samples.landscapes: Painted landscapes with exact masks and captions: the built-in sample set.
#
# Season and time of day are told by the caption alone and the layout by the mask alone.

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
    """An image (uint8 [R, R, 3]), its class ids (uint8 [R, R]) and what its caption says."""

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


def draw(seed, index, resolution=128):
    """Paint landscape `index` of the set `seed`; a pure function of its arguments."""
    season = SEASONS[int(np.random.default_rng([seed, index, 0]).integers(len(SEASONS)))]
    time = list(TIMES)[int(np.random.default_rng([seed, index, 1]).integers(len(TIMES)))]
    horizon, things = compose(np.random.default_rng([seed, index, 2]))
    rng = np.random.default_rng([seed, index, 3])
    image, mask = render_scene(rng, resolution, horizon, things, season, time)
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
    kind = Kind("landscapes", palette(), lambda split: draw)
    return write_set(out, SampleSet(count, resolution, seed, test, kind.name), kind, workers)


# --- workspace: Where a notebook run keeps its things: one folder below outputs/, the same names in every notebook.

SAMPLE_ROWS = {"train": 1024, "test": 128}
HELD_OUT_SEED = 7373  # of no sample set, of no training, and of no rows on which settings were chosen


def sample_landscapes() -> Path:
    """data/landscapes, painted if it is not there."""
    folder = ROOT / "data" / "landscapes"
    write_landscapes(folder, SAMPLE_ROWS["train"], test=SAMPLE_ROWS["test"])
    return folder


def held_out_landscapes(rows: int) -> Path:
    """Landscapes of a seed that no training used, painted below outputs/ if they are not there."""
    return write_landscapes(OUTPUTS / "held_out" / f"landscapes-{rows}-{HELD_OUT_SEED}", rows, seed=HELD_OUT_SEED)
