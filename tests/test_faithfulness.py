"""Promise: pixels and outlines are counted as one would by hand, and a network of transformers can be the segmenter."""

import json

import numpy as np
import pytest
import torch
from test_segmenter import PALETTE, SHORT, train_segmenter, write_rectangles
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segcn.data.palette import IGNORE, Label, Palette
from segcn.evaluate.evaluator import Observer, faithfulness
from segcn.evaluate.metrics import (
    boundary_counts,
    boundary_f,
    boundary_tolerance,
    calibration,
    class_counts,
    confidence_bins,
    confusion_matrix,
    iou,
    mask_scores,
)
from segcn.models.features import open_extractor
from segcn.models.segmenter import classes_of_labels, open_segmenter
from segcn.utils.errors import UserError

WITH_HOLE = Palette((Label(0, "other", (0, 0, 0), ignore=True), *(Label(k, str(k), (k, 1, 1)) for k in (1, 2, 3))))


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


def test_miou_is_that_of_a_brute_force_count_over_all_images():
    found, wanted = some_masks()
    confused = sum(confusion_matrix(f, w, 4) for f, w in zip(found, wanted, strict=True))
    assert iou(confused).tolist() == pytest.approx(counted_by_hand(found, wanted, 4))
    assert confused.sum() == (wanted != IGNORE).sum() and confused[1, 2] == ((wanted == 1) & (found == 2)).sum()


def test_a_class_that_no_mask_holds_has_no_iou_and_lowers_that_of_the_classes_it_covers():
    predicted = torch.tensor([[0, 0, 2, 1]], dtype=torch.uint8)
    mask = torch.tensor([[0, 0, 0, 1]], dtype=torch.uint8)
    found = iou(confusion_matrix(predicted, mask, 3))
    assert found[2].isnan() and found[:2].tolist() == [pytest.approx(2 / 3), 1]
    assert found.nanmean() == pytest.approx(5 / 6)


def test_the_sums_over_images_give_the_same_miou_and_resampled_ones_lie_around_it():
    found, wanted = some_masks(count=6, classes=3)
    each = torch.stack([confusion_matrix(f, w, 3) for f, w in zip(found, wanted, strict=True)])
    edges = torch.stack([boundary_counts(f, w, 3) for f, w in zip(found, wanted, strict=True)])
    found = mask_scores(class_counts(each), edges, PALETTE)
    expected = iou(each.sum(0))
    assert found["miou"].value == pytest.approx(expected.mean().item())
    assert [one.value for one in found["per_class"].values()] == pytest.approx(expected.tolist())
    low, high = found["miou"].interval()
    assert low < found["miou"].value < high


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
    assert segmenter(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    extractor = open_extractor(segmenter)
    seen = Observer(segmenter, extractor).observe(split, log=lambda line: None)
    assert extractor.name == "segformer (segformer-3) features" and seen["features"].shape == (3, 16)
    by_hand = counted_by_hand(
        torch.stack([segmenter(one.image[None]).argmax(1)[0] for one in Observer(segmenter, extractor).pairs(split)]),
        torch.stack([one.mask for one in Observer(segmenter, extractor).pairs(split)]),
        3,
    )
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
    train_segmenter(write_rectangles(tmp_path / "data", 4), SHORT, tmp_path / "own", log=lambda line: None)
    assert open_segmenter(tmp_path / "own", PALETTE, 64, "pad", "cpu").settings["resolution"] == SHORT.resolution
    with pytest.raises(UserError, match=r"expected a folder with config\.json"):
        open_segmenter(tmp_path, PALETTE, 32, "crop")
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    with pytest.raises(UserError, match="cannot be opened as a semantic segmenter"):
        open_segmenter(tmp_path, PALETTE, 32, "crop")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        open_segmenter(tmp_path, PALETTE, 32, "crop")
