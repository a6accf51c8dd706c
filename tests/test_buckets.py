"""Promise: with --buckets images keep their shapes, pairs stay aligned, and each row comes once an epoch.

Batches are of one shape, and any number of processes trains on the same rows in each step."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import ALONE
from torch.utils.data import DataLoader

from segcn.data.dataset import PairedDataset
from segcn.data.metadata import check_split, read_split
from segcn.data.sampler import Groups, Stream
from segcn.data.transforms import (
    AUGMENTS,
    AugmentConfig,
    Draw,
    apply,
    boxes,
    buckets,
    draw,
    output_shape,
    size_ids,
    to_source,
)
from segcn.data.visualize import SHEET_GAP, write_sheet
from segcn.generate.config import InferConfig, SampleConfig
from segcn.generate.infer import infer
from segcn.generate.writer import reconstruct_dataset
from segcn.models.base import encode_moments
from segcn.models.segmenter import build_segmenter
from segcn.train import latent_cache
from segcn.train.batches import Examples, Plan
from segcn.train.log import training_lines
from segcn.train.loop import train
from segcn.train.setup import prepare
from segcn.train.validation import HeldOutScorer, generate_rows, score_rows
from segcn.utils.args import make
from segcn.utils.errors import UserError

SHAPES = [(48, 80), (48, 80), (80, 48), (64, 64)]  # of the rows of `mixed`, in turn, at 64 pixels
SIDES = st.integers(8, 4000)


@pytest.fixture(scope="module")
def bucketed(quick, mixed):
    """A function from settings to the config of a few quick steps on it."""
    return lambda out, **changes: quick(
        out, **{"dataset_name": str(mixed), "buckets": True, "max_train_steps": 4} | changes
    )


def pairs_of(folder, augment="affine", seed=0):
    return PairedDataset(read_split(folder, "train"), 64, AugmentConfig.parse(augment), seed, "bucket")


@settings(deadline=None, derandomize=True, database=None)
@given(height=SIDES, width=SIDES, resolution=st.sampled_from([64, 128, 512, 704, 1024]))
def test_a_bucket_has_the_nearest_ratio_about_as_many_pixels_and_sides_that_the_networks_take(
    height, width, resolution
):
    shape, step = output_shape((height, width), resolution, "bucket"), min(64, resolution // 8)
    assert all(side % step == 0 and resolution // 3 <= side <= 2 * resolution for side in shape)
    assert 0.8 * resolution**2 < np.prod(shape) <= resolution**2
    off = {one: abs(np.log(one[0] / one[1]) - np.log(height / width)) for one in buckets(resolution)}
    assert off[shape] <= min(off.values()) + 1e-12
    assert output_shape((width, height), resolution, "bucket") == shape[::-1]
    cut = boxes(Draw(fit="bucket"), (height, width), resolution)[0]  # one side whole, the ratio kept to a pixel
    assert cut.height == height or cut.width == width
    assert abs(cut.height * shape[1] - cut.width * shape[0]) <= max(shape)
    assert output_shape((resolution,) * 2, resolution, "bucket") == (resolution,) * 2


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([(200, 300), (240, 130)]), fill=st.sampled_from("ic"))
def test_image_and_mask_are_cut_and_moved_alike_in_the_shape_of_the_bucket(seed, size, fill):
    """The image says where each pixel was, the mask in which block of ten pixels; both agree with the draw."""
    y, x = np.indices(size)
    image = torch.from_numpy(np.stack([x % 256 // 2 * 2, y % 256 // 2 * 2, 0 * x]).clip(0, 255).astype(np.uint8))
    config = AugmentConfig(
        brightness=0, contrast=0, saturation=0, crop_min=0.7, fill={"i": "ignore", "c": "cover"}[fill]
    )
    shape = output_shape(size, 128, "bucket")
    drawn = draw(config, seed, 0, 0, fit="bucket", shape=shape)
    blocks = torch.from_numpy((x // 10 + y // 10 * 8).astype(np.uint8) % 251)[None]
    moved, mask, valid = apply(image, blocks, drawn, 128)
    assert moved.shape == (3, *shape) and mask.shape == valid.shape == (1, *shape)
    assert fill == "i" or valid.all()
    down, across = np.indices(shape)
    source = to_source(np.stack([across, down], -1), drawn, size, 128)
    near = np.abs(source / 10 - np.round(source / 10)).min(-1) * 10 > 2.2  # NEAREST twice, a pixel is two
    inside = valid[0].numpy() & near & (source > 1).all(-1) & (source < np.array(size[::-1]) - 2).all(-1)
    column, line = (source // 10).astype(int)[..., 0], (source // 10).astype(int)[..., 1]
    assert inside.any() and np.array_equal(
        mask[0].numpy()[inside], ((column + line * 8) % 251)[inside].astype(np.uint8)
    )
    plain = inside & (source % 256 > 4).all(-1) & (source % 256 < 250).all(-1)  # where the ramps do not begin again
    for channel in (0, 1):
        assert np.abs(moved[channel].numpy() - source[..., channel] % 256)[plain].max() <= 3


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 12), rows=st.integers(1, 40), balanced=st.booleans())
def test_each_row_comes_once_an_epoch_and_each_step_has_one_shape(seed, size, rows, balanced):
    random = np.random.default_rng(seed)
    shapes = random.choice([48, 64, 80], (rows, 2), p=[0.1, 0.3, 0.6])
    repeats = 1 + random.random(rows) if balanced else None
    groups, stream = Groups(Stream(rows, seed, repeats), shapes, size), Stream(rows, seed, repeats)
    later = Groups(Stream(rows, seed, repeats), shapes, size)
    for epoch in (2, 0, 1):
        found = [groups[number] for number in range(groups.start(epoch), groups.start(epoch + 1))]
        expected = [stream[position] for position in range(stream.start(epoch), stream.start(epoch + 1))]
        assert Counter(key for group in found for key in group) == Counter(expected)
        assert all(len({tuple(shapes[row]) for _, row in group}) == 1 and len(group) <= size for group in found)
        rest = Counter(tuple(shapes[group[0][1]]) for group in found if len(group) < size)
        assert all(count == 1 for count in rest.values())  # one smaller group of a shape at most
        assert later[groups.start(epoch)] == found[0]
    assert rows < 12 or groups[0] != groups[groups.start(1)]


@pytest.mark.parametrize("accumulate, batch, world", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2)])
def test_a_step_has_the_same_rows_and_each_the_same_weight_however_it_is_divided(mixed, accumulate, batch, world):
    shapes, groups = pairs_of(mixed).shapes, Groups(Stream(11, 5), pairs_of(mixed).shapes, 4)
    plans = [Plan(11, 5, 1, 9, accumulate, batch, rank, world, shapes=shapes) for rank in range(world)]
    micro = [list(plan) for plan in plans]
    for step in range(8):
        parts = [keys for own in micro for keys in own[step * accumulate : (step + 1) * accumulate]]
        weighed = Counter()
        for keys in parts:
            assert 1 <= len(keys) <= batch
            for visit, row, share in keys:
                weighed[visit, row] += share / len(keys) / len(parts)  # the mean of a part, the mean of all parts
        shown = {key: weight for key, weight in weighed.items() if weight}
        assert shown == pytest.approx(dict.fromkeys(groups[step + 1], 1 / 4))


def test_with_and_without_the_cache_a_row_is_the_same_in_its_shape(mixed, base, tmp_path):
    pairs = pairs_of(mixed, "affine,fill=cover", 3)
    assert pairs.shapes.tolist() == [list(SHAPES[row % 4]) for row in range(11)]
    cache = latent_cache.build(tmp_path / "cache", pairs, base, 2, ALONE, print)
    given = {"seed": 3, "timesteps": 1000, "class_weights": torch.ones(9), "reward": (200, 700)}
    cached, direct = (Examples(pairs, kept, 8, (12, 8, 8), given) for kept in (cache, None))
    for key in [(epoch, row) for epoch in range(2) for row in range(4)]:
        one, other, (height, width) = cached[key], direct[key], SHAPES[key[1]]
        for name in ("control", "cells", "weights", "mask", "noise", "posterior"):
            assert torch.equal(one[name], other[name]), name
        assert one["moments"].shape == (24, height // 8, width // 8) and one["mask"].shape == (height, width)
        moments = encode_moments(base.vae, other["image"][None])[0]
        assert torch.allclose(one["moments"], moments, atol=2e-3, rtol=2e-3)
    keys = {latent_cache.cache_key(one, "base") for one in (pairs, PairedDataset(pairs.split, 64, pairs.augment, 3))}
    assert len(keys) == 2
    (pairs.split[1].image).rename(tmp_path / "gone.png")
    try:
        other = latent_cache.build(tmp_path / "less", pairs, base, 1, ALONE, print, bad_limit=1)
        assert other.good(1, pairs.shapes) == 4  # the next wide one
        with pytest.raises(UserError, match="No other row has its shape"):
            other.good(1, np.arange(22).reshape(11, 2))
    finally:
        (tmp_path / "gone.png").rename(pairs.split[1].image)


def test_stable_diffusion_xl_reads_the_size_of_the_bucket():
    assert size_ids(Draw(fit="bucket"), (60, 90), 64) == [60, 90, 3, 0, 48, 80]  # of 53 pixels, three above are cut
    assert size_ids(Draw(fit="bucket"), (64, 64), 64) == [64, 64, 0, 0, 64, 64]


def alike(one, other):
    found = [ControlNetModel.from_pretrained(folder).state_dict() for folder in (one, other)]
    return all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


SMOOTH = {"adam_epsilon": 1e-2, "cache": "none"}  # at 1e-8 the first steps are the signs of rounding errors


def test_a_step_of_several_micro_batches_trains_as_one(bucketed, tmp_path):
    whole = train(bucketed(tmp_path / "whole", train_batch_size=4, **SMOOTH))
    assert alike(whole, train(bucketed(tmp_path / "parts", gradient_accumulation_steps=2, **SMOOTH)))


@pytest.mark.slow
def test_two_processes_train_as_one(bucketed, tmp_path):
    whole = train(bucketed(tmp_path / "one", train_batch_size=4, **SMOOTH))
    list(training_lines(bucketed(tmp_path / "two", **SMOOTH), 2))
    assert alike(whole, tmp_path / "two")


def test_an_epoch_has_a_step_for_each_group(bucketed, tmp_path):
    epoch = {"preset": "sd15", "max_train_steps": None, "num_train_epochs": 1, "train_batch_size": 4, "cache": "none"}
    run = prepare(bucketed(tmp_path / "epoch", **epoch, report_to="none"), check=False)
    assert run.config.max_train_steps == 2 + 1 + 1  # 6 wide rows, 3 tall ones and 2 squares in groups of 4
    plan = Plan(11, 0, 0, 4, 1, 4, shapes=run.examples.dataset.shapes)
    batches = list(DataLoader(run.examples, batch_sampler=plan))
    assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(11))
    assert {tuple(batch["control"].shape[2:]) for batch in batches} == set(SHAPES)


def test_held_out_rows_are_scored_in_their_shapes_and_shown_in_squares(pipeline, mixed, tmp_path):
    held_out, segmenter = read_split(mixed, "test"), build_segmenter(9, 8)
    masks = [sample.mask.numpy() for sample in PairedDataset(held_out, 64, AUGMENTS["none"], 0, "bucket")]
    scorer = HeldOutScorer(segmenter, held_out, masks, {"miou": 0.5})
    images = generate_rows(scorer, pipeline, make(SampleConfig, "tiny", num_inference_steps=1), 3, lambda step: False)
    assert [image.shape[:2] for image in images] == [mask.shape for mask in masks] == SHAPES
    assert 0 <= score_rows(scorer, images)["miou"] <= 1
    sheet = write_sheet(tmp_path / "sheet.png", [images])
    assert sheet.shape == (80, 4 * 80 + 3 * SHEET_GAP, 3)
    assert (sheet[:16] == 255)[:, :80].all() and np.array_equal(sheet[16:64, :80], images[0])


def test_wide_and_tall_images_come_back_in_their_shape(write, pipeline, mixed, tmp_path):
    out = read_split(write(controls=str(mixed), resolution=64, buckets=True))
    seen = read_split(reconstruct_dataset(read_split(mixed, "test"), pipeline.base, tmp_path / "r", 64, 16, "bucket"))
    for split in (out, seen):
        check_split(split)
        assert [Image.open(record.image).size[::-1] for record in split.records] == SHAPES
    alone = read_split(
        write(controls=str(mixed), resolution=64, buckets=True, batch_size=1, output_dir=str(tmp_path / "1"))
    )
    for one, other in zip(out.records, alone.records, strict=True):
        pixels = [np.asarray(Image.open(record.image)).astype(int) for record in (one, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    moved = write(controls=str(mixed), resolution=64, buckets=True, augment_masks="affine", from_images=0.5,
                  output_dir=str(tmp_path / "moved"))  # fmt: skip
    assert [Image.open(record.image).size[::-1] for record in read_split(moved).records] == SHAPES


def test_infer_keeps_the_shape(mixed, random_base, random_controlnet, tmp_path):
    given = {"pretrained_model_name_or_path": str(random_base), "control": str(read_split(mixed, "test")[2].mask),
             "controlnet_model_name_or_path": str(random_controlnet), "prompt": ["a lake"]}  # fmt: skip
    config = make(InferConfig, "tiny", **given, out=str(tmp_path / "a.png"), num_inference_steps=1, resolution=64)
    assert Image.open(infer(replace(config, buckets=True))).size == (48, 80)


@pytest.mark.parametrize("changes, message", [
    ({"fit": "pad"}, "--buckets keeps the shapes of images, --fit pad makes squares: leave one out"),
    ({"resolution": 100}, "expected a --resolution that is a multiple of 8, found 100"),
    ({"resolution": 600}, "expected a --resolution that is a multiple of 64, found 600"),
    ({"resolution": 72}, "expected a --resolution that is a multiple of 64, found 72"),  # latent cells of 8 px
    ({"resolution": None}, "--buckets: expected --resolution, the side of a square with as many pixels"),
    ({"tiled": True}, "--tiled leaves masks as large as they are, --buckets makes them smaller: leave one out"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(bucketed, write, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write(**{"buckets": True, "resolution": 64} | changes)
    if "tiled" not in changes and changes.get("resolution", 64):
        with pytest.raises(UserError, match=message):
            train(bucketed(tmp_path / "out", **changes))
