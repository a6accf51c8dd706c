"""Promise: the study of usefulness leaks nothing between fractions, resumes to the same bytes, says what it found."""

import dataclasses
import json
import os
import random
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import die_at, forked
from test_segmenter import PALETTE, write_rectangles

from segcn.cli import run_command
from segcn.data.dataset import PairedDataset
from segcn.data.masks import write_mask
from segcn.data.metadata import read_split, write_metadata
from segcn.data.palette import IGNORE
from segcn.evaluate.bootstrap import difference, resamples
from segcn.models.segmenter import SegmenterConfig
from segcn.study import report, run, training
from segcn.study.config import UtilityConfig
from segcn.study.plan import Arm, StudyPlan, arms, drawn_rows, stage_rows
from segcn.study.run import evaluate_utility
from segcn.study.training import Mixture, last_fall, mixed_batches, synthetic_places, train_mixed
from segcn.utils.errors import UserError

QUICK = SegmenterConfig(steps=3, batch_size=4, width=8, resolution=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rectangles(folder / "train", 8)
    write_rectangles(folder / "test", 4, seed=1)
    return folder


@pytest.fixture
def config(data, tmp_path):
    return UtilityConfig(
        dataset_name=str(data), output_dir=str(tmp_path / "study"), fractions="0.25,1", ratios="1,2", seeds=2,
        images=4, resolution=32, segmenter_resolution=32, segmenter_steps=2, segmenter_batch_size=2, segmenter_width=8,
        resamples=50,
    )  # fmt: skip


def test_each_fraction_holds_the_rows_of_the_smaller_ones(data):
    split = read_split(data, "train")
    few, more, all_rows = (drawn_rows(split, fraction, 3) for fraction in (0.25, 0.5, 1))
    assert (len(few), len(more), sorted(all_rows)) == (2, 4, list(range(8)))
    assert more[:2] == few and all_rows[:4] == more
    assert drawn_rows(split, 1, 4) != all_rows
    assert len(drawn_rows(split, 0.01, 3)) == 2  # one row has no other to differ from


def test_every_stage_of_a_fraction_gets_a_folder_of_its_rows_alone(data, config, tmp_path):
    split = read_split(data, "train")
    rows = drawn_rows(split, 0.25, 0)
    staged = stage_rows(split, rows, tmp_path / "rows")
    assert {path.name for path in (tmp_path / "rows").rglob("*.png")} == {
        f"{name}{row}.png" for row in rows for name in ("", "mask-")
    }
    same = [(one.image_name, one.captions) == (split[row].image_name, split[row].captions)
            for one, row in zip(staged.records, rows, strict=True)]  # fmt: skip
    assert all(same)
    plan = StudyPlan(config, {0.25: staged, 1: split}, read_split(data, "test"))
    training, generation = plan.controlnet(0.25), plan.synthetic(0.25)
    assert training.dataset_name == generation.controls == str(tmp_path / "rows")
    assert training.controlnet_model_name_or_path is None and training.faithfulness_rows == 0  # starts from the base
    assert generation.controlnet_model_name_or_path == training.output_dir
    assert generation.segmenter == str(plan.segmenter(Arm(0.25, 0.0), 0)[1])
    assert (generation.limit, generation.replicates) == (2, 2)


STAGES = [  # a setting, and the stages that it makes stale: of the smaller fraction and of the larger one
    ({"controlnet_steps": 7}, "cCiIsmM"), ({"controlnet_more_steps": 7}, "CIM"), ({"min_miou": 0.1}, "iImM"),
    ({"segmenter_steps": 7}, "iIsrRmM"), ({"synthetic_weight": 0.5}, "mM"), ({"seeds": 3}, ""), ({"resamples": 9}, ""),
]  # fmt: skip


def folders(plan):
    """By a letter: ControlNets, images, and segmenters of real and of mixed images; capitals: the larger fraction."""
    found = {}
    for fraction, change in ((0.25, str.lower), (1.0, str.upper)):
        named = {"c": plan.controlnet(fraction).output_dir, "i": plan.synthetic(fraction).output_dir}
        named |= {letter: plan.segmenter(Arm(fraction, ratio), 0)[1].name for letter, ratio in (("r", 0.0), ("m", 1.0))}
        found |= {change(letter): Path(folder).name for letter, folder in named.items()}
    return found


@pytest.mark.parametrize(("change", "stale"), STAGES)
def test_a_setting_makes_stale_what_depends_on_it(config, change, stale):
    plan = run.open_plan(config, lambda line: None)
    before, after = folders(plan), folders(dataclasses.replace(plan, config=dataclasses.replace(plan.config, **change)))
    assert {letter for letter in before if before[letter] != after[letter]} == set(stale) - {"s"}


def test_every_fraction_is_compared_and_the_largest_in_all_ways(config):
    assert [(arm.fraction, arm.name) for arm in arms(config)] == [
        (0.25, "real"), (0.25, "real+1x"), (1, "real"), (1, "real+1x"), (1, "synthetic"), (1, "real+2x"),
    ]  # fmt: skip
    assert [Arm(1, ratio).share for ratio in (0, 1, 3, None)] == [0, 0.5, 0.75, 1]


@pytest.mark.parametrize(("batch_size", "share"), [(16, 1 / 3), (5, 0.5), (7, 2 / 3), (4, 0), (4, 1)])
def test_over_the_steps_the_share_of_synthetic_images_is_exact(batch_size, share):
    places = [synthetic_places(step, batch_size, share) for step in range(300)]
    assert {len(batch) for batch in places} == {batch_size}
    assert sum(map(sum, places)) == round(300 * batch_size * share)


def test_a_mixture_shows_the_real_images_in_their_order_and_weighs_the_synthetic_ones(tmp_path):
    real, synthetic = write_rectangles(tmp_path / "real", 6), write_rectangles(tmp_path / "synthetic", 3, seed=9)

    def batches(*mixture, **given):
        images, masks, weights = zip(*mixed_batches(Mixture(*mixture, **given), QUICK), strict=True)
        return images, masks, [weight.tolist() for weight in weights]

    whole, half = [1, 1, 1, 1], [1, 1, 0.25, 0.25]
    shown, masks, weights = batches(real, None)
    assert weights == [whole] * 3 and shown[0].shape == (4, 3, 32, 32) and masks[0].shape == (4, 32, 32)
    mixed, _, weights = batches(real, synthetic, 0.5, 0.25)
    assert weights == [half] * 3 and torch.equal(torch.cat([image[:2] for image in mixed]), torch.cat(shown)[:6])
    assert batches(real, synthetic, 0.5, 0.25, real_last=1 / 3)[2] == [half, half, whole]
    assert batches(None, synthetic, 1.0, 0.25)[2] == [whole] * 3


def test_every_draw_of_a_small_data_set_is_made_once_and_a_large_one_has_new_ones_each_epoch(tmp_path, monkeypatch):
    split, made = write_rectangles(tmp_path / "real", 3), []
    sample = PairedDataset.sample
    monkeypatch.setattr(PairedDataset, "sample", lambda self, *key: (made.append(key), sample(self, *key))[1])
    monkeypatch.setattr(training, "KEPT_DRAWS", 7)
    draws = training.Draws(split)
    first, again, third = (draws.sample(1, epoch, QUICK) for epoch in (0, 2, 1))
    assert made == [(1, 0), (1, 1)] and torch.equal(first[0], again[0]) and not torch.equal(first[0], third[0])
    exact = sample(PairedDataset(split, QUICK.resolution, training.AUGMENT, 0, QUICK.fit), 1, 0)
    assert (first[0] - exact.image).abs().max() <= 0.5 / 127.5 + 1e-6 and torch.equal(first[1], exact.mask)
    monkeypatch.setattr(training, "KEPT_DRAWS", 2)
    large = training.Draws(split)
    assert not torch.equal(large.sample(1, 0, QUICK)[0], large.sample(1, 2, QUICK)[0]) and not large.kept


def test_the_fall_of_the_loss_in_the_last_tenth_shows_whether_it_has_levelled():
    falling = torch.linspace(2, 1, 100)
    assert last_fall(torch.cat([falling[::2], torch.ones(50)])) == 0
    assert last_fall(falling) == pytest.approx(1 - falling[90:].mean().item() / falling[80:90].mean().item(), abs=1e-4)


def test_pixels_that_are_marked_ignored_change_nothing_that_is_learned(tmp_path):
    real, synthetic = write_rectangles(tmp_path / "real", 4), write_rectangles(tmp_path / "synthetic", 4, seed=9)

    def weights(weight, blank):
        if blank:
            for record in synthetic.records:
                write_mask(record.mask, np.full((32, 32), IGNORE, np.uint8), PALETTE)
        found = train_mixed(Mixture(real, synthetic, 0.5, weight), QUICK, lambda line: None)
        return torch.cat([tensor.flatten().float() for tensor in found.state_dict().values()])

    unweighed = weights(0.0, blank=False)
    assert not torch.equal(weights(1.0, blank=False), unweighed)
    assert torch.equal(weights(1.0, blank=True), unweighed)


def brute_force(counts, draws):
    """Each resample image by image and seed by seed: the mean over classes."""
    seeds, images = counts.shape[:2]
    found = []
    for times, often in zip(*(torch.cat(list(resamples(count, name, draws))).int().tolist()
                              for count, name in ((images, "rows"), (seeds, "seeds"))), strict=True):  # fmt: skip
        values = []
        for one in (number for number, count in enumerate(often) for _ in range(count)):
            summed = sum(counts[one, image] * count for image, count in enumerate(times))
            values.append(np.mean([both / (there + found - both) for there, found, both in summed]))
        found.append(np.mean(values))
    return np.array(found)


def test_resamples_equal_a_brute_force_bootstrap_over_seeds_and_images_and_their_differences_are_paired():
    draw = np.random.default_rng(5)  # pixels in the mask, in the prediction, in both: [3 seeds, 12 images, 4 classes]
    there, predicted = draw.integers(50, 100, (2, 3, 12, 4))
    both = (np.minimum(there, predicted) * draw.uniform(0.4, 0.8, there.shape)).astype(int)
    counts, better = (np.stack([there, predicted, found], -1) for found in (both, both + 2))  # by less than they differ
    scores, others = (report.iou_over_seeds(found, list("abcd"), 240) for found in (counts, better))
    assert np.allclose(scores["miou"].draws, brute_force(counts, 240), rtol=1e-12)
    for one in scores.values():
        low, high = one.interval()
        assert low < one.value < high
    low, high = difference(others["miou"], scores["miou"]).interval()
    assert low > 0 and high - low < np.ptp(scores["miou"].interval()) / 3


VERDICTS = [(0.05, [0.02, 0.08], "raise"), (-0.05, [-0.08, -0.02], "lower"), (0.01, [-0.01, 0.03], "no effect")]


@pytest.mark.parametrize(("found", "ends", "said"), VERDICTS)
def test_the_verdict_says_whether_the_interval_holds_zero(found, ends, said):
    arm = {"fraction": 0.05, "rows": 51, "miou": 0.7, "above_real": {"miou": found, "miou_interval": ends}}
    sentence = report.verdict(arm)
    assert sentence.startswith("With 5 % of the real rows (51), ") and sentence.endswith(".")
    assert [word for *_, word in VERDICTS if word in sentence] == [said]
    assert f"from {0.7 - found:.3f} to 0.700" in sentence and f"{ends[0]:+.3f} to {ends[1]:+.3f}" in sentence


@pytest.fixture
def stand_ins(monkeypatch):
    """In place of a ControlNet's training and of generation: files as they leave them, and their settings."""
    given = []

    def train(settings):
        given.append(settings)
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")

    def generate(settings, log):
        given.append(settings)
        folder, split = Path(settings.output_dir), read_split(settings.controls)
        made = write_rectangles(folder / "made", 4, seed=len(split))
        lines = [{"kept": True, "miou": 0.5, "ignored": 0.25}] * 4
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.palette.save(folder / "palette.json")
        write_metadata(folder, [(f"made/{one.image_name}", f"made/{one.mask_name}", "x") for one in made.records])

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "generate_dataset", generate)
    return given


def test_a_study_measures_every_arm_uses_its_named_rows_alone_and_draws_both_curves(config, stand_ins, data):
    said = []
    metrics = evaluate_utility(config, said.append)
    folder, rows = Path(config.output_dir), json.loads((Path(config.output_dir) / "rows.json").read_text())
    assert len(metrics["arms"]) == 6 and len(metrics["verdicts"]) == 2
    assert all(len(arm["of_each_seed"]) == 2 and 0 <= arm["miou"] <= 1 for arm in metrics["arms"])
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert rows["1"][:2] == rows["0.25"] and len(rows["1"]) == 8
    seen = [read_split(one.dataset_name if hasattr(one, "dataset_name") else one.controls) for one in stand_ins]
    names = [[record.image_name for record in split.records] for split in seen]
    assert names == [rows["0.25"]] * 2 + [rows["1"]] * 2
    text = (folder / "utility.md").read_text()
    expected = ["has seen images without masks", "pigeonhole bootstrap", "25.0% of their pixels"]
    assert all(part in text for part in [*expected, f"fell by {metrics['last_fall']:.1%} at most"])
    first, larger = stand_ins[0], stand_ins[2]  # the larger fraction's starts from the smaller one's
    assert (first.controlnet_model_name_or_path, larger.controlnet_model_name_or_path) == (None, first.output_dir)
    steps = config.controlnet_steps, config.controlnet_more_steps
    assert (first.max_train_steps, larger.max_train_steps) == steps
    assert any(line.startswith("16 stages") for line in said)
    assert any(line.startswith("[16/16]") and line.endswith("left") for line in said)
    again = []
    evaluate_utility(config, again.append)
    assert any(line.startswith("0 stages") for line in again) and len(stand_ins) == 4
    axes = report.plot(metrics).axes
    assert {one.get_title() + one.get_title("left") for one in axes[1:]} == {"sky", "grass", "road"}
    assert all(len(one.get_lines()) == 2 and one.get_xscale() == "log" for one in axes)
    assert [line.get_xdata().tolist() for line in axes[0].get_lines()] == [[2, 8]] * 2


def test_killed_at_any_change_to_the_disk_rerun_it_ends_with_the_same_metrics(config, stand_ins, tmp_path):
    def study(name, change=0):
        def work():
            torch.set_num_threads(1)
            if change:
                die_at(change)
            with open(os.devnull, "w") as sys.stdout:
                evaluate_utility(dataclasses.replace(config, output_dir=str(tmp_path / name)))

        return forked(work)

    assert study("straight") == 0
    straight, draw, kills = (tmp_path / "straight" / "metrics.json").read_bytes(), random.Random(), 0
    for name in ("once", "twice"):
        for _ in range(3):
            kills += study(name, draw.randint(10, 120)) == -signal.SIGKILL
        assert study(name) == 0
        assert (tmp_path / name / "metrics.json").read_bytes() == straight
    assert kills >= 2


def test_a_study_that_is_interrupted_stops_all_of_its_segmenters_and_resumes(config, stand_ins, tmp_path, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    config = dataclasses.replace(config, segmenter_steps=50)
    torch.set_num_threads(1)  # one segmenter after the other, here three at once
    alone = evaluate_utility(dataclasses.replace(config, output_dir=str(tmp_path / "alone")), lambda line: None)
    torch.set_num_threads(3)
    before, said = set(threading.enumerate()), []

    def log(line):
        said.append(line)
        if "real+1x" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_utility(config, log)
    assert set(threading.enumerate()) == before and len(said) < 14
    assert evaluate_utility(config, said.append) == alone


@pytest.mark.parametrize("name, value, said", [
    ("fractions", "0.1,2", "--fractions: expected numbers above 0 and up to 1"),
    ("ratios", "one", "--ratios: expected numbers"), ("seeds", 1, "--seeds: expected 2 or more"),
    ("few_real_ratio", 3.0, "--few_real_ratio 3: expected one of --ratios 1,2"),
    ("synthetic_weight", 1.5, "--synthetic_weight: expected 0 to 1"),
    ("augment", "swirl", "expected affine or none first, found 'swirl'"),
    ("augment_masks", "swirl", "--augment_masks: expected affine"),
    ("vary", ["by day"], "--vary: expected words with bars"),
    ("vary", ["benign|malignant"], "no caption of .* has one of these words"),
    ("dataset_name", "", "--dataset_name: expected a data set folder"),
    ("dataset_name", "{data}/train", "expected train/ and test/"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_before_anything_is_trained(config, data, name, value, said):
    value = value.format(data=data) if name == "dataset_name" else value
    with pytest.raises(UserError, match=said):
        evaluate_utility(dataclasses.replace(config, **{name: value}), lambda line: None)


@pytest.mark.slow
def test_a_whole_small_study_trains_generates_and_measures(landscapes, random_base, tmp_path):
    words = f"""evaluate utility --dataset_name {landscapes} --base {random_base} --output_dir {tmp_path / "study"}
        --fractions 0.25,1 --ratios 1 --seeds 2 --images 6 --resolution 64 --controlnet_steps 2
        --controlnet_more_steps 1 --num_inference_steps 2 --segmenter_resolution 32 --segmenter_steps 4
        --segmenter_batch_size 2 --segmenter_width 8 --min_miou 0""".split()
    run_command(words)
    metrics = (tmp_path / "study" / "metrics.json").read_bytes()
    made = json.loads(metrics)["synthetic"]
    assert {fraction: one["kept"] for fraction, one in made.items()} == {"0.25": 6, "1": 6}
    run_command(words)
    assert (tmp_path / "study" / "metrics.json").read_bytes() == metrics
