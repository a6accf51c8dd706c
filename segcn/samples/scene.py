"""What stands where in a landscape; nothing here knows the season or the time of day."""

import numpy as np

from segcn.samples.canvas import rasterise
from segcn.samples.things import CLOUD, HOUSE, SUN, TREE, cloud, ground, house, mountains, sun, tree, ways

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
    """Houses of one colour and trees of one kind, the far ones first."""
    taken = []
    colour = str(rng.choice(["red", "blue", "yellow", "white"]))
    kind = str(rng.choice(["pine", "round"]))
    houses, trees = rng.choice(3, p=[0.4, 0.42, 0.18]), rng.choice(6, p=[0.25, 0.15, 0.2, 0.18, 0.12, 0.1])
    spots = stand(rng, horizon, obstacles, taken, houses, lambda near: 0.08 + 0.07 * near) if houses else []
    things = [house(rng, x, y, 0.18 + 0.17 * near, colour) for x, y, near in spots]
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
