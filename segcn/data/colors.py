"""Colors as people see them: CIE L*a*b*, how different two colors look, and to whom."""

from collections.abc import Collection
from itertools import combinations

import numpy as np

from segcn.data.palette import Palette

TO_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.95030]])
KNEE = 6 / 29  # below it the lightness of dark colors is taken as linear
SRGB = np.arange(256) / 255
LINEAR = np.where(SRGB <= 0.04045, SRGB / 12.92, ((SRGB + 0.055) / 1.055) ** 2.4)
VISIONS = {  # linear RGB to what is seen: Machado, Oliveira and Fernandes 2009 (doi:10.1109/TVCG.2009.113), severity 1
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
APART = 12  # CIEDE2000 from which on two classes of a mask are seen as two at a glance


def to_lab(image: np.ndarray, vision: str = "normal") -> np.ndarray:
    """sRGB, uint8 [..., 3] -> CIE 1976 L*a*b* under D65, float64 [..., 3]: L* in [0, 100].

    vision: one of VISIONS. https://en.wikipedia.org/wiki/CIELAB_color_space
    """
    seen = LINEAR[image] if vision == "normal" else (LINEAR[image] @ VISIONS[vision].T).clip(0, 1)
    share = seen @ TO_XYZ.T / TO_XYZ.sum(1)  # of white's X, Y and Z
    x, y, z = np.moveaxis(np.where(share > KNEE**3, np.cbrt(share), share / (3 * KNEE**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def ciede2000(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How different two colors look, L*a*b* float [..., 3] each -> float [...]; 1 is just noticed side by side.

    Sharma, Wu and Dalal 2005 (doi:10.1002/col.20070), whose numbers of equations these are.
    """
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    mean = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(mean / (mean + 25.0**7))  # 4: of a*, so that greys weigh more
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    grey = c1 * c2 == 0  # without a hue
    turn = np.where(grey, 0, (h2 - h1 + 180) % 360 - 180)  # 10
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2)  # 8, 9, 11
    light, c, h = (l1 + l2) / 2, (c1 + c2) / 2, np.where(grey, h1 + h2, (h1 + turn / 2) % 360)  # 12 to 14
    t = sum(
        (weight * np.cos(np.radians(times * h + shift))
         for weight, times, shift in ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.2, 4, -63))), start=1.0,
    )  # fmt: skip
    blue = np.radians(60 * np.exp(-(((h - 275) / 25) ** 2)))  # 16
    turned = 2 * np.sqrt(c**7 / (c**7 + 25.0**7)) * np.sin(blue)  # 17, 21
    sl, sc, sh = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2), 1 + 0.045 * c, 1 + 0.015 * c * t
    lightness, chroma, hue = dl / sl, dc / sc, dh / sh
    return np.sqrt(lightness**2 + chroma**2 + hue**2 - turned * chroma * hue)  # 22


def look_alike(palette: Palette) -> list[tuple[float, str, str, str]]:
    """(CIEDE2000, class, class, to whom) of the labels whose colors are nearer than APART, the nearest first.

    Each pair once: normal where all see it so, else the vision to which it is nearest.
    """
    colors = np.array([label.color for label in palette.labels], np.uint8)
    pairs = np.array(list(combinations(range(len(colors)), 2)), int).reshape(-1, 2)
    labs = [to_lab(colors, vision) for vision in VISIONS]
    found = []
    for (one, other), near in zip(pairs, np.stack([ciede2000(*lab[pairs.T]) for lab in labs], 1), strict=True):
        whose = 0 if near[0] < APART else int(near.argmin())
        if near[whose] < APART:
            found.append((float(near[whose]), palette.names[one], palette.names[other], list(VISIONS)[whose]))
    return sorted(found)


def said_alike(palette: Palette, ids: Collection[int]) -> list[str]:
    """A line each on the classes, of these ids, that look alike to all, and to people who are color blind."""
    found, lines = look_alike(Palette(tuple(label for label in palette.labels if label.id in ids))), []
    for blind in (False, True):
        pairs = [pair for pair in found if (pair[3] != "normal") == blind]
        if pairs:
            apart, one, other, vision = pairs[0]
            whom = f" to people with {vision}" if blind else ""
            more = f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
            lines.append(f"{one} and {other}{more} look alike{whom}: difference {apart:.1f}, {APART} is easy to see")
    return lines
