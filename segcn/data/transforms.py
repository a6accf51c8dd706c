"""Paired augmentation: drawn once for a (seed, epoch, row), applied to image and mask alike; where it puts each pixel.

Points are (x, y) in pixels; the center of pixel k lies at k, so that an image of width W ends at -0.5 and W - 0.5.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segcn.data.captions import cannot_be_mirrored, says_a_side
from segcn.data.palette import IGNORE
from segcn.utils import rng
from segcn.utils.args import check_values, flag
from segcn.utils.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """How far each parameter may be drawn from the one that changes nothing; UserError for what is out of range."""

    degrees: float = flag(10.0, "rotation in [-degrees, degrees]", low=0, high=180)
    translate: float = flag(0.1, "shift along either axis, a fraction of the side", low=0, high=1)
    scale_min: float = flag(0.9, "smallest scale", low=0.01, high=100)
    scale_max: float = flag(1.2, "largest scale", low=0.01, high=100)
    shear: float = flag(5.0, "degrees along either axis", low=0, high=80)
    hflip: float = flag(
        0.5, "probability; what becomes of captions that say left or right: sided_captions", low=0, high=1
    )
    crop_min: float = flag(1.0, "smallest side of the crop, a fraction of the largest one", low=0.01, high=1)
    crop_shift: float = flag(1.0, "share of the room around the crop that it may move in; 0: centered", low=0, high=1)
    brightness: float = flag(0.1, "factors in [1 - x, 1 + x]", low=0, high=1)
    contrast: float = flag(0.1, "factors in [1 - x, 1 + x]", low=0, high=1)
    saturation: float = flag(0.1, "factors in [1 - x, 1 + x]", low=0, high=1)
    hue: float = flag(0.0, "a fraction of the color circle", low=0, high=0.5)
    fill: str = flag(
        "ignore",
        "what leaves the frame: ignore takes it out of the loss; cover scales up until nothing does",
        ("ignore", "cover"),
    )
    sided_captions: str = flag(
        "skip", "captions that say left or right: skip never flips them; rewrite swaps the words", ("skip", "rewrite")
    )

    def __post_init__(self):
        try:
            check_values(self)
        except UserError as error:
            raise UserError(f"augmentation: {str(error).removeprefix('--')}") from None
        if self.scale_min > self.scale_max:
            raise UserError(f"augmentation: expected scale_min <= scale_max, found {self.scale_min}, {self.scale_max}")

    @classmethod
    def none(cls) -> "AugmentConfig":
        """The configuration whose every draw is the plain, centered resize."""
        return cls(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def parse(cls, text: str) -> "AugmentConfig":
        """Read `affine` or `none`, and changes to it: `affine,degrees=20,fill=cover`. UserError lists the fields."""
        defaults = {field.name: field.default for field in fields(cls)}
        start, *changes = [part.strip() for part in text.split(",")]
        try:
            if start not in AUGMENTS:
                raise UserError(f"expected {' or '.join(AUGMENTS)} first, found {start!r}")
            changed: dict[str, Any] = {}
            for change in changes:
                name, equals, value = (part.strip() for part in change.partition("="))
                if not equals or name not in defaults:
                    raise UserError(f"unknown {change!r}; expected a field and its value, as name=value")
                try:
                    changed[name] = value if isinstance(defaults[name], str) else float(value)
                except ValueError:
                    raise UserError(f"{name}: expected a number, found {value!r}") from None
            return replace(AUGMENTS[start], **changed)
        except UserError as error:
            listed = ", ".join(f"{name}={value}" for name, value in defaults.items())
            wrong = str(error).removeprefix("augmentation: ")
            example = "As in affine,degrees=20,fill=cover; the fields of affine"
            raise UserError(f"--augment: {wrong}.\n  {example}: {listed}") from None

    @property
    def still(self) -> bool:
        """Whether every epoch draws the same."""
        return replace(self, fill="ignore", sided_captions="skip") == AugmentConfig.none()


AUGMENTS = {"affine": AugmentConfig(), "none": AugmentConfig.none()}


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
    fit: str = "crop"  # how an image that is not square becomes one

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Draw":
        """The inverse of `to_dict`, also after a journey through JSON."""
        return cls(**values | {"crop": tuple(values["crop"])})

    def affine(self, resolution: int) -> tuple[float, list[float], float, list[float]]:
        """Angle, shifts in pixels, scale and shears: what torchvision's `affine` takes."""
        shifts = [self.translate_x * resolution, self.translate_y * resolution]
        return self.angle, shifts, self.scale, [self.shear_x, self.shear_y]


class Box(NamedTuple):
    """A rectangle of whole pixels, in the order of torchvision's crops."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image):
        """Its part of an array or tensor [..., H, W]."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Its part of an image [H, W, 3]."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def draw(config: AugmentConfig, seed: int, epoch: int, row: int, caption: str = "", fit: str = "crop") -> Draw:
    """The parameters of one sample, by the arguments alone.

    caption: all captions of the row; where they say left or right, `config.sided_captions` decides on flips.
    """

    def between(name: str, low: float, high: float) -> float:
        return rng.between(low, high, "augment", seed, epoch, row, name)

    def around(name: str, middle: float, reach: float) -> float:
        return between(name, middle - reach, middle + reach)

    keeps_sides = cannot_be_mirrored if config.sided_captions == "rewrite" else says_a_side
    top, left = (around(name, 0.5, config.crop_shift / 2) for name in ("crop_top", "crop_left"))
    drawn = Draw(
        angle=around("angle", 0.0, config.degrees), scale=between("scale", config.scale_min, config.scale_max),
        translate_x=around("translate_x", 0.0, config.translate),
        translate_y=around("translate_y", 0.0, config.translate),
        shear_x=around("shear_x", 0.0, config.shear), shear_y=around("shear_y", 0.0, config.shear),
        flip=between("flip", 0.0, 1.0) < config.hflip and not keeps_sides(caption),
        crop=(top, left, between("crop_size", config.crop_min, 1.0)), fit=fit,
        brightness=around("brightness", 1.0, config.brightness), contrast=around("contrast", 1.0, config.contrast),
        saturation=around("saturation", 1.0, config.saturation), hue=around("hue", 0.0, config.hue),
    )  # fmt: skip
    return replace(drawn, scale=max(drawn.scale, covering_scale(drawn))) if config.fill == "cover" else drawn


def apply(
    image: torch.Tensor, mask: torch.Tensor, draw: Draw, resolution: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut, resize and transform a pair by the same numbers; `to_output` says where each pixel goes.

    image: uint8 [3, H, W] -> uint8 [3, R, R], bilinear with antialias
    mask: uint8 [1, H, W] -> uint8 [1, R, R], NEAREST
    Returned third is valid: bool [1, R, R], False where out of frame; there the image is 0 and the mask 255.
    ValueError where image and mask differ in size.
    """
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"expected one size, found {list(image.shape)} and {list(mask.shape)}")
    image = _to_square(image, draw, resolution, InterpolationMode.BILINEAR, padding_mode="edge")
    pair = torch.cat([mask, torch.ones_like(mask)])  # class ids, and 1 where there is image
    pair = _to_square(pair, draw, resolution, InterpolationMode.NEAREST_EXACT, fill=[IGNORE, 0])

    # Color comes before the frame moves, so that black corners do not weigh in the contrast's mean.
    for adjust, amount, unchanged in (
        (F.adjust_brightness, draw.brightness, 1),
        (F.adjust_contrast, draw.contrast, 1),
        (F.adjust_saturation, draw.saturation, 1),
        (F.adjust_hue, draw.hue, 0),
    ):
        image = adjust(image, amount) if amount != unchanged else image
    if draw.flip:
        image, pair = F.horizontal_flip(image), F.horizontal_flip(pair)
    if draw.affine(resolution) != Draw().affine(resolution):
        edged = F.pad(image, [1], padding_mode="edge")  # so that no black is blended into pixels that are in frame
        image = F.affine(edged, *draw.affine(resolution), InterpolationMode.BILINEAR, fill=0)[..., 1:-1, 1:-1]
        pair = F.affine(pair, *draw.affine(resolution), InterpolationMode.NEAREST, fill=[IGNORE, 0])
    valid = pair[1:].bool()
    return image * valid, pair[:1], valid


def center_square(mask: torch.Tensor, resolution: int, fit: str = "crop") -> torch.Tensor:
    """What `apply` leaves of a mask that is not augmented: uint8 [1, H, W] -> uint8 [1, R, R]."""
    return _to_square(mask, Draw(fit=fit), resolution, InterpolationMode.NEAREST_EXACT, fill=IGNORE)


def _to_square(image: torch.Tensor, draw: Draw, resolution: int, interpolation, **padding) -> torch.Tensor:
    """Cut, resized and put in the middle of the square: [C, H, W] -> [C, R, R]; padding: what F.pad puts around it."""
    source, frame = boxes(draw, image.shape[-2:], resolution)
    resized = F.resized_crop(image, *source, [frame.height, frame.width], interpolation, antialias=True)
    if resized.shape[-2:] == (resolution, resolution):
        return resized
    right, bottom = resolution - frame.left - frame.width, resolution - frame.top - frame.height
    return F.pad(resized, [frame.left, frame.top, right, bottom], **padding)


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` start so that they cover `length` >= size, each over `overlap` of the one before or more.

    The last one is shifted inwards. overlap < size.
    """
    return [*range(0, length - size, size - overlap), length - size]


# --- Where a draw puts each pixel: numbers alone, so that an image can be held against them


def boxes(draw: Draw, size: Sequence[int], resolution: int) -> tuple[Box, Box]:
    """What is cut out of an image of `size` (height, width), and where in the square of R x R it is put.

    crop: a square of the short side, to the whole square; stretch: all, to the whole square; pad: all, to its middle.
    A drawn crop makes the first smaller.
    """
    drawn_top, drawn_left, share = draw.crop
    side = min(size) if draw.fit == "crop" else max(size)
    whole = [max(1, round(share * side)) for side in (size if draw.fit == "stretch" else (side, side))]
    height, width = (min(*pair) for pair in zip(size, whole, strict=True))
    source = Box(round(drawn_top * (size[0] - height)), round(drawn_left * (size[1] - width)), height, width)
    down, across = (max(1, round(resolution * cut / side)) for cut, side in zip((height, width), whole, strict=True))
    return source, Box((resolution - down) // 2, (resolution - across) // 2, down, across)


def matrix(draw: Draw, resolution: int) -> np.ndarray:
    """The 3 x 3 float64 matrix that takes points of the square input to the output, flip included."""
    middle, shift = (resolution - 1) / 2, np.array([draw.translate_x, draw.translate_y])
    placed = np.eye(3)
    placed[:2, :2] = _linear(draw)
    placed[:2, 2] = middle + resolution * shift - placed[:2, :2] @ (middle, middle)
    mirror = np.array([[-1.0, 0, resolution - 1], [0, 1, 0], [0, 0, 1]])
    return placed @ mirror if draw.flip else placed


def source_matrix(draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """The 3 x 3 matrix that takes points of an image of `size` (height, width) to the output: cut, fit, transform."""
    source, target = boxes(draw, size, resolution)
    across, down = target.width / source.width, target.height / source.height
    left, top = (0.5 - source.left) * across + target.left - 0.5, (0.5 - source.top) * down + target.top - 0.5
    return matrix(draw, resolution) @ np.array([[across, 0, left], [0, down, top], [0, 0, 1]])


def to_output(points: np.ndarray, draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Where points [..., 2] of an image of `size` (height, width) land in the output of R x R."""
    by = source_matrix(draw, size, resolution)
    return np.asarray(points, np.float64) @ by[:2, :2].T + by[:2, 2]


def to_source(points: np.ndarray, draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Where points [..., 2] of the output come from: the inverse of `to_output`."""
    by = np.linalg.inv(source_matrix(draw, size, resolution))
    return np.asarray(points, np.float64) @ by[:2, :2].T + by[:2, 2]


def covering_scale(draw: Draw) -> float:
    """The least scale at which the moved square still covers the whole output.

    The output's corners, taken back by the inverse at scale 1, must lie in the square blown up by the scale; between
    them nothing can stick out, as both are convex.
    """
    corners = np.array([(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)]) - [draw.translate_x, draw.translate_y]
    return 2 * np.abs(np.linalg.solve(_linear(replace(draw, scale=1.0)), corners.T)).max().item()


def _linear(draw: Draw) -> np.ndarray:
    """Scale times rotation times shear along y times shear along x, as torchvision documents `affine`."""
    angle, shear_x, shear_y = map(math.radians, (draw.angle, draw.shear_x, draw.shear_y))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    down, along = np.array([[1, 0], [-math.tan(shear_y), 1]]), np.array([[1, -math.tan(shear_x)], [0, 1]])
    return draw.scale * rotation @ down @ along


def size_ids(draw: Draw, size: Sequence[int], resolution: int) -> list[float]:
    """What Stable Diffusion XL reads of an image (Podell et al. 2023, arXiv:2307.01952, section 2.2), six numbers.

    Height and width of the original, top and left of the output in the original once that is resized and mirrored, and
    twice R. Shift and scale of a draw count; rotation and shear cannot be said so. 0, 0 where a border is shown.
    """
    height, width = size
    by = source_matrix(replace(draw, angle=0.0, shear_x=0.0, shear_y=0.0), (height, width), resolution)
    corners = np.array([(-0.5, -0.5, 1), (width - 0.5, height - 0.5, 1)]) @ by.T  # of a mirrored one, the other is left
    left, top = (-0.5 - corners.min(0)[:2]).round().clip(min=0).tolist()
    return [float(height), float(width), top, left, float(resolution), float(resolution)]
