"""An antialiased canvas that keeps an image and its exact label map in step."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

# --- samples.canvas: An antialiased canvas that keeps an image and its exact label map in step.

SUBPIXELS = 3  # odd, so that the middle subpixel is the pixel's centre


def ellipse(x, y, radius_x, radius_y, corners=32):
    """Polygon [corners, 2] of an ellipse; unit coordinates, y down."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius_x * np.cos(turn), y + radius_y * np.sin(turn)], axis=1)


def rectangle(left, top, right, bottom):
    """Polygon [4, 2] of an upright rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def rasterise(polygons, resolution):
    """Rasterise the union of polygons in unit coordinates.

    Returns None if it lies out of frame, else (box, cover, centre): box the two slices of the frame it
    touches, cover float32 [h, w, 1] the share of each pixel it covers, centre bool [h, w] whether it covers
    the pixel's centre.
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
    centre = np.asarray(sheet)[middle::SUBPIXELS, middle::SUBPIXELS] > 0
    cover = np.asarray(sheet.reduce(SUBPIXELS), np.float32)[..., None] / 255
    return (slice(top, bottom), slice(left, right)), cover, centre


def smooth_noise(rng, resolution, cells_y, cells_x):
    """Low-frequency noise float32 [R, R] in about [-1, 1], the same pattern at every resolution."""
    grid = rng.uniform(-1, 1, (cells_y, cells_x)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((resolution, resolution), Image.Resampling.BICUBIC))


class Canvas:
    """Image float32 [R, R, 3] in 0..255, labels uint8 [R, R], and the pixel centres x and y in 0..1."""

    def __init__(self, resolution):
        self.resolution = resolution
        self.image = np.zeros((resolution, resolution, 3), np.float32)
        self.labels = np.zeros((resolution, resolution), np.uint8)
        centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
        self.y, self.x = centres[:, None, None], centres[None, :, None]

    def fill(self, polygons, color, label=None, opacity=1.0):
        """Paint the union of polygons; color is RGB or a function of pixel centres (y [h,1,1], x [1,w,1]).

        With label None the label map stays as it is (shading, windows, snow).
        """
        raster = rasterise(polygons, self.resolution)
        if raster is None:
            return
        box, cover, centre = raster
        if callable(color):
            color = color(self.y[box[0]], self.x[:, box[1]])
        self.image[box] += cover * opacity * (np.asarray(color, np.float32) - self.image[box])
        if label is not None:
            self.labels[box][centre] = label

    def blend(self, color, opacity):
        """Blend a color over the whole frame; opacity broadcasts to [R, R, 1]."""
        self.image += opacity * (np.asarray(color, np.float32) - self.image)

    def to_uint8(self):
        """Image uint8 [R, R, 3]."""
        return np.clip(np.round(self.image), 0, 255).astype(np.uint8)


# --- samples.things: The things a landscape is made of, as polygons in unit coordinates (y down).

SKY, CLOUD, SUN, MOUNTAIN, GRASS, WATER, ROAD, TREE, HOUSE = range(9)


@dataclass
class Thing:
    """An object: its class id, the polygons whose union it covers, and what its painter needs to know."""

    label: int
    polygons: list
    kind: str = ""
    about: dict = field(default_factory=dict)


def ridge_polygon(rng, base, height, xs):
    """A mountain range standing on y = base: its polygons, ridge line and peaks."""
    peaks = np.sort(rng.uniform(-0.05, 1.05, rng.integers(1, 6)))
    tops = height * rng.uniform(0.55, 1.0, len(peaks))
    halves = tops * rng.uniform(0.9, 1.7, len(peaks)) + 0.06
    slopes = tops[:, None] * (1 - np.abs(xs - peaks[:, None]) / halves[:, None])
    owner, elevation = slopes.argmax(axis=0), slopes.max(axis=0)
    knots = np.linspace(-0.1, 1.1, 34)
    jags = np.interp(xs, knots, rng.uniform(-1, 1, len(knots)))
    elevation = elevation * (1 + 0.14 * jags) + rng.uniform(-0.03, 0.02)
    ridge = base - np.maximum(elevation, -0.1)
    foot = [(xs[-1], base + 0.12), (xs[0], base + 0.12)]
    polygon = np.concatenate([np.stack([xs, ridge], axis=1), foot])
    return [polygon], {"ridge": ridge, "owner": owner, "peaks": peaks, "xs": xs, "base": base, "jags": jags}


def mountains(rng, horizon):
    """No range, one, or two behind each other."""
    xs = np.linspace(-0.02, 1.02, 79)
    ranges = []
    for far in (True, False):
        height = rng.uniform(0.12, max(0.16, horizon - 0.1))
        polygons, about = ridge_polygon(rng, horizon, height, xs)
        ranges.append(Thing(MOUNTAIN, polygons, "far" if far else "near", about))
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
    outline = (outline - (x, y)) * wobble[:, None] + (x, y)
    return Thing(WATER, [outline], "lake")


def way(rng, meadow, label, kind):
    """A road or river winding from the horizon to the bottom edge."""
    along = np.linspace(0, 1, 28)
    far, near = rng.uniform(0.05, 0.95), rng.uniform(0.0, 1.0)
    bend = rng.uniform(-0.22, 0.22) * np.sin(along * np.pi * rng.choice([1.0, 2.0]))
    middle = far + (near - far) * along**1.4 + bend
    half = (0.082 + (rng.uniform(0.19, 0.25) - 0.082) * along) / 2
    start = np.interp(far, meadow.about["xs"], meadow.about["line"])
    y = start + (1.03 - start) * along
    left, right = np.stack([middle - half, y], axis=1), np.stack([middle + half, y], axis=1)
    about = {"y": y, "middle": middle, "half": half}
    return Thing(label, [np.concatenate([left, right[::-1]])], kind, about)


def ways(rng, horizon, meadow):
    """Nothing, a lake, a river, a road, or a lake and a road."""
    choice = rng.choice(["nothing", "lake", "river", "road", "both"], p=[0.14, 0.26, 0.2, 0.22, 0.18])
    if choice == "lake":
        return [lake(rng, horizon)]
    if choice == "river":
        return [way(rng, meadow, WATER, "river")]
    road = way(rng, meadow, ROAD, "road")
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
    return Thing(CLOUD, puffs, about={"top": bottom - height * 0.85, "bottom": bottom, "x": x})


def tree(rng, x, y, scale, kind):
    """A deciduous tree or a pine whose trunk stands at (x, y)."""
    height = np.clip(scale * rng.uniform(0.9, 1.15), 0.17, 0.4)
    crown = np.clip(height * rng.uniform(0.5, 0.62), 0.1, 0.22)
    half_trunk = max(0.02, 0.1 * crown)
    trunk = rectangle(x - half_trunk, y - 0.45 * height, x + half_trunk, y)
    about = {"x": x, "y": y, "height": height, "crown": crown, "shade": rng.uniform(-1, 1)}
    about["trunk"] = [trunk]
    about["foliage"] = pine_foliage(about) if kind == "pine" else round_foliage(rng, about)
    return Thing(TREE, [trunk, *about["foliage"]], kind, about)


def pine_foliage(about):
    """Three triangles, the widest lowest."""
    x, y, height, crown = (about[key] for key in ("x", "y", "height", "crown"))
    tiers = []
    for top, bottom, width in ((0.48, 0.14, 1.0), (0.74, 0.37, 0.82), (1.0, 0.6, 0.6)):
        half = crown * width / 2
        tiers.append(
            np.array([(x, y - top * height), (x + half, y - bottom * height), (x - half, y - bottom * height)])
        )
    return tiers


def round_foliage(rng, about):
    """Five overlapping puffs round a full one."""
    x, y, height, crown = (about[key] for key in ("x", "y", "height", "crown"))
    middle, radius_y = y - 0.64 * height, 0.36 * height
    puffs = [ellipse(x, middle, crown * 0.42, radius_y * 0.88)]
    for turn in np.arange(5) * 2 * np.pi / 5 + rng.uniform(0, 6):
        centre = x + 0.27 * crown * np.cos(turn), middle + 0.55 * radius_y * np.sin(turn)
        puffs.append(ellipse(*centre, crown * 0.25, radius_y * 0.44))
    return puffs


def house(rng, x, y, width, color):
    """A gabled house seen from a corner; its base line is y and its middle x."""
    flip = rng.choice([-1, 1])
    wall, roof, corner = 0.4 * width, 0.34 * width, -0.06 * width
    outer, inner, end = -0.5 * width, corner, 0.5 * width
    apex = (outer + inner) / 2

    def place(*points):
        return np.array([(x + flip * px, y - py) for px, py in points])

    about = {
        "front": place((outer, 0), (outer, wall), (apex, wall + roof), (inner, wall), (inner, 0)),
        "side": place((inner, 0), (inner, wall), (end, wall), (end, 0)),
        "roof": place(
            (apex, wall + roof),
            (end - 0.1 * width, wall + roof),
            (end + 0.03 * width, wall - 0.02 * width),
            (inner - 0.01 * width, wall - 0.02 * width),
        ),
        "door": place(
            (apex - 0.085 * width, 0),
            (apex - 0.085 * width, 0.27 * width),
            (apex + 0.085 * width, 0.27 * width),
            (apex + 0.085 * width, 0),
        ),
        "windows": [
            place(
                (left, 0.12 * width),
                (left, 0.28 * width),
                (left + 0.15 * width, 0.28 * width),
                (left + 0.15 * width, 0.12 * width),
            )
            for left in (0.04 * width, 0.27 * width)
        ],
        "x": x,
        "y": y,
        "width": width,
    }
    return Thing(HOUSE, [about["front"], about["side"], about["roof"]], color, about)
