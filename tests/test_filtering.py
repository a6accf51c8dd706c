"""Promise: an image that does not obey its mask is generated again, in the end dropped; every score is recorded."""

import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from runs import tree
from torchmetrics.classification import MulticlassJaccardIndex

from segcn.data.metadata import check_split, read_split
from segcn.generate import filtering, writer
from segcn.generate.filtering import Filter, generate_filtered
from segcn.generate.writer import records_of
from segcn.models import segmenter as segmenters
from segcn.models.segmenter import SegmenterConfig, build_segmenter, train_segmenter
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def segmenter(landscapes, tmp_path_factory):
    """The folder of one that has learnt little."""
    folder = tmp_path_factory.mktemp("segmenter") / "quick"
    train_segmenter(read_split(landscapes, "train"), SegmenterConfig(steps=2, width=8, resolution=64), folder, str)
    return folder


@pytest.fixture
def config(config, segmenter):
    return replace(config, segmenter=str(segmenter))


@pytest.fixture
def noise_images(monkeypatch):
    """Images are noise, by row and attempt."""

    def noise(pipeline, masks, captions, rows, settings, size, start):
        return np.stack([np.random.default_rng(row).integers(0, 256, (*size, 3), np.uint8) for row in rows])

    monkeypatch.setattr(writer, "generate", noise)


class Scripted:
    """A filter that reads its score, in percent, off the image."""

    min_miou, max_attempts = 0.6, 4

    def predict(self, images):
        return [np.full((2, 2), image[0, 0, 0], np.uint8) for image in images]

    def score(self, predicted, mask):
        return float(predicted[0, 0]) / 100


def scripted(scores):
    """A function that makes images with these scores by (image, attempt), and its calls."""
    calls = []

    def make_images(which, attempt):
        calls.append((attempt, which))
        return [np.full((2, 2, 3), scores[one][attempt], np.uint8) for one in which]

    return make_images, calls


MASKS = [np.zeros((2, 2), np.uint8)] * 3


def test_only_failures_are_generated_again_and_the_best_of_each_is_taken():
    make_images, calls = scripted([[70], [10, 65], [50, 20, 30, 40]])
    made = generate_filtered(make_images, MASKS, Scripted())
    assert calls == [(0, [0, 1, 2]), (1, [1, 2]), (2, [2]), (3, [2])]
    assert [(one.kept, one.attempt, one.scores) for one in made] == [
        (True, 0, [0.7]), (True, 1, [0.1, 0.65]), (False, 0, [0.5, 0.2, 0.3, 0.4]),
    ]  # fmt: skip
    assert [one.image[0, 0, 0] for one in made] == [70, 65, 50]
    make_images, calls = scripted([[0], [0], [0]])
    made = generate_filtered(make_images, MASKS, None)  # without a filter each is generated once
    assert calls == [(0, [0, 1, 2])] and all(one.kept and one.scores == [] for one in made)


def test_a_score_is_the_miou_over_the_classes_of_the_mask():
    criterion = Filter(build_segmenter(9, 8), 0.5, 1)
    draw = np.random.default_rng(0)
    for _ in range(20):
        mask, seen = draw.integers(0, 9, (2, 6, 7)).astype(np.uint8)
        mask[draw.random((6, 7)) < 0.2] = 255
        jaccard = MulticlassJaccardIndex(9, "none", ignore_index=255)
        jaccard.update(torch.tensor(seen)[None].long(), torch.tensor(mask)[None].long())
        wanted = [value for value, id in zip(jaccard.compute().tolist(), range(9), strict=True) if (mask == id).any()]
        assert criterion.score(seen, mask) == pytest.approx(np.mean(wanted), abs=1e-4)
    assert criterion.score(seen, np.full((6, 7), 255, np.uint8)) == 1.0


@pytest.mark.parametrize("fit, looked_at", [
    ("crop", slice(4, 20)), ("pad", slice(0, 24)), ("stretch", slice(0, 24)),
])  # fmt: skip
def test_what_is_predicted_lies_where_it_is_in_the_image(monkeypatch, fit, looked_at):
    segmenter = build_segmenter(9, 8)
    segmenter.settings = {"resolution": 16, "fit": fit}
    monkeypatch.setattr(filtering, "predict", lambda _, images: ((images[:, 0] + 1) * 127.5).round().byte() // 30)
    mask = np.repeat(np.arange(3, dtype=np.uint8), 8)[None].repeat(16, 0)
    seen = Filter(segmenter, 0, 1).predict([np.stack([mask * 30] * 3, -1)])[0]
    assert seen.shape == mask.shape and (np.delete(seen, np.r_[looked_at], 1) == 255).all()
    inside, wanted = seen[:, looked_at], mask[:, looked_at]
    assert (inside != 255).all() and (inside == wanted).mean() > 0.8


def test_what_passes_is_the_set_and_what_does_not_is_recorded_and_shown(write, noise_images, tmp_path):
    scores = [record["miou"] for record in records_of(write(min_miou=0.0, output_dir=str(tmp_path / "all")))]
    assert len(set(scores)) > 2 and all(0 <= score <= 1 for score in scores)
    with pytest.raises(UserError, match=r"min_miou: was 0.0, is 0.5"):
        write(min_miou=0.5, output_dir=str(tmp_path / "all"))
    wanted = sorted(scores)[3]
    out = write(min_miou=wanted, max_attempts=2)
    records = list(records_of(out))
    assert [record["image"] for record in records] == list(range(6)) and not all(record["kept"] for record in records)
    for record, first in zip(records, scores, strict=True):
        assert record["scores"][0] == pytest.approx(first, abs=1e-3) and record["miou"] == max(record["scores"])
        assert record["kept"] == (record["miou"] >= wanted) and len(record["scores"]) == 1 + (first < wanted)
        assert (out / record["file_name"]).is_file() and record["file_name"].startswith(("rejected/", "images/"))
    kept = [record["file_name"] for record in records if record["kept"]]
    check_split(read_split(out))
    assert [row.image_name for row in read_split(out).records] == kept
    rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(kept) and Image.open(out / "filtering.png").size[0] > 500
    assert f"| dropped | {6 - len(kept)} |" in (out / "README.md").read_text()
    house = [8 in np.asarray(Image.open(out / record["conditioning_image_file_name"])) for record in records]
    for state in (True, False):  # of all images with a house
        marked = [record | {"kept": record["kept"] if not has else state}
                  for record, has in zip(records, house, strict=True)]  # fmt: skip
        assert ("house" in filtering.mostly_dropped(out, marked, read_split(out).palette)) == (not state)
    shutil.rmtree(out / "rejected")
    assert not filtering.mostly_dropped(out, records, read_split(out).palette)


def test_a_filtered_set_that_was_cut_ends_with_the_same_bytes(write, noise_images):
    given = {"min_miou": 0.1, "max_attempts": 2, "limit": 5}
    out = write(**given)
    whole = tree(out)
    for name in ("metadata.csv", *[record["file_name"] for record in records_of(out) if record["kept"]][:2]):
        (out / name).unlink()
    write(**given)
    assert tree(out) == whole


def test_where_nothing_passes_the_best_score_is_named(config, write, noise_images):
    with pytest.raises(UserError, match=r"no image reached --min_miou 1.0; the best has 0\.\d+, see .*filtering.png"):
        write(min_miou=1.0, max_attempts=1, limit=2)
    assert not Path(config.output_dir, "metadata.csv").exists() and Path(config.output_dir, "filtering.png").is_file()


def test_without_a_segmenter_one_is_trained_once_on_the_real_training_rows(
    write, noise_images, landscapes, tmp_path, monkeypatch
):
    trained = []

    def train(split, settings, folder, log, device):
        trained.append((split.metadata, settings.resolution))
        return train_segmenter(split, replace(settings, steps=1, width=8), folder, log)

    monkeypatch.setattr(segmenters, "train_segmenter", train)
    lines, given = [], {"segmenter": None, "min_miou": 0.0}
    for name in ("a", "b"):
        write(lines.append, **given, output_dir=str(tmp_path / name))
    assert trained == [(landscapes / "train" / "metadata.csv", 64)]
    assert sum("reused" in line for line in lines) == 1
    given |= {"palette": str(landscapes / "palette.json"), "output_dir": str(tmp_path / "c")}
    with pytest.raises(UserError, match="--segmenter DIR"):
        write(**given, controls=str(landscapes / "test" / "masks"), prompt="a lake")


def test_a_segmenter_of_other_classes_is_refused(config, write, noise_images, tmp_path):
    split = read_split(config.controls, "train")
    labels = tuple(replace(label, name=f"{label.name}s") for label in split.palette.labels)
    renamed = replace(split, palette=replace(split.palette, labels=labels))
    train_segmenter(renamed, SegmenterConfig(steps=1, width=8, resolution=64), tmp_path / "other", str)
    with pytest.raises(UserError, match="another palette"):
        write(segmenter=str(tmp_path / "other"), min_miou=0.5)


@pytest.mark.parametrize("replicates", [1, 2, 4])
def test_hard_rows_get_more_images_and_all_together_as_many(replicates):
    hardness = np.random.default_rng(0).random(50) ** 2
    counts = filtering.allocate(hardness, replicates)
    assert sum(counts) == 50 * replicates and min(counts) >= min(1, replicates - 1)
    ordered = [counts[row] for row in np.argsort(hardness)]
    assert ordered == sorted(ordered) and ordered[-1] > replicates
    assert filtering.allocate(np.zeros(5), replicates) == [replicates] * 5


def test_a_set_with_hard_rows_first_that_was_cut_ends_with_the_same_bytes(write, noise_images, monkeypatch):
    given = {"min_miou": 0.0, "hard_first": True, "limit": 3, "replicates": 2}
    with pytest.raises(UserError, match="--min_miou"):
        write(hard_first=True)
    monkeypatch.setattr(writer, "images_of_rows", lambda *_: [3, 1, 2])
    out = write(**given)
    whole = tree(out)
    places = [(record["row"], record["replicate"]) for record in records_of(out)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    for name in ("metadata.csv", *[record["file_name"] for record in records_of(out)][2:4]):
        (out / name).unlink()
    write(**given)
    assert tree(out) == whole
    with pytest.raises(UserError, match="limit: was 3, is 4"):
        write(**given | {"limit": 4})


def test_how_hard_a_row_is_depends_on_what_the_segmenter_finds_in_real_images(config, monkeypatch):
    conditions = writer.read_conditions(replace(config, replicates=3))
    criterion = filtering.open_filter(replace(config, min_miou=0.0), conditions, str)
    masks = [conditions.read_mask(row, 0, "")[0] for row in range(6)]
    missed = next(id for id in range(9) if 0 < sum((mask == id).any() for mask in masks) < 6)
    seen = iter([np.where(mask == missed, (missed + 1) % 9, mask).astype(np.uint8) for mask in masks])
    monkeypatch.setattr(Filter, "predict", lambda *_: [next(seen)])
    counts = filtering.images_of_rows(replace(config, replicates=3), conditions, criterion)
    assert len(counts) == 6 and sum(counts) == 18 and min(counts) >= 1
    having, others = ([counts[row] for row in range(6) if (masks[row] == missed).any() == has] for has in (True, False))
    assert np.mean(having) > np.mean(others) and max(having) > max(others)
    rare = np.zeros((6, 9), int)
    rare[:, 0], rare[4, 8] = 1, 1  # a class that one row alone shows, and nothing that is found in it
    monkeypatch.setattr(filtering, "class_pixels", lambda _: rare)
    monkeypatch.setattr(Filter, "predict", lambda *_: [np.full_like(masks[0], 255)])
    monkeypatch.setattr(Filter, "confusion", lambda *_: torch.ones(9, 9, dtype=torch.int64))
    counts = filtering.images_of_rows(replace(config, replicates=3), conditions, criterion)
    assert counts[4] > max(counts[:4] + counts[5:])
    with pytest.raises(UserError, match="masks alone"):
        filtering.images_of_rows(replace(config, controls=config.controls + "/test/masks"), conditions, criterion)
