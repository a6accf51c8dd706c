"""An antialiased canvas that keeps an image and its label map in step, and the shapes of which landscapes consist.

Coordinates are in 0 to 1 of the frame, y down; polygons are float [corners, 2] of (x, y).
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

SUBPIXELS = 3  # odd, so that the middle subpixel is the pixel's center
SKY, CLOUD, SUN, MOUNTAIN, GRASS, WATER, ROAD, TREE, HOUSE = range(9)


@dataclass
class Thing:
    """An object: its class id, the polygons whose union it covers, its kind, and what its renderer needs to know."""

    label: int
    polygons: list
    kind: str = ""
    about: dict = field(default_factory=dict)


class Canvas:
    """Image float32 [R, R, 3] in 0..255, labels uint8 [R, R], and the pixel centers x and y in 0..1."""

    def __init__(self, resolution):
        self.resolution = resolution
        self.image = np.zeros((resolution, resolution, 3), np.float32)
        self.labels = np.zeros((resolution, resolution), np.uint8)
        centers = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
        self.y, self.x = centers[:, None, None], centers[None, :, None]

    def fill(self, polygons, color, label=None, opacity=1.0):
        """Fill the union of polygons; color is RGB or a function of pixel centers (y [h,1,1], x [1,w,1]).

        With label None the label map stays as it is (shading, windows, snow).
        """
        raster = rasterize(polygons, self.resolution)
        if raster is None:
            return
        box, cover, center = raster
        if callable(color):
            color = color(self.y[box[0]], self.x[:, box[1]])
        self.image[box] += cover * opacity * (np.asarray(color, np.float32) - self.image[box])
        if label is not None:
            self.labels[box][center] = label

    def blend(self, color, opacity):
        """Blend a color over the whole frame; opacity broadcasts to [R, R, 1]."""
        self.image += opacity * (np.asarray(color, np.float32) - self.image)


def rasterize(polygons, resolution):
    """Rasterize the union of polygons: None where it lies out of frame, else (box, cover, center).

    box: the two slices of the frame it touches; cover: float32 [h, w, 1], the share of each pixel it covers; center:
    bool [h, w], whether it covers the pixel's center.
    """
    corners = np.concatenate(polygons) * resolution
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, resolution)
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, resolution)
    if right <= left or bottom <= top:
        return None
    sheet = Image.new("L", (int(right - left) * SUBPIXELS, int(bottom - top) * SUBPIXELS))
    pen = ImageDraw.Draw(sheet)
    for polygon in polygons:
        points = (polygon * resolution - (left, top)) * SUBPIXELS - 0.5
        pen.polygon(points.ravel().tolist(), fill=255)
    middle = SUBPIXELS // 2
    center = np.asarray(sheet)[middle::SUBPIXELS, middle::SUBPIXELS] > 0
    cover = np.asarray(sheet.reduce(SUBPIXELS), np.float32)[..., None] / 255
    return (slice(top, bottom), slice(left, right)), cover, center


def smooth_noise(rng, resolution, cells_y, cells_x):
    """Low-frequency noise float32 [R, R, 1] in about [-1, 1], the same pattern at every resolution."""
    grid = rng.uniform(-1, 1, (cells_y, cells_x)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((resolution, resolution), Image.Resampling.BICUBIC))[..., None]


def ellipse(x, y, radius_x, radius_y, corners=32):
    """Polygon of an ellipse."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius_x * np.cos(turn), y + radius_y * np.sin(turn)], axis=1)


def rectangle(left, top, right, bottom):
    """Polygon of an upright rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def band(left, right, y):
    """Polygon between two lines of x over the same y."""
    return np.concatenate([np.stack([left, y], axis=1), np.stack([right, y], axis=1)[::-1]])


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
        ranges.append(Thing(MOUNTAIN, [polygon], kind, about))
    count = rng.choice(3, p=[0.35, 0.4, 0.25])
    return ranges[2 - count :]


def ground(rng, horizon):
    """Rolling ground from the horizon down."""
    xs = np.linspace(-0.02, 1.02, 40)
    waves = rng.uniform(0, 0.025) * np.sin(xs * rng.uniform(3, 8) + rng.uniform(0, 6))
    line = horizon + waves + rng.uniform(-0.06, 0.06) * (xs - 0.5)
    polygon = np.concatenate([np.stack([xs, line], axis=1), [(1.02, 1.02), (-0.02, 1.02)]])
    return Thing(GRASS, [polygon], about={"xs": xs, "line": line})


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
    return Thing(WATER, [(outline - (x, y)) * wobble[:, None] + (x, y)], "lake")


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
        return [road_or_river(rng, meadow, WATER, "river")]
    road = road_or_river(rng, meadow, ROAD, "road")
    if choice == "both":
        return [lake(rng, horizon, road.about["middle"][16]), road]
    return [road] if choice == "road" else []


def sun(rng, horizon):
    """A disc anywhere in the sky, or none."""
    x, y, radius = rng.uniform(0.07, 0.93), rng.uniform(0.08, horizon - 0.05), rng.uniform(0.05, 0.078)
    disc = Thing(SUN, [ellipse(x, y, radius, radius, 40)], about={"x": x, "y": y, "radius": radius})
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
    return Thing(CLOUD, puffs, about={"top": bottom - height * 0.85, "bottom": bottom})


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
    return Thing(TREE, [trunk, *foliage], kind, about)


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
    return Thing(HOUSE, [about["front"], about["side"], about["roof"]], color, about)
