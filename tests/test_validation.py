"""Promise: a training says how well its images obey held-out masks, and is not disturbed by it."""

import contextlib
import io
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from runs import log_of, weights

from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.data.visualize import SHEET_GAP, WIDEST, read_sheet, write_sheet
from segcn.generate.config import SampleConfig
from segcn.models import segmenter
from segcn.train import checkpoint, validation
from segcn.train import loop as training
from segcn.train.checkpoint import read_best
from segcn.train.log import fractions, read_log, validation_scores
from segcn.train.loop import train
from segcn.train.validation import convergence_step
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError
from segcn.utils.io import problem

LEARNING = {0: 0.2, 2: 0.25, 4: 0.8, 6: 0.7}  # a made-up share of the ceiling at each step


@pytest.fixture(scope="module", autouse=True)
def two_denoising_steps():
    """Of the sampling in this file, which is here for its flow."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SampleConfig.PRESETS["tiny"], "num_inference_steps", 2)
        yield


@pytest.fixture(scope="module")
def scored_config(quick, landscapes, tmp_path_factory):
    """A function from settings to the config of a run of six steps, scored at every second by a small segmenter."""
    folder = tmp_path_factory.mktemp("segmenter") / "trained"
    settings = segmenter.SegmenterConfig(steps=20, batch_size=4, width=8, resolution=64)
    segmenter.train_segmenter(read_split(landscapes, "train"), settings, folder, lambda line: None)
    scoring = {"faithfulness_rows": 3, "validation_steps": 2, "segmenter": str(folder)}
    return lambda out, **given: quick(out, **scoring | given)


@pytest.fixture(scope="module")
def scored_run(scored_config, tmp_path_factory):
    """A scored run and the state of the global random numbers after it."""
    torch.manual_seed(5)
    folder = train(scored_config(tmp_path_factory.mktemp("runs") / "scored_run", report_to="tensorboard"))
    return folder, torch.get_rng_state()


@pytest.fixture(scope="module")
def scripted(scored_config):
    """A function that trains, scored as LEARNING says without generating; `meanwhile` is called while validating."""

    def look(run, validate=validation.validate_now):
        scripted.run = run
        return validate(run)

    def generated(scorer, *rest):
        scripted.meanwhile(scripted.run)
        return [np.zeros((*mask.shape, 3), np.uint8) for mask in scorer.masks]

    def score(scorer, generated):
        share = LEARNING[scripted.run.step]
        return {"miou": share / 2, "of_ceiling": share, "per_class": {"sky": share, "cloud": None}}

    def scripted(folder, **given):
        return train(scored_config(folder, checkpoints_total_limit=1, **given))

    scripted.meanwhile = lambda run: None
    with pytest.MonkeyPatch.context() as patched:
        for name, made_up in {"validate_now": look, "generate_rows": generated, "score_rows": score}.items():
            patched.setattr(validation, name, made_up)
        yield scripted


@pytest.fixture(scope="module")
def learned(scripted, tmp_path_factory):
    """A scripted run without a break, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = scripted(tmp_path_factory.mktemp("runs") / "learned")
    return folder, printed.getvalue()


CURVES = {
    "none": ([], None), "one": ([0.4], None), "flat": ([0.4, 0.41, 0.4, 0.42], None), "two": ([0.2, 0.8], 100),
    "noisy": ([0.4, 0.52, 0.38, 0.47, 0.5], None), "jump": ([0.2, 0.22, 0.21, 0.8, 0.85, 0.83], 300),
    "gradual": ([0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 300), "spike": ([0.2, 0.7, 0.2, 0.25, 0.8, 0.8], 400),
    "spike alone": ([0.2, 0.7, 0.2, 0.2], None), "collapse": ([0.2, 0.8, 0.8, 0.1], 100),
    "at once": ([0.8, 0.8, 0.79], None),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_the_jump_of_a_curve_is_found(name):
    curve, step = CURVES[name]
    assert convergence_step(range(0, 100 * len(curve), 100), curve) == step


def test_a_run_logs_how_well_held_out_masks_are_obeyed_and_a_sheet_shows_its_first_rows(scored_run, landscapes):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = scored_run
    entries = read_log(folder / "log.jsonl")
    assert fractions(entries)[0] == [0, 2, 4, 6]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    (ceiling,) = (entry["ceiling"] for entry in entries if "ceiling" in entry)
    assert ceiling["images"] == 3 and ceiling["miou"] > 0
    for score in validation_scores(entries).values():
        assert score["of_ceiling"] == pytest.approx(score["miou"] / ceiling["miou"], abs=1e-3)
        assert score["per_class"].keys() == ceiling["per_class"].keys() and score["seconds"] > 0
    events = EventAccumulator(str(next((folder / "logs").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("faithfulness/of_ceiling")] == [0, 2, 4, 6]
    assert "faithfulness/sky" in events.Tags()["scalars"] and "validation" in events.Tags()["images"]
    split = read_split(landscapes, "test")
    masks, generated = read_sheet(folder / "validation" / "step-000004.png")
    for row, mask in enumerate(masks):
        assert (mask == split.palette.table[read_mask(split[row].mask, split.palette)]).all()
    assert len(generated) == 3 and all(image.std() > 0 for image in generated)


def test_a_scored_run_ends_with_the_weights_of_one_that_is_not(scored_run, quick, tmp_path):
    folder, state = scored_run
    torch.manual_seed(5)
    assert weights(train(quick(tmp_path / "blind"))) == weights(folder)
    assert torch.equal(torch.get_rng_state(), state)
    losses = [[entry["loss"] for entry in log_of(run) if "loss" in entry] for run in (folder, tmp_path / "blind")]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("fresh_precision")
def test_half_precision_generates_and_scores(scored_config, tmp_path):
    out = train(scored_config(tmp_path / "out", mixed_precision="bf16", max_train_steps=1, use_ema=True))
    assert list(validation_scores(log_of(out))) == [0, 1]


def test_the_best_checkpoint_is_kept_and_named(learned):
    folder, printed = learned
    assert list(checkpoint.steps(folder)) == [4, 6] and problem(folder / "checkpoint-4") is None
    assert read_best(folder) == {"step": 4, "checkpoint": "checkpoint-4", "miou": 0.4, "of_ceiling": 0.8}
    assert "Faithfulness on 3 rows every 2 steps: about" in printed and "s each, 3 times." in printed
    assert "at step 4: mIoU 0.400, 80% of the ceiling, the best so far." in printed
    assert printed.count("The ControlNet began to obey the masks at step 4.") == 1


def test_a_scored_run_that_was_killed_logs_the_same(scripted, learned, tmp_path):
    cut, (whole, _) = tmp_path / "cut", learned
    save = training.save

    def killed(run, only_best=False):
        if run.step == 4:
            raise RuntimeError("killed after the validation, before the checkpoint")
        save(run, only_best)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            scripted(cut)
    assert 4 in validation_scores(log_of(cut)) and read_best(cut)["step"] == 2
    scripted(cut)
    assert log_of(cut) == log_of(whole) and read_best(cut) == read_best(whole) and weights(cut) == weights(whole)
    scripted(cut, resume_from_checkpoint="checkpoint-4")
    assert log_of(cut) == log_of(whole) and read_best(cut) == read_best(whole)


def test_a_signal_ends_a_validation_that_is_made_up_for_later(scripted, learned, tmp_path):
    cut, (whole, _) = tmp_path / "cut", learned
    scripted.meanwhile = lambda run: run.stop_signal.append(15) if run.step == 4 else None
    with pytest.raises(SystemExit):
        scripted(cut)
    scripted.meanwhile = lambda run: None
    assert list(validation_scores(log_of(cut))) == [0, 2] and list(checkpoint.steps(cut)) == [2, 4]
    scripted(cut)
    assert log_of(cut) == log_of(whole) and read_best(cut) == read_best(whole)


@pytest.mark.slow
def test_two_processes_agree_on_the_best(scored_config, tmp_path):
    config = scored_config(tmp_path / "out", train_batch_size=1, max_train_steps=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "segcn.train"]
    done = subprocess.run([*launcher, *arguments_of(config)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(validation_scores(log_of(tmp_path / "out"))) == [0, 2] and read_best(tmp_path / "out")["step"] == 2


def test_without_held_out_rows_or_with_a_segmenter_of_another_resolution_nothing_begins(
    scored_config, landscapes, tmp_path
):
    given = {"dataset_name": str(landscapes / "train")}
    with pytest.raises(UserError, match=r"no test split in .*--max_train_samples 10,.*--faithfulness_rows 0"):
        train(scored_config(tmp_path / "out", **given))
    with pytest.raises(UserError, match=r"expected one trained at 32 px.*found 64"):
        train(scored_config(tmp_path / "out", resolution=32))
    assert not (tmp_path / "out").exists()
    config, split = scored_config("x", **given, max_train_samples=10), read_split(landscapes, "train")
    trained = replace(split, records=split.records[:10])
    assert [record.row for record in validation.held_out_rows(config, trained).records] == [10, 11]


def test_one_segmenter_serves_all_runs_on_the_same_rows(quick, landscapes, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "SegmenterConfig", partial(segmenter.SegmenterConfig, steps=2, width=8))
    config, split, lines = quick("x", faithfulness_rows=2), read_split(landscapes, "train"), []
    held_out = validation.held_out_rows(config, split)
    first, again = (validation.open_scorer(config, held_out, split, tmp_path, "cpu", lines.append) for _ in range(2))
    assert len(list(tmp_path.glob("segmenter-*"))) == 1 and "reused" in lines[-1] and first.ceiling == again.ceiling
    assert np.stack(first.masks).shape == (2, 64, 64) and first.ceiling["images"] == 2


def test_a_sheet_keeps_its_images_apart_and_its_size(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    assert write_sheet(tmp_path / "sheet.png", images).shape == (32 + SHEET_GAP, 48 + 2 * SHEET_GAP, 3)
    assert (np.array(read_sheet(tmp_path / "sheet.png")) == images).all()
    large = write_sheet(tmp_path / "large.png", np.zeros((3, 9, 512, 512, 3), np.uint8))
    assert large.shape[1] <= WIDEST and large.shape[0] < 2 * WIDEST and len(read_sheet(tmp_path / "large.png")) == 6
