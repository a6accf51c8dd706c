"""Promise: images are not scored by what filtered or rewarded them, and a number that is too good says why."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_evaluate import QUICK
from test_segmenter import quiet, write_rectangles

from segcn.data.masks import read_mask
from segcn.data.metadata import read_split, write_metadata
from segcn.evaluate import evaluator, run
from segcn.evaluate.config import EvaluateConfig
from segcn.evaluate.evaluator import Observer, evaluate, faithfulness
from segcn.evaluate.page import report_html
from segcn.evaluate.report import metrics_table
from segcn.evaluate.run import evaluate_folders, read_splits, trained_on_held_out
from segcn.generate import filtering, writer
from segcn.generate.__main__ import generate_share_of_process
from segcn.generate.filtering import likely_cause, open_filter
from segcn.models.base import weights_digest
from segcn.models.features import open_extractor
from segcn.models.segmenter import REWARD_FOLDER, REWARD_SEGMENTER, load_segmenter, train_segmenter
from segcn.utils.errors import UserError
from segcn.utils.paths import RUN_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data with train/ and test/, and two segmenters of the former: seed 0, and seed 1, which filters."""
    folder = tmp_path_factory.mktemp("grading")
    train = write_rectangles(folder / "data" / "train", 32)
    write_rectangles(folder / "data" / "test", 16, seed=7)
    for seed in (0, 1):
        train_segmenter(train, replace(QUICK, seed=seed), folder / f"segmenter-{seed}", quiet, "cpu")
    return folder


@pytest.fixture
def filtered(folder, tmp_path):
    """A set as filtering leaves it: four of sixteen rows dropped."""
    out, records = tmp_path / "set", []
    for record in write_rectangles(out, 16, seed=7).records:
        kept = record.row % 4 > 0
        records.append({
            "image": record.row, "kept": kept, "attempt": int(record.row % 4 == 1), "miou": 0.9 if kept else 0.2,
            "text": "a field by day" if kept else "a field at night", "file_name": record.image_name,
            "conditioning_image_file_name": record.mask_name,
        })  # fmt: skip
    names = ("file_name", "conditioning_image_file_name", "text")
    write_metadata(out, [tuple(record[name] for name in names) for record in records if record["kept"]])
    (out / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    digest = weights_digest(load_segmenter(folder / "segmenter-1", "cpu"))
    settings = {"min_miou": 0.5, "segmenter_weights": digest}
    (out / "generation.json").write_text(json.dumps(settings))
    return read_split(out)


def observer(folder, seed):
    segmenter = load_segmenter(folder / f"segmenter-{seed}", "cpu")
    return Observer(segmenter, open_extractor(segmenter))


def test_the_report_says_what_was_dropped_and_what_the_dropped_ones_had(folder, filtered):
    found = evaluate(read_split(folder / "data" / "test"), filtered, observer(folder, 0), log=quiet)
    filtering_found = found.metrics["filtering"]
    assert {key: filtering_found[key] for key in ("requested", "kept", "regenerated", "dropped")} == {
        "requested": 16, "kept": 12, "regenerated": 4, "dropped": 4,
    }  # fmt: skip
    assert filtering_found["words"]["night"] == [1.0, 0.25] and "field" not in filtering_found["words"]
    for text in (metrics_table(found.metrics), report_html(found, folder)):
        text = " ".join(text.split())
        assert "16 images requested, 12 kept (4 of them regenerated), 4 dropped" in text and "night 100%" in text


@pytest.fixture
def trained(folder, monkeypatch):
    """The segmenter that an evaluation trains is the one of its seed, without the training."""
    take = lambda split, settings, *rest: load_segmenter(folder / f"segmenter-{settings.seed}", "cpu")  # noqa: E731
    monkeypatch.setattr(run, "segmenter_of", take)


@pytest.mark.usefixtures("trained")
def test_a_set_is_not_scored_by_the_segmenter_that_filtered_it(folder, filtered):
    config = EvaluateConfig(real=str(folder / "data"), synthetic=str(filtered.folder))
    lines = []
    same = replace(config, segmenter=str(folder / "segmenter-1"), output_dir=str(filtered.folder.parent / "same"))
    found = evaluate_folders(same, log=lines.append)
    assert any("filtered these images" in line for line in lines)
    digest = found.metrics["filtering"]["segmenter_weights"]
    assert weights_digest(found.observer.segmenter) != digest
    other = replace(config, segmenter=str(folder / "segmenter-0"), output_dir=str(filtered.folder.parent / "other"))
    assert evaluate_folders(other, log=quiet).metrics["segmenter"]["seed"] == 0
    flattered = evaluate(read_split(folder / "data" / "test"), filtered, observer(folder, 1), log=quiet)
    assert any("has filtered them" in line for line in flattered.metrics["warnings"])


@pytest.fixture
def rewarded(folder, tmp_path):
    """A set of a ControlNet whose training segmenter-1 has rewarded: a function of how its images look."""
    run = tmp_path / "run"
    (run / "checkpoint-6" / "controlnet").mkdir(parents=True)
    shutil.copytree(folder / "segmenter-1", run / REWARD_FOLDER)
    digest = weights_digest(load_segmenter(folder / "segmenter-1", "cpu"))
    (run / REWARD_SEGMENTER).write_text(json.dumps({"weights": digest, "weight": 1.0, "folder": None}))
    out = write_rectangles(tmp_path / "set", 16, seed=7).folder
    made = {"controlnet": str(run / "checkpoint-6" / "controlnet"), "reward_segmenter_weights": digest}
    (out / "generation.json").write_text(json.dumps(made))
    return read_split(out)


@pytest.mark.usefixtures("trained")
def test_a_set_is_not_scored_by_the_segmenter_that_rewarded_its_controlnet(folder, rewarded, tmp_path):
    digest, lines = json.loads((rewarded.folder / "generation.json").read_text())["reward_segmenter_weights"], []
    config = EvaluateConfig(str(folder / "data"), str(rewarded.folder), segmenter=str(folder / "segmenter-1"))
    found = evaluate_folders(replace(config, output_dir=str(tmp_path / "same")), log=lines.append)
    assert any("segmenter-1 rewarded the training: one that is trained on real rows" in line for line in lines)
    assert weights_digest(found.observer.segmenter) != digest
    assert found.metrics["reward"]["scored_by"] != found.metrics["reward"]["weights"] == digest
    flattered = evaluate(read_split(folder / "data" / "test"), rewarded, observer(folder, 1), log=quiet).metrics
    assert any("has rewarded the training of their ControlNet" in line for line in flattered["warnings"])
    assert flattered["reward"]["of_ceiling_by_reward"] is None


@pytest.mark.usefixtures("trained")
def test_where_the_one_to_be_trained_has_rewarded_the_next_seed_scores(folder, rewarded, tmp_path):
    digests = [weights_digest(load_segmenter(folder / f"segmenter-{seed}", "cpu")) for seed in (0, 1)]
    (rewarded.folder / "generation.json").write_text(json.dumps({"reward_segmenter_weights": digests[0]}))
    splits = read_splits(EvaluateConfig(str(folder / "data"), str(rewarded.folder)))
    for given in ({}, {"segmenter": str(folder / "segmenter-0")}):
        config = EvaluateConfig(str(folder / "data"), str(rewarded.folder), **given)
        assert weights_digest(run.independent_segmenter(config, splits, tmp_path, quiet)) == digests[1]


def test_the_report_has_the_figures_of_both_segmenters_and_says_when_they_part(folder, rewarded, monkeypatch):
    real = read_split(folder / "data" / "test")
    for record in rewarded.records:
        image = Image.open(record.image).filter(ImageFilter.GaussianBlur(2))
        image.save(record.image)
    found = evaluate(real, read_split(rewarded.folder), observer(folder, 0), log=quiet)
    reward = found.metrics["reward"]
    expected = [
        faithfulness(split, load_segmenter(folder / "segmenter-1", "cpu"))["miou"] for split in (rewarded, real)
    ]
    assert reward["of_ceiling_by_reward"] == pytest.approx(expected[0] / expected[1])
    assert reward["of_ceiling"] == found.metrics["of_ceiling"] != reward["of_ceiling_by_reward"]
    low, high = found.metrics["intervals"]["reward"]["of_ceiling_by_reward"]
    line = f"{reward['of_ceiling_by_reward']:.3f} [{low:.3f}, {high:.3f}] of the ceiling by the segmenter that rewarded"
    for text in (metrics_table(found.metrics), report_html(found, folder)):
        assert line in " ".join(text.split())
    for least, parted in ((9.0, False), (-1.0, True)):
        monkeypatch.setattr(evaluator, "PARTED", least)
        warnings = evaluate(real, rewarded, observer(folder, 0), log=quiet).metrics["warnings"]
        assert any("they part by more than" in line for line in warnings) == parted
    shutil.rmtree(rewarded.folder.parent / "run")
    gone = evaluate(real, rewarded, observer(folder, 0), log=quiet).metrics
    assert gone["reward"]["of_ceiling_by_reward"] is None and "not at hand" in " ".join(metrics_table(gone).split())


def test_a_perfect_score_comes_with_its_reason(folder):
    real = read_split(folder / "data" / "test")
    found = evaluate(real, real, observer(folder, 0), log=quiet)
    assert found.metrics["of_ceiling"] == 1
    assert "no sign of quality" in " ".join(metrics_table(found.metrics).split())


def test_far_from_all_real_images_is_no_praise_for_the_memorization_test(folder, tmp_path):
    noise = write_rectangles(tmp_path / "noise", 16, seed=7)
    for record in noise.records:
        Image.effect_noise((32, 32), 90).convert("RGB").save(record.image)
    real, train = (read_split(folder / "data" / name) for name in ("test", "train"))
    found = evaluate(real, noise, observer(folder, 0), train=train, log=quiet)
    for text in (metrics_table(found.metrics), report_html(found, folder)):
        assert "says nothing: far from all real images" in " ".join(text.split())


def test_the_filter_and_the_evaluation_train_two_segmenters(config, landscapes, monkeypatch):
    used = []
    monkeypatch.setattr(filtering, "segmenter_of", lambda split, settings, *rest: used.append((len(split), settings)))
    monkeypatch.setattr(filtering, "Filter", lambda *given: given)
    conditions = writer.read_conditions(config)
    open_filter(replace(config, min_miou=0.5), conditions, quiet)
    rows, settings = used[0]
    assert rows == 12 and settings.seed != EvaluateConfig.seed


class Scored:
    """A filter of which real images, reconstructions and nothing else reach these scores."""

    def __init__(self, real, seen, min_miou):
        self.left, self.min_miou = [real, seen], min_miou

    def predict(self, images):
        found = self.left.pop(0)
        self.score = lambda predicted, mask: found
        return images


@pytest.mark.parametrize(
    ("real", "seen", "cause"),
    [(0.5, 0.4, "The threshold is the likely cause"), (0.9, 0.4, "The base is"), (0.9, 0.88, "The ControlNet is")],
)
def test_a_set_of_which_nothing_is_kept_names_the_likely_cause(config, base, real, seen, cause):
    text = likely_cause(config, base, Scored(real, seen, 0.7), [{"miou": 0.1}])
    assert text.startswith(cause) and f"{real:.2f}" in text and f"{seen:.2f}" in text and "0.10" in text


def test_reconstructions_are_made_by_a_command(config, landscapes):
    out = generate_share_of_process(replace(config, reconstruct=True, limit=3, split="test"))
    made, real = read_split(out), read_split(landscapes, "test")
    assert len(made) == 3 and made[0].caption == real[0].caption
    assert np.array_equal(read_mask(made[0].mask, made.palette), read_mask(real[0].mask, real.palette))
    with pytest.raises(UserError, match="empty or not there yet"):
        generate_share_of_process(replace(config, reconstruct=True))


def test_rows_that_the_controlnet_was_trained_on_are_not_called_held_out_without_a_word(folder, tmp_path):
    write_rectangles(tmp_path / "data", 24)
    generated = write_rectangles(tmp_path / "set", 8, seed=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "set" / "generation.json").write_text(json.dumps({"controlnet": str(tmp_path / "run")}))
    config = EvaluateConfig(str(tmp_path / "data"), str(generated.folder), output_dir=str(tmp_path / "out"))
    splits = read_splits(config)
    for used, warned in ((None, True), (24, True), (21, False)):
        recorded = {"dataset_name": str(tmp_path / "data"), "max_train_samples": used}
        (tmp_path / "run" / RUN_FILE).write_text(json.dumps(recorded))
        found = trained_on_held_out(config, splits)
        assert ["--max_train_samples 21" in line for line in found] == [True] * warned
