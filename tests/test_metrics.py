"""Promise: pixels, outlines and distances are those of brute force and of the literature, and move as they should.

A network of transformers can be the segmenter.
"""

import json

import numpy as np
import pytest
import torch
from test_segmenter import PALETTE, SHORT, train_segmenter, write_rectangles
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from segcn.data.dataset import to_image
from segcn.data.palette import IGNORE, Label, Palette
from segcn.evaluate import bootstrap
from segcn.evaluate.bootstrap import Estimate, difference, ratio, resamples
from segcn.evaluate.evaluator import Observer, faithfulness
from segcn.evaluate.metrics import (
    boundary_counts,
    boundary_f,
    boundary_tolerance,
    calibration,
    class_counts,
    cmmd,
    confidence_bins,
    confusion_matrix,
    few_images,
    frechet_distance,
    frechet_estimate,
    iou,
    kernel_distance,
    mask_scores,
    memorization,
    neighborhoods,
)  # fmt: skip
from segcn.models.base import one_core
from segcn.models.features import backbone_extractor, open_extractor
from segcn.models.segmenter import classes_of_labels, open_segmenter
from segcn.utils import rng
from segcn.utils.errors import UserError

FOUR = Palette(tuple(Label(k, str(k), (k, 1, 1)) for k in range(4)))
WITH_HOLE = Palette((Label(0, "other", (0, 0, 0), ignore=True), *(Label(k, str(k), (k, 1, 1)) for k in (1, 2, 3))))


@pytest.fixture(autouse=True)
def one_core_alone():
    with one_core():
        yield


def some_masks(seed=0, count=4, side=24, classes=4):
    """Blocks of classes, with unlabelled ones among them: what was found and what was wanted, uint8 [N, H, W]."""
    noise = np.random.default_rng(seed)
    blocks = noise.integers(0, classes, (2, count, side // 4, side // 4)).repeat(4, 2).repeat(4, 3).astype(np.uint8)
    blocks[1][noise.random(blocks[1].shape) < 0.1] = IGNORE
    return torch.from_numpy(blocks[0]), torch.from_numpy(blocks[1])


def counted_by_hand(found, wanted, classes):
    """Intersection over union of every class, pixel by pixel."""
    pixels = [(f, w) for f, w in zip(found.flatten().tolist(), wanted.flatten().tolist(), strict=True) if w != IGNORE]
    both = [sum(f == label and w == label for f, w in pixels) for label in range(classes)]
    return [both[label] / sum(f == label or w == label for f, w in pixels) for label in range(classes)]


def outline_by_hand(mask, label):
    """The pixels of a class that have another labelled class above, below, left or right."""
    height, width = mask.shape
    for row, column in np.ndindex(height, width):
        if mask[row, column] == label:
            around = [(row + a, column + b) for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))]
            near = [mask[r, c] for r, c in around if 0 <= r < height and 0 <= c < width]
            if any(one not in (label, IGNORE) for one in near):
                yield row, column


def near(pixel, others, reach):
    steps = range(-reach, reach + 1)
    return any((pixel[0] + down, pixel[1] + across) in others for down in steps for across in steps)


def test_miou_is_that_of_a_brute_force_count_over_all_images_and_resampled_ones_lie_around_it():
    found, wanted = some_masks(count=6)
    each = torch.stack([confusion_matrix(f, w, 4) for f, w in zip(found, wanted, strict=True)])
    confused, by_hand = each.sum(0), counted_by_hand(found, wanted, 4)
    assert iou(confused).tolist() == pytest.approx(by_hand)
    assert confused.sum() == (wanted != IGNORE).sum() and confused[1, 2] == ((wanted == 1) & (found == 2)).sum()
    edges = torch.stack([boundary_counts(f, w, 4) for f, w in zip(found, wanted, strict=True)])
    scores = mask_scores(class_counts(each), edges, FOUR)
    assert [one.value for one in scores["per_class"].values()] == pytest.approx(by_hand)
    value, (low, high) = scores["miou"].value, scores["miou"].interval()
    assert value == pytest.approx(np.mean(by_hand)) and low < value < high


def test_a_class_that_no_mask_holds_has_no_iou_and_lowers_that_of_the_classes_it_covers():
    predicted = torch.tensor([[0, 0, 2, 1]], dtype=torch.uint8)
    mask = torch.tensor([[0, 0, 0, 1]], dtype=torch.uint8)
    found = iou(confusion_matrix(predicted, mask, 3))
    assert found[2].isnan() and found[:2].tolist() == [pytest.approx(2 / 3), 1]
    assert found.nanmean() == pytest.approx(5 / 6)


@pytest.mark.parametrize("grow", [1, 7])
def test_outlines_are_those_of_a_brute_force_count(grow):
    found, wanted = (one[0] for one in some_masks(count=1, side=24))
    found, wanted = (one.repeat_interleave(grow, 0).repeat_interleave(grow, 1) for one in (found, wanted))
    counts, reach = boundary_counts(found, wanted, 4), boundary_tolerance(wanted.shape)
    assert reach == (1 if grow == 1 else 2)
    masks = [np.where(wanted == IGNORE, IGNORE, found), wanted.numpy()]
    for label in range(4):
        one, other = (set(outline_by_hand(mask, label)) for mask in masks)
        reached = sum(near(p, other, reach) for p in one), sum(near(p, one, reach) for p in other)
        assert counts[label].tolist() == [len(one), reached[0], len(other), reached[1]]


def test_a_perfect_outline_scores_one_a_missing_one_zero_and_an_unwanted_class_nothing():
    wanted = torch.zeros(32, 32, dtype=torch.uint8)
    wanted[8:20, 8:20] = 1
    assert boundary_f(boundary_counts(wanted, wanted, 3))[:2].tolist() == [1, 1]
    scores = boundary_f(boundary_counts(torch.zeros_like(wanted), wanted, 3))
    assert scores[:2].tolist() == [0, 0] and scores[2].isnan()


def test_confidence_that_can_be_believed_is_off_by_nothing_and_boasting_by_its_excess():
    right = torch.tensor([True] * 80 + [False] * 20)
    honest, boasting = (confidence_bins(torch.full((100,), sure), right)[None] for sure in (0.8, 1.0))
    assert calibration(honest)["expected_calibration_error"].value == pytest.approx(0, abs=1e-6)
    found = calibration(boasting)
    assert found["expected_calibration_error"].value == pytest.approx(0.2)
    assert found["accuracy"] == pytest.approx([0.8]) and found["pixels"] == [100]


@pytest.fixture
def segformer(tmp_path):
    """A function from a number of labels to a folder with a tiny SegFormer of random weights."""

    def save(labels):
        sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
        sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        torch.manual_seed(0)
        config = SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=labels)
        SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / f"segformer-{labels}")
        return tmp_path / f"segformer-{labels}"

    return save


def test_a_folder_of_transformers_counts_like_our_own_and_gives_the_name_of_its_features(segformer, tmp_path):
    split = write_rectangles(tmp_path / "data", 3)
    segmenter = open_segmenter(segformer(3), split.palette, 32, "crop", "cpu")
    extractor = open_extractor(segmenter)
    observer = Observer(segmenter, extractor)
    seen, pairs = observer.observe(split, log=len), list(observer.pairs(split))
    assert extractor.name == "segformer (segformer-3) features" and seen["features"].shape == (3, 16)
    predicted = torch.stack([segmenter(one.image[None]).argmax(1)[0] for one in pairs])
    by_hand = counted_by_hand(predicted, torch.stack([one.mask for one in pairs]), 3)
    assert iou(seen["confusion"]).tolist() == pytest.approx(by_hand)
    assert faithfulness(split, segmenter)["miou"] == pytest.approx(np.mean(by_hand))


def test_its_image_processor_says_how_it_sees_the_images(segformer):
    folder = segformer(3)
    processor = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    segmenter, image = open_segmenter(folder, PALETTE, 32, "crop", "cpu"), torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.allclose(segmenter.normalize(image), image, atol=1e-6)
    assert segmenter.normalize(torch.zeros(1, 3, 32, 32)).shape[2:] == (64, 64)
    assert segmenter(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_labels_are_mapped_by_their_number_and_another_number_is_refused(segformer):
    assert classes_of_labels(WITH_HOLE, 4, "f") == [0, 1, 2, 3] and classes_of_labels(WITH_HOLE, 3, "f") == [1, 2, 3]
    segmenter = open_segmenter(segformer(3), WITH_HOLE, 32, "crop", "cpu")
    assert segmenter(torch.rand(1, 3, 32, 32)).argmax(1).min() >= 1
    with pytest.raises(UserError, match=r"segformer-7: expected 3 or 4 labels, as many as palette.json has .* found 7"):
        open_segmenter(segformer(7), WITH_HOLE, 32, "crop")


def test_our_own_is_opened_by_the_same_flag_and_what_is_no_segmenter_is_named(tmp_path):
    train_segmenter(write_rectangles(tmp_path / "data", 4), SHORT, tmp_path / "own", log=len)
    assert open_segmenter(tmp_path / "own", PALETTE, 64, "pad", "cpu").settings["resolution"] == SHORT.resolution
    for config, message in (
        (None, r"expected a folder with config\.json"),
        ('{"model_type": "segformer"}', "cannot be opened as a semantic segmenter"), ("{", "expected JSON"),
    ):  # fmt: skip
        if config:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            open_segmenter(tmp_path, PALETTE, 32, "crop")


@pytest.fixture
def dinov2(tmp_path):
    """A folder with a tiny DINOv2 of random weights and its image processor."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
                ).save_pretrained(tmp_path / "dinov2")  # fmt: skip
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path / "dinov2"
    )
    return tmp_path / "dinov2"


def test_a_backbones_features_are_its_class_token_of_images_as_its_processor_makes_them(dinov2, segformer):
    found, pixels = (
        backbone_extractor(dinov2, "cpu"),
        np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8),
    )
    images = torch.stack([to_image(torch.from_numpy(one).permute(2, 0, 1)) for one in pixels])
    inputs = BitImageProcessor.from_pretrained(dinov2)(list(pixels), return_tensors="pt")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2)(**inputs).last_hidden_state[:, 0]
    assert found.name == "dinov2" and torch.allclose(found.extract(images), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"--features .*expected a folder of a vision backbone"):
        backbone_extractor(segformer(3))  # which has no image processor


def test_cmmd_is_the_squared_mmd_of_unit_vectors_by_pairs():
    near, far, same_kind = cloud(30), cloud(30, shift=2.0, seed=5), cloud(30, seed=5)
    unit = [features.double() / features.double().norm(dim=1, keepdim=True) for features in (near, far)]
    kernel = lambda one, other: torch.exp(-(torch.cdist(one, other) ** 2) / 200)  # noqa: E731
    same = [(kernel(one, one).sum() - len(one)) / (len(one) * (len(one) - 1)) for one in unit]
    assert cmmd(near, far).value == pytest.approx(1000 * float(sum(same) - 2 * kernel(*unit).mean()), rel=1e-6)
    assert cmmd(near, far).value > 0.2 > 0 > cmmd(near, same_kind).value  # unbiased: below 0 by chance


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
    for found in (few, many):
        assert 0 <= found.interval()[0] < found.value < found.interval()[1]
    assert np.ptp(many.interval()) < 0.6 * np.ptp(few.interval())


def test_resamples_repeat_and_leave_the_random_state():
    state = torch.get_rng_state()
    first, again = (torch.cat(list(resamples(7, draws=150))) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (150, 7)
    rows = torch.randint(7, (100, 7), generator=rng.generator("bootstrap", "rows", 7, 0))
    assert torch.equal(first[:100], torch.stack([row.bincount(minlength=7) for row in rows]).to(first.dtype))
    assert not torch.equal(first, torch.cat(list(resamples(7, "other", 150))))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    noise = torch.Generator().manual_seed(0)
    intervals = [bootstrap.mean(torch.randn(80, generator=noise)).interval() for _ in range(60)]
    assert 0.85 <= np.mean([low < 0 < high for low, high in intervals]) <= 1


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
