"""Where a draw puts each pixel: numbers alone, so that a picture can be held against them.

Points are (x, y) in pixels; the centre of pixel k lies at k, so that a picture of width W ends at -0.5 and W - 0.5.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Draw:
    """What was drawn; the defaults change nothing. It alone replays an augmentation."""

    angle: float = 0.0  # degrees, clockwise
    translate_x: float = 0.0  # fractions of the side
    translate_y: float = 0.0
    scale: float = 1.0  # as applied: with fill=cover already raised
    shear_x: float = 0.0  # degrees
    shear_y: float = 0.0
    flip: bool = False
    crop: tuple[float, float, float] = (0.5, 0.5, 1.0)  # top and left, fractions of the room; size, of the whole
    brightness: float = 1.0  # factors
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    fit: str = "crop"  # how a picture that is not square becomes one

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Draw":
        """The inverse of `to_dict`, also after a journey through JSON."""
        return cls(**values | {"crop": tuple(values["crop"])})


class Box(NamedTuple):
    """A rectangle of whole pixels, in the order of torchvision's crops."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture):
        """Its part of an array or tensor [..., H, W]."""
        return picture[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Its part of a picture [H, W, 3]."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def boxes(draw: Draw, size: Sequence[int], resolution: int) -> tuple[Box, Box]:
    """What is cut out of a picture of `size` (height, width), and where in the square of R x R it is put.

    crop: a square of the short side, to the whole square; stretch: all, to the whole square; pad: all, to its middle.
    A drawn crop makes the first smaller.
    """
    drawn_top, drawn_left, share = draw.crop
    if draw.fit == "stretch":
        sides = tuple(max(1, round(share * side)) for side in size)
    else:
        sides = (max(1, round(share * (min(size) if draw.fit == "crop" else max(size)))),) * 2
    height, width = (min(whole, side) for whole, side in zip(size, sides, strict=True))
    source = Box(round(drawn_top * (size[0] - height)), round(drawn_left * (size[1] - width)), height, width)
    down, across = (max(1, round(resolution * cut / side)) for cut, side in zip(source[2:], sides, strict=True))
    return source, Box((resolution - down) // 2, (resolution - across) // 2, down, across)


def matrix(draw: Draw, resolution: int) -> np.ndarray:
    """The 3 x 3 float64 matrix that takes points of the square input to the output, flip included."""
    middle = (resolution - 1) / 2
    placed = np.eye(3)
    placed[:2, :2] = _linear(draw)
    placed[:2, 2] = middle + resolution * _shift(draw) - placed[:2, :2] @ (middle, middle)
    mirror = np.array([[-1.0, 0, resolution - 1], [0, 1, 0], [0, 0, 1]])
    return placed @ mirror if draw.flip else placed


def source_matrix(draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """The 3 x 3 matrix that takes points of a picture of `size` (height, width) to the output: cut, fit, transform."""
    source, target = boxes(draw, size, resolution)
    across, down = target.width / source.width, target.height / source.height
    fitted = np.array(
        [
            [across, 0, (0.5 - source.left) * across + target.left - 0.5],
            [0, down, (0.5 - source.top) * down + target.top - 0.5],
            [0, 0, 1],
        ]
    )
    return matrix(draw, resolution) @ fitted


def to_output(points: np.ndarray, draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Where points [..., 2] of a picture of `size` (height, width) land in the output of R x R."""
    return _moved(points, source_matrix(draw, size, resolution))


def to_source(points: np.ndarray, draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Where points [..., 2] of the output come from: the inverse of `to_output`."""
    return _moved(points, np.linalg.inv(source_matrix(draw, size, resolution)))


def covering_scale(draw: Draw) -> float:
    """The least scale at which the moved square still covers the whole output.

    The output's corners, taken back by the inverse at scale 1, must lie in the square blown up by the scale; between
    them nothing can stick out, as both are convex.
    """
    corners = np.array([(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)]) - _shift(draw)
    return 2 * np.abs(np.linalg.solve(_linear(replace(draw, scale=1.0)), corners.T)).max().item()


def _linear(draw: Draw) -> np.ndarray:
    """Scale times rotation times shear along y times shear along x, as torchvision documents `affine`."""
    angle, shear_x, shear_y = map(math.radians, (draw.angle, draw.shear_x, draw.shear_y))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    down, along = np.array([[1, 0], [-math.tan(shear_y), 1]]), np.array([[1, -math.tan(shear_x)], [0, 1]])
    return draw.scale * rotation @ down @ along


def _shift(draw: Draw) -> np.ndarray:
    return np.array([draw.translate_x, draw.translate_y])


def _moved(points: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.asarray(points, np.float64) @ by[:2, :2].T + by[:2, 2]
