"""Colours a layout for a season and a time of day."""

import numpy as np

from segcn.samples.backdrop import Backdrop, ramp
from segcn.samples.canvas import ellipse, smooth_noise
from segcn.samples.colours import SNOW, WALLS
from segcn.samples.things import CLOUD, GRASS, HOUSE, MOUNTAIN, ROAD, SUN, TREE, WATER


class Painter(Backdrop):
    """Paints the things of a scene one after the other, the far ones first."""

    def paint(self, things):
        """Sky first, then every thing in order."""
        discs = [thing for thing in things if thing.label == SUN]
        self.sun = discs[0].about if discs else None
        self.sky()
        painters = {
            SUN: self.disc,
            CLOUD: self.cloud,
            MOUNTAIN: self.mountain,
            GRASS: self.ground,
            WATER: self.water,
            ROAD: self.road,
            TREE: self.tree,
            HOUSE: self.house,
        }
        for thing in things:
            painters[thing.label](thing)
        return self.canvas

    def ground(self, thing):
        """Grass or snow with soft patches and the season's dots; mist along the horizon."""
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
                cap = [
                    top,
                    top + 0.62 * (right - top),
                    top + 0.42 * ((right + left) / 2 - top),
                    top + 0.62 * (left - top),
                ]
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
            fill(
                [
                    np.array(
                        [
                            roof[0],
                            roof[1],
                            roof[1] + 0.72 * (roof[2] - roof[1]),
                            roof[0] + 0.72 * (roof[3] - roof[0]),
                        ]
                    )
                ],
                self.lit(SNOW),
            )
        fill([about["door"]], self.lit((84, 52, 40)))
        window = self.light.window if self.time in ("dusk", "night") else self.lit(self.light.window)
        for pane in about["windows"]:
            fill([pane], window)


def paint_scene(rng, resolution, horizon, things, season, time):
    """Paint a composed scene: (image uint8 [R, R, 3], mask uint8 [R, R])."""
    canvas = Painter(rng, resolution, horizon, season, time).paint(things)
    return canvas.to_uint8(), canvas.labels
