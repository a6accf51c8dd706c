"""Paired augmentation: drawn once for a (seed, epoch, row), applied to image and mask alike."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segcn import seeds
from segcn.captions import cannot_be_mirrored, says_a_side
from segcn.errors import UserError
from segcn.geometry import Draw, boxes, covering_scale, matrix, to_output, to_source
from segcn.labels import IGNORE

__all__ = ["AUGMENTS", "AugmentConfig", "Draw", "apply", "centre_square", "draw", "matrix", "to_output", "to_source"]

BOUNDS = {  # of each number; above these a draw means nothing
    "degrees": (0, 180), "translate": (0, 1), "scale_min": (0.01, 100), "scale_max": (0.01, 100), "shear": (0, 80),
    "hflip": (0, 1), "crop_min": (0.01, 1), "crop_shift": (0, 1), "brightness": (0, 1), "contrast": (0, 1),
    "saturation": (0, 1), "hue": (0, 0.5),
}  # fmt: skip
WORDS = {"fill": ("ignore", "cover"), "sided_captions": ("skip", "rewrite")}


@dataclass(frozen=True)
class AugmentConfig:
    """How far each parameter may be drawn from the one that changes nothing."""

    degrees: float = 10.0  # rotation in [-degrees, degrees]
    translate: float = 0.1  # shift along either axis, a fraction of the side
    scale_min: float = 0.9
    scale_max: float = 1.2
    shear: float = 5.0  # degrees along either axis
    hflip: float = 0.5  # probability; what becomes of captions that say left or right: sided_captions
    crop_min: float = 1.0  # smallest side of the crop, a fraction of the largest one
    crop_shift: float = 1.0  # how much of the room around the crop it may move in; 0 keeps it centred
    brightness: float = 0.1  # factors in [1 - x, 1 + x]
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.0  # a fraction of the colour circle, at most 0.5
    fill: str = "ignore"  # what leaves the frame: ignore takes it out of the loss; cover scales up until nothing does
    sided_captions: str = "skip"  # captions that say left or right: skip never flips them; rewrite swaps the words

    def __post_init__(self):
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"augmentation: {name}: expected {low} to {high}, found {value}")
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise UserError(f"augmentation: {name}: expected {' or '.join(words)}, found {getattr(self, name)!r}")
        if self.scale_min > self.scale_max:
            raise UserError(f"augmentation: expected scale_min <= scale_max, found {self.scale_min}, {self.scale_max}")

    @classmethod
    def none(cls) -> "AugmentConfig":
        """The configuration whose every draw is the plain, centred resize."""
        return cls(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def parse(cls, text: str) -> "AugmentConfig":
        """Read `affine` or `none`, and changes to it: `affine,degrees=20,fill=cover`. UserError lists the fields."""
        start, *changes = [part.strip() for part in text.split(",")]
        if start not in AUGMENTS:
            raise _unread(f"expected {' or '.join(AUGMENTS)} first, found {start!r}")
        changed: dict[str, Any] = dict(map(_read_change, changes))
        try:
            return replace(AUGMENTS[start], **changed)
        except UserError as error:
            raise _unread(str(error).removeprefix("augmentation: ")) from None

    @property
    def still(self) -> bool:
        """Whether every epoch draws the same."""
        words: dict[str, Any] = {name: known[0] for name, known in WORDS.items()}
        return replace(self, **words) == AugmentConfig.none()


def _read_change(change: str) -> tuple[str, float | str]:
    """One `name=value`."""
    name, equals, value = (part.strip() for part in change.partition("="))
    if not equals or name not in {field.name for field in fields(AugmentConfig)}:
        raise _unread(f"unknown {change!r}; expected a field and its value, as name=value")
    if name in WORDS:
        return name, value
    try:
        return name, float(value)
    except ValueError:
        raise _unread(f"{name}: expected a number, found {value!r}") from None


def _unread(what: str) -> UserError:
    listed = ", ".join(f"{field.name}={field.default}" for field in fields(AugmentConfig))
    return UserError(f"--augment: {what}.\n  As in affine,degrees=20,fill=cover; the fields of affine: {listed}")


AUGMENTS = {"affine": AugmentConfig(), "none": AugmentConfig.none()}


def draw(config: AugmentConfig, seed: int, epoch: int, row: int, caption: str = "", fit: str = "crop") -> Draw:
    """The parameters of one sample, by the arguments alone.

    caption: all that is told of the row; where it says left or right, `config.sided_captions` decides on flips.
    """

    def between(name: str, low: float, high: float) -> float:
        return seeds.between(low, high, "augment", seed, epoch, row, name)

    def around(name: str, centre: float, reach: float) -> float:
        return between(name, centre - reach, centre + reach)

    keeps_sides = cannot_be_mirrored if config.sided_captions == "rewrite" else says_a_side
    top, left = (around(name, 0.5, config.crop_shift / 2) for name in ("crop_top", "crop_left"))
    drawn = Draw(
        angle=around("angle", 0.0, config.degrees),
        translate_x=around("translate_x", 0.0, config.translate),
        translate_y=around("translate_y", 0.0, config.translate),
        scale=between("scale", config.scale_min, config.scale_max),
        shear_x=around("shear_x", 0.0, config.shear),
        shear_y=around("shear_y", 0.0, config.shear),
        flip=between("flip", 0.0, 1.0) < config.hflip and not keeps_sides(caption),
        crop=(top, left, between("crop_size", config.crop_min, 1.0)),
        brightness=around("brightness", 1.0, config.brightness),
        contrast=around("contrast", 1.0, config.contrast),
        saturation=around("saturation", 1.0, config.saturation),
        hue=around("hue", 0.0, config.hue),
        fit=fit,
    )
    return replace(drawn, scale=max(drawn.scale, covering_scale(drawn))) if config.fill == "cover" else drawn


def apply(
    image: torch.Tensor, mask: torch.Tensor, draw: Draw, resolution: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut, resize and transform a pair by the same numbers; `geometry.to_output` says where each pixel goes.

    image: uint8 [3, H, W] -> uint8 [3, R, R], bilinear with antialias
    mask: uint8 [1, H, W] -> uint8 [1, R, R], NEAREST
    Returned third is valid: bool [1, R, R], False where out of frame; there the image is 0 and the mask 255.
    ValueError where image and mask differ in size.
    """
    if image.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"expected one size, found {list(image.shape)} and {list(mask.shape)}")
    image = _colour(_squared(image, draw, resolution, InterpolationMode.BILINEAR), draw)
    pair = _squared_mask(mask, draw, resolution)
    if draw.flip:
        image, pair = F.horizontal_flip(image), F.horizontal_flip(pair)
    image, pair = _affine(image, pair, draw)
    valid = pair[1:].bool()
    return (image if valid.all() else image * valid), pair[:1], valid


def centre_square(mask: torch.Tensor, resolution: int, fit: str = "crop") -> torch.Tensor:
    """What `apply` leaves of a mask that is not augmented: uint8 [1, H, W] -> uint8 [1, R, R]."""
    return _squared_mask(mask, Draw(fit=fit), resolution)[:1]


def _squared_mask(mask: torch.Tensor, draw: Draw, resolution: int) -> torch.Tensor:
    """The mask in its square, 255 where there is no picture, and below it 1 in the picture, else 0: uint8 [2, R, R]."""
    ids = _squared(mask, draw, resolution, InterpolationMode.NEAREST_EXACT)
    frame = boxes(draw, mask.shape[-2:], resolution)[1]
    if frame[2:] == (resolution, resolution):
        return torch.cat([ids, torch.ones_like(ids)])
    pair = torch.stack([torch.full_like(ids[0], IGNORE), torch.zeros_like(ids[0])])
    frame.cut(pair)[:] = torch.cat([frame.cut(ids), torch.ones_like(frame.cut(ids))])
    return pair


def _squared(picture: torch.Tensor, draw: Draw, resolution: int, interpolation: InterpolationMode) -> torch.Tensor:
    """Cut, resized and put in the middle of the square, whose border repeats the picture's: [C, H, W] -> [C, R, R]."""
    source, frame = boxes(draw, tuple(picture.shape[-2:]), resolution)
    resized = F.resized_crop(picture, *source, [frame.height, frame.width], interpolation, antialias=True)
    if frame[2:] == (resolution, resolution):
        return resized
    right, bottom = resolution - frame.left - frame.width, resolution - frame.top - frame.height
    return F.pad(resized, [frame.left, frame.top, right, bottom], padding_mode="edge")


def _colour(image: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Before the frame moves, so that black corners do not weigh in the contrast's mean."""
    image = F.adjust_brightness(image, draw.brightness) if draw.brightness != 1 else image
    image = F.adjust_contrast(image, draw.contrast) if draw.contrast != 1 else image
    image = F.adjust_saturation(image, draw.saturation) if draw.saturation != 1 else image
    return F.adjust_hue(image, draw.hue) if draw.hue != 0 else image


def _affine(image: torch.Tensor, pair: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate, shift, scale and shear about the centre; image and mask by the same matrix."""
    shears = [draw.shear_x, draw.shear_y]
    shifts = [draw.translate_x * pair.shape[-1], draw.translate_y * pair.shape[-2]]
    if (draw.angle, *shifts, draw.scale, *shears) == (0, 0, 0, 1, 0, 0):
        return image, pair
    placed = (draw.angle, shifts, draw.scale, shears)
    edged = F.pad(image, [1], padding_mode="edge")  # so that no black is blended into pixels that are in frame
    image = F.affine(edged, *placed, InterpolationMode.BILINEAR, fill=0)[..., 1:-1, 1:-1]
    return image, F.affine(pair, *placed, InterpolationMode.NEAREST, fill=[IGNORE, 0])
