"""Promise: rows with rare classes come more often, exactly, at any position of the stream; rare classes weigh more."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ALONE

from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.data.palette import IGNORE
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
from segcn.train.batches import Plan, make_class_weights
from segcn.train.setup import prepare
from segcn.utils import rng

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
    pixels[:, 0] = 5
    pixels[:20, 1] = 3
    pixels[:5, 2] = 1
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
    table = torch.tensor([1.0, 2.0, 6.0])
    mask = torch.zeros(16, 24, dtype=torch.uint8)
    mask[:8, 8:16] = 2
    mask[8:, 16:] = IGNORE
    mask[8:, 8:12] = 1
    assert cell_weights(mask, table, 8).tolist() == [[1, 6, 1], [1, 1.5, 0]]


@pytest.mark.parametrize("cache", ["latents", "none"])
def test_examples_carry_weights_where_they_are_asked_for(quick, tmp_path, landscapes, cache):
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
