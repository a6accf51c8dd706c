"""Paired augmentation: drawn once for a (seed, epoch, row), applied to image and mask alike; where it puts each pixel.

Points are (x, y) in pixels; the center of pixel k lies at k, so that an image of width W ends at -0.5 and W - 0.5.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segcn.data.captions import cannot_be_mirrored, says_a_side
from segcn.data.config import BUCKET
from segcn.data.palette import IGNORE
from segcn.utils import rng
from segcn.utils.args import check_values, flag
from segcn.utils.errors import UserError

LARGEST_STEP = 64  # pixels between the sides of two buckets, the cells of Stable Diffusion 1.5's smallest feature map


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
    fit: str = "crop"  # how an image that is not square becomes one, or which part of it fills its bucket

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Draw":
        """The inverse of `to_dict`, also after a journey through JSON."""
        return cls(**values | {"crop": tuple(values["crop"])})

    def affine(self, shape: Sequence[int]) -> tuple[float, list[float], float, list[float]]:
        """Angle, shifts in pixels, scale and shears: what torchvision's `affine` takes. shape: height, width."""
        shifts = [self.translate_x * shape[1], self.translate_y * shape[0]]
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


def draw(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    row: int,
    caption: str = "",
    fit: str = "crop",
    shape: Sequence[int] = (1, 1),
) -> Draw:
    """The parameters of one sample, by the arguments alone.

    caption: all captions of the row; where they say left or right, `config.sided_captions` decides on flips. shape:
    height and width of the output, or any in their ratio.
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
    return replace(drawn, scale=max(drawn.scale, covering_scale(drawn, shape))) if config.fill == "cover" else drawn


def apply(
    image: torch.Tensor, mask: torch.Tensor, draw: Draw, resolution: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut, resize and transform a pair by the same numbers; `to_output` says where each pixel goes.

    image: uint8 [3, H, W] -> uint8 [3, R, R], bilinear with antialias
    mask: uint8 [1, H, W] -> uint8 [1, R, R], NEAREST
    Returned third is valid: bool [1, R, R], False where out of frame; there the image is 0 and the mask 255. Where the
    draw's fit is that of buckets, R x R is the image's bucket.
    ValueError where image and mask differ in size.
    """
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"expected one size, found {list(image.shape)} and {list(mask.shape)}")
    image = _framed(image, draw, resolution, InterpolationMode.BILINEAR, padding_mode="edge")
    pair = torch.cat([mask, torch.ones_like(mask)])  # class ids, and 1 where there is image
    pair = _framed(pair, draw, resolution, InterpolationMode.NEAREST_EXACT, fill=[IGNORE, 0])

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
    affine = draw.affine(image.shape[-2:])
    if affine != Draw().affine(image.shape[-2:]):
        edged = F.pad(image, [1], padding_mode="edge")  # so that no black is blended into pixels that are in frame
        image = F.affine(edged, *affine, InterpolationMode.BILINEAR, fill=0)[..., 1:-1, 1:-1]
        pair = F.affine(pair, *affine, InterpolationMode.NEAREST, fill=[IGNORE, 0])
    valid = pair[1:].bool()
    return image * valid, pair[:1], valid


def center_square(mask: torch.Tensor, resolution: int, fit: str = "crop") -> torch.Tensor:
    """What `apply` leaves of a mask that is not augmented: uint8 [1, H, W] -> uint8 [1, R, R], or its bucket's."""
    return _framed(mask, Draw(fit=fit), resolution, InterpolationMode.NEAREST_EXACT, fill=IGNORE)


def _framed(image: torch.Tensor, draw: Draw, resolution: int, interpolation, **padding) -> torch.Tensor:
    """Cut, resized and put in the middle of the output: [C, H, W] -> [C, R, R]; padding: what F.pad puts around it."""
    source, frame = boxes(draw, image.shape[-2:], resolution)
    resized = F.resized_crop(image, *source, [frame.height, frame.width], interpolation, antialias=True)
    height, width = output_shape(image.shape[-2:], resolution, draw.fit)
    if resized.shape[-2:] == (height, width):
        return resized
    right, bottom = width - frame.left - frame.width, height - frame.top - frame.height
    return F.pad(resized, [frame.left, frame.top, right, bottom], **padding)


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` start so that they cover `length` >= size, each over `overlap` of the one before or more.

    The last one is shifted inwards. overlap < size.
    """
    return [*range(0, length - size, size - overlap), length - size]


# --- The output's shape, and where a draw puts each pixel: numbers alone, so that an image can be held against them


def bucket_step(resolution: int, factor: int = 1) -> int:
    """What the sides of buckets are multiples of: 64 px, below 512 px R/8; UserError where that is not possible.

    factor: the width of a latent cell in pixels.
    """
    step = max(1, min(LARGEST_STEP, resolution // 8))
    if resolution % step or resolution < 8 or step % factor:
        multiple = LARGEST_STEP if resolution >= 8 * LARGEST_STEP else 8 * factor
        raise UserError(f"--buckets: expected a --resolution that is a multiple of {multiple}, found {resolution}")
    return step


def check_buckets(config: Any, factor: int = 1) -> None:
    """UserError for what --buckets cannot be combined with; config: with the flags buckets, fit and resolution."""
    if not config.buckets:
        return
    if config.fit != "crop":
        raise UserError(f"--buckets keeps the shapes of images, --fit {config.fit} makes squares: leave one out")
    if config.resolution is None:
        raise UserError("--buckets: expected --resolution, the side of a square with as many pixels")
    bucket_step(config.resolution, factor)


@lru_cache
def buckets(resolution: int) -> list[tuple[int, int]]:
    """The shapes (height, width) of --buckets, which have nearly R x R pixels and never more: memory is a square's.

    One side is R/2 to 2R, the other as long as fits (as in NovelAI's aspect-ratio bucketing,
    https://github.com/NovelAI/novelai-aspect-ratio-bucketing). UserError where there are none for R.
    """
    step = bucket_step(resolution)
    sides = range(-(-resolution // (2 * step)) * step, 2 * resolution + 1, step)
    shapes = [(side, resolution**2 // side // step * step) for side in sides]
    return sorted({*shapes, *(shape[::-1] for shape in shapes)})


def output_shape(size: Sequence[int], resolution: int, fit: str) -> tuple[int, int]:
    """Height and width that an image of `size` (height, width) gets: R x R, or the bucket nearest to its ratio."""
    if fit != BUCKET:
        return resolution, resolution
    ratio = math.log(size[0] / size[1])
    return min(buckets(resolution), key=lambda shape: (abs(math.log(shape[0] / shape[1]) - ratio), -math.prod(shape)))


def boxes(draw: Draw, size: Sequence[int], resolution: int) -> tuple[Box, Box]:
    """What is cut out of an image of `size` (height, width), and where in the output of R x R it is put.

    crop: a square of the short side, to the whole square; stretch: all, to the whole square; pad: all, to its middle;
    bucket: what has the bucket's ratio, to the whole bucket. A drawn crop makes the first smaller.
    """
    drawn_top, drawn_left, share = draw.crop
    shape = output_shape(size, resolution, draw.fit)
    if draw.fit in ("crop", BUCKET):
        fitted = [min(size[0], size[1] * shape[0] / shape[1]), min(size[1], size[0] * shape[1] / shape[0])]
    else:
        fitted = list(size) if draw.fit == "stretch" else [max(size)] * 2
    whole = [max(1, round(share * side)) for side in fitted]
    height, width = (min(*pair) for pair in zip(size, whole, strict=True))
    source = Box(round(drawn_top * (size[0] - height)), round(drawn_left * (size[1] - width)), height, width)
    down, across = (
        max(1, round(out * cut / side)) for out, cut, side in zip(shape, (height, width), whole, strict=True)
    )
    return source, Box((shape[0] - down) // 2, (shape[1] - across) // 2, down, across)


def matrix(draw: Draw, shape: Sequence[int]) -> np.ndarray:
    """The 3 x 3 float64 matrix that takes points of the cut and fitted image of `shape` (height, width) to the output.

    Flip included.
    """
    across = np.array([shape[1], shape[0]])  # as points are written
    middle, shift = (across - 1) / 2, np.array([draw.translate_x, draw.translate_y])
    placed = np.eye(3)
    placed[:2, :2] = _linear(draw)
    placed[:2, 2] = middle + across * shift - placed[:2, :2] @ middle
    mirror = np.array([[-1.0, 0, shape[1] - 1], [0, 1, 0], [0, 0, 1]])
    return placed @ mirror if draw.flip else placed


def source_matrix(draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """The 3 x 3 matrix that takes points of an image of `size` (height, width) to the output: cut, fit, transform."""
    source, target = boxes(draw, size, resolution)
    across, down = target.width / source.width, target.height / source.height
    left, top = (0.5 - source.left) * across + target.left - 0.5, (0.5 - source.top) * down + target.top - 0.5
    shape = output_shape(size, resolution, draw.fit)
    return matrix(draw, shape) @ np.array([[across, 0, left], [0, down, top], [0, 0, 1]])


def to_output(points: np.ndarray, draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Where points [..., 2] of an image of `size` (height, width) land in the output of R x R."""
    by = source_matrix(draw, size, resolution)
    return np.asarray(points, np.float64) @ by[:2, :2].T + by[:2, 2]


def to_source(points: np.ndarray, draw: Draw, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Where points [..., 2] of the output come from: the inverse of `to_output`."""
    by = np.linalg.inv(source_matrix(draw, size, resolution))
    return np.asarray(points, np.float64) @ by[:2, :2].T + by[:2, 2]


def covering_scale(draw: Draw, shape: Sequence[int] = (1, 1)) -> float:
    """The least scale at which the moved image still covers the whole output, of `shape` (height, width) or its ratio.

    The output's corners, taken back by the inverse at scale 1, must lie in the frame blown up by the scale; between
    them nothing can stick out, as both are convex.
    """
    sides = np.array([shape[1], shape[0]])
    corners = np.array([(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)]) - [draw.translate_x, draw.translate_y]
    back = np.linalg.solve(_linear(replace(draw, scale=1.0)), (sides * corners).T)
    return 2 * np.abs(back / sides[:, None]).max().item()


def _linear(draw: Draw) -> np.ndarray:
    """Scale times rotation times shear along y times shear along x, as torchvision documents `affine`."""
    angle, shear_x, shear_y = map(math.radians, (draw.angle, draw.shear_x, draw.shear_y))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    down, along = np.array([[1, 0], [-math.tan(shear_y), 1]]), np.array([[1, -math.tan(shear_x)], [0, 1]])
    return draw.scale * rotation @ down @ along


def size_ids(draw: Draw, size: Sequence[int], resolution: int) -> list[float]:
    """What Stable Diffusion XL reads of an image (Podell et al. 2023, arXiv:2307.01952, section 2.2), six numbers.

    Height and width of the original, top and left of the output in the original once that is resized and mirrored, and
    height and width of the output. Shift and scale of a draw count; rotation and shear cannot be said so. 0, 0 where a
    border is shown.
    """
    height, width = size
    by = source_matrix(replace(draw, angle=0.0, shear_x=0.0, shear_y=0.0), (height, width), resolution)
    corners = np.array([(-0.5, -0.5, 1), (width - 0.5, height - 0.5, 1)]) @ by.T  # of a mirrored one, the other is left
    left, top = (-0.5 - corners.min(0)[:2]).round().clip(min=0).tolist()
    return [float(height), float(width), top, left, *map(float, output_shape(size, resolution, draw.fit))]
