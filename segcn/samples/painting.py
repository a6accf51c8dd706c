"""Colours a layout for a season and a time of day."""

from dataclasses import dataclass

import numpy as np

from segcn.samples.canvas import Canvas, ellipse, smooth_noise
from segcn.samples.scene import CLOUD, GRASS, HOUSE, MOUNTAIN, ROAD, SUN, TREE, WATER


@dataclass(frozen=True)
class Light:
    """Colours of a time of day, RGB 0..255; tint multiplies every material's colour."""

    sky: tuple  # top, middle, bottom
    tint: tuple
    haze: tuple
    mist: float  # opacity of the haze at the horizon
    disc: tuple
    glow: tuple
    cloud: tuple  # top, base
    water: tuple
    ice: tuple
    window: tuple


LIGHTS = {
    "dawn": Light(((120, 178, 226), (240, 200, 214), (255, 222, 190)), (0.92, 0.82, 0.92), (250, 212, 212), 0.42,
                  (255, 236, 140), (255, 232, 180), ((255, 251, 250), (198, 160, 198)), (110, 150, 200),
                  (146, 186, 226), (120, 130, 156)),
    "day": Light(((38, 108, 210), (96, 166, 236), (168, 214, 246)), (1.0, 1.0, 1.0), (190, 216, 238), 0.16,
                 (255, 232, 92), (255, 250, 214), ((255, 255, 255), (196, 208, 224)), (36, 104, 178), (130, 184, 222),
                 (96, 130, 160)),
    "dusk": Light(((58, 28, 100), (186, 52, 84), (255, 146, 44)), (0.60, 0.43, 0.52), (186, 78, 92), 0.2,
                  (255, 214, 84), (255, 160, 60), ((255, 190, 176), (160, 92, 140)), (72, 42, 104), (92, 72, 138),
                  (255, 206, 100)),
    "night": Light(((6, 10, 36), (20, 32, 76), (40, 56, 108)), (0.36, 0.43, 0.58), (52, 70, 120), 0.14,
                   (246, 246, 224), (120, 140, 200), ((136, 144, 176), (82, 92, 132)), (16, 36, 92), (40, 68, 126),
                   (255, 214, 110)),
}


@dataclass(frozen=True)
class Nature:
    """Colours of a season, RGB 0..255 in daylight."""

    grass: tuple
    dots: tuple  # colours of flowers or fallen leaves
    rock: tuple
    snow: float  # how far snow reaches down the mountains, share of their height
    foliage: tuple  # lit, shaded
    pine: tuple  # lit, shaded


NATURES = {
    "spring": Nature((142, 216, 78), ((255, 150, 190), (255, 255, 255), (255, 232, 80)), (136, 128, 132), 0.34,
                     ((255, 196, 220), (222, 112, 164)), ((70, 150, 84), (34, 96, 62))),
    "summer": Nature((70, 148, 52), (), (124, 112, 92), 0.0, ((64, 140, 48), (18, 70, 34)),
                     ((44, 112, 62), (14, 62, 42))),
    "autumn": Nature((206, 152, 62), ((220, 84, 34), (170, 60, 30)), (138, 108, 94), 0.16,
                     ((246, 136, 36), (182, 46, 26)), ((66, 106, 58), (30, 64, 42))),
    "winter": Nature((228, 236, 248), (), (112, 118, 136), 0.62, ((228, 238, 248), (128, 152, 184)),
                     ((84, 128, 120), (36, 76, 78))),
}
WALLS = {"red": (204, 48, 42), "blue": (56, 108, 200), "yellow": (244, 196, 56), "white": (250, 244, 228)}
SNOW = (246, 249, 255)


def ramp(colours, position):
    """Interpolate RGB colours spread evenly over position 0..1; position [..., 1] gives [..., 3]."""
    stops = np.linspace(0, 1, len(colours))
    colours = np.asarray(colours, np.float32)
    flat = np.clip(position[..., 0], 0, 1)
    return np.stack([np.interp(flat, stops, colours[:, k]) for k in range(3)], axis=-1).astype(np.float32)


class Painter:
    """Paints the things of a scene one after the other onto its canvas."""

    def __init__(self, rng, resolution, horizon, season, time):
        self.rng, self.horizon, self.season, self.time = rng, horizon, season, time
        self.light, self.nature = LIGHTS[time], NATURES[season]
        self.canvas = Canvas(resolution)
        self.sun = None
        self.reflection = None

    def lit(self, colour):
        """A material's colour in this light."""
        return np.asarray(colour, np.float32) * np.asarray(self.light.tint, np.float32)

    def lit_ramp(self, colours, start, end, axis="y"):
        """A colour function running through lit colours from start to end along an axis."""
        colours = [self.lit(colour) for colour in colours]
        return lambda y, x: ramp(colours, ((y if axis == "y" else x) - start) / (end - start))

    @property
    def shadow_side(self):
        """+1 where shadows fall to the right, -1 to the left."""
        return 1 if self.sun is None or self.sun["x"] < 0.5 else -1

    def paint(self, things):
        """Sky first, then every thing in order."""
        discs = [thing for thing in things if thing.label == SUN]
        self.sun = discs[0].about if discs else None
        self.sky()
        painters = {SUN: self.disc, CLOUD: self.cloud, MOUNTAIN: self.mountain, GRASS: self.ground, WATER: self.water,
                    ROAD: self.road, TREE: self.tree, HOUSE: self.house}
        for thing in things:
            painters[thing.label](thing)
        return self.canvas

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
                self.canvas.fill([ellipse(x + dx * radius, y + dy * radius, size * radius, size * radius)],
                                 (206, 208, 200), opacity=0.8)

    def cloud(self, thing):
        """Bright above, shaded at the base."""
        top, bottom = thing.about["top"], thing.about["bottom"]
        bright, base = self.light.cloud

        def colour(y, x):
            place = (y - top) / (bottom - top) + 0 * x
            return ramp((bright, bright, base), place)

        self.canvas.fill(thing.polygons, colour, CLOUD)
        for puff in thing.polygons[1:]:
            middle = puff.mean(axis=0)
            self.canvas.fill([(puff - middle) * 0.62 + middle + (-0.1 * self.shadow_side, -0.22) * np.ptp(puff, axis=0)
                              * (0.5, 0.5)], bright, opacity=0.35)

    def mountain(self, thing):
        """Rock paling towards its foot, snow on the heights, shade on the side away from the sun."""
        about, far = thing.about, thing.kind == "far"
        top, base = about["ridge"].min(), about["base"]
        rock = self.lit(self.nature.rock)
        haze = np.asarray(self.light.haze, np.float32)
        near_colour = rock + (0.42 if far else 0.1) * (haze - rock)
        foot = near_colour + 0.4 * (haze - near_colour)
        self.canvas.fill(thing.polygons, lambda y, x: ramp((near_colour, near_colour, foot), (y - top) / (base - top) + 0 * x),
                         MOUNTAIN)
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
        snow = snow + (0.25 if far else 0.0) * (np.asarray(self.light.haze) - snow)
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
        if abs(xs[side[-1]] - xs[crest]) < 0.06:
            return
        down = np.linspace(0, 1, 6)
        spine_x = xs[crest] + self.shadow_side * 0.2 * abs(xs[side[-1]] - xs[crest]) * np.array([0, 1.1, 0.3, 1.5, 0.8, 1.6])
        spine = np.stack([spine_x, ridge[crest] + down * (base + 0.04 - ridge[crest])], axis=1)
        slope = np.stack([xs[side], ridge[side]], axis=1)
        shade = self.lit((52, 50, 78)) * 0.8
        self.canvas.fill([np.concatenate([slope, [(xs[side[-1]], base + 0.04)], spine[::-1]])], shade, opacity=0.42)

    def ground(self, thing):
        """Grass or snow, paler in the distance, with soft patches and the season's dots; mist above the horizon."""
        canvas, horizon = self.canvas, self.horizon
        self.reflection = canvas.image.copy()
        base = self.lit(self.nature.grass)
        patches = smooth_noise(self.rng, canvas.resolution, 9, 5)[..., None]
        far = base + 0.3 * (np.asarray(self.light.haze) - base)
        colours = (far, base, base * 0.84)
        canvas.fill(thing.polygons, lambda y, x: ramp(colours, (y - horizon) / (1 - horizon) + 0 * x), GRASS)
        on_ground = (canvas.labels == GRASS)[..., None]
        canvas.image *= 1 + on_ground * (0.05 if self.season == "winter" else 0.11) * patches
        self.dots()
        canvas.blend(self.light.haze, self.light.mist * np.exp(-(((canvas.y - horizon) / 0.07) ** 2)) + 0 * canvas.x)

    def dots(self):
        """Flowers in spring, fallen leaves in autumn."""
        for dx, dy, size, pick in self.rng.uniform(0, 1, (46, 4)):
            if self.nature.dots:
                y = self.horizon + 0.06 + dy * (0.94 - self.horizon)
                radius = 0.006 + 0.010 * dy * (0.6 + 0.4 * size)
                colour = self.nature.dots[int(pick * len(self.nature.dots))]
                self.canvas.fill([ellipse(dx, y, radius * 1.2, radius, 12)], self.lit(colour), opacity=0.85)

    def mirrored(self):
        """The scene behind the horizon upside down, with the sun's streak."""
        canvas = self.canvas
        rows = (2 * self.horizon - canvas.y[:, 0, 0]) * canvas.resolution
        rows = np.clip(np.abs(rows), 0, int(self.horizon * canvas.resolution)).astype(int)
        mirror = self.reflection[rows]
        if self.sun:
            width = 0.03 + 0.05 * (canvas.y - self.horizon)
            streak = 0.6 * np.exp(-(((canvas.x - self.sun["x"]) / width) ** 2))
            mirror = mirror + streak * (np.asarray(self.light.disc, np.float32) - mirror)
        return mirror

    def water(self, thing):
        """Water (ice in winter) mixed with what it mirrors, and a soft shore."""
        canvas, frozen = self.canvas, self.season == "winter"
        own = np.asarray(self.light.ice if frozen else self.light.water, np.float32)
        ripples = smooth_noise(self.rng, canvas.resolution, 24, 4)[..., None]
        surface = own + (0.22 if frozen else 0.42) * (self.mirrored() - own)
        surface = surface * (1 + (0.04 if frozen else 0.1) * ripples)
        rows = canvas.resolution

        def colour(y, x):
            top, left = int(y[0, 0, 0] * rows), int(x[0, 0, 0] * rows)
            return surface[top : top + y.shape[0], left : left + x.shape[1]]

        canvas.fill(thing.polygons, colour, WATER)

    def road(self, thing):
        """Asphalt with pale edges and a dashed middle line."""
        asphalt = [(128, 124, 130), (96, 92, 100), (78, 76, 86)]
        self.canvas.fill(thing.polygons, self.lit_ramp(asphalt, self.horizon, 1.0), ROAD)
        y, middle, half = (thing.about[key] for key in ("y", "middle", "half"))
        for start in range(8, len(y) - 2, 4):
            rows = slice(start, start + 3)
            left = np.stack([middle[rows] - 0.09 * half[rows], y[rows]], axis=1)
            right = np.stack([middle[rows] + 0.09 * half[rows], y[rows]], axis=1)
            self.canvas.fill([np.concatenate([left, right[::-1]])], self.lit((244, 232, 196)), opacity=0.9)

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
        light, dark = (np.asarray(colour) * (1 + 0.07 * about["shade"]) for colour in self.nature.foliage)
        self.canvas.fill(about["foliage"], self.lit_ramp((light, light, dark), y - height, y - 0.26 * height), TREE)
        for puff in about["foliage"][1:]:
            middle = puff.mean(axis=0)
            small = (puff - middle) * 0.6 + middle - (0.03 * crown * self.shadow_side, 0.05 * height)
            self.canvas.fill([small], self.lit(light), opacity=0.4)

    def pine(self, about):
        """Tiers lit from one side, snow on each in winter."""
        x, crown = about["x"], about["crown"]
        light, dark = self.nature.pine
        colours = (light, dark) if self.shadow_side > 0 else (dark, light)
        for tier in about["foliage"]:
            self.canvas.fill([tier], self.lit_ramp(colours, x - 0.35 * crown, x + 0.35 * crown, "x"), TREE)
            if self.season == "winter":
                top, right, left = tier
                cap = [top, top + 0.62 * (right - top), top + 0.42 * ((right + left) / 2 - top),
                       top + 0.62 * (left - top)]
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
            fill([np.array([roof[0], roof[1], roof[1] + 0.72 * (roof[2] - roof[1]), roof[0] + 0.72 * (roof[3] - roof[0])])],
                 self.lit(SNOW))
        fill([about["door"]], self.lit((84, 52, 40)))
        window = self.light.window if self.time in ("dusk", "night") else self.lit(self.light.window)
        for pane in about["windows"]:
            fill([pane], window)


def paint_scene(rng, resolution, horizon, things, season, time):
    """Paint a composed scene: (image uint8 [R, R, 3], mask uint8 [R, R])."""
    canvas = Painter(rng, resolution, horizon, season, time).paint(things)
    return canvas.to_uint8(), canvas.labels
