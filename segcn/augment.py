"""Paired augmentation: drawn once for a (seed, epoch, row), applied to image and mask alike."""

import re
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segcn import seeds
from segcn.errors import UserError
from segcn.labels import IGNORE

SAYS_A_SIDE = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class AugmentConfig:
    """How far each parameter may be drawn from the one that changes nothing."""

    degrees: float = 10.0  # rotation in [-degrees, degrees]
    translate: float = 0.1  # shift along either axis, a fraction of the side
    scale_min: float = 0.9
    scale_max: float = 1.2
    shear: float = 5.0  # degrees along either axis
    hflip: float = 0.5  # probability; captions that say left or right are never flipped
    crop_min: float = 1.0  # smallest side of the square crop, a fraction of the image's short side
    crop_shift: float = 1.0  # how much of the room around the crop it may move in; 0 keeps it centred
    brightness: float = 0.1  # factors in [1 - x, 1 + x]
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.0  # a fraction of the colour circle, at most 0.5

    def __post_init__(self):
        if not 0 < self.scale_min <= self.scale_max:
            raise UserError(f"augmentation: expected 0 < scale_min <= scale_max, found {self}")
        if not 0 < self.crop_min <= 1 or not 0 <= self.hue <= 0.5:
            raise UserError(f"augmentation: expected 0 < crop_min <= 1 and 0 <= hue <= 0.5, found {self}")

    @classmethod
    def none(cls) -> "AugmentConfig":
        """The configuration whose every draw is the plain, centred resize."""
        return cls(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


AUGMENTS = {"affine": AugmentConfig(), "none": AugmentConfig.none()}


@dataclass(frozen=True)
class Draw:
    """What was drawn; the defaults change nothing."""

    angle: float = 0.0  # degrees, clockwise
    translate_x: float = 0.0  # fractions of the side
    translate_y: float = 0.0
    scale: float = 1.0
    shear_x: float = 0.0  # degrees
    shear_y: float = 0.0
    flip: bool = False
    crop: tuple[float, float, float] = (
        0.5,
        0.5,
        1.0,
    )  # top and left as fractions of the room; side of the short side
    brightness: float = 1.0  # factors
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def draw(config: AugmentConfig, seed: int, epoch: int, row: int, caption: str = "") -> Draw:
    """The parameters of one sample, by the arguments alone; captions saying left or right are not flipped."""

    def between(name: str, low: float, high: float) -> float:
        return seeds.between(low, high, "augment", seed, epoch, row, name)

    def around(name: str, centre: float, reach: float) -> float:
        return between(name, centre - reach, centre + reach)

    crop = [around(name, 0.5, config.crop_shift / 2) for name in ("crop_top", "crop_left")]
    return Draw(
        angle=around("angle", 0.0, config.degrees),
        translate_x=around("translate_x", 0.0, config.translate),
        translate_y=around("translate_y", 0.0, config.translate),
        scale=between("scale", config.scale_min, config.scale_max),
        shear_x=around("shear_x", 0.0, config.shear),
        shear_y=around("shear_y", 0.0, config.shear),
        flip=between("flip", 0.0, 1.0) < config.hflip and not SAYS_A_SIDE.search(caption),
        crop=(*crop, between("crop_size", config.crop_min, 1.0)),
        brightness=around("brightness", 1.0, config.brightness),
        contrast=around("contrast", 1.0, config.contrast),
        saturation=around("saturation", 1.0, config.saturation),
        hue=around("hue", 0.0, config.hue),
    )


def apply(
    image: torch.Tensor, mask: torch.Tensor, draw: Draw, resolution: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crop, resize and transform a pair by the same numbers.

    image: uint8 [3, H, W] -> uint8 [3, R, R], bilinear with antialias
    mask: uint8 [1, H, W] -> uint8 [1, R, R], NEAREST
    Returned third is valid: bool [1, R, R], False where out of frame; there the image is 0 and the mask 255.
    """
    image, mask = _crop(image, mask, draw.crop, resolution)
    image = _colour(image, draw)
    if draw.flip:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    return _affine(image, mask, draw)


def centre_square(mask: torch.Tensor, resolution: int) -> torch.Tensor:
    """What `apply` leaves of a mask that is not augmented: uint8 [1, H, W] -> uint8 [1, R, R]."""
    return _crop(mask, mask, (0.5, 0.5, 1.0), resolution)[1]


def _crop(
    image: torch.Tensor, mask: torch.Tensor, crop: tuple[float, float, float], resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the drawn square out of both and resize it: uint8 [C, H, W] -> uint8 [C, R, R]."""
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"expected one size, found {list(image.shape)} and {list(mask.shape)}")
    height, width = image.shape[-2:]
    top, left, size = crop
    side = max(1, round(size * min(height, width)))
    box = (round(top * (height - side)), round(left * (width - side)), side, side)
    square = [resolution, resolution]
    return (
        F.resized_crop(image, *box, square, InterpolationMode.BILINEAR, antialias=True),
        F.resized_crop(mask, *box, square, InterpolationMode.NEAREST_EXACT),
    )


def _colour(image: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Before the frame moves, so that black corners do not weigh in the contrast's mean."""
    image = F.adjust_brightness(image, draw.brightness) if draw.brightness != 1 else image
    image = F.adjust_contrast(image, draw.contrast) if draw.contrast != 1 else image
    image = F.adjust_saturation(image, draw.saturation) if draw.saturation != 1 else image
    return F.adjust_hue(image, draw.hue) if draw.hue != 0 else image


def _affine(image: torch.Tensor, mask: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate, shift, scale and shear about the centre; image and mask by the same matrix."""
    inside = torch.ones_like(mask)
    shears = [draw.shear_x, draw.shear_y]
    shifts = [draw.translate_x * mask.shape[-1], draw.translate_y * mask.shape[-2]]
    if (draw.angle, *shifts, draw.scale, *shears) == (0, 0, 0, 1, 0, 0):
        return image, mask, inside.bool()
    placed = (draw.angle, shifts, draw.scale, shears)
    image = F.affine(image, *placed, InterpolationMode.BILINEAR, fill=0)
    pair = F.affine(torch.cat([mask, inside]), *placed, InterpolationMode.NEAREST, fill=[IGNORE, 0])
    valid = pair[1:].bool()
    return image * valid, pair[:1], valid
