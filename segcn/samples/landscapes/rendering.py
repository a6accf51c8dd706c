"""Landscapes are rendered onto an antialiased canvas that keeps an image and its label map in step.

Coordinates are in 0 to 1 of the frame, y down; polygons are float [corners, 2] of (x, y).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUBPIXELS = 3  # odd, so that the middle subpixel is the pixel's center
SKY, CLOUD, SUN, MOUNTAIN, GRASS, WATER, ROAD, TREE, HOUSE = range(9)


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


@dataclass(frozen=True)
class Light:
    """Colors of a time of day, RGB 0..255; tint multiplies every material's color."""

    sky: tuple  # top, middle, bottom
    cloud: tuple  # top, base
    tint: tuple
    haze: tuple
    mist: float  # opacity of the haze at the horizon
    disc: tuple
    glow: tuple
    water: tuple
    ice: tuple
    window: tuple


@dataclass(frozen=True)
class Nature:
    """Colors of a season, RGB 0..255 in daylight."""

    grass: tuple
    rock: tuple
    snow: float  # how far snow reaches down the mountains, share of their height
    foliage: tuple  # lit, shaded
    pine: tuple  # lit, shaded
    dots: tuple = ()  # colors of flowers or fallen leaves


LIGHTS = {
    "dawn": Light(
        sky=((120, 178, 226), (240, 200, 214), (255, 222, 190)), cloud=((255, 251, 250), (198, 160, 198)),
        tint=(0.92, 0.82, 0.92), haze=(250, 212, 212), mist=0.42, disc=(255, 236, 140), glow=(255, 232, 180),
        water=(110, 150, 200), ice=(146, 186, 226), window=(120, 130, 156),
    ),
    "day": Light(
        sky=((38, 108, 210), (96, 166, 236), (168, 214, 246)), cloud=((255, 255, 255), (196, 208, 224)),
        tint=(1.0, 1.0, 1.0), haze=(190, 216, 238), mist=0.16, disc=(255, 232, 92), glow=(255, 250, 214),
        water=(36, 104, 178), ice=(130, 184, 222), window=(96, 130, 160),
    ),
    "dusk": Light(
        sky=((58, 28, 100), (186, 52, 84), (255, 146, 44)), cloud=((255, 190, 176), (160, 92, 140)),
        tint=(0.60, 0.43, 0.52), haze=(186, 78, 92), mist=0.2, disc=(255, 214, 84), glow=(255, 160, 60),
        water=(72, 42, 104), ice=(92, 72, 138), window=(255, 206, 100),
    ),
    "night": Light(
        sky=((6, 10, 36), (20, 32, 76), (40, 56, 108)), cloud=((136, 144, 176), (82, 92, 132)),
        tint=(0.36, 0.43, 0.58), haze=(52, 70, 120), mist=0.14, disc=(246, 246, 224), glow=(120, 140, 200),
        water=(16, 36, 92), ice=(40, 68, 126), window=(255, 214, 110),
    ),
}  # fmt: skip
NATURES = {
    "spring": Nature(
        grass=(142, 216, 78), rock=(136, 128, 132), snow=0.34, foliage=((255, 196, 220), (222, 112, 164)),
        pine=((70, 150, 84), (34, 96, 62)), dots=((255, 150, 190), (255, 255, 255), (255, 232, 80)),
    ),
    "summer": Nature(
        grass=(70, 148, 52), rock=(124, 112, 92), snow=0.0, foliage=((64, 140, 48), (18, 70, 34)),
        pine=((44, 112, 62), (14, 62, 42)),
    ),
    "autumn": Nature(
        grass=(206, 152, 62), rock=(138, 108, 94), snow=0.16, foliage=((246, 136, 36), (182, 46, 26)),
        pine=((66, 106, 58), (30, 64, 42)), dots=((220, 84, 34), (170, 60, 30)),
    ),
    "winter": Nature(
        grass=(228, 236, 248), rock=(112, 118, 136), snow=0.62, foliage=((228, 238, 248), (128, 152, 184)),
        pine=((84, 128, 120), (36, 76, 78)),
    ),
}  # fmt: skip
WALLS = {"red": (204, 48, 42), "blue": (56, 108, 200), "yellow": (244, 196, 56), "white": (250, 244, 228)}
SNOW = (246, 249, 255)


def ramp(colors, position):
    """Interpolate RGB colors spread evenly over position 0..1; position [..., 1] gives [..., 3]."""
    stops = np.linspace(0, 1, len(colors))
    colors = np.asarray(colors, np.float32)
    flat = np.clip(position[..., 0], 0, 1)
    return np.stack([np.interp(flat, stops, colors[:, k]) for k in range(3)], axis=-1).astype(np.float32)


def vertical(colors, top, bottom):
    """The color function that runs through colors from one y to another, at every x."""
    return lambda y, x: ramp(colors, (y - top) / (bottom - top) + 0 * x)


def shrunk(polygon, share):
    """The polygon at a share of its size about its middle, and that middle."""
    middle = polygon.mean(axis=0)
    return (polygon - middle) * share + middle


class Renderer:
    """A canvas in one season's and one hour's colors, with a method for each thing of a scene."""

    def __init__(self, rng, resolution, horizon, season, time):
        self.rng, self.horizon, self.season, self.time = rng, horizon, season, time
        self.light, self.nature = LIGHTS[time], NATURES[season]
        self.haze = np.asarray(self.light.haze, np.float32)
        self.canvas = Canvas(resolution)
        self.sun = self.reflection = None

    def render(self, things):
        """Sky first, then every thing in order, the far ones first: image uint8 [R, R, 3], mask uint8 [R, R]."""
        self.sun = next((thing.about for thing in things if thing.label == SUN), None)
        self.sky()
        methods = {SUN: self.disc, CLOUD: self.cloud, MOUNTAIN: self.mountain, GRASS: self.ground,
                   WATER: self.water, ROAD: self.road, TREE: self.tree, HOUSE: self.house}  # fmt: skip
        for thing in things:
            methods[thing.label](thing)
        return np.clip(np.round(self.canvas.image), 0, 255).astype(np.uint8), self.canvas.labels

    def lit(self, color):
        """A material's color in this light."""
        return np.asarray(color, np.float32) * np.asarray(self.light.tint, np.float32)

    @property
    def shadow_side(self):
        """+1 where shadows fall to the right, -1 to the left."""
        return 1 if self.sun is None or self.sun["x"] < 0.5 else -1

    def sky(self):
        """Gradient, stars at night, and the glow around the sun."""
        canvas = self.canvas
        canvas.image += ramp(self.light.sky, canvas.y / (self.horizon + 0.03))
        if self.time == "night":
            for x, y in self.rng.uniform(0, 1, (26, 2)):
                canvas.fill([ellipse(x, y * self.horizon, 0.007, 0.007, 8)], (226, 230, 255), opacity=0.85)
        if self.sun:
            square = (canvas.x - self.sun["x"]) ** 2 + (canvas.y - self.sun["y"]) ** 2
            canvas.blend(self.light.glow, 0.75 * np.exp(-np.sqrt(square) / 0.1))

    def disc(self, thing):
        """The sun, or the moon with two pale seas."""
        self.canvas.fill(thing.polygons, self.light.disc, SUN)
        if self.time == "night":
            x, y, radius = (thing.about[key] for key in ("x", "y", "radius"))
            for dx, dy, size in ((-0.3, -0.25, 0.3), (0.32, 0.3, 0.24)):
                sea = ellipse(x + dx * radius, y + dy * radius, size * radius, size * radius)
                self.canvas.fill([sea], (206, 208, 200), opacity=0.8)

    def cloud(self, thing):
        """Bright above, shaded at the base."""
        bright, base = self.light.cloud
        shading = vertical((bright, bright, base), thing.about["top"], thing.about["bottom"])
        self.canvas.fill(thing.polygons, shading, CLOUD)
        for puff in thing.polygons[1:]:
            lifted = shrunk(puff, 0.62) + (-0.1 * self.shadow_side, -0.22) * np.ptp(puff, axis=0) * (0.5, 0.5)
            self.canvas.fill([lifted], bright, opacity=0.35)

    def mountain(self, thing):
        """Rock paling towards its foot, snow on the heights, shade on the side away from the sun."""
        about, far = thing.about, thing.kind == "far"
        top, base = about["ridge"].min(), about["base"]
        rock = self.lit(self.nature.rock)
        near_color = rock + (0.42 if far else 0.1) * (self.haze - rock)
        foot = near_color + 0.4 * (self.haze - near_color)
        self.canvas.fill(thing.polygons, vertical((near_color, near_color, foot), top, base), MOUNTAIN)
        self.snow_cap(about, top, far)
        for index in range(len(about["peaks"])):
            self.mountain_shade(about, index)

    def snow_cap(self, about, top, far):
        """Snow from the ridge down, with a jagged lower edge."""
        xs, ridge, base = about["xs"], about["ridge"], about["base"]
        elevation = np.maximum(base - ridge, 0)
        line = (base - top) * (1 - self.nature.snow)
        depth = np.maximum(elevation - line, 0) * (0.8 + 0.35 * about["jags"])
        if self.nature.snow == 0 or depth.max() < 0.015:
            return
        snow = self.lit(SNOW)
        snow = snow + (0.25 if far else 0.0) * (np.asarray(self.light.haze) - snow)  # float64, as in ground
        edge = np.stack([xs, ridge + depth], axis=1)[::-1]
        self.canvas.fill([np.concatenate([np.stack([xs, ridge], axis=1), edge])], snow)

    def mountain_shade(self, about, index):
        """The facet of one peak that lies away from the sun."""
        xs, ridge, base = about["xs"], about["ridge"], about["base"]
        own = np.flatnonzero((about["owner"] == index) & (ridge < base))
        if len(own) < 4:
            return
        crest = own[ridge[own].argmin()]
        side = own[own >= crest] if self.shadow_side > 0 else own[own <= crest][::-1]
        reach = abs(xs[side[-1]] - xs[crest])
        if reach < 0.06:
            return
        down = np.linspace(0, 1, 6)
        spine_x = xs[crest] + self.shadow_side * 0.2 * reach * np.array([0, 1.1, 0.3, 1.5, 0.8, 1.6])
        spine = np.stack([spine_x, ridge[crest] + down * (base + 0.04 - ridge[crest])], axis=1)
        slope = np.stack([xs[side], ridge[side]], axis=1)
        shade = self.lit((52, 50, 78)) * 0.8
        self.canvas.fill([np.concatenate([slope, [(xs[side[-1]], base + 0.04)], spine[::-1]])], shade, opacity=0.42)

    def ground(self, thing):
        """Grass or snow with soft patches and the season's dots; mist along the horizon."""
        canvas, horizon = self.canvas, self.horizon
        self.reflection = canvas.image.copy()
        base = self.lit(self.nature.grass)
        patches = smooth_noise(self.rng, canvas.resolution, 9, 5)
        far = base + 0.3 * (np.asarray(self.light.haze) - base)  # float64: with float32 some pixels change by 1
        canvas.fill(thing.polygons, vertical((far, base, base * 0.84), horizon, 1), GRASS)
        on_ground = (canvas.labels == GRASS)[..., None]
        canvas.image *= 1 + on_ground * (0.05 if self.season == "winter" else 0.11) * patches
        for dx, dy, size, pick in self.rng.uniform(0, 1, (46, 4)):  # flowers in spring, fallen leaves in autumn
            if self.nature.dots:
                radius = 0.006 + 0.010 * dy * (0.6 + 0.4 * size)
                dot = ellipse(dx, horizon + 0.06 + dy * (0.94 - horizon), radius * 1.2, radius, 12)
                canvas.fill([dot], self.lit(self.nature.dots[int(pick * len(self.nature.dots))]), opacity=0.85)
        canvas.blend(self.light.haze, self.light.mist * np.exp(-(((canvas.y - horizon) / 0.07) ** 2)) + 0 * canvas.x)

    def water(self, thing):
        """Water (ice in winter) mixed with what it mirrors: the scene behind the horizon and the sun's streak."""
        canvas, frozen, size = self.canvas, self.season == "winter", self.canvas.resolution
        own = np.asarray(self.light.ice if frozen else self.light.water, np.float32)
        ripples = smooth_noise(self.rng, size, 24, 4)
        rows = (2 * self.horizon - canvas.y[:, 0, 0]) * size
        mirror = self.reflection[np.clip(np.abs(rows), 0, int(self.horizon * size)).astype(int)]
        if self.sun:
            width = 0.03 + 0.05 * (canvas.y - self.horizon)
            streak = 0.6 * np.exp(-(((canvas.x - self.sun["x"]) / width) ** 2))
            mirror = mirror + streak * (np.asarray(self.light.disc, np.float32) - mirror)
        surface = own + (0.22 if frozen else 0.42) * (mirror - own)
        surface = surface * (1 + (0.04 if frozen else 0.1) * ripples)

        def color(y, x):
            top, left = int(y[0, 0, 0] * size), int(x[0, 0, 0] * size)
            return surface[top : top + y.shape[0], left : left + x.shape[1]]

        canvas.fill(thing.polygons, color, WATER)

    def road(self, thing):
        """Asphalt with a dashed middle line."""
        asphalt = [self.lit(color) for color in ((128, 124, 130), (96, 92, 100), (78, 76, 86))]
        self.canvas.fill(thing.polygons, vertical(asphalt, self.horizon, 1.0), ROAD)
        y, middle, half = (thing.about[key] for key in ("y", "middle", "half"))
        for start in range(8, len(y) - 2, 4):
            rows = slice(start, start + 3)
            dash = band(middle[rows] - 0.09 * half[rows], middle[rows] + 0.09 * half[rows], y[rows])
            self.canvas.fill([dash], self.lit((244, 232, 196)), opacity=0.9)

    def cast_shadow(self, x, y, half):
        """A flat shadow on the ground, away from the sun."""
        shape = ellipse(x + 0.5 * self.shadow_side * half, y, 1.25 * half, 0.24 * half)
        self.canvas.fill([shape], self.lit((30, 34, 60)) * 0.6, opacity=0.38)

    def tree(self, thing):
        """Trunk and foliage; blossom, leaves or snow by season."""
        about = thing.about
        x, y, height, crown = (about[key] for key in ("x", "y", "height", "crown"))
        self.cast_shadow(x, y, 0.6 * crown)
        self.canvas.fill(about["trunk"], self.lit((104, 70, 48)), TREE)
        if thing.kind == "pine":
            self.pine(about)
            return
        light, dark = (np.asarray(color) * (1 + 0.07 * about["shade"]) for color in self.nature.foliage)
        colors = [self.lit(color) for color in (light, light, dark)]
        self.canvas.fill(about["foliage"], vertical(colors, y - height, y - 0.26 * height), TREE)
        for puff in about["foliage"][1:]:
            small = shrunk(puff, 0.6) - (0.03 * crown * self.shadow_side, 0.05 * height)
            self.canvas.fill([small], self.lit(light), opacity=0.4)

    def pine(self, about):
        """Tiers lit from one side, snow on each in winter."""
        left, right = about["x"] - 0.35 * about["crown"], about["x"] + 0.35 * about["crown"]
        colors = [self.lit(color) for color in self.nature.pine][:: self.shadow_side]
        for tier in about["foliage"]:
            self.canvas.fill([tier], lambda y, x: ramp(colors, (x - left) / (right - left)), TREE)
            if self.season == "winter":
                top, low_right, low_left = tier
                middle = top + 0.42 * ((low_right + low_left) / 2 - top)
                cap = [top, top + 0.62 * (low_right - top), middle, top + 0.62 * (low_left - top)]
                self.canvas.fill([np.array(cap)], self.lit(SNOW), opacity=0.95)

    def house(self, thing):
        """Walls, roof (snowed on in winter), door, and windows that are lit at dusk and at night."""
        about, wall = thing.about, np.asarray(WALLS[thing.kind])
        self.cast_shadow(about["x"], about["y"], 0.5 * about["width"])
        fill = self.canvas.fill
        tint = 0.5 * (np.asarray(self.light.tint) + np.mean(self.light.tint))
        fill([about["front"]], wall * tint, HOUSE)
        fill([about["side"]], wall * tint * 0.78, HOUSE)
        roof = about["roof"]
        fill([roof], self.lit((98, 62, 54)), HOUSE)
        if self.season == "winter":
            snow = [roof[0], roof[1], roof[1] + 0.72 * (roof[2] - roof[1]), roof[0] + 0.72 * (roof[3] - roof[0])]
            fill([np.array(snow)], self.lit(SNOW))
        fill([about["door"]], self.lit((84, 52, 40)))
        window = self.light.window if self.time in ("dusk", "night") else self.lit(self.light.window)
        for pane in about["windows"]:
            fill([pane], window)
