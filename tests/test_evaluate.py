import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from test_segmenter import PALETTE, write_rectangles

from segcn.dataset import to_image
from segcn.distance import INCEPTION_WEIGHTS, frechet_distance, kernel_distance
from segcn.errors import UserError
from segcn.evaluate import evaluate, faithfulness, table, write_metrics
from segcn.labels import IGNORE, Label, Palette
from segcn.masks import read_mask, write_mask
from segcn.records import read_split
from segcn.segmenter import SegmenterConfig, build_segmenter, predict, train_segmenter

QUICK = SegmenterConfig(steps=80, batch_size=8, learning_rate=0.015, width=16, resolution=32)


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_rectangles(tmp_path_factory.mktemp("real") / "test", 12, seed=7)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    return train_segmenter(write_rectangles(folder / "train", 32), QUICK, folder / "trained", log=quiet)


@pytest.fixture(scope="module")
def metrics(real, segmenter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    blurred = changed(real, folder / "blurred", lambda image: image.filter(ImageFilter.GaussianBlur(3)))
    noisy = changed(real, folder / "noisy", lambda image: Image.effect_noise(image.size, 60).convert("RGB"))
    return evaluate(real, blurred, segmenter, floor=noisy, reconstructions=real, batch_size=5, log=quiet)


def changed(split, folder, change):
    """A copy of a rectangle set whose images went through `change`."""
    copy = write_rectangles(folder, len(split), seed=7)
    for record in copy.records:
        change(Image.open(record.image)).save(record.image)
    return read_split(folder)


def brute_force(predicted, wanted, classes):
    """Intersection over union of every class, pixel by pixel, None where the class is not wanted."""
    pixels = [(p, w) for p, w in zip(predicted.flatten(), wanted.flatten(), strict=True) if w != IGNORE]
    iou = []
    for label in range(classes):
        both = sum(p == label and w == label for p, w in pixels)
        either = sum(p == label or w == label for p, w in pixels)
        iou.append(both / either if any(w == label for _, w in pixels) else None)
    return iou


def test_a_briefly_trained_segmenter_finds_the_rectangles(real, segmenter):
    assert faithfulness(real, segmenter)["miou"] > 0.9


def test_miou_is_that_of_a_count_over_all_pixels(real):
    segmenter = build_segmenter(3, width=8, seed=3)
    segmenter.settings = {"resolution": 32}
    images = np.stack([np.array(Image.open(record.image)) for record in real.records])
    predicted = predict(segmenter, to_image(torch.from_numpy(images).permute(0, 3, 1, 2)))
    wanted = np.stack([read_mask(record.mask, PALETTE) for record in real.records])
    expected = brute_force(predicted.numpy(), wanted, 3)
    found = faithfulness(real, segmenter, batch_size=5)
    assert list(found["per_class"].values()) == pytest.approx(expected)
    assert found["miou"] == pytest.approx(sum(expected) / 3)
    assert found["images"] == 12


def test_a_class_that_no_mask_wants_leaves_the_mean(tmp_path, segmenter):
    split = write_rectangles(tmp_path, 3)
    for record in split.records:
        mask = read_mask(record.mask, PALETTE)
        write_mask(record.mask, np.where(mask == 2, IGNORE, mask), PALETTE)
    found = faithfulness(read_split(tmp_path), segmenter)
    assert found["per_class"]["road"] is None
    assert found["miou"] == pytest.approx(np.mean([found["per_class"][name] for name in ("sky", "grass")]))


def test_identical_sets_are_at_no_distance_and_blur_moves_them_apart(real, segmenter, metrics):
    same = evaluate(real, real, segmenter, log=quiet)["distance"]
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert metrics["distance"]["frechet_distance"] > same["frechet_distance"] + 0.01
    assert metrics["distance"]["kernel_distance_mean"] > same["kernel_distance_mean"]


def test_frechet_distance_of_known_gaussians():
    line = torch.tensor([[-1.0], [0.0], [1.0]])
    assert frechet_distance(line, line + 3) == pytest.approx(9, abs=1e-6)
    assert frechet_distance(line, 2 * line) == pytest.approx(1, abs=1e-6)


def test_kernel_distance_repeats_and_leaves_the_random_state():
    near, far = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.ones(70, 4)
    state = torch.get_rng_state()
    first = kernel_distance(near, far)
    assert first == kernel_distance(near, far) and first[2] == 50
    assert torch.equal(torch.get_rng_state(), state)


def test_the_distance_names_its_extractor_and_is_not_called_fid(metrics):
    assert metrics["distance"]["extractor"] == "segmenter features"
    assert not {"fid", "kid_mean"} & set(metrics["distance"])
    assert (metrics["distance"]["images_real"], metrics["distance"]["images_synthetic"]) == (12, 12)


def test_the_floor_lies_below_and_the_reconstructions_at_the_ceiling(metrics):
    found = {name: entry["miou"] for name, entry in metrics["faithfulness"].items()}
    assert found["floor"] < found["synthetic"] < found["real"] == found["reconstructions"]
    assert metrics["of_ceiling"] == found["synthetic"] / found["real"]


def test_the_table_holds_every_number(metrics):
    text = table(metrics)
    for entry in metrics["faithfulness"].values():
        for value in (entry["miou"], *entry["per_class"].values()):
            assert f"{value:.3f}" in text
    for key in ("frechet_distance", "kernel_distance_mean", "kernel_distance_std"):
        assert f"{metrics['distance'][key]:.4g}" in text
    assert f"{metrics['of_ceiling']:.3f}" in text and "FID" not in text
    assert all(name in text for name in ("real (ceiling)", "with mask", "no mask (floor)", *PALETTE.names))


def test_the_table_stays_narrow_with_many_classes(metrics):
    crowded = json.loads(json.dumps(metrics))
    for entry in crowded["faithfulness"].values():
        entry["per_class"] = {f"a class of things {k}": k / 150 for k in range(150)}
    text = table(crowded)
    assert max(map(len, text.splitlines())) <= 100
    assert f"{149 / 150:.3f}" in text


def test_metrics_are_stored_as_json_and_evaluate_repeats(real, segmenter, metrics, tmp_path):
    write_metrics(metrics, tmp_path / "run" / "metrics.json")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    once, twice = (evaluate(real, real, segmenter, batch_size=5, log=quiet) for _ in range(2))
    assert once == twice
    assert all(map(math.isfinite, [once["of_ceiling"], once["distance"]["kernel_distance_std"]]))


def test_images_of_any_size_are_seen_at_the_segmenters_resolution(tmp_path, segmenter):
    large = write_rectangles(tmp_path, 6, seed=7, side=100)
    assert faithfulness(large, segmenter)["miou"] > 0.8


def test_a_broken_image_is_named_with_its_row(tmp_path, segmenter):
    split = write_rectangles(tmp_path, 4)
    split[2].image.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"metadata\.csv, line 4 \(row 2\).*2\.png"):
        faithfulness(split, segmenter)


def test_sets_that_do_not_belong_together_are_refused(tmp_path, real, segmenter):
    split = write_rectangles(tmp_path, 3)
    Palette((*PALETTE.labels, Label(3, "house", (1, 2, 3)))).save(tmp_path / "palette.json")
    other = read_split(tmp_path)
    with pytest.raises(UserError, match="its palette differs"):
        evaluate(real, other, segmenter, log=quiet)
    with pytest.raises(UserError, match="expected the 3 classes of the segmenter, found 4"):
        evaluate(other, other, segmenter, log=quiet)
    with pytest.raises(UserError, match="at least 2 images"):
        evaluate(split, type(split)(split.folder, split.metadata, PALETTE, split.records[:1]), segmenter, log=quiet)


def test_inception_weights_are_used_when_at_hand_and_missing_ones_are_named(real, segmenter, tmp_path):
    with pytest.raises(UserError, match=INCEPTION_WEIGHTS):
        evaluate(real, real, segmenter, inception=tmp_path / "none.pth", log=quiet)
    try:
        import torch_fidelity  # noqa: F401
    except ModuleNotFoundError:
        stored = tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION_WEIGHTS
        stored.parent.mkdir(parents=True)
        stored.touch()
        with pytest.raises(UserError, match="pip install torch-fidelity"):
            evaluate(real, real, segmenter, log=quiet)
