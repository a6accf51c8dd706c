import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segcn.augment import AUGMENTS, AugmentConfig, Draw, apply, draw
from segcn.errors import UserError
from segcn.labels import IGNORE

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
BLOCK = 8  # pixels on a side of one class in the coordinate-encoded mask
GEOMETRY = AugmentConfig(brightness=0.0, contrast=0.0, saturation=0.0)
WILD = AugmentConfig(degrees=180.0, translate=0.4, scale_min=0.5, scale_max=2.0, shear=20.0, crop_min=0.5)
WILD_GEOMETRY = dataclasses.replace(WILD, brightness=0.0, contrast=0.0, saturation=0.0)
SEEDS = st.integers(0, 2**31)


def coordinates(height, width):
    """An image whose first channels grow by 2 a pixel with x and y, and a mask that numbers its blocks."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([2 * x, 2 * y, np.full_like(x, 90)]).astype(np.uint8)
    mask = (y // BLOCK * (width // BLOCK) + x // BLOCK).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy(mask)[None]


def random_pair(seed, height=24, width=32):
    noise = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=noise, dtype=torch.uint8)
    mask = torch.tensor([0, 3, 7, IGNORE], dtype=torch.uint8)
    return image, mask[torch.randint(0, 4, (1, height, width), generator=noise)]


def interior(valid):
    """Valid pixels whose eight neighbours are valid too: there no black has been blended in."""
    return (torch.nn.functional.avg_pool2d(valid.float(), 3, 1, 1) > 0.99)[0]


def worst_distance(image, mask, valid, width):
    """How far, in pixels of the source, a pixel's image coordinates lie outside its class's block."""
    inner = interior(valid) & (mask[0] != IGNORE)
    assert inner.any()
    block = mask[0][inner].int()
    worst = 0.0
    for channel, index in ((0, block % (width // BLOCK)), (1, block // (width // BLOCK))):
        first, last = index * BLOCK, index * BLOCK + BLOCK - 1
        position = image[channel][inner].float() / 2
        worst = max(worst, (first - position).max().item(), (position - last).max().item())
    return worst


@FEW
@given(seed=SEEDS, config=st.sampled_from([GEOMETRY, WILD_GEOMETRY]))
def test_image_and_mask_stay_aligned_within_half_a_pixel(seed, config):
    config = dataclasses.replace(config, crop_min=1.0)
    image, mask, valid = apply(*coordinates(96, 96), draw(config, seed, 0, 0), 96)
    rounding = 0.25  # half a grey level, where one pixel is two levels
    assert worst_distance(image, mask, valid, 96) <= 0.5 + rounding + 0.01


@FEW
@given(seed=SEEDS, size=st.sampled_from([(96, 96), (96, 120), (112, 96)]))
def test_resized_pairs_stay_aligned_within_half_a_pixel_of_both_grids(seed, size):
    image, mask, valid = apply(*coordinates(*size), draw(GEOMETRY, seed, 0, 0), 40)
    half_a_pixel_of_both = 0.5 + 0.5 * 96 / 40
    edge = slice(1, -1)  # at the frame the antialias filter is cut off and its centre shifts
    distance = worst_distance(image[:, edge, edge], mask[:, edge, edge], valid[:, edge, edge], size[1])
    assert distance <= half_a_pixel_of_both + 0.25 + 0.3


@FEW
@given(seed=SEEDS, resolution=st.sampled_from([16, 24, 40]))
def test_no_new_class_appears(seed, resolution):
    image, mask = random_pair(seed % 5)
    mask = mask.clamp(max=7)
    _, augmented, valid = apply(image, mask, draw(WILD, seed, 1, 2), resolution)
    assert set(augmented[valid].tolist()) <= set(mask.unique().tolist())
    assert set(augmented[~valid].tolist()) <= {IGNORE}


@FEW
@given(seed=SEEDS)
def test_the_same_draw_gives_the_same_bytes_of_the_stated_shapes(seed):
    pair, drawn = random_pair(1), draw(WILD, seed, 0, 0)
    before = [part.clone() for part in pair]
    first, second = apply(*pair, drawn, 16), apply(*pair, drawn, 16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, pair, strict=True))
    image, mask, valid = first
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
    assert (mask.dtype, mask.shape) == (torch.uint8, (1, 16, 16))
    assert (valid.dtype, valid.shape) == (torch.bool, (1, 16, 16))


def distance_inside(drawn, resolution):
    """Signed distance in pixels from the frame, positive inside, of where each output pixel comes from.

    The matrix is rotation times shear times scale about the centre, as torchvision documents `affine`.
    """
    angle, shear_x, shear_y = map(math.radians, (drawn.angle, drawn.shear_x, drawn.shear_y))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear_down = np.array([[1, 0], [-math.tan(shear_y), 1]])
    shear_along = np.array([[1, -math.tan(shear_x)], [0, 1]])
    matrix = drawn.scale * rotation @ shear_down @ shear_along
    y, x = np.mgrid[:resolution, :resolution] + 0.5 - resolution / 2
    placed = np.stack([x - drawn.translate_x * resolution, y - drawn.translate_y * resolution])
    source = np.einsum("ij,jhw->ihw", np.linalg.inv(matrix), placed)
    return resolution / 2 - np.abs(source).max(axis=0)


@FEW
@given(seed=SEEDS, config=st.sampled_from([AUGMENTS["affine"], WILD]))
def test_valid_is_exactly_the_area_inside_the_frame(seed, config):
    drawn = draw(config, seed, 0, 0)
    image, mask, valid = apply(*random_pair(2, 32, 32), drawn, 32)
    distance = distance_inside(drawn, 32)
    decided = np.abs(distance) > 1e-3
    np.testing.assert_array_equal(valid[0].numpy()[decided], (distance > 0)[decided])
    assert (image * ~valid == 0).all() and (mask[~valid] == IGNORE).all()


def test_unlabelled_pixels_inside_the_frame_stay_valid():
    image, mask = random_pair(3)
    _, mask, valid = apply(image, torch.full_like(mask, IGNORE), Draw(angle=10.0), 24)
    assert (mask == IGNORE).all()
    assert 0.5 < valid.float().mean() < 1


@pytest.mark.parametrize("size", [(24, 24), (24, 40), (41, 24)])
def test_none_is_the_plain_resized_centre(size):
    image, mask = random_pair(4, *size)
    drawn = draw(AUGMENTS["none"], 7, 3, 9)
    assert drawn == Draw()
    augmented, augmented_mask, valid = apply(image, mask, drawn, 16)
    box = (round((size[0] - 24) / 2), round((size[1] - 24) / 2), 24, 24)
    square = F.crop(image, *box), F.crop(mask, *box)
    assert torch.equal(augmented, F.resize(square[0], [16, 16], antialias=True))
    assert torch.equal(augmented_mask, F.resize(square[1], [16, 16], InterpolationMode.NEAREST_EXACT))
    assert valid.all()


def test_none_at_the_image_size_changes_nothing():
    image, mask = random_pair(5, 24, 24)
    augmented, augmented_mask, valid = apply(image, mask, Draw(), 24)
    assert torch.equal(augmented, image) and torch.equal(augmented_mask, mask) and valid.all()


def test_a_flip_mirrors_both():
    image, mask = random_pair(6, 16, 16)
    flipped, flipped_mask, _ = apply(image, mask, Draw(flip=True), 16)
    assert torch.equal(flipped, image.flip(-1)) and torch.equal(flipped_mask, mask.flip(-1))


def test_colour_leaves_the_mask_alone():
    image, mask = random_pair(7, 16, 16)
    coloured, same, _ = apply(image, mask, Draw(brightness=1.1, contrast=0.9, saturation=1.1, hue=0.1), 16)
    assert not torch.equal(coloured, image)
    assert torch.equal(same, mask)


@FEW
@given(seed=SEEDS, epoch=st.integers(0, 99), row=st.integers(0, 10**6))
def test_a_draw_depends_on_seed_epoch_and_row_alone(seed, epoch, row):
    config = AUGMENTS["affine"]
    first = draw(config, seed, epoch, row)
    torch.rand(3)
    assert draw(config, seed, epoch, row) == first
    others = [
        draw(config, seed + 1, epoch, row),
        draw(config, seed, epoch + 1, row),
        draw(config, seed, epoch, row + 1),
    ]
    assert len({first, *others}) == 4


@FEW
@given(seed=SEEDS)
def test_draws_stay_within_their_configuration(seed):
    drawn = draw(AUGMENTS["affine"], seed, 0, 0)
    assert abs(drawn.angle) <= 10 and abs(drawn.translate_x) <= 0.1 and 0.9 <= drawn.scale <= 1.2
    assert abs(drawn.shear_y) <= 5 and 0.9 <= drawn.brightness <= 1.1 and drawn.hue == 0
    assert all(0 <= part <= 1 for part in drawn.crop)


def test_about_half_are_flipped_and_captions_with_a_side_never():
    config = AUGMENTS["affine"]
    captions = ["a house on the left", "the Right bank", "a leftmost tree", "a left-hand bend"]
    assert 60 < sum(draw(config, 0, 0, row, "a bright lake").flip for row in range(200)) < 140
    assert not any(draw(config, 0, 0, row, caption).flip for row in range(50) for caption in captions)
    plain = [dataclasses.replace(draw(config, 0, 0, row), flip=False) for row in range(50)]
    assert plain == [draw(config, 0, 0, row, captions[0]) for row in range(50)]


def test_impossible_settings_and_pairs_are_refused():
    with pytest.raises(UserError, match="scale_min"):
        AugmentConfig(scale_min=2.0)
    with pytest.raises(UserError, match="crop_min"):
        AugmentConfig(crop_min=0.0)
    image, mask = random_pair(8)
    with pytest.raises(ValueError, match="one size"):
        apply(image, mask[..., 1:], Draw(), 16)
