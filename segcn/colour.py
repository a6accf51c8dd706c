"""Mean colours, and how far those of painted images are from those of real ones of the same masks."""

from collections.abc import Iterable

import numpy as np

TO_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.95030]])
KNEE = 6 / 29  # below it the lightness of dark colours is taken as linear
SRGB = np.arange(256) / 255
LINEAR = np.where(SRGB <= 0.04045, SRGB / 12.92, ((SRGB + 0.055) / 1.055) ** 2.4)


def to_lab(image: np.ndarray) -> np.ndarray:
    """sRGB, uint8 [..., 3] -> CIE 1976 L*a*b* under D65, float64 [..., 3]: L* in [0, 100]; a step of 2 can be seen.

    https://en.wikipedia.org/wiki/CIELAB_color_space
    """
    share = LINEAR[image] @ TO_XYZ.T / TO_XYZ.sum(1)  # of white's X, Y and Z
    x, y, z = np.moveaxis(np.where(share > KNEE**3, np.cbrt(share), share / (3 * KNEE**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def mean_colour(images: Iterable[np.ndarray]) -> np.ndarray:
    """Mean L*, a* and b* of images, uint8 [H, W, 3] each: every image counts the same."""
    return np.mean([to_lab(image).mean((0, 1)) for image in images], axis=0)


def colour_shift(real: Iterable[np.ndarray], painted: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean colour of the painted images less that of the real ones: L, a, b, and their norm delta_e (CIE 1976)."""
    shift = mean_colour(painted) - mean_colour(real)
    return dict(zip("Lab", map(float, shift), strict=True)) | {"delta_e": float(np.linalg.norm(shift))}
