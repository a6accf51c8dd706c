"""Promise: image, mask and caption are changed by the same numbers, which depend on (seed, epoch, row) alone."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segcn.data.captions import cannot_be_mirrored, mirrored, says_a_side
from segcn.data.config import FITS
from segcn.data.dataset import PairedDataset
from segcn.data.metadata import finish_dataset, read_split, write_pair
from segcn.data.palette import IGNORE, Label, Palette
from segcn.data.transforms import (
    AUGMENTS,
    AugmentConfig,
    Draw,
    apply,
    boxes,
    center_square,
    draw,
    matrix,
    to_output,
    to_source,
)
from segcn.train.config import TrainConfig
from segcn.utils.errors import UserError

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
BLOCK = 8  # px, the size of the squares of one class in the coordinate-encoded mask
GEOMETRY = AugmentConfig(brightness=0.0, contrast=0.0, saturation=0.0)
WILD = AugmentConfig(degrees=180.0, translate=0.4, scale_min=0.5, scale_max=2.0, shear=20.0, crop_min=0.5)
WILD_GEOMETRY = dataclasses.replace(WILD, brightness=0.0, contrast=0.0, saturation=0.0)
SEEDS = st.integers(0, 2**31)


def coordinates(size):
    """An image whose first channels grow by 2 a pixel with x and y, and a mask that numbers its blocks."""
    y, x = np.mgrid[:size, :size]
    image = np.stack([2 * x, 2 * y, np.full_like(x, 90)]).astype(np.uint8)
    mask = (y // BLOCK * (size // BLOCK) + x // BLOCK).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy(mask)[None]


def random_pair(seed, height=24, width=32):
    noise = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=noise, dtype=torch.uint8)
    mask = torch.tensor([0, 3, 7, IGNORE], dtype=torch.uint8)
    return image, mask[torch.randint(0, 4, (1, height, width), generator=noise)]


def interior(valid):
    """Valid pixels whose eight neighbours are valid too: there no black has been blended in."""
    return (torch.nn.functional.avg_pool2d(valid.float(), 3, 1, 1) > 0.99)[0]


@FEW
@given(seed=SEEDS, config=st.sampled_from([GEOMETRY, WILD_GEOMETRY]))
def test_image_and_mask_stay_aligned_within_half_a_pixel(seed, config):
    config = dataclasses.replace(config, crop_min=1.0)
    image, mask, valid = apply(*coordinates(96), draw(config, seed, 0, 0), 96)
    inner = interior(valid) & (mask[0] != IGNORE)
    block, across = mask[0][inner].int(), 96 // BLOCK
    rounding = 0.25  # half a grey level, where one pixel is two levels
    for channel, index in ((0, block % across), (1, block // across)):
        position, first = image[channel][inner].float() / 2, index * BLOCK
        outside = torch.maximum(first - position, position - (first + BLOCK - 1))  # in pixels of the source
        assert outside.max() <= 0.5 + rounding + 0.01


@FEW
@given(seed=SEEDS, fit=st.sampled_from(FITS), fill=st.sampled_from(["ignore", "cover"]))
def test_the_same_draw_gives_the_same_bytes_of_the_stated_shapes_and_makes_up_no_class(seed, fit, fill):
    pair, drawn = random_pair(seed % 7, 30, 19), draw(dataclasses.replace(WILD, fill=fill), seed, 0, 0, fit=fit)
    before = [part.clone() for part in pair]
    first, second = apply(*pair, drawn, 16), apply(*pair, drawn, 16)
    assert all(torch.equal(a, b) for a, b in zip((*first, *before), (*second, *pair), strict=True))
    assert [part.dtype for part in first] == [torch.uint8, torch.uint8, torch.bool]
    assert [part.shape for part in first] == [(3, 16, 16), (1, 16, 16), (1, 16, 16)]
    _, mask, valid = first
    assert set(mask[valid].tolist()) <= set(pair[1].unique().tolist()) and (mask[~valid] == IGNORE).all()


@FEW
@given(seed=SEEDS, hue=st.floats(0.05, 0.5))
def test_another_hue_changes_the_image_and_leaves_the_mask_as_it_is(seed, hue):
    pair, drawn = random_pair(seed % 7), draw(dataclasses.replace(WILD, hue=hue), seed, 0, 0)
    assert 0 < abs(drawn.hue) <= hue
    plain, turned = (apply(*pair, one, 24) for one in (dataclasses.replace(drawn, hue=0.0), drawn))
    assert all(map(torch.equal, plain[1:], turned[1:]))
    drawn = dataclasses.replace(drawn, hue=hue)
    assert not torch.equal(plain[0], apply(*pair, drawn, 24)[0])


def distance_inside(drawn, resolution):
    """Signed distance in pixels from the frame, positive inside, of where each output pixel comes from."""
    y, x = np.mgrid[:resolution, :resolution]
    drawn = dataclasses.replace(drawn, crop=(0.5, 0.5, 1.0))
    source = to_source(np.stack([x, y], axis=-1), drawn, (resolution, resolution), resolution)
    return resolution / 2 - np.abs(source - (resolution - 1) / 2).max(axis=-1)


@FEW
@given(seed=SEEDS, config=st.sampled_from([AUGMENTS["affine"], WILD]))
def test_valid_is_exactly_the_area_inside_the_frame(seed, config):
    drawn = draw(config, seed, 0, 0)
    image, mask, valid = apply(*random_pair(2, 32, 32), drawn, 32)
    distance = distance_inside(drawn, 32)
    decided = np.abs(distance) > 1e-3
    np.testing.assert_array_equal(valid[0].numpy()[decided], (distance > 0)[decided])
    assert (image * ~valid == 0).all() and (mask[~valid] == IGNORE).all()


@FEW
@given(seed=SEEDS, epoch=st.integers(0, 99), row=st.integers(0, 10**6))
def test_a_draw_depends_on_seed_epoch_and_row_alone(seed, epoch, row):
    config = AUGMENTS["affine"]
    first = draw(config, seed, epoch, row)
    torch.rand(3)
    assert draw(config, seed, epoch, row) == first
    others = (seed + 1, epoch, row), (seed, epoch + 1, row), (seed, epoch, row + 1)
    assert len({first, *(draw(config, *other) for other in others)}) == 4


@FEW
@given(seed=SEEDS)
def test_draws_stay_within_their_configuration(seed):
    drawn = draw(AUGMENTS["affine"], seed, 0, 0)
    assert abs(drawn.angle) <= 10 and abs(drawn.translate_x) <= 0.1 and 0.9 <= drawn.scale <= 1.2
    assert abs(drawn.shear_y) <= 5 and 0.9 <= drawn.brightness <= 1.1 and drawn.hue == 0
    assert all(0 <= part <= 1 for part in drawn.crop)


def test_about_half_are_flipped_and_captions_with_a_side_only_where_every_word_can_be_rewritten():
    config = AUGMENTS["affine"]
    captions = ["a house on the left", "the Right bank", "a leftmost tree", "a left-hand bend"]
    assert 60 < sum(draw(config, 0, 0, row, "a bright lake").flip for row in range(200)) < 140
    assert not any(draw(config, 0, 0, row, caption).flip for row in range(50) for caption in captions)
    plain = [dataclasses.replace(draw(config, 0, 0, row), flip=False) for row in range(50)]
    assert plain == [draw(config, 0, 0, row, captions[0]) for row in range(50)]
    config = AugmentConfig.parse("affine,sided_captions=rewrite,hflip=1")
    for caption in ("a house on the left", "a bright lake", "leftovers on the left", "a LeFt turn"):
        assert draw(config, 0, 0, 0, caption).flip == (caption in ("a house on the left", "a bright lake"))


def test_impossible_settings_and_pairs_are_refused():
    for wrong in ({"scale_min": 2.0}, {"crop_min": 0.0}, {"shear": 90.0}, {"hflip": float("nan")}, {"fill": "edge"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AugmentConfig(**wrong)
    image, mask = random_pair(8)
    with pytest.raises(ValueError, match="one size"):
        apply(image, mask[..., 1:], Draw(), 16)


GRIDS = (96, 96), (96, 130), (150, 110)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("config", [GEOMETRY, WILD_GEOMETRY, dataclasses.replace(WILD_GEOMETRY, fill="cover")])
def test_pixels_and_masks_land_where_the_matrix_says(config, fit):
    """1000 draws: an image and a mask whose values are their coordinates, beside those that `to_source` gives."""
    for seed in range(112):
        size = GRIDS[seed % len(GRIDS)]
        y, x = np.mgrid[: size[0], : size[1]].astype(np.uint8)
        drawn, resolution = draw(config, seed, 0, 0, fit=fit), max(size)
        image, mask, valid = apply(torch.from_numpy(np.stack([x, y, x])), torch.from_numpy(x)[None], drawn, resolution)
        y, x = np.mgrid[:resolution, :resolution]
        predicted = to_source(np.stack([x, y], -1), drawn, size, resolution)
        inner = interior(valid).numpy() & (predicted > 2).all(-1) & (predicted < np.array(size[::-1]) - 3).all(-1)
        error = np.abs(image[:2].permute(1, 2, 0).numpy() - predicted)[inner]
        grown = max(1.0, 1 / drawn.scale)  # source pixels that one output pixel spans
        assert len(error) and error.max() <= 1.0 * grown and error.mean() < 0.5, (seed, fit, error.max())
        error = np.abs(mask[0].numpy() - predicted[..., 0])[valid[0].numpy()]
        assert error.max() <= 0.5 + 0.5 + 0.05  # half a pixel by NEAREST in its square, and again in the moved one


@FEW
@given(seed=SEEDS, fit=st.sampled_from(FITS), width=st.integers(20, 60), resolution=st.sampled_from([16, 64]))
def test_there_and_back_is_the_same_point(seed, fit, width, resolution):
    drawn = draw(WILD, seed, 0, 0, fit=fit)
    points = np.random.default_rng(seed).uniform(-50, 100, (20, 2))
    there = to_output(points, drawn, (40, width), resolution)
    np.testing.assert_allclose(to_source(there, drawn, (40, width), resolution), points, atol=1e-8)
    square = to_output(points, dataclasses.replace(drawn, crop=(0, 0, 1.0)), (resolution, resolution), resolution)
    homogeneous = np.column_stack([points, np.ones(20)]) @ matrix(drawn, (resolution, resolution)).T
    np.testing.assert_allclose(square, homogeneous[:, :2], atol=1e-8)
    assert np.array_equal(matrix(Draw(), (resolution, resolution)), np.eye(3))


@pytest.mark.parametrize("config", [AugmentConfig(), WILD])
def test_cover_leaves_no_pixel_out_of_frame_and_scales_only_where_it_must(config):
    covering = dataclasses.replace(config, fill="cover")
    raised = 0
    for seed in range(1500):
        plain, covered = draw(config, seed, 0, 0), draw(covering, seed, 0, 0)
        assert dataclasses.replace(covered, scale=plain.scale) == plain and covered.scale >= plain.scale
        grid = np.stack(np.meshgrid([-0.5, 31.5], [-0.5, 31.5]), -1)
        whole = dataclasses.replace(covered, crop=(0.5, 0.5, 1.0))
        reach = np.abs(to_source(grid, whole, (32, 32), 32) - 15.5).max()
        assert reach <= 16 + 1e-9
        if covered.scale > plain.scale:
            raised += 1
            assert reach >= 16 - 1e-9  # no more than needed
        if seed < 300:
            assert apply(*random_pair(seed, 32, 32), covered, 32)[2].all()
    assert raised > 100 and draw(AugmentConfig.parse("none,fill=cover"), 0, 3, 1) == Draw()


def test_no_black_is_blended_into_what_is_in_frame():
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8), torch.zeros(1, 40, 40, dtype=torch.uint8)
    for seed in range(50):
        for config in (GEOMETRY, dataclasses.replace(GEOMETRY, fill="cover")):
            image, _, valid = apply(*white, draw(config, seed, 0, 0), 32)
            assert (image[valid.expand_as(image)] >= 254).all()


@pytest.mark.parametrize("size", [(24, 40), (41, 24), (24, 24)])
def test_fits_keep_what_they_say_and_none_is_the_plain_resized_center(size):
    image, mask = random_pair(4, *size)
    mask = mask.clamp(max=7)
    padded, padded_mask, valid = apply(image, mask, Draw(fit="pad"), 48)
    down, across = (round(48 * side / max(size)) for side in size)
    top, left = (48 - down) // 2, (48 - across) // 2
    assert valid.sum() == down * across and valid[:, top : top + down, left : left + across].all()
    assert (padded[:, ~valid[0]] == 0).all() and (padded_mask[~valid] == IGNORE).all()
    inside = F.resize(image, [down, across], antialias=True)
    assert torch.equal(padded[:, top : top + down, left : left + across], inside)
    center = round((size[0] - 24) / 2), round((size[1] - 24) / 2), 24, 24
    for drawn, box in ((Draw(fit="stretch"), (0, 0, *size)), (draw(AUGMENTS["none"], 7, 3, 9), center)):
        fitted, fitted_mask, whole = apply(image, mask, drawn, 48)
        assert torch.equal(fitted, F.resize(F.crop(image, *box), [48, 48], antialias=True)) and whole.all()
        assert torch.equal(fitted_mask, F.resize(F.crop(mask, *box), [48, 48], InterpolationMode.NEAREST_EXACT))
        assert torch.equal(center_square(mask, 48, drawn.fit), fitted_mask)
    assert drawn == Draw() and torch.equal(center_square(mask, 48, "pad"), padded_mask)


def test_augmentation_is_read_from_a_line_and_what_cannot_be_read_is_named():
    assert AugmentConfig.parse("affine") == AugmentConfig() and AugmentConfig.parse("none").still
    read = AugmentConfig.parse("affine, degrees=20,fill=cover,hflip=0")
    assert read == AugmentConfig(degrees=20.0, fill="cover", hflip=0.0) and not read.still
    assert dataclasses.replace(AugmentConfig.none(), hflip=0.5) == dataclasses.replace(AugmentConfig.none(), hflip=0.5)
    wrong = "", "afine", "affine,degree=3", "affine,degrees", "affine,degrees=x", "affine,fill=edge", "affine,hflip=2"
    for text in wrong:
        with pytest.raises(UserError) as caught:
            AugmentConfig.parse(text)
        for part in (text.split(",")[-1].split("=")[0], "--augment", "scale_min=0.9"):
            assert part in str(caught.value)


@pytest.mark.parametrize(("caption", "other"), [
    ("a house on the left", "a house on the right"), ("Left of it, RIGHT there", "Right of it, LEFT there"),
    ("the leftmost tree, rightwards", "the rightmost tree, leftwards"),
    ("a left-hand bend; lefthand; Upper-left, topright", "a right-hand bend; righthand; Upper-right, topleft"),
    ("bright, upright, copyright and leftovers", "bright, upright, copyright and leftovers"),
])  # fmt: skip
def test_captions_are_mirrored(caption, other):
    assert mirrored(caption) == other and mirrored(other) == caption


WORDS = st.lists(st.sampled_from(
    ["left", "Right", "LEFT", "leftmost", "Rightward", "left-hand", "bright", "leftover", "upright", "a", "LeFt", "-"]
))  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.text(), WORDS.map(" ".join), WORDS.map("".join)))
def test_mirrored_twice_is_the_same(caption):
    assert mirrored(mirrored(caption)) == caption
    assert says_a_side(mirrored(caption)) == says_a_side(caption)
    assert cannot_be_mirrored(mirrored(caption)) == cannot_be_mirrored(caption)
    assert not cannot_be_mirrored(caption) or says_a_side(caption)


def test_the_help_of_segcn_train_lists_the_fields_and_their_defaults():
    listed = dict(re.findall(r"(\w+)=(\S+)", TrainConfig.EPILOG.split("cover:\n")[1].split("\n\n")[0]))
    fields = dataclasses.fields(AugmentConfig)
    assert list(listed) == [field.name for field in fields]
    for field, value in zip(fields, listed.values(), strict=True):
        choices = field.metadata.get("choices")
        assert value.split("|") == list(choices) if choices else float(value) == field.default


@pytest.mark.parametrize("seed", range(20))
def test_ten_lines_of_torchvision_give_the_same_bytes(seed):
    """The method written out, as a reader would: cut and resize, color, flip, affine, valid pixels."""
    (image, mask), size = random_pair(seed, 40, 56), 32
    drawn = draw(dataclasses.replace(WILD, hflip=0.5), seed, 0, 0)
    expected = apply(image, mask, drawn, size)

    source, _ = boxes(drawn, image.shape[-2:], size)
    image = F.resized_crop(image, *source, [size, size], InterpolationMode.BILINEAR, antialias=True)
    mask = F.resized_crop(mask, *source, [size, size], InterpolationMode.NEAREST_EXACT)
    image = F.adjust_contrast(F.adjust_brightness(image, drawn.brightness), drawn.contrast)
    image = F.adjust_saturation(image, drawn.saturation)
    if drawn.flip:
        image, mask = image.flip(-1), mask.flip(-1)
    image = F.affine(F.pad(image, [1], padding_mode="edge"), *drawn.affine((size, size)), InterpolationMode.BILINEAR)
    valid = F.affine(torch.ones_like(mask), *drawn.affine((size, size)), InterpolationMode.NEAREST).bool()
    mask = F.affine(mask, *drawn.affine((size, size)), InterpolationMode.NEAREST, fill=IGNORE)
    image = image[..., 1:-1, 1:-1] * valid

    assert all(map(torch.equal, (image, mask, valid), expected))


SIDED = {"left lung": 1, "right lung": 2, "heart": 0, "kidney_R": 4, "kidney_L": 3}


def sided_dataset(folder, names, **palette):
    labels = [Label(id, name, (40 * id, 200 - 30 * id, 10), **palette.get(name, {})) for name, id in names.items()]
    mask = np.repeat(np.array(list(names.values()), np.uint8), 32 // len(names) + 1)[:32][None].repeat(32, 0)
    rows = [(f"images/{k}.png", f"masks/{k}.png", "a scan") for k in range(8)]
    for image, name, _ in rows:
        write_pair(folder, (image, name), np.dstack([mask * 50] * 3), mask, Palette(tuple(labels)))
    finish_dataset(folder, rows, Palette(tuple(labels)))
    return PairedDataset(read_split(folder), 32, dataclasses.replace(AugmentConfig.none(), hflip=0.5), 0), mask


@pytest.mark.parametrize("declared", [False, True])
def test_a_flip_swaps_left_and_right_classes(tmp_path, declared):
    names = {"one": 1, "two": 2, "heart": 0} if declared else SIDED
    pairs, mask = sided_dataset(tmp_path, names, **({"one": {"mirror": 2}} if declared else {}))
    swapped = np.arange(256, dtype=np.uint8)
    swapped[[1, 2]] = 2, 1
    if not declared:
        swapped[[3, 4]] = 4, 3
    flips = 0
    for row in range(8):
        sample = pairs.sample(row, 0)
        flips += sample.draw.flip
        assert np.array_equal(sample.mask.numpy(), swapped[mask[:, ::-1]] if sample.draw.flip else mask)
    assert 0 < flips < 8


def test_without_a_partner_nothing_is_flipped(tmp_path):
    pairs, _ = sided_dataset(tmp_path, {"left lung": 1, "heart": 0})
    assert not any(pairs.sample(row, epoch).draw.flip for row in range(8) for epoch in range(4))
