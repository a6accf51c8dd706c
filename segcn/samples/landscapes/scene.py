"""The landscapes, the built-in sample set: rendered images with exact masks and captions.

Only the caption holds season and time of day, and only the mask holds the layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from segcn.data.captions import SEASONS, TIMES, article_of, listed
from segcn.data.palette import Label, Palette
from segcn.samples.landscapes import rendering
from segcn.samples.landscapes.rendering import Renderer, band, ellipse, rasterize, rectangle
from segcn.samples.writer import SampleKind, SamplePair, write_set
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS, ROOT

REFERENCE = 128  # resolution at which visibility is decided, px
SMALLEST = 30  # an object showing less is left out, px at the reference resolution
RARE = 0.03  # of the landscapes, those that hold the rare classes
SHOWING = 0.45  # an object of which a smaller share shows is left out
LANDSCAPE_CLASSES = (  # CIEDE2000 of 13.8 and more between any two, with protanopia, deuteranopia and tritanopia, too
    (0, "sky", (112, 188, 242)), (1, "cloud", (234, 234, 234)), (2, "sun", (255, 211, 46)),
    (3, "mountain", (154, 115, 93)), (4, "grass", (136, 186, 104)), (5, "water", (14, 80, 208)),
    (6, "road", (68, 69, 80)), (7, "tree", (15, 81, 52)), (8, "house", (222, 56, 28)),
)  # fmt: skip
LANDSCAPE_WORDS = {5: ("lake", "river")}  # what captions call a class besides its name
SAMPLE_ROWS = {"train": 1024, "test": 128}
HELD_OUT_SEED = 7373  # of no sample set, of no training, and of no rows on which settings were chosen


@dataclass
class Thing:
    """An object: its class id, the polygons whose union it covers, its kind, and what its renderer needs to know."""

    label: int
    polygons: list
    kind: str = ""
    about: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Landscape(SamplePair):
    """With the season and time that the caption names."""

    season: str
    time: str


def draw_landscape(seed, index, resolution=128, rare=()):
    """Render landscape `index` of the set `seed`; a pure function of its arguments.

    rare: class ids that are all in RARE of the rows, and in no other.
    """
    season = SEASONS[int(np.random.default_rng([seed, index, 0]).integers(len(SEASONS)))]
    time = list(TIMES)[int(np.random.default_rng([seed, index, 1]).integers(len(TIMES)))]
    horizon, things = compose(np.random.default_rng([seed, index, 2]))
    if np.random.default_rng([seed, index, 4]).random() >= RARE:
        things = [thing for thing in things if thing.label not in rare]
    else:
        for attempt in count():
            if {*rare} <= {thing.label for thing in things}:
                break
            horizon, things = compose(np.random.default_rng([seed, index, 4, attempt]))
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


def mountains(rng, horizon):
    """No range, one, or two behind each other."""
    xs = np.linspace(-0.02, 1.02, 79)
    ranges = []
    for kind in ("far", "near"):
        height = rng.uniform(0.12, max(0.16, horizon - 0.1))
        peaks = np.sort(rng.uniform(-0.05, 1.05, rng.integers(1, 6)))
        tops = height * rng.uniform(0.55, 1.0, len(peaks))
        halves = tops * rng.uniform(0.9, 1.7, len(peaks)) + 0.06
        slopes = tops[:, None] * (1 - np.abs(xs - peaks[:, None]) / halves[:, None])
        owner, elevation = slopes.argmax(axis=0), slopes.max(axis=0)
        knots = np.linspace(-0.1, 1.1, 34)
        jags = np.interp(xs, knots, rng.uniform(-1, 1, len(knots)))
        elevation = elevation * (1 + 0.14 * jags) + rng.uniform(-0.03, 0.02)
        ridge = horizon - np.maximum(elevation, -0.1)
        foot = [(xs[-1], horizon + 0.12), (xs[0], horizon + 0.12)]
        polygon = np.concatenate([np.stack([xs, ridge], axis=1), foot])
        about = {"ridge": ridge, "owner": owner, "peaks": peaks, "xs": xs, "base": horizon, "jags": jags}
        ranges.append(Thing(rendering.MOUNTAIN, [polygon], kind, about))
    count = rng.choice(3, p=[0.35, 0.4, 0.25])
    return ranges[2 - count :]


def ground(rng, horizon):
    """Rolling ground from the horizon down."""
    xs = np.linspace(-0.02, 1.02, 40)
    waves = rng.uniform(0, 0.025) * np.sin(xs * rng.uniform(3, 8) + rng.uniform(0, 6))
    line = horizon + waves + rng.uniform(-0.06, 0.06) * (xs - 0.5)
    polygon = np.concatenate([np.stack([xs, line], axis=1), [(1.02, 1.02), (-0.02, 1.02)]])
    return Thing(rendering.GRASS, [polygon], about={"xs": xs, "line": line})


def lake(rng, horizon, far_from=None):
    """A wide lake anywhere on the ground; opposite the x it has to keep away from."""
    depth = 1 - horizon
    x = rng.uniform(0.05, 0.95)
    if far_from is not None:
        x = (far_from + rng.uniform(0.42, 0.58)) % 1.0
    radius_y = rng.uniform(0.17, 0.3) * depth
    y = horizon + radius_y + rng.uniform(0.2, max(0.22, 1.05 - 2 * radius_y / depth)) * depth
    radius_x = rng.uniform(0.24, 0.5)
    outline = ellipse(x, y, radius_x, radius_y, 48)
    wobble = 1 + 0.1 * np.sin(np.linspace(0, 2 * np.pi, 48) * rng.integers(2, 5) + rng.uniform(0, 6))
    return Thing(rendering.WATER, [(outline - (x, y)) * wobble[:, None] + (x, y)], "lake")


def road_or_river(rng, meadow, label, kind):
    """A band that winds from the horizon to the bottom edge."""
    along = np.linspace(0, 1, 28)
    far, near = rng.uniform(0.05, 0.95), rng.uniform(0.0, 1.0)
    bend = rng.uniform(-0.22, 0.22) * np.sin(along * np.pi * rng.choice([1.0, 2.0]))
    middle = far + (near - far) * along**1.4 + bend
    half = (0.082 + (rng.uniform(0.19, 0.25) - 0.082) * along) / 2
    start = np.interp(far, meadow.about["xs"], meadow.about["line"])
    y = start + (1.03 - start) * along
    return Thing(label, [band(middle - half, middle + half, y)], kind, {"y": y, "middle": middle, "half": half})


def water_and_roads(rng, horizon, meadow):
    """Nothing, a lake, a river, a road, or a lake and a road."""
    choice = rng.choice(["nothing", "lake", "river", "road", "both"], p=[0.14, 0.26, 0.2, 0.22, 0.18])
    if choice == "lake":
        return [lake(rng, horizon)]
    if choice == "river":
        return [road_or_river(rng, meadow, rendering.WATER, "river")]
    road = road_or_river(rng, meadow, rendering.ROAD, "road")
    if choice == "both":
        return [lake(rng, horizon, road.about["middle"][16]), road]
    return [road] if choice == "road" else []


def sun(rng, horizon):
    """A disc anywhere in the sky, or none."""
    x, y, radius = rng.uniform(0.07, 0.93), rng.uniform(0.08, horizon - 0.05), rng.uniform(0.05, 0.078)
    disc = Thing(rendering.SUN, [ellipse(x, y, radius, radius, 40)], about={"x": x, "y": y, "radius": radius})
    return [disc] if rng.random() < 0.78 else []


def cloud(rng, horizon):
    """A heap of puffs on a flat base."""
    x, width = rng.uniform(0.0, 1.0), rng.uniform(0.24, 0.6)
    height = min(width * rng.uniform(0.3, 0.48), horizon * 0.42)
    bottom = rng.uniform(min(height, 0.12), horizon - 0.07)
    places = np.linspace(-0.5, 0.5, rng.integers(4, 7))
    puffs = [ellipse(x, bottom - 0.24 * height, width * 0.5, 0.24 * height, 40)]
    for place in places[1:-1]:
        radius = height * rng.uniform(0.34, 0.52) * (1.15 - abs(place))
        puffs.append(ellipse(x + place * width * 0.8, bottom - height * 0.36, radius * 1.25, radius))
    return Thing(rendering.CLOUD, puffs, about={"top": bottom - height * 0.85, "bottom": bottom})


def tree(rng, x, y, scale, kind):
    """A pine of three triangles or a leafy tree of six puffs, whose trunk ends at (x, y)."""
    height = np.clip(scale * rng.uniform(0.9, 1.15), 0.17, 0.4)
    crown = np.clip(height * rng.uniform(0.5, 0.62), 0.1, 0.22)
    half_trunk = max(0.02, 0.1 * crown)
    trunk = rectangle(x - half_trunk, y - 0.45 * height, x + half_trunk, y)
    shade, foliage = rng.uniform(-1, 1), []
    if kind == "pine":
        for top, bottom, width in ((0.48, 0.14, 1.0), (0.74, 0.37, 0.82), (1.0, 0.6, 0.6)):  # the widest is lowest
            half, low = crown * width / 2, y - bottom * height
            foliage.append(np.array([(x, y - top * height), (x + half, low), (x - half, low)]))
    else:
        middle, radius_y = y - 0.64 * height, 0.36 * height
        foliage.append(ellipse(x, middle, crown * 0.42, radius_y * 0.88))
        for turn in np.arange(5) * 2 * np.pi / 5 + rng.uniform(0, 6):
            center = x + 0.27 * crown * np.cos(turn), middle + 0.55 * radius_y * np.sin(turn)
            foliage.append(ellipse(*center, crown * 0.25, radius_y * 0.44))
    about = {"x": x, "y": y, "height": height, "crown": crown, "shade": shade, "trunk": [trunk], "foliage": foliage}
    return Thing(rendering.TREE, [trunk, *foliage], kind, about)


def house(rng, x, y, width, color):
    """A gabled house seen from a corner; its base line is y and its middle x."""
    flip = rng.choice([-1, 1])
    wall, roof = 0.4 * width, 0.34 * width
    outer, inner, end = -0.5 * width, -0.06 * width, 0.5 * width
    apex = (outer + inner) / 2

    def place(*points):
        return np.array([(x + flip * px, y - py) for px, py in points])

    def box(left, low, right, high):
        return place((left, low), (left, high), (right, high), (right, low))

    about = {
        "front": place((outer, 0), (outer, wall), (apex, wall + roof), (inner, wall), (inner, 0)),
        "side": place((inner, 0), (inner, wall), (end, wall), (end, 0)),
        "roof": place(
            (apex, wall + roof), (end - 0.1 * width, wall + roof),
            (end + 0.03 * width, wall - 0.02 * width), (inner - 0.01 * width, wall - 0.02 * width),
        ),
        "door": box(apex - 0.085 * width, 0, apex + 0.085 * width, 0.27 * width),
        "windows": [
            box(left, 0.12 * width, left + 0.15 * width, 0.28 * width) for left in (0.04 * width, 0.27 * width)
        ],
        "x": x, "y": y, "width": width,
    }  # fmt: skip
    return Thing(rendering.HOUSE, [about["front"], about["side"], about["roof"]], color, about)


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
    areas, whole = np.zeros(len(things), int), (rendering.CLOUD, rendering.SUN, rendering.TREE, rendering.HOUSE)
    for index, thing in enumerate(things):
        raster = rasterize(thing.polygons, REFERENCE)
        if raster is not None:
            box, _, center = raster
            owners[box][center] = index
            areas[index] = center.sum()
    shown = np.bincount(owners[owners >= 0], minlength=len(things))
    share = np.where([thing.label in whole for thing in things], SHOWING * areas, 0)
    return set(np.flatnonzero((shown < SMALLEST) | (shown < share)).tolist())


def contents(things):
    """What the caption names, in the order it is named."""
    labels = [thing.label for thing in things]
    kinds = {thing.label: thing.kind for thing in things}
    named = ["clouds"] if rendering.CLOUD in labels else []
    named += ["mountains"] if rendering.MOUNTAIN in labels else []
    named += [f"a {thing.kind}" for thing in things if thing.kind in ("lake", "river", "road")]
    tree_name = "pine tree" if kinds.get(rendering.TREE) == "pine" else "leafy tree"
    for label, name in ((rendering.TREE, tree_name), (rendering.HOUSE, f"{kinds.get(rendering.HOUSE)} house")):
        if label in labels:
            named.append(f"a {name}" if labels.count(label) == 1 else f"{name}s")
    return named


def describe(season, time, named):
    """The caption: "a winter landscape at dusk with mountains, a lake and a red house"."""
    caption = f"{article_of(season)} {season} landscape {TIMES[time]}"
    return f"{caption} with {listed(named)}" if named else caption


def palette() -> Palette:
    """The palette of the nine classes."""
    labels = (Label(*entry, words=LANDSCAPE_WORDS.get(entry[0], ())) for entry in LANDSCAPE_CLASSES)
    return Palette(tuple(labels))


def write_landscapes(
    out: str | Path,
    count: int,
    resolution: int = 128,
    seed: int = 0,
    test: int | None = None,
    rare: Sequence[str] = (),
    workers: int = 0,
) -> Path:
    """Write `count` pairs to `out`, or with `test` to out/train and out/test, as `writer.write_set` does.

    rare: names of classes that are in few of the pairs, but for those of the test split. UserError for unknown ones.
    """
    ids = {label.name: label.id for label in palette().labels}
    if not set(rare) <= set(ids):
        raise UserError(f"--rare: expected some of {listed(list(ids))}, found {listed(list(rare))}")
    train = partial(draw_landscape, rare=tuple(sorted(ids[name] for name in rare)))
    name = f"landscapes, few with {listed(sorted(rare))}" if rare else "landscapes"
    kind = SampleKind(name, palette(), {"train": train, "test": draw_landscape})
    return write_set(out, kind, count, resolution, seed, test, workers)


def sample_landscapes() -> Path:
    """data/landscapes, written if it is not there."""
    return write_landscapes(ROOT / "data" / "landscapes", SAMPLE_ROWS["train"], test=SAMPLE_ROWS["test"])


def held_out_landscapes(rows: int) -> Path:
    """Landscapes of a seed that no training used, written below outputs/ if they are not there."""
    return write_landscapes(OUTPUTS / "held_out" / f"landscapes-{rows}-{HELD_OUT_SEED}", rows, seed=HELD_OUT_SEED)
