"""Promise: a row and an epoch give the same tensors in any order, process and worker, in the stated ranges.

Rows with rare classes come more often, exactly, at any position of the stream; rare classes weigh more.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import ALONE

from segcn.data.captions import cut_captions, without_classes
from segcn.data.dataset import PairedDataset, read_framed_mask, to_control, to_image, to_uint8
from segcn.data.files import read_image
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split, write_metadata
from segcn.data.palette import IGNORE, Label, Palette
from segcn.data.sampler import (
    Stream,
    balanced,
    cell_weights,
    class_pixels,
    class_weights,
    frequencies,
    read_class_pixels,
    repeat_factors,
)
from segcn.data.transforms import AUGMENTS, AugmentConfig, Draw, apply, draw
from segcn.models.base import encode_text
from segcn.samples.landscapes.scene import palette
from segcn.train import latent_cache
from segcn.train.batches import Examples, Plan, make_class_weights
from segcn.train.setup import prepare
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.paths import ROOT

SKY, TREE = Label(0, "sky", (135, 206, 235)), Label(1, "tree", (0, 100, 0))
PALETTE = Palette((SKY, TREE, Label(IGNORE, "unlabelled", (9, 9, 9), ignore=True)))
SPUN = AugmentConfig(degrees=45.0)


@pytest.fixture
def split(tmp_path):
    noise = np.random.default_rng(0)
    captions = ["a tree", "a tree on the left", "a sky"]
    for row in range(3):
        pixels = noise.integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        write_mask(tmp_path / f"mask-{row}.png", noise.choice([0, 1, 255], (20, 28)).astype(np.uint8), PALETTE)
    PALETTE.save(tmp_path / "palette.json")
    write_metadata(tmp_path, [(f"{k}.png", f"mask-{k}.png", captions[k]) for k in range(3)])
    return read_split(tmp_path)


def test_a_sample_has_the_stated_shapes_and_ranges_and_pixels_survive_the_round_trip(split):
    sample = PairedDataset(split, 16, AUGMENTS["affine"], seed=0)[0]
    parts = sample.image, sample.control, sample.mask, sample.valid
    assert [part.dtype for part in parts] == [torch.float32, torch.float32, torch.uint8, torch.bool]
    assert [part.shape for part in parts] == [(3, 16, 16), (3, 16, 16), (16, 16), (16, 16)]
    assert -1 <= sample.image.min() < -0.2 and 0.2 < sample.image.max() <= 1
    assert sample.control.min() >= 0 and sample.control.max() <= 1
    assert sample.caption == "a tree" and np.array_equal(sample.original.permute(1, 2, 0), read_image(split[0].image))
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    image = to_image(pixels)
    assert (image.min(), image.max()) == (-1, 1) and np.array_equal(to_uint8(image), pixels.permute(0, 2, 3, 1))
    assert to_uint8(torch.full((3, 1, 1), 2.0)).tolist() == [[[255, 255, 255]]]


def test_the_control_is_the_palette_and_black_out_of_frame(split):
    sample = PairedDataset(split, 16, SPUN, seed=0)[0]
    expected = torch.from_numpy(PALETTE.table[sample.mask.numpy()]).permute(2, 0, 1) / 255
    assert not sample.valid.all()
    assert torch.equal(sample.control, expected * sample.valid)
    unlabelled_inside = sample.valid & (sample.mask == IGNORE)
    assert unlabelled_inside.any()
    assert torch.allclose(sample.control[:, unlabelled_inside], torch.tensor(9 / 255))
    stack = torch.stack([sample.mask, sample.mask.flip(-1)])  # [2, H, W]
    single = torch.stack([to_control(mask, PALETTE) for mask in stack])
    assert torch.equal(single[0], expected) and single.shape == (2, 3, 16, 16)
    for masks in (stack, stack.numpy()):
        assert torch.equal(to_control(masks, PALETTE), single)
    assert torch.equal(to_control(stack[1].numpy(), PALETTE), single[1])


def test_an_index_is_a_row_of_an_epoch_and_without_augmentation_every_epoch_is_the_same(split):
    dataset, still = (PairedDataset(split, 16, AUGMENTS[name], seed=5) for name in ("affine", "none"))
    assert len(dataset) == len(list(dataset)) == 3
    later, direct = dataset[7], dataset.sample(row=1, epoch=2)
    assert later.draw == direct.draw == draw(AUGMENTS["affine"], 5, 2, 1, split[1].caption)
    assert torch.equal(later.image, direct.image) and torch.equal(later.mask, direct.mask)
    assert not torch.equal(later.image, dataset[1].image)
    assert torch.equal(still[0].image, still[3].image) and still[0].valid.all()


def test_files_that_do_not_fit_are_named(split):
    write_mask(split[1].mask, np.zeros((20, 27), np.uint8), PALETTE)
    split[0].image.write_bytes(b"nothing")
    pairs = PairedDataset(split, 16, AUGMENTS["none"], seed=0)
    with pytest.raises(UserError, match=r"metadata.csv, line 3 \(row 1\): .*28 x 20, found 27 x 20"):
        pairs[1]
    with pytest.raises(UserError, match=r"line 2 \(row 0\): .*0.png: the image cannot be read"):
        pairs[0]
    with pytest.raises(UserError, match="crop, pad, stretch, found 'squeeze'"):
        PairedDataset(split, 16, AUGMENTS["none"], 0, "squeeze")


SIDED = "a tree on the left", "a sky above", "Rightmost tree"
REWRITE = AugmentConfig.parse("affine,sided_captions=rewrite")


@pytest.fixture
def captioned(split):
    """The same rows with several captions, some of which say a side."""
    captions = ("a tree", "one tree", "trees"), SIDED, ("a sky", "leftovers")
    records = tuple(record._replace(captions=said) for record, said in zip(split.records, captions, strict=True))
    return dataclasses.replace(split, records=records)


def test_one_of_several_captions_is_drawn_in_each_epoch(captioned):
    dataset, again, other = (PairedDataset(captioned, 16, AUGMENTS["affine"], seed) for seed in (0, 0, 1))
    for row in range(3):
        used = [dataset.sample(row, epoch).caption for epoch in range(30)]
        assert set(used) == set(captioned[row].captions)
        assert used == [again.caption(row, epoch, False) for epoch in range(30)]
        assert used != [other.caption(row, epoch, False) for epoch in range(30)]


def test_no_caption_comes_with_an_image_that_it_does_not_fit_and_every_one_is_listed(captioned):
    skipping, rewriting = PairedDataset(captioned, 16, AUGMENTS["affine"], 0), PairedDataset(captioned, 16, REWRITE, 0)
    assert not any(skipping.draw(row, epoch).flip for row in (1, 2) for epoch in range(30))
    sides, turned, seen = {"a tree on the left", "Rightmost tree"}, {"a tree on the right", "Leftmost tree"}, set()
    for epoch in range(60):
        sample = rewriting.sample(1, epoch)
        assert sample.caption in (turned if sample.draw.flip else sides) | {"a sky above"}
        seen.add(sample.caption)
    assert len(seen) == 5
    assert not any(rewriting.draw(2, epoch).flip for epoch in range(30))  # leftovers
    assert list(skipping.captions()) == [caption for record in captioned.records for caption in record.captions]
    assert set(rewriting.captions()) == {*skipping.captions(), *turned}


@pytest.mark.parametrize(("caption", "left"), [
    ("a winter landscape at dusk with mountains, a lake and a red house", "a winter landscape at dusk"),
    ("a winter landscape at dusk with a red barn and a lake", "a winter landscape at dusk with a red barn"),
    ("a landscape with a River and a red barn, seen from above", "a landscape with a red barn, seen from above"),
    ("a photo of houses, in spring", "a photo, in spring"), ("two Trees", ""), ("", ""),
    ("a roadside inn; a treehouse", "a roadside inn; a treehouse"), ("by day,  at noon", "by day,  at noon"),
])  # fmt: skip
def test_phrases_that_name_a_class_leave_a_caption_and_nothing_else_does(caption, left):
    assert without_classes(caption, palette()) == left


def test_a_caption_is_cut_of_all_its_classes_and_twice_of_one_of_them():
    cut = "a dusk with {}".format
    whole, pairs = cut("mountains, a lake and a red house"), ("a lake and a red house", "mountains and a red house")
    whole_cut, *one_cut = cut_captions(whole, palette())
    assert whole_cut == "a dusk" and len(set(one_cut)) == 2
    assert set(one_cut) < {*map(cut, pairs), cut("mountains, a lake")}
    assert all(cut_captions(text, palette()) == ["a dusk"] * 3 for text in (cut("a lake"), "a dusk"))


def test_words_of_a_class_are_kept_in_the_file_and_leave_the_label_contract_alone(tmp_path):
    palette().save(tmp_path / "palette.json")
    assert Palette.load(tmp_path / "palette.json") == palette()
    bare = Palette(tuple(dataclasses.replace(label, words=()) for label in palette().labels))
    assert bare != palette() and bare.fingerprint == palette().fingerprint
    (tmp_path / "palette.json").write_text('{"labels": [{"id": 0, "name": "a", "color": [0, 0, 0], "words": "lake"}]}')
    with pytest.raises(UserError, match="words, a list of texts, found 'lake'"):
        Palette.load(tmp_path / "palette.json")


@pytest.mark.parametrize("augment", ["affine", "affine,sided_captions=rewrite,fill=cover"])
def test_with_and_without_the_cache_a_step_gets_the_same(captioned, base, tmp_path, augment):
    """Also the text: in the first K epochs the draws are the same, afterwards the captions go on changing."""
    dataset = PairedDataset(captioned, 32, AugmentConfig.parse(augment), seed=3)
    cache = latent_cache.build(tmp_path / "cache", dataset, base, 4, ALONE, print, class_dropout=True)
    shape, settings = (12, 4, 4), {"seed": 3, "empty_prompts": 0.2, "class_dropout": 0.5, "timesteps": 1000}
    cached, direct = (Examples(dataset, kept, base.latent_factor, shape, settings) for kept in (cache, None))
    for key in [(epoch, row) for epoch in range(4) for row in range(3)]:
        one, other = cached[key], direct[key]
        for name in ("control", "cells", "noise", "posterior"):
            assert torch.equal(one[name], other[name]), name
        text = encode_text(base, [other["caption"]])[0].half().float()
        assert torch.allclose(one["text"], text, atol=2e-3), other["caption"]
    told_later = {cached.dataset.caption(0, epoch, False) for epoch in range(4, 30)}
    assert told_later == set(captioned[0].captions) and cached[29, 0]["text"].shape == text.shape
    with pytest.raises(KeyError, match="never said"):
        cache.text_of("never said")
    assert json.loads(next((tmp_path / "cache").glob("captions-*.json")).read_text())[0] == ""
    assert isinstance(cache.text_of(""), np.memmap)


def test_a_cache_depends_on_what_it_holds(split):
    keys = {
        latent_cache.cache_key(PairedDataset(split, 16, AugmentConfig.parse(augment), 0, fit), "base")
        for augment in ("affine", "affine,fill=cover", "affine,sided_captions=rewrite")
        for fit in ("crop", "pad")
    }
    assert len(keys) == 6


SHARE = """
import hashlib, sys
import numpy as np
from torch.utils.data import DataLoader
from segcn.data.dataset import PairedDataset
from segcn.data.metadata import read_split
from segcn.data.transforms import AugmentConfig
from segcn.train.batches import Examples, Plan

rank, world, workers = map(int, sys.argv[2:])
split = read_split(sys.argv[1], "train")
pairs = PairedDataset(split, 64, AugmentConfig.parse("affine,sided_captions=rewrite"), 0, "pad")
examples = Examples(pairs, None, 8, (4, 8, 8), {"seed": 0, "empty_prompts": 0.1, "timesteps": 1000})
plan = Plan(len(split), 0, 0, 10, 1, 4 // world, rank, world, 1 + np.arange(len(split)) / 7)
for batch in DataLoader(examples, batch_sampler=plan, num_workers=workers):
    for place, caption in enumerate(batch.pop("caption")):
        parts = [batch[name][place].numpy().tobytes() for name in sorted(batch)]
        print(hashlib.sha256(caption.encode() + b"".join(parts)).hexdigest())
"""


def test_workers_and_processes_change_no_byte(landscapes):
    """One process, two that share its work, and one with two workers, each with its own hash seed and threads."""
    started = []
    for number, share in enumerate([(0, 1, 0), (0, 2, 0), (1, 2, 0), (0, 1, 2)]):
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(1 + number % 2)}
        command = [sys.executable, "-c", SHARE, str(landscapes), *map(str, share)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT))
    alone, even, odd, worked = (process.communicate(timeout=120)[0].split() for process in started)
    assert len(set(alone)) == 40
    batches = zip(even[::2], even[1::2], odd[::2], odd[1::2], strict=True)
    assert [row for batch in batches for row in batch] == alone == worked


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_mask_to_generate_from_is_the_one_that_training_sees(split, fit):
    sample = PairedDataset(split, 24, AUGMENTS["none"], 0, fit).sample(1, 0)
    mask, frame = read_framed_mask(split[1].mask, PALETTE, 24, fit)
    assert np.array_equal(mask, sample.mask.numpy())
    assert np.array_equal(frame.cut(np.ones_like(mask)), frame.cut(sample.valid.numpy())) and frame[3] == 24
    assert sample.valid.sum() == frame.height * frame.width and (frame.height == 24) == (fit != "pad")
    assert np.array_equal(read_framed_mask(split[1].mask, PALETTE)[0], read_mask(split[1].mask, PALETTE))


def test_the_draw_of_a_sample_replays_it(split):
    sample = PairedDataset(split, 16, AugmentConfig.parse("affine,fill=cover"), 0, "pad").sample(0, 4)
    again = Draw.from_dict(json.loads(json.dumps(sample.draw.to_dict())))
    mask = torch.from_numpy(read_mask(split[0].mask, PALETTE))[None]
    image, mask, valid = apply(sample.original, mask, again, 16)
    assert torch.equal(to_image(image), sample.image) and torch.equal(mask[0], sample.mask)
    assert torch.equal(valid[0], sample.valid)


def darken_and_erase(image, mask, seed):
    """A researcher's augmentation: it darkens the image, and takes the labels from a row of pixels by the seed."""
    mask = mask.clone()
    mask[seed % len(mask)] = IGNORE
    return image // 2, mask


def test_a_function_of_ones_own_runs_after_the_paired_affine(split):
    plain, own = PairedDataset(split, 16, SPUN, 3), PairedDataset(split, 16, SPUN, 3, function=darken_and_erase)
    assert not own.still and not PairedDataset(split, 16, AUGMENTS["none"], 3, function=darken_and_erase).still
    seeds = set()
    for row, epoch in ((0, 0), (1, 0), (0, 1), (2, 5)):
        expected, sample = plain.sample(row, epoch), own.sample(row, epoch)
        seed = rng.seed_of("augment function", 3, epoch, row)
        assert (to_uint8(sample.image) == to_uint8(expected.image) // 2).all()
        seeds.add(seed)
        expected.mask[seed % 16] = IGNORE
        assert torch.equal(sample.mask, expected.mask) and torch.equal(sample.valid, expected.valid)
        assert torch.equal(sample.control, to_control(sample.mask, PALETTE) * sample.valid)
    assert len(seeds) == 4


@pytest.mark.parametrize(("function", "words"), [
    (lambda image, mask, seed: (image, torch.full_like(mask, 9)), "class ids of palette.json, or 255, found 9"),
    (lambda image, mask, seed: (image.float(), mask), r"an image, uint8 \[3, 16, 16\], found torch.float32"),
    (lambda image, mask, seed: (image, mask[None]), r"a mask, uint8 \[16, 16\], found torch.uint8 \[1, 16, 16\]"),
])  # fmt: skip
def test_what_such_a_function_may_not_give_is_named(split, function, words):
    function.__name__ = "recolor"
    with pytest.raises(UserError, match=f"the augmentation recolor: expected {words}"):
        PairedDataset(split, 16, SPUN, 0, function=function).sample(0, 0)


FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
FACTORS = st.lists(st.floats(1, 6), min_size=1, max_size=12)
COUNTS = st.lists(st.lists(st.integers(0, 10**6), min_size=5, max_size=5), min_size=1, max_size=9)


def test_without_repeats_the_stream_is_one_permutation_after_another():
    keys = [Stream(10, 7)[position] for position in range(35)]
    assert [visit for visit, _ in keys] == [position // 10 for position in range(35)]
    for epoch in range(3):
        rows = [row for _, row in keys[10 * epoch : 10 * epoch + 10]]
        assert rows == rng.permutation(10, "rows", 7, epoch)


@FEW
@given(factors=FACTORS, seed=st.integers(0, 99))
def test_each_row_comes_as_often_as_its_factor_says_and_its_visits_are_numbered(factors, seed):
    repeats, epochs = np.array(factors), 20
    stream = Stream(len(repeats), seed, repeats)
    keys = [stream[position] for position in range(stream.start(epochs))]
    for row, factor in enumerate(repeats):
        visits = sorted(visit for visit, found in keys if found == row)
        assert visits == list(range(len(visits)))
        assert abs(len(visits) - epochs * factor) < 1
    one = [sorted(row for _, row in keys[stream.start(e) : stream.start(e + 1)]) for e in range(epochs)]
    assert all(set(rows) == set(range(len(repeats))) for rows in one)


@FEW
@given(factors=FACTORS, seed=st.integers(0, 99), data=st.data())
def test_any_position_is_found_without_those_before_it_and_factors_of_one_change_nothing(factors, seed, data):
    rows, repeats = len(factors), np.array(factors)
    stream, plain, ones = Stream(rows, seed, repeats), Stream(rows, seed), Stream(rows, seed, np.ones(rows))
    walked = [stream[position] for position in range(200)]
    for position in data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=5)):
        assert Stream(rows, seed, repeats)[position] == walked[position] == stream[position]
        assert plain[position] == ones[position]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_balanced_batches_do_not_depend_on_processes_or_breaks(world):
    repeats = np.array([1.0, 2.5, 1.0, 1.3, 1.0, 4.0, 1.0])
    whole = [key for batch in Plan(7, 3, 0, 9, 2, 8, repeats=repeats) for key in batch]
    parts = [list(Plan(7, 3, 0, 9, 2, 8 // world, rank, world, repeats)) for rank in range(world)]
    assert [key for step in zip(*parts, strict=True) for batch in step for key in batch] == whole
    assert [key for batch in Plan(7, 3, 5, 9, 2, 8, repeats=repeats) for key in batch] == whole[5 * 2 * 8 :]
    assert len(set(whole)) == len(whole)


def test_a_late_start_of_many_rows_takes_no_time():
    rows = 100_000
    repeats = 1 + 3 * np.random.default_rng(0).random(rows) ** 4
    began = time.monotonic()
    stream = Stream(rows, 0, repeats)
    late = stream.start(100) - 5000
    keys = [stream[position] for position in range(late, late + 10000)]
    assert len(set(keys)) == 10000 and {visit > 90 for visit, _ in keys} == {True}
    assert time.monotonic() - began < 10


def test_factors_are_those_of_the_paper():
    pixels = np.zeros((100, 4), np.uint32)
    pixels[:, 0], pixels[:20, 1], pixels[:5, 2] = 5, 3, 1
    repeats = repeat_factors(pixels, 0.2)
    assert repeats[:5] == pytest.approx(2) and (repeats[5:] == 1).all()
    assert repeat_factors(pixels, 0.4)[10] == pytest.approx(2**0.5)
    rows, area = frequencies(pixels, repeats)
    assert rows == pytest.approx([1, 25 / 105, 10 / 105, 0]) and area.sum() == pytest.approx(1)
    assert (repeat_factors(np.zeros((3, 2)), 0.5) == 1).all()


def test_pixels_are_counted_once_and_kept_and_balance_says_what_it_changes(landscapes, tmp_path):
    split, lines = read_split(landscapes, "train"), []
    pixels = read_class_pixels(split, tmp_path / "cache", ALONE)
    assert np.array_equal(pixels, class_pixels(split)) and pixels.dtype == np.uint32
    mask = read_mask(split[3].mask, split.palette)
    assert np.array_equal(pixels[3], np.bincount(mask.ravel(), minlength=256)[: pixels.shape[1]])
    (kept,) = (tmp_path / "cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    repeats = balanced(split, 0.9, tmp_path / "cache", ALONE, lines.append)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [stamp]
    assert repeats.max() > 1 and len(repeats) == len(split)
    assert "12 rows occur" in lines[0] and len(lines) == 8 and "->" in lines[1] and max(map(len, lines)) <= 100


@FEW
@given(counts=COUNTS, exponent=st.floats(0.05, 2))
def test_the_mean_over_labelled_pixels_is_one_and_ratios_are_powers_of_the_shares(counts, exponent):
    pixels = np.array(counts, np.uint32)
    weights, area = class_weights(pixels, exponent).double(), torch.tensor(pixels.sum(0, dtype=np.float64))
    assert weights.shape == (5,) and (weights[area == 0] == 0).all()
    if area.sum() > 0:
        assert (weights * area).sum() / area.sum() == pytest.approx(1, rel=1e-4)
        shown = area > 0
        scaled = weights[shown] * area[shown] ** exponent
        assert torch.allclose(scaled, scaled.mean().expand_as(scaled), rtol=1e-4)


def test_a_cell_is_the_mean_of_its_pixels_and_unlabelled_ones_are_nothing():
    mask = torch.zeros(16, 24, dtype=torch.uint8)
    mask[:8, 8:16], mask[8:, 16:], mask[8:, 8:12] = 2, IGNORE, 1
    assert cell_weights(mask, torch.tensor([1.0, 2.0, 6.0]), 8).tolist() == [[1, 6, 1], [1, 1.5, 0]]


@pytest.mark.parametrize("cache", ["latents", "none"])
def test_examples_carry_weights_where_they_are_requested(quick, tmp_path, landscapes, cache):
    run = prepare(quick(tmp_path / "run", cache=cache, class_weighting=0.5))
    split = read_split(landscapes, "train")
    table = class_weights(class_pixels(split), 0.5)
    for key in [(0, 3), (1, 8)]:
        example = run.examples[key]
        expected = cell_weights(run.examples.dataset.sample(key[1], key[0]).mask, table, 8)
        assert torch.equal(example["weights"], expected) and example["weights"].dtype == torch.float32
        assert example["weights"].shape == example["cells"].shape and len(expected.unique()) > 4
    assert make_class_weights(quick("x"), split, run.accelerator) is None
    run.examples.settings["class_weights"] = None
    assert "weights" not in run.examples[0, 3]
