"""Promise: rare classes weigh more, the mean labelled pixel weighs 1, and what is not labelled weighs nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcn.data.metadata import read_split
from segcn.data.palette import IGNORE
from segcn.data.sampler import cell_weights, class_pixels, class_weights
from segcn.train.batches import make_class_weights
from segcn.train.setup import prepare

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
COUNTS = st.lists(st.lists(st.integers(0, 10**6), min_size=5, max_size=5), min_size=1, max_size=9)


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
