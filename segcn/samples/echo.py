"""Phantoms of echocardiograms, made up: two apical views of a beating heart, with speckle from a physical model.

Lengths are in mm, angles in radians, levels in dB. The probe is at (0, 0), z points into the body, x to the right of
the image; beam coordinates are the distance r from the probe and the angle from the z axis. Only the caption holds
view, phase and quality, and only the mask the shapes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.data.palette import Label, Palette
from segcn.samples.writer import SampleKind, SamplePair, write_set

ECHO_PALETTE = Palette((  # ids as in CAMUS (Leclerc et al. 2019, doi:10.1109/TMI.2019.2900516), colors of Okabe and Ito
    Label(0, "background", (0, 0, 0)), Label(1, "left ventricle", (86, 180, 233)),
    Label(2, "myocardium", (213, 94, 0)), Label(3, "left atrium", (240, 228, 66)),
))  # fmt: skip
BACKGROUND, VENTRICLE, MYOCARDIUM, ATRIUM = range(4)
VIEWS, PHASES = ("two-chamber", "four-chamber"), ("diastole", "systole")
QUALITIES = {"good": 0.4, "medium": 0.42, "poor": 0.18}  # with their shares
IMAGES_OF_A_PATIENT = len(VIEWS) * len(PHASES)
DEPTHS, BEAMS = 448, 144  # samples of the beam grid
OVERSAMPLING = 2  # each way, averaged
BLOOD, MUSCLE, TISSUE = -50.0, -20.0, -25.0  # dB of the mean echo
FOCUS, FACE = 70.0, 4.0  # mm from the probe: where the beam is narrowest, where the sector begins
TRICUSPID = -8.0  # mm from the mitral plane
WHITE = 4.0  # dB below 0 that is white
DENSITY = {"blood": 0.7, "tissue": 6.0}  # mean number of scatterers in a cell of the beam grid


@dataclass(frozen=True)
class Echo(SamplePair):
    """With what the caption says, and the patient whose four images these are."""

    view: str
    phase: str
    quality: str
    patient: int


@dataclass(frozen=True)
class Heart:
    """The shapes of a heart in one view and phase."""

    x: float  # apex of the ventricle
    z: float
    tilt: float  # of the ventricle's axis
    bend: float  # of the axis, at half its length
    length: float  # apex to mitral plane
    half: float  # largest half width
    waist: float  # half width at the mitral plane, as a share of it
    widest: float  # where it is widest, as a share of the length
    roundness: float  # exponent of the apex: 0.5 is an ellipse
    skew: float  # how much wider the right side is, as a share
    wall: float  # thickness of the myocardium
    apex_wall: float
    slope: float  # of the mitral plane
    atrium_length: float
    atrium_half: float
    atrium_tilt: float  # against the ventricle's axis
    right: float  # width of the right ventricle; 0: not in this view
    right_apex: float  # where it begins, as a share of the length
    right_atrium: float  # width
    closed: float  # the mitral valve: 1 closed, 0 wide open
    warp: np.ndarray  # [terms, 6]: smooth displacements of everything
    muscles: tuple  # of papillary muscles (side, place as a share of the length, size)


@dataclass(frozen=True)
class Scan:
    """What probe and machine do to the images of a view; the same in both phases."""

    angle: float  # half of the sector's
    depth: float
    top: float  # of the probe, as a share of the image's height
    middle: float  # as a share of the image's width
    height: float  # that the image shows
    beam: float  # standard deviation of the beam's profile
    pulse: float  # standard deviation of the pulse
    gain: float
    sliders: np.ndarray  # error of the time-gain compensation at even depths
    contact: np.ndarray  # at even angles
    noise: float  # electronic, at the probe
    clutter: float  # haze near the probe
    lobes: float  # amplitude of the side lobes
    dynamic: float  # dynamic range that is shown
    gamma: float
    along: float  # echo of a surface along the beam, as a share of one across it


def draw_echo(seed: int, index: int, resolution: int = 128) -> Echo:
    """Image `index` of the set `seed`; a pure function of its arguments. Four images in a row are of one patient."""
    patient, (view, phase) = index // IMAGES_OF_A_PATIENT, divmod(index % IMAGES_OF_A_PATIENT, len(PHASES))
    scan_rng = np.random.default_rng([seed, patient, 1, view])
    quality = str(scan_rng.choice(list(QUALITIES), p=list(QUALITIES.values())))
    heart, reach = draw_heart(seed, patient, view, phase)
    scan = draw_scan(scan_rng, list(QUALITIES).index(quality), reach)
    rng = np.random.default_rng([seed, patient, 2, view, phase])
    echoes = reflect(rng, np.random.default_rng([seed, patient, 3, view]), heart, scan)
    beams = compress(envelope(rng, echoes, scan), scan)
    image, mask = scan_convert(beams, heart, scan, resolution)
    names = VIEWS[view], PHASES[phase], quality
    more = dict(zip(("view", "phase", "quality"), names, strict=True))
    more["patient"] = f"{seed % 2**32:08x}-{patient:05d}"
    return Echo(np.repeat(image[..., None], 3, axis=2), mask, describe_echo(*names), *names, patient, more=more)


def describe_echo(view: str, phase: str, quality: str) -> str:
    """The caption: "a two-chamber echocardiogram, end of diastole, good image quality"."""
    return f"a {view} echocardiogram, end of {phase}, {quality} image quality"


# --- Anatomy


def draw_heart(seed: int, patient: int, view: int, phase: int) -> tuple[Heart, float]:
    """The heart of a patient in one view and phase, and how deep it reaches.

    From end of diastole to end of systole the walls keep their volume, the apex stays, the mitral plane comes nearer.
    """
    own = np.random.default_rng([seed, patient, 0])
    length, thickness = np.clip(own.normal(86, 8), 66, 108), np.clip(own.normal(9.3, 1.4), 6.5, 13.5)
    half = length * np.clip(own.normal(0.275, 0.035), 0.2, 0.37)
    ejected = np.clip(own.normal(0.54, 0.12), 0.18, 0.74)
    atrium_length, atrium_half = length * own.uniform(0.42, 0.64), half * own.uniform(0.82, 1.22)
    shrunk, right, roundness = own.uniform(0.74, 0.9), own.uniform(0.75, 1.35), own.uniform(0.4, 0.56)
    probe_z, apex_share = own.uniform(9, 20), own.uniform(0.6, 0.95)

    rng = np.random.default_rng([seed, patient, 4, view])
    length = length * rng.uniform(0.86, 1.0)  # foreshortened
    half = half * rng.uniform(0.9, 1.08)
    tilt = np.radians(np.clip(rng.normal(-3 if view else 2, 7), -18, 18))
    about = {
        "x": rng.normal(9 if view else 0, 6), "tilt": tilt, "bend": rng.normal(0, 2.5), "waist": rng.uniform(0.66, 0.9),
        "widest": rng.uniform(0.5, 0.68), "skew": rng.normal(0, 0.08), "slope": rng.normal(0, 0.09),
        "atrium_tilt": rng.normal(0, 0.12), "right_apex": rng.uniform(0.12, 0.34), "roundness": roundness,
        "right": view * half * right * rng.uniform(0.85, 1.1), "right_atrium": half * rng.uniform(1.0, 1.6),
    }  # fmt: skip
    amount = rng.uniform(0.4, 2.0, 3) * (1.0, 0.7, 0.5)
    waves, turns = rng.uniform(0.02, 0.05, (3, 2)) * (1, 1.6), rng.uniform(0, 2 * np.pi, (3, 3))
    warp = np.column_stack([amount, waves, turns])
    sides = rng.permutation([-1, 1])
    muscles = tuple((side, rng.uniform(0.38, 0.6), rng.uniform(0.6, 1.1)) for side in sides[: rng.choice(3)])
    atrium_length, atrium_half = atrium_length * rng.uniform(0.9, 1.1), atrium_half * rng.uniform(0.9, 1.1)
    closed = rng.uniform(0.3, 1.0)

    reach = probe_z + thickness + length + atrium_length
    if phase:
        shorter = 1 - 0.3 * ejected
        narrower = np.sqrt((1 - ejected) / shorter)
        muscle = ((half + thickness) ** 2 - half**2) / shorter  # kept
        thickness = np.sqrt((half * narrower) ** 2 + muscle) - half * narrower
        atrium_length = atrium_length + length * (1 - shorter) * 0.85  # its roof hardly moves
        length, half = length * shorter, half * narrower
        about["right"], about["bend"] = about["right"] * (0.68 + 0.1 * (1 - ejected)), about["bend"] * narrower
        about["waist"] = min(about["waist"] * 1.12, 0.98)
        closed = 1.0
    else:
        atrium_half = atrium_half * shrunk
    thickness, apex_wall = float(thickness), float(thickness * apex_share)
    heart = Heart(
        z=float(probe_z + apex_wall), length=float(length), half=float(half), wall=thickness, apex_wall=apex_wall,
        atrium_length=float(atrium_length), atrium_half=float(atrium_half), closed=closed, warp=warp, muscles=muscles,
        **about,
    )  # fmt: skip
    return heart, float(reach)


@dataclass(frozen=True)
class Places:
    """Where points are in a heart: distances in mm that are negative within a structure, and only nearly exact."""

    along: np.ndarray  # the ventricle's axis, from its apex
    across: np.ndarray  # to the right
    cavity: np.ndarray  # of the left ventricle
    outer: np.ndarray  # surface of its myocardium
    plane: np.ndarray  # of the mitral valve; negative on the side of the ventricle
    atrium: np.ndarray
    atrium_along: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Class ids."""
        mask = np.where((self.outer < 0) & (self.plane < 0), np.uint8(MYOCARDIUM), np.uint8(BACKGROUND))
        mask[(self.atrium < 0) & (self.plane >= 0)] = ATRIUM
        mask[(self.cavity < 0) & (self.plane < 0)] = VENTRICLE
        return mask


def locate(heart: Heart, x: np.ndarray, z: np.ndarray) -> Places:
    """Where the points (x, z) are in the heart."""
    for amount, wave_x, wave_z, turn_x, turn_z, phase in heart.warp:
        shift = amount * np.sin(wave_x * x + wave_z * z + turn_x)
        x, z = x + shift * np.cos(turn_z), z + shift * np.sin(phase)
    u, v = into(heart, x, z)
    skew = 1 + heart.skew * np.tanh(v / 8)
    half = bulge(u / heart.length, heart.widest, heart.waist, heart.roundness) * heart.half * skew
    outer_length = heart.length + heart.apex_wall
    widest = (heart.widest * heart.length + heart.apex_wall) / outer_length
    base = (heart.waist * heart.half + 0.72 * heart.wall) / (heart.half + heart.wall)
    start = u + heart.apex_wall
    outer = bulge(start / outer_length, widest, base, heart.roundness) * (heart.half + heart.wall) * skew
    cavity = np.where(u < 0, np.hypot(u, v), np.abs(v) - half)
    surface = np.where(start < 0, np.hypot(start, v), np.abs(v) - outer)
    waist = heart.waist * heart.half
    plane = u - heart.length - heart.slope * v
    turn = heart.atrium_tilt
    s, w = (u - heart.length) * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - (u - heart.length) * np.sin(turn)
    share = np.clip(s / heart.atrium_length, 0, 1)
    mouth = min(waist * 0.98 / heart.atrium_half, 1.0)
    rise = np.sin(np.pi / 2 * np.clip(share / 0.45, 0, 1))
    room = heart.atrium_half * (mouth + (1 - mouth) * rise) * fall(share, 0.55)
    atrium = np.where(s > heart.atrium_length, np.hypot(s - heart.atrium_length, w), np.abs(w) - room)
    return Places(u, v, cavity, surface, plane, atrium, s)


def right_heart(heart: Heart, at: Places) -> tuple[np.ndarray, np.ndarray]:
    """Distances, as in `Places`, to the free walls of the right ventricle and atrium, which lie left of the septum."""
    share = np.clip((at.along / heart.length - heart.right_apex) / (0.95 - heart.right_apex), 0, 1)
    room = heart.right * np.sin(np.pi * 0.62 * share**0.8) / np.sin(np.pi * 0.62) * (share > 0)
    deep = np.clip(at.atrium_along / (0.9 * heart.atrium_length), 0, 1)
    return at.outer - room, at.atrium - 1.1 * heart.right_atrium * fall(deep, 0.35)


def into(heart: Heart, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(along, across) the ventricle's axis of the points (x, z)."""
    dx, dz = x - heart.x, z - heart.z
    u = dx * np.sin(heart.tilt) + dz * np.cos(heart.tilt)
    share = np.clip(u / heart.length, 0, 1)
    return u, dx * np.cos(heart.tilt) - dz * np.sin(heart.tilt) - heart.bend * 4 * share * (1 - share)


def out_of(heart: Heart, along: np.ndarray, across: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, z) of points given along and across the ventricle's axis; the bend and the warp are left out."""
    x = heart.x + along * np.sin(heart.tilt) + across * np.cos(heart.tilt)
    return x, heart.z + along * np.cos(heart.tilt) - across * np.sin(heart.tilt)


def bulge(share: np.ndarray, widest: float, waist: float, roundness: float) -> np.ndarray:
    """Half width along an axis as a share of the largest: 0 at share 0, 1 at `widest`, `waist` at 1."""
    before = np.clip((widest - share) / widest, 0, 1)
    after = np.clip((share - widest) / (1 - widest), 0, 1.3)
    return (1 - before * before) ** roundness * (1 - (1 - waist) * after * after)


def fall(share: np.ndarray, start: float) -> np.ndarray:
    """1 up to `start`, then round to 0 at 1."""
    return np.sqrt(np.clip(1 - np.clip((share - start) / (1 - start), 0, 1) ** 2, 0, 1))


# --- Physics


def draw_scan(rng: np.random.Generator, grade: int, reach: float) -> Scan:
    """Settings and faults of an examination; grade: 0 good, 1 medium, 2 poor quality. reach: depth of the heart."""
    depth, angle = float(np.clip(reach + rng.uniform(-4, 20), 105, 210)), np.radians(rng.uniform(32, 42))
    height = max(depth * rng.uniform(1.03, 1.08), 2 * depth * np.sin(angle) * rng.uniform(0.87, 1.0))
    contact = np.cumsum(rng.normal(0, (1.2, 2.0, 3.0)[grade], 9))
    contact -= np.sort(contact)[-3:].mean()  # the operator turns the gain up
    ramp = np.linspace(-1, 1, 9) * rng.choice([-1, 1])
    contact -= np.clip(ramp - rng.uniform(-0.1, 0.6), 0, None) * (4, 9, 16)[grade] * rng.uniform(0.3, 1.3)
    return Scan(
        angle=float(angle), depth=depth, height=float(height), middle=0.5 + rng.normal(0, 0.012),
        top=float(max(0.012, (1 - depth / height) * rng.uniform(0.3, 0.6))),
        beam=np.radians((0.85, 0.98, 1.15)[grade] * rng.uniform(0.85, 1.2)), pulse=rng.uniform(0.42, 0.62),
        gain=rng.normal(0, 2.0) + (0, 0, -1)[grade], sliders=rng.normal(0, 1.6, 7), contact=contact,
        noise=(-66, -61, -55)[grade] + rng.uniform(-3, 3), clutter=(-24, -17, -11)[grade] + rng.normal(0, 4),
        lobes=(0.015, 0.025, 0.045)[grade] * rng.uniform(0.6, 1.6), dynamic=rng.uniform(46, 58),
        gamma=rng.uniform(1.15, 1.6), along=(0.3, 0.16, 0.06)[grade] * rng.uniform(0.6, 1.4),
    )  # fmt: skip


def beam_grid(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Depths [DEPTHS, 1] and angles [1, BEAMS] of the samples."""
    r = (np.arange(DEPTHS, dtype=np.float32) + 0.5) * np.float32(scan.depth / DEPTHS)
    return r[:, None], np.linspace(-scan.angle, scan.angle, BEAMS, dtype=np.float32)[None]


def texture(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A smooth random field of the beam grid with so many free values each way, standard deviation about 1."""
    coarse = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    return np.asarray(coarse.resize((BEAMS, DEPTHS), Image.Resampling.BICUBIC)) * np.float32(1.4)


def scattered(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    """Sums of the echoes of a Poisson number of scatterers in each cell, of unit mean power and random phase."""
    noise = rng.standard_normal((2, *shape), dtype=np.float32)
    count = rng.poisson(density, shape).astype(np.float32)
    return (noise[0] + 1j * noise[1]) * np.sqrt(count / (2 * density))


def power(level: np.ndarray | float) -> np.ndarray:
    """Power of a level in dB."""
    return np.exp(np.asarray(level, np.float32) * np.float32(np.log(10) / 10))


def reflect(rng: np.random.Generator, still: np.random.Generator, heart: Heart, scan: Scan) -> np.ndarray:
    """The echo of each cell of the beam grid, complex [DEPTHS, BEAMS], after attenuation and time-gain compensation.

    Tissue scatters at random, surfaces reflect what hits them squarely, fibers along the beam scatter less. rng is of
    this moment, `still` of what does not move with the heart.
    """
    r, angle = beam_grid(scan)
    at = locate(heart, r * np.sin(angle), r * np.cos(angle))
    steps = np.float32(scan.depth / DEPTHS), np.float32(2 * scan.angle / BEAMS)

    def distance(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A field as mm from its surface, and the squared cosine between the beam and the surface's normal."""
        by_r, by_angle = np.gradient(field, *steps)
        slope = np.sqrt(by_r**2 + (by_angle / r) ** 2) + 1e-3
        return field / slope, (by_r / slope) ** 2

    rough = texture(rng, 90, 40)
    cavity, across_cavity = distance(at.cavity)
    surface, across_surface = distance(at.outer)
    atrium, across_atrium = distance(at.atrium)
    before = at.plane < 0
    inside = (cavity + rough * np.clip(1.3 - at.along / heart.length, 0.5, 1.3) < 0) & before
    muscle = (surface < 0) & before & ~inside
    for side, place, size in heart.muscles:
        middle = side * (heart.half - 4.5 * size)
        blob = np.hypot((at.along - place * heart.length) / 11, (at.across - middle) / 4) + 0.12 * rough
        muscle |= (blob < size) & inside
    inside &= ~muscle
    blood = inside | ((atrium + 0.4 * rough < 0) & ~before)
    fibers = MUSCLE + 3 * texture(still, 6, 5) + 2 * texture(rng, 24, 12) + 7 * (across_surface - 0.3)
    level = np.where(muscle, fibers, 0).astype(np.float32)

    beyond = np.where(before, surface, atrium)  # mm outside of the heart
    lines = [
        (cavity, across_cavity, before, 0.9, -16.0), (surface, across_surface, before & (at.across > 0), 1.6, -8.0),
        (atrium, across_atrium, ~before, 1.2, -15.0),
    ]  # fmt: skip
    left = before & (at.across < 0)
    if heart.right:
        (right, across_right), (other, across_other) = map(distance, right_heart(heart, at))
        above, below = ((at.across < 0) & where for where in (at.plane < TRICUSPID, at.plane >= TRICUSPID))
        blood |= above & (surface > 0) & (right + rough < 0)
        blood |= below & (atrium > 3.5 + 0.8 * rough) & (other < 0) & (at.atrium_along < heart.atrium_length)
        wall = above & (surface > 0) & (right + rough >= 0) & (right < 4.5)
        level = np.where(wall, MUSCLE - 2 + 2.5 * texture(rng, 24, 12), level)
        muscle |= wall
        beyond = np.where(above, right - 4.5, np.where(below, other, beyond))
        lines += [
            (surface, across_surface, left, 0.8, -22.0), (right - 4.5, across_right, above, 1.3, -9.0),
            (other, across_other, below & (at.atrium_along > 0), 1.2, -15.0),
        ]  # fmt: skip
    else:
        lines.append((surface, across_surface, left, 1.6, -8.0))
    outside = ~blood & ~muscle
    away = np.clip(beyond - 3, 0, None)
    on_right, on_left = still.uniform(0.05, 0.45, 2).astype(np.float32)
    falling = np.where(at.across > 0, on_right, on_left)
    tissue = TISSUE + 5.5 * texture(still, 14, 9) - np.minimum(away * falling, 26)
    level = np.where(outside, tissue, np.where(blood, BLOOD + 4 * texture(still, 8, 6), level))

    total = power(level)
    coherent = np.zeros_like(total)
    for field, facing, where, width, line_level in lines:
        shine = np.exp(-((field / width) ** 2)) * where * (scan.along + (1 - scan.along) * facing)
        coherent += shine * power(line_level + 4 * texture(rng, 30, 18))
    dense, thin = (scattered(rng, total.shape, DENSITY[name]) for name in ("tissue", "blood"))
    glint = np.exp(1j * 3 * texture(rng, 40, 30))
    echoes = np.where(blood, thin, dense) * np.sqrt(total) + (0.9 * dense + 0.13 * glint) * np.sqrt(coherent)
    deposit(echoes, *valve_points(rng, heart), scan)

    loss = np.where(blood, 0.35, np.where(muscle, 1.5, 2.0)) + 6.0 * (coherent > power(-14.0))
    passed = -np.cumsum(loss, axis=0) * steps[0] / 10 + 1.15 * r / 10
    passed += np.interp(r[:, 0], np.linspace(0, scan.depth, 7), scan.sliders)[:, None]
    lit = np.interp(angle[0], np.linspace(-scan.angle, scan.angle, 9), scan.contact)[None] * (1 - np.exp(-r / 18))
    echoes *= np.sqrt(power(passed + lit))
    haze = scan.clutter - 0.55 * r + 4 * texture(still, 30, 9)
    return echoes + scattered(still, echoes.shape, DENSITY["tissue"]) * np.sqrt(power(haze))


def valve_points(rng: np.random.Generator, heart: Heart) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, z, amplitude) of the scatterers of the mitral annulus and leaflets, and of the tricuspid valve's."""
    waist, spots = heart.waist * heart.half, []
    rings = [(-waist, waist, 0.0)]
    if heart.right:
        edge = -waist - 0.9 * heart.wall
        rings.append((edge - heart.right, edge, -TRICUSPID))
    for start, end, higher in rings:
        middle, half = (start + end) / 2 + rng.uniform(-0.15, 0.15) * waist, (end - start) / 2
        for hinge in (start, end):
            side = np.sign(hinge - middle)
            base = np.array([heart.length - higher + heart.slope * hinge, hinge])
            tip = np.array([heart.length - higher - 4 - (1 - heart.closed) * 0.45 * half - rng.uniform(0, 3),
                            middle + side * (1 - heart.closed) * 0.5 * half])  # fmt: skip
            knee = (base + tip) / 2 + (rng.uniform(0, 3), side * (1 - heart.closed) * 2)
            t = np.sort(rng.uniform(0, 1, (160, 1)), axis=0)
            leaflet = (1 - t) ** 2 * base + 2 * t * (1 - t) * knee + t**2 * tip + rng.normal(0, 0.35, (160, 2))
            ring = base + (0, 1.5 * side) + rng.normal(0, 1, (90, 2)) * (2.2, 1.8)
            spots += [(leaflet, 0.026 * rng.uniform(0.3, 1.1)), (ring, 0.085)]
    points = np.concatenate([each for each, _ in spots])
    levels = [level * (0.6 + 1.2 * scattered(rng, (len(each),), 9)) for each, level in spots]
    return *out_of(heart, points[:, 0], points[:, 1]), np.concatenate(levels)


def deposit(echoes: np.ndarray, x: np.ndarray, z: np.ndarray, amplitude: np.ndarray, scan: Scan) -> None:
    """Add single scatterers, as near in phase as those of a surface are, to the cells that they lie in."""
    row = np.hypot(x, z) / scan.depth * DEPTHS
    column = (np.arctan2(x, z) / scan.angle + 1) / 2 * (BEAMS - 1) + 0.5
    kept = (row < DEPTHS) & (column >= 0) & (column < BEAMS)
    np.add.at(echoes, (row[kept].astype(int), column[kept].astype(int)), amplitude[kept].astype(echoes.dtype))


def envelope(rng: np.random.Generator, echoes: np.ndarray, scan: Scan) -> np.ndarray:
    """What the beams receive: echoes blurred by pulse and beam, with noise, without the carrier; float [DEPTHS, BEAMS].

    In baseband a pulse is a Gaussian along depth, and a focused beam a Gaussian of nearly constant angle with side
    lobes: speckle is as short everywhere, and wider with depth. The response has unit energy, so a mean echo of 0 dB
    stays one.
    """
    r, _ = beam_grid(scan)
    rows, columns = DEPTHS + 32, BEAMS + 24  # echoes of one edge must not reach the other
    width = scan.beam * np.hypot(1, 0.45 * (FOCUS / r - 1)) / (2 * scan.angle / BEAMS)
    wave = np.fft.fftfreq(columns).astype(np.float32)[None]
    beam = np.exp(-2 * (np.pi * width * wave) ** 2) + 7 * scan.lobes * np.exp(-2 * (np.pi * 7 * width * wave) ** 2)
    beam = (beam / np.sqrt((beam**2).mean(axis=1, keepdims=True))).astype(np.float32)
    received = np.fft.ifft(np.fft.fft(echoes.astype(np.complex64), columns, axis=1) * beam, axis=1)[:, :BEAMS]
    hiss = scan.noise + 1.15 * r / 10 + np.interp(r, np.linspace(0, scan.depth, 7), scan.sliders)
    received += scattered(rng, echoes.shape, 50.0) * np.sqrt(power(hiss))
    length = scan.pulse / (scan.depth / DEPTHS)
    pulse = np.exp(-2 * (np.pi * length * np.fft.fftfreq(rows).astype(np.float32)) ** 2)
    pulse = (pulse / np.sqrt((pulse**2).mean())).astype(np.float32)[:, None]
    return np.abs(np.fft.ifft(np.fft.fft(received, rows, axis=0) * pulse, axis=0)[:DEPTHS])


def compress(received: np.ndarray, scan: Scan) -> np.ndarray:
    """The logarithm of an envelope, cut to the dynamic range, as grey values from 0 to 255."""
    level = 20 * np.log10(received + 1e-6) + scan.gain
    return 255 * np.clip((level + WHITE + scan.dynamic) / scan.dynamic, 0, 1) ** scan.gamma


def scan_convert(beams: np.ndarray, heart: Heart, scan: Scan, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """(image, class ids), uint8 [R, R] each: beams interpolated, black outside of the sector."""
    _, _, r, angle, shown = pixel_grid(scan, resolution * OVERSAMPLING)
    row = np.clip(r * (DEPTHS / scan.depth) - 0.5, 0, DEPTHS - 1.001)
    column = np.clip((angle / scan.angle + 1) / 2 * (BEAMS - 1), 0, BEAMS - 1.001)
    top, left = row.astype(int), column.astype(int)
    down, right = row - top, column - left
    flat, first = beams.ravel(), top * BEAMS + left
    upper = flat[first] * (1 - right) + flat[first + 1] * right
    lower = flat[first + BEAMS] * (1 - right) + flat[first + BEAMS + 1] * right
    image = (upper * (1 - down) + lower * down) * shown
    image = image.reshape(resolution, OVERSAMPLING, resolution, OVERSAMPLING).mean(axis=(1, 3))
    x, z, *_, shown = pixel_grid(scan, resolution)
    return np.rint(image).astype(np.uint8), locate(heart, x, z).mask * shown


def pixel_grid(scan: Scan, size: int) -> tuple[np.ndarray, ...]:
    """(x, z, distance, angle) of the pixel centers of an image of size x size, and whether the sector holds them."""
    centers = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x = np.broadcast_to((centers - scan.middle)[None] * np.float32(scan.height), (size, size))
    z = np.broadcast_to((centers - scan.top)[:, None] * np.float32(scan.height), (size, size))
    r, angle = np.hypot(x, z), np.arctan2(x, z)
    return x, z, r, angle, (r > FACE) & (r < scan.depth) & (np.abs(angle) < scan.angle)


def write_echo(
    out: str | Path, count: int, resolution: int = 128, seed: int = 0, test: int | None = None, workers: int = 0
) -> Path:
    """Write `count` images to `out`, or with `test` to out/train and out/test, as `writer.write_set` does.

    No patient has images on both sides.
    """
    kind = SampleKind("echo", ECHO_PALETTE, {"train": draw_echo, "test": draw_echo})
    return write_set(out, kind, count, resolution, seed, test, workers)
