"""Promise: the distances are those of the literature, and each moves the way it should."""

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from segcn.evaluate import bootstrap
from segcn.evaluate.bootstrap import Estimate, difference, ratio, resamples
from segcn.evaluate.metrics import (
    few_images,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    memorization,
    neighborhoods,
)
from segcn.models.base import one_core


@pytest.fixture(autouse=True)
def one_core_alone():
    with one_core():
        yield


def cloud(count, width=12, shift=0.0, seed=0):
    """Features that are correlated and not centred, as those of networks are."""
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=noise) @ mixing + 1 + shift


def torch_fidelity_fid(near, far):
    statistics = [fid_features_to_statistics(one.double()) for one in (near, far)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def torch_fidelity_kid(near, far):
    settings = {"kid_subsets": 1, "kid_subset_size": len(near), "verbose": False, "kid_kernel": "poly", "rng_seed": 0}
    settings |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    return kid_features_to_metric(near.double(), far.double(), **settings)["kernel_inception_distance_mean"]


@pytest.mark.parametrize(("count", "width", "shift"), [(200, 12, 0.0), (200, 12, 0.3), (40, 96, 0.3)])
def test_frechet_and_kernel_distance_agree_with_torch_fidelity_on_the_same_features(count, width, shift):
    near, far = cloud(count, width), cloud(count, width, shift=shift, seed=1) * 1.1
    assert frechet_distance(near, far) == pytest.approx(torch_fidelity_fid(near, far), rel=1e-3)
    assert kernel_distance(near, far).value == pytest.approx(torch_fidelity_kid(near, far), rel=1e-3)


def test_the_kernel_distances_interval_contains_zero_for_one_distribution_and_not_for_two():
    near = cloud(150)
    assert frechet_distance(near, near) == pytest.approx(0, abs=1e-9)
    for far, same in ((near, True), (cloud(150, seed=1), True), (cloud(150, shift=0.4, seed=1), False)):
        low, high = kernel_distance(near, far).interval()
        assert (low < 0 < high) == same and high > 0


def test_the_frechet_interval_holds_its_value_and_narrows_with_more_images():
    few, many = (frechet_estimate(cloud(count), cloud(count, shift=0.3, seed=1)) for count in (40, 400))
    widths = []
    for found in (few, many):
        low, high = found.interval()
        assert 0 <= low < found.value < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_resamples_repeat_and_leave_the_random_state():
    state = torch.get_rng_state()
    first, again = (torch.cat(list(resamples(7, draws=150))) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (150, 7)
    assert (first.sum(1) == 7).all() and first.std() > 0.5
    assert not torch.equal(first, torch.cat(list(resamples(7, "other", 150))))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    noise = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        low, high = bootstrap.mean(torch.randn(80, generator=noise)).interval()
        covered += low < 0 < high
    assert 0.85 <= covered / 60 <= 1


def test_differences_of_paired_draws_are_narrower_than_those_of_other_rows():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    one, near, apart = bootstrap.mean(values), bootstrap.mean(values + 0.01), bootstrap.mean(values + 0.01, "other")
    spans = [high - low for low, high in (difference(near, one).interval(), difference(apart, one).interval())]
    assert spans[0] < 1e-9 < 0.1 < spans[1]
    assert ratio(one, Estimate(None, one.draws)).interval() is None


def test_precision_falls_off_the_real_cloud_and_recall_where_the_generated_one_is_narrow():
    real = cloud(200, 4)
    same, away, narrow = (neighborhoods(real, far) for far in (
        cloud(200, 4, seed=1), cloud(200, 4, shift=4, seed=1), (cloud(200, 4, seed=1) - 1) * 0.1 + 1))  # fmt: skip
    assert min(one.value for one in same.values()) > 0.7
    assert max(one.value for one in away.values()) < 0.1
    assert narrow["precision"].value > 0.95 and narrow["density"].value > 1.05
    assert narrow["recall"].value < 0.3 and narrow["coverage"].value < 0.5


def test_copies_of_training_images_are_nearer_than_real_test_images_and_the_closest_are_named():
    train, test = cloud(100), cloud(60, seed=1)
    copies = train[:40] + 0.01
    copied, fresh = memorization(copies, test, train), memorization(cloud(60, seed=2), test, train)
    assert copied["nearer_than_real"].value == 1 and copied["nearer_than_real"].interval()[0] > 0.95
    low, high = fresh["nearer_than_real"].interval()
    assert low < 0.5 < high
    assert all(one["row"] == one["training_row"] for one in copied["closest"])
    assert memorization(train[:5], test, train)["closest"][0]["distance"] == pytest.approx(0, abs=1e-6)


def test_too_few_images_for_a_frechet_distance_are_said_with_the_number_needed():
    assert "Inception" in few_images(9999, 2048, "Inception v3") and "10240" in few_images(9999, 2048, "Inception v3")
    assert few_images(10240, 2048, "Inception v3") is None
