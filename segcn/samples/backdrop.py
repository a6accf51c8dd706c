"""The far parts of a picture: sky, sun, clouds and mountains."""

import numpy as np

from segcn.samples.canvas import Canvas, ellipse
from segcn.samples.colours import LIGHTS, NATURES, SNOW
from segcn.samples.things import CLOUD, MOUNTAIN, SUN


def ramp(colours, position):
    """Interpolate RGB colours spread evenly over position 0..1; position [..., 1] gives [..., 3]."""
    stops = np.linspace(0, 1, len(colours))
    colours = np.asarray(colours, np.float32)
    flat = np.clip(position[..., 0], 0, 1)
    return np.stack([np.interp(flat, stops, colours[:, k]) for k in range(3)], axis=-1).astype(np.float32)


class Backdrop:
    """A canvas in one season's and one hour's colours, and the painters of sky, sun, clouds and mountains."""

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
                self.canvas.fill(
                    [ellipse(x + dx * radius, y + dy * radius, size * radius, size * radius)],
                    (206, 208, 200),
                    opacity=0.8,
                )

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
            self.canvas.fill(
                [
                    (puff - middle) * 0.62
                    + middle
                    + (-0.1 * self.shadow_side, -0.22) * np.ptp(puff, axis=0) * (0.5, 0.5)
                ],
                bright,
                opacity=0.35,
            )

    def mountain(self, thing):
        """Rock paling towards its foot, snow on the heights, shade on the side away from the sun."""
        about, far = thing.about, thing.kind == "far"
        top, base = about["ridge"].min(), about["base"]
        rock = self.lit(self.nature.rock)
        haze = np.asarray(self.light.haze, np.float32)
        near_colour = rock + (0.42 if far else 0.1) * (haze - rock)
        foot = near_colour + 0.4 * (haze - near_colour)
        self.canvas.fill(
            thing.polygons,
            lambda y, x: ramp((near_colour, near_colour, foot), (y - top) / (base - top) + 0 * x),
            MOUNTAIN,
        )
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
        spine_x = xs[crest] + self.shadow_side * 0.2 * abs(xs[side[-1]] - xs[crest]) * np.array(
            [0, 1.1, 0.3, 1.5, 0.8, 1.6]
        )
        spine = np.stack([spine_x, ridge[crest] + down * (base + 0.04 - ridge[crest])], axis=1)
        slope = np.stack([xs[side], ridge[side]], axis=1)
        shade = self.lit((52, 50, 78)) * 0.8
        self.canvas.fill([np.concatenate([slope, [(xs[side[-1]], base + 0.04)], spine[::-1]])], shade, opacity=0.42)
