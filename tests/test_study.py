"""Promise: the study of usefulness leaks nothing between fractions, resumes to the same bytes, says what it found."""

import dataclasses
import json
import os
import random
import shutil
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
from segcn.data.transforms import AugmentConfig
from segcn.evaluate.bootstrap import bootstrap, difference, nested_resamples, resamples
from segcn.models.base import weights_digest
from segcn.models.segmenter import SegmenterConfig, load_segmenter
from segcn.study import report, run, training
from segcn.study.config import AFFINE, StudyConfig
from segcn.study.plan import BOUND, REAL, Arm, Portion, drawn_rows
from segcn.study.run import study
from segcn.study.training import Draws, Mixture, Rule, learning_rates, synthetic_places, train_arm
from segcn.utils.errors import UserError

QUICK = SegmenterConfig(steps=3, batch_size=4, width=8, resolution=32)
FEW, ALL = Portion(0, 0.5), Portion(0, 1.0)
AUGMENT = AugmentConfig.parse(AFFINE)
ALONE = Arm("synthetic", 4)
PRETRAINED, MIXED = Arm("real", after=ALONE), Arm("mixed", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rectangles(folder / "train", 8)
    write_rectangles(folder / "test", 4, seed=1)
    return folder


@pytest.fixture
def config(data, tmp_path):
    return StudyConfig(
        dataset_name=str(data), output_dir=str(tmp_path / "study"), fractions="0.5,1", draws=1, seeds=2, images="4",
        resolution=32, segmenter_resolution=32, segmenter_steps=2, segmenter_batch_size=2, segmenter_width=8,
        learning_rates=[0.01], segmenter_augments=[AFFINE], validation_steps=1, patience=2, resamples=50,
    ).filled  # fmt: skip


def quietly(line):
    pass


def test_each_fraction_learns_from_the_rows_of_the_smaller_ones_and_validates_on_none_of_them():
    few, more, every = (drawn_rows(40, fraction, 3, 7) for fraction in (0.2, 0.5, 1))
    for learned, validation, other in (few, more, every):
        assert not set(learned) & set(validation) and not set(other) & {*learned, *validation}
    assert [[len(part) for part in one] for one in (few, more, every)] == [[6, 2, 7], [16, 4, 7], [32, 8, 0]]
    assert set(few[0]) < set(more[0]) < set(every[0]) and set(few[1]) < set(more[1]) < set(every[1])
    assert drawn_rows(40, 1, 4, 7) != every
    assert [len(part) for part in drawn_rows(40, 0.01, 3, 7)] == [2, 1, 7]  # one row has no other to differ from


def test_every_stage_of_a_case_gets_a_folder_of_its_rows_alone(data, config, tmp_path):
    split = read_split(data, "train")
    plan = run.open_plan(config, quietly)
    learned, validation, other = drawn_rows(8, 0.5, 0, 4)
    for part, rows in zip(plan.rows[FEW], (learned, validation, other), strict=True):
        assert [(one.image_name, one.captions) for one in part.records] == [
            (split[row].image_name, split[row].captions) for row in rows
        ]
        assert {path.name for path in part.folder.rglob("*.png")} == {
            f"{name}{row}.png" for row in rows for name in ("", "mask-")
        }
    training, generation = plan.controlnet(FEW), plan.synthetic(FEW)
    assert training.dataset_name == generation.controls == str(plan.rows[FEW].learned.folder)
    assert training.controlnet_model_name_or_path is None and training.faithfulness_rows == 0  # starts from the base
    assert plan.controlnet(ALL).controlnet_model_name_or_path == training.output_dir
    assert generation.controlnet_model_name_or_path == training.output_dir
    assert generation.segmenter == str(plan.segmenter(FEW, REAL, 0)[1])
    assert (generation.limit, generation.replicates) == (3, 2)


def test_new_layouts_come_from_the_rows_of_a_case_alone_and_every_image_has_one_of_its_own(config, tmp_path):
    for row, record in enumerate(write_rectangles(tmp_path / "data/train", 8).records):
        mask = np.zeros((32, 32), np.uint8)
        mask[6 + row : 14 + row, 12:20] = 1  # an object
        write_mask(record.mask, mask, PALETTE)
    write_rectangles(tmp_path / "data/test", 2)
    config = dataclasses.replace(config, dataset_name=str(tmp_path / "data"))
    before, plan = (run.open_plan(dataclasses.replace(config, layouts=layouts), quietly) for layouts in (False, True))
    for case, rows in plan.rows.items():
        settings, generation = plan.layouts(case), plan.synthetic(case)
        assert settings.dataset_name == str(rows.learned.folder) and before.layouts(case) is None
        assert generation.controls == settings.output_dir and (generation.limit, generation.replicates) == (4, 1)
        assert generation.prompt == "{caption} with {classes}"
        assert len(list(Path(settings.output_dir).glob("masks/*.png"))) == 4
        assert generation.output_dir != before.synthetic(case).output_dir


STAGES = [  # a setting, and the stages that it makes stale: of the smaller fraction and of the larger one
    ({"controlnet_steps": 7}, "cCiIsSpPmM"), ({"controlnet_more_steps": 7}, "CISPM"), ({"min_miou": 0.1}, "iIsSpPmM"),
    ({"inpaint": ["road"]}, "iIsSpPmM"),
    ({"segmenter_steps": 7}, "iIsSpPmMrR"), ({"patience": 3}, "iIsSpPmMrR"), ({"ratio": 2.0}, "mM"),
    ({"seeds": 3}, ""), ({"resamples": 9}, ""),
]  # fmt: skip


def folders(plan):
    """By a letter: ControlNets, images, and segmenters of some arms; capitals: the larger fraction."""
    found = {}
    for case, change in ((FEW, str.lower), (ALL, str.upper)):
        named = {"c": plan.controlnet(case).output_dir, "i": plan.synthetic(case).output_dir}
        arms = {"r": REAL, "s": ALONE, "p": PRETRAINED, "m": MIXED}
        named |= {letter: plan.segmenter(case, arm, 0)[1] for letter, arm in arms.items()}
        found |= {change(letter): Path(folder).name for letter, folder in named.items()}
    return found


@pytest.mark.parametrize(("change", "stale"), STAGES)
def test_a_setting_makes_stale_what_depends_on_it(config, change, stale):
    plan = run.open_plan(config, quietly)
    before, after = folders(plan), folders(dataclasses.replace(plan, config=dataclasses.replace(plan.config, **change)))
    assert {letter for letter in before if before[letter] != after[letter]} == set(stale)


def test_every_recipe_has_real_alone_for_as_long_and_the_upper_bound_is_there_where_rows_are_left(config):
    plan = run.open_plan(dataclasses.replace(config, images="2,4"), quietly)
    assert [arm.name for arm in plan.arms(FEW)] == [
        "real", "2 synthetic", "4 synthetic", "2 synthetic, then real", "4 synthetic, then real",
        "real with 4 synthetic mixed in", "real with other real rows mixed in",
        "real, as long as 2 synthetic, then real", "real, as long as 4 synthetic, then real",
        "real, as long as real with 4 synthetic mixed in",
    ]  # fmt: skip
    assert BOUND not in plan.arms(ALL)


def test_arms_see_as_many_real_images_as_real_alone_and_their_controls_take_as_many_steps(config, monkeypatch):
    plan = run.open_plan(dataclasses.replace(config, ratio=0.5), quietly)
    taken = {REAL: 100, ALONE: 60}
    monkeypatch.setattr(plan, "result", lambda case, arm, seed: {"steps_taken": taken[arm]}, raising=False)
    length = partial(plan.steps, FEW, seed=0)
    assert [length(arm) for arm in taken] == [None] * 2
    assert (length(PRETRAINED), length(BOUND), length(MIXED)) == (100, 150, 150)
    assert [length(Arm("real", like=arm)) for arm in (PRETRAINED, MIXED)] == [160, 150]


@pytest.mark.parametrize(("batch_size", "share"), [(16, 1 / 3), (5, 0.5), (7, 2 / 3), (4, 0), (4, 1)])
def test_over_the_steps_the_share_of_synthetic_images_is_exact(batch_size, share):
    places = [synthetic_places(step, batch_size, share) for step in range(300)]
    assert {len(batch) for batch in places} == {batch_size}
    assert sum(map(sum, places)) == round(300 * batch_size * share)


def mixture_of(*splits):
    return Mixture(*(split and Draws(split, AUGMENT) for split in splits))


def test_a_mixture_shows_the_real_images_in_their_order(tmp_path):
    real, synthetic = write_rectangles(tmp_path / "real", 6), write_rectangles(tmp_path / "synthetic", 3, seed=9)

    def images(*splits, steps):
        return [batch[0] for batch, _ in zip(mixture_of(*splits).batches(QUICK), range(steps), strict=False)]

    shown = torch.cat(images(real, None, steps=3))
    mixed = images(real, synthetic, steps=6)  # half of each batch: twice the steps show the same real images
    assert torch.equal(torch.cat([batch[:2] for batch in mixed]), shown) and mixed[0].shape == (4, 3, 32, 32)
    assert not torch.equal(images(None, synthetic, steps=1)[0], shown[:4])


def test_every_draw_of_a_small_data_set_is_made_once_and_a_large_one_has_new_ones_each_epoch(tmp_path, monkeypatch):
    split, made = write_rectangles(tmp_path / "real", 3), []
    sample = PairedDataset.sample
    monkeypatch.setattr(PairedDataset, "sample", lambda self, *key: (made.append(key), sample(self, *key))[1])
    monkeypatch.setattr(training, "KEPT_DRAWS", 7)
    draws = Draws(split, AUGMENT)
    first, again, third = (draws.sample(1, epoch, QUICK) for epoch in (0, 2, 1))
    assert made == [(1, 0), (1, 1)] and torch.equal(first[0], again[0]) and not torch.equal(first[0], third[0])
    exact = sample(PairedDataset(split, QUICK.resolution, AUGMENT, 0, QUICK.fit), 1, 0)
    assert (first[0] - exact.image).abs().max() <= 0.5 / 127.5 + 1e-6 and torch.equal(first[1], exact.mask)
    monkeypatch.setattr(training, "KEPT_DRAWS", 2)
    large = Draws(split, AUGMENT)
    assert not torch.equal(large.sample(1, 0, QUICK)[0], large.sample(1, 2, QUICK)[0]) and not large.kept


def rates_of(scores, steps=None, most=1000, longer=1.0):
    """The learning rates of a training whose looks find these scores, and how many were taken."""
    found = iter(scores)
    config = dataclasses.replace(QUICK, steps=most, learning_rate=1.0)
    rates = list(learning_rates(config, Rule(60, 2, longer), steps, lambda: next(found)))
    return rates, len(scores) - len(list(found))


def test_a_training_ends_a_third_after_the_plateau_and_one_of_set_length_has_the_same_shape():
    rates, looks = rates_of([0.1, 0.3, 0.2, 0.4, 0.4005, 0.39, 0.9])  # 0.4005 is no better than 0.4
    assert looks == 6 and len(rates) == 6 * 60 + 2 * 60
    assert rates[:2] == [1 / 50, 2 / 50] and set(rates[50:360]) == {1.0} and rates[-1] == pytest.approx(1 / 121)
    assert rates == rates_of([], steps=len(rates))[0]
    assert len(rates_of([step / 9 for step in range(9)], most=300)[0]) == 400  # at most
    assert rates_of([], steps=1)[0] == [1 / 50]
    assert rates_of([0.1, 0.3, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4], longer=2)[1] == 8  # twice as long as to the best


def test_trainings_that_differ_in_length_alone_are_one_and_each_has_the_weights_as_if_alone(tmp_path, segformer):
    real, synthetic = write_rectangles(tmp_path / "real", 5), write_rectangles(tmp_path / "synthetic", 3, seed=9)
    lengths, foreign = (3, 4, 7, 7, 12), dataclasses.replace(QUICK, architecture=str(segformer))
    for config, splits in ((QUICK, (real, None)), (QUICK, (real, synthetic)), (foreign, (real, None))):
        train = partial(train_arm, mixture_of(*splits), config, Draws(real), Rule(1, 1), log=quietly)
        alone = [train([length])[0] for length in lengths]
        together = train(lengths)
        assert [one.settings["steps_taken"] for one in together] == list(lengths)
        for one, other in zip(together, alone, strict=True):
            assert weights_digest(one) == weights_digest(other) and one.settings == other.settings
        assert weights_digest(together[1]) != weights_digest(together[2])


def test_pixels_that_are_marked_ignored_change_nothing_that_is_learned(tmp_path):
    real, synthetic = write_rectangles(tmp_path / "real", 4), write_rectangles(tmp_path / "synthetic", 4, seed=9)

    def weights(blank):
        if blank:
            for record in synthetic.records:
                write_mask(record.mask, np.full((32, 32), IGNORE, np.uint8), PALETTE)
        mixture = mixture_of(real, synthetic)
        for batch, _ in zip(mixture.batches(QUICK), range(2), strict=False):
            assert not blank or (batch[1][2:] == IGNORE).all()
        (found,) = train_arm(mixture, QUICK, Draws(real), Rule(1, 1), [2], log=quietly)
        return torch.cat([tensor.flatten().float() for tensor in found.state_dict().values()])

    assert not torch.equal(weights(blank=False), weights(blank=True))


def hierarchical_variance(values):
    """Of a mean over groups and their members, as the bootstrap with one group fewer knows it: [groups, members]."""
    groups, members = values.shape
    between, within = values.mean(1).var(ddof=0), values.var(1, ddof=0).mean() / members
    return (between + within) / (groups - 1) if groups > 1 else values.var(ddof=1) / members


@pytest.mark.parametrize("shape", [(3, 3), (5, 2), (1, 4)])
def test_hierarchical_resamples_have_the_variance_that_is_known_widened_by_students_t(shape):
    values = np.random.default_rng(2).normal(size=shape)
    weights = torch.cat(list(nested_resamples(*shape, 40_000))).numpy()
    assert np.allclose(weights.mean((1, 2)), 1)
    means = (weights * values).mean((1, 2))
    degrees = (shape[0] if shape[0] > 1 else shape[1]) - 1
    student = {2: 4.303, 4: 2.776, 3: 3.182}[degrees] / 1.95996
    assert means.mean() == pytest.approx(values.mean(), abs=0.03)
    assert means.std() == pytest.approx(student * hierarchical_variance(values) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("between", "shape"), [(1.0, (3, 3)), (0.0, (3, 3)), (0.0, (1, 4)), (1.0, (6, 2))])
def test_the_interval_holds_a_known_effect_in_nineteen_of_twenty_studies(between, shape):
    """Draws of rows differ by `between`, seeds by 1, images by 3: what a study of a true effect of 0 would see."""
    noise, held, studies = np.random.default_rng(4), 0, 300
    for _ in range(studies):
        networks = between * noise.normal(size=(shape[0], 1)) + noise.normal(size=shape)
        images = torch.from_numpy(networks[..., None] + 3 * noise.normal(size=40))
        found = bootstrap(
            lambda rows, nets, images=images: torch.einsum("bds,dsn,bn->b", nets, images, rows) / images.numel(),
            400, rows=40, networks=shape,
        )  # fmt: skip
        low, high = found.interval()
        held += low <= 0 <= high
    assert 0.91 <= held / studies <= 1


def brute_force(counts, draws):
    """Each resample image by image and network by network: the mean over classes."""
    rows, networks = (torch.cat(list(each)).tolist() for each in (
        resamples(counts.shape[2], "rows", draws), nested_resamples(*counts.shape[:2], draws)))  # fmt: skip
    found = []
    for times, weights in zip(rows, networks, strict=True):
        total = 0.0
        for draw, seed in np.ndindex(counts.shape[:2]):
            summed = sum(counts[draw, seed, image] * count for image, count in enumerate(times))
            each = np.mean([both / (there + found - both) for there, found, both in summed])
            total += weights[draw][seed] * each / (counts.shape[0] * counts.shape[1])
        found.append(total)
    return np.array(found)


def test_resamples_equal_a_brute_force_bootstrap_over_draws_seeds_and_images_and_their_differences_are_paired():
    draw = np.random.default_rng(5)  # pixels in the mask, in the prediction, in both: [2 draws, 3 seeds, 12 images, 4]
    there, predicted = draw.integers(50, 100, (2, 2, 3, 12, 4))
    both = (np.minimum(there, predicted) * draw.uniform(0.4, 0.8, there.shape)).astype(int)
    counts, better = (np.stack([there, predicted, found], -1) for found in (both, both + 2))  # by less than they differ
    scores, others = (report.iou_of_networks(found, list("abcd"), 120) for found in (counts, better))
    assert np.allclose(scores["miou"].draws, brute_force(counts, 120), rtol=1e-12)
    for one in scores.values():
        low, high = one.interval()
        assert low < one.value < high
    low, high = difference(others["miou"], scores["miou"]).interval()
    assert low > 0 and high - low < np.ptp(scores["miou"].interval()) / 3


def arm_of(kind, images, exposure, compute=None, fewer=(), house=(0, -1, 1)):
    """An arm's figures as in metrics.json; gains as (value, low, high), also of a class."""
    of = lambda gain: {"miou": gain[0], "miou_interval": list(gain[1:]),  # noqa: E731
                       "per_class": {"house": house[0]}, "intervals": {"house": list(house[1:])}}  # fmt: skip
    above = {"equal_exposure": of(exposure)} | ({"equal_compute": of(compute)} if compute else {})
    return {"kind": kind, "images": images, "rows": 200, "miou": 0.7 + exposure[0], "above": above,
            "above_fewer": {f"fewer_{one}": of(gain) for one, gain in dict(fewer).items()}}  # fmt: skip


GAIN, NOTHING, LOSS = (0.018, 0.009, 0.026), (0.001, -0.004, 0.006), (-0.02, -0.03, -0.01)
VERDICTS = [  # of pretraining on 1,000 and on 2,000 images, and of mixing; what is said, and what is not
    ((GAIN, GAIN), NOTHING, (NOTHING, NOTHING), ["pretrain on 1,000 synthetic images, then finetune: mIoU +1.8 [+0.9",
     "mixing: no difference shown", "don't add any beyond 1,000", "upper bound: mIoU +1.8"], ["untried"]),
    ((GAIN, GAIN), GAIN, (LOSS, NOTHING), ["pretrain on 2,000", "mixing: loss", "more than 2,000 untried"], ["beyond"]),
    ((GAIN, LOSS), NOTHING, (NOTHING, NOTHING), ["add no synthetic images",
     "pretraining: less than the same compute on the real rows gives"], ["beyond", "single classes"]),
    ((GAIN, NOTHING), NOTHING, (GAIN, GAIN), ["mix 2,000 synthetic images in: mIoU +1.8", "pretraining: no diff"], []),
]  # fmt: skip


@pytest.mark.parametrize(("pretrained", "more", "mixed", "said", "unsaid"), VERDICTS)
def test_the_verdict_is_what_to_do_and_a_gain_is_above_both_controls(pretrained, more, mixed, said, unsaid):
    arms = [arm_of("pretrained", 1000, *pretrained), arm_of("pretrained", 2000, *pretrained, {1000: more}),
            arm_of("mixed", 2000, *mixed), arm_of("bound", 2000, GAIN, GAIN)]  # fmt: skip
    sentence = report.verdict(arms)
    assert sentence.startswith("With your 200 rows: ") and sentence.endswith(".")
    assert [words for words in said if words not in sentence] == [words for words in unsaid if words in sentence] == []
    of_rare = arm_of("mixed", 2000, NOTHING, NOTHING, house=(0.158, 0.013, 0.322))
    assert (
        "mixing: no difference shown, mIoU +0.1 [-0.4, +0.6] above real alone and +0.1 [-0.4, +0.6] above real for"
        " as long, but a gain of single classes, above real for as long: house +15.8 [+1.3, +32.2]"
    ) in report.verdict([*arms[:2], of_rare])


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
        lines = [{"kept": True, "miou": 0.5, "conditioning_image_file_name": f"made/{one.mask_name}"}
                 for one in made.records]  # fmt: skip
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.palette.save(folder / "palette.json")
        write_metadata(folder, [(f"made/{one.image_name}", f"made/{one.mask_name}", "x") for one in made.records])

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "generate_dataset", generate)
    return given


def test_a_study_measures_every_arm_uses_its_named_rows_alone_and_draws_curves(config, stand_ins, data):
    said, config = [], dataclasses.replace(config, draws=2, learning_rates=[0.01, 0.02])
    metrics = study(config, said.append)
    folder, rows = Path(config.output_dir), json.loads((Path(config.output_dir) / "rows.json").read_text())
    assert [(arm["rows"], arm["kind"]) for arm in metrics["arms"]] == [
        (4, kind) for kind in ("real", "synthetic", "pretrained", "mixed", "bound", "longer", "longer")
    ] + [(8, kind) for kind in ("real", "synthetic", "pretrained", "mixed", "longer", "longer")]
    for arm in metrics["arms"]:
        assert np.shape(arm["of_each_draw_and_seed"]) == (2, 2) and 0 <= arm["miou"] <= 1
        assert (arm["kind"] in ("pretrained", "mixed", "bound")) == ("equal_compute" in arm.get("above", {}))
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    seen = [read_split(one.dataset_name if hasattr(one, "dataset_name") else one.controls) for one in stand_ins]
    names = [[record.image_name for record in split.records] for split in seen]
    assert names == [rows[case]["learned"] for case in ("0.5-0", "1-0", "0.5-1", "1-1") for _ in range(2)]
    text, chosen = (folder / "study.md").read_text(), [case["learning_rate"] for case in metrics["cases"]]
    expected = ["has seen images without masks", "hierarchical bootstrap", "with an mIoU of 0.50", "(2 draws)"]
    assert [part for part in expected if part not in text] == [] and set(chosen) <= {0.01, 0.02}
    lost = [case | {"mostly_dropped": ["sky", "road"]} for case in metrics["cases"]]
    said_of_lost = report.report(metrics | {"cases": lost}).count("Of sky and road more were dropped than kept")
    assert "more were dropped" not in text and said_of_lost == 4
    segmenters = [json.loads(path.read_text()) for path in folder.glob("segmenters/0.5-0-real-0-*/config.json")]
    best = max(segmenters, key=lambda one: one["validation_miou"])  # of the two learning rates
    assert len(segmenters) == 2 and best["learning_rate"] == chosen[0]
    assert any(line.startswith("64 stages") for line in said) and any(line.startswith("[64/64]") for line in said)
    again = []
    assert study(config, again.append) == metrics
    assert any(line.startswith("0 stages") for line in again) and len(stand_ins) == 8
    axes = report.plot(metrics).axes
    titles = ("".join(one.get_title(place) for place in ("left", "center")) for one in axes[2:])  # as rcParams say
    assert {title.partition(",")[0] for title in titles} == {"sky", "grass", "road"}
    assert [container.get_label() for container in axes[0].containers] == [
        "real alone", "pretrained on 4 synthetic", "4 synthetic mixed in", "other real rows mixed in",
    ]  # fmt: skip


def test_killed_at_any_change_to_the_disk_rerun_it_ends_with_the_same_metrics(config, stand_ins, tmp_path):
    def work_of(name, change=0):
        def work():
            torch.set_num_threads(1)
            if change:
                die_at(change)
            with open(os.devnull, "w") as sys.stdout:
                study(dataclasses.replace(config, fractions="0.5", output_dir=str(tmp_path / name)))

        return forked(work)

    assert work_of("straight") == 0
    straight, draw, kills = (tmp_path / "straight" / "metrics.json").read_bytes(), random.Random(), 0
    for _ in range(3):
        kills += work_of("killed", draw.randint(10, 150)) == -signal.SIGKILL
    assert work_of("killed") == 0 and kills >= 1
    assert (tmp_path / "killed" / "metrics.json").read_bytes() == straight


def test_a_study_that_is_interrupted_stops_all_of_its_segmenters_and_resumes(config, stand_ins, tmp_path, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    config = dataclasses.replace(config, segmenter_steps=20, validation_steps=20, fractions="0.5")
    torch.set_num_threads(1)  # one segmenter after the other, here three at once
    alone = study(dataclasses.replace(config, output_dir=str(tmp_path / "alone")), quietly)
    torch.set_num_threads(3)
    before, said = set(threading.enumerate()), []

    def log(line):
        said.append(line)
        if "mixed_in" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(config, log)
    assert set(threading.enumerate()) == before and len(said) < 22
    assert study(config, said.append) == alone


def test_a_whole_study_with_a_segformer_from_its_config_gives_the_same_numbers_again(
    config, stand_ins, segformer, tmp_path
):
    given = {"segmenter_architecture": str(segformer), "learning_rates": [1e-3], "fractions": "0.5"}
    config = dataclasses.replace(config, **given)
    metrics, out = study(config, quietly), tmp_path / "study" / "segmenters"
    (again,) = out.glob("*-4_synthetic-then_real-0-*")
    segmenter = load_segmenter(again, "cpu")
    assert segmenter.settings["name"] == "segformer (segformer)" and segmenter.settings["resolution"] == 32
    shutil.rmtree(again)
    assert study(config, quietly) == metrics and weights_digest(load_segmenter(again, "cpu")) == weights_digest(
        segmenter
    )


def test_the_tier_fills_in_what_is_not_given_and_the_intervals_say_what_they_cover(config):
    quick, full = (StudyConfig(tier=tier, seeds=4).filled for tier in ("quick", "full"))
    assert (quick.draws, full.draws, quick.seeds, full.seeds) == (1, 3, 4, 4)
    assert (quick.amounts, full.amounts) == ((512,), (256, 512, 1024)) and len(full.some) == 3
    assert "one draw" in report.ONE and "do not cover which rows" in report.ONE


@pytest.mark.parametrize("name, value, said", [
    ("tier", "slow", "--tier: expected one of quick, full"),
    ("fractions", "0.1,2", "--fractions: expected numbers above 0 and up to 1"),
    ("images", "many", "--images: expected numbers"), ("seeds", 1, "--seeds: expected 2 or more"),
    ("segmenter_architecture", "unet", "--segmenter_architecture unet: expected small, or a folder"),
    ("segmenter_augments", ["swirl"], "expected affine or none first, found 'swirl'"),
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
        study(dataclasses.replace(config, **{name: value}), quietly)


@pytest.mark.slow
def test_a_whole_small_study_trains_generates_and_measures(landscapes, random_base, tmp_path):
    words = f"""study --dataset_name {landscapes} --pretrained_model_name_or_path {random_base}
        --output_dir {tmp_path / "study"} --fractions 0.5,1 --seeds 2 --images 6 --resolution 64 --controlnet_steps 2
        --learning_rates 0.01 --controlnet_more_steps 1 --num_inference_steps 2 --segmenter_resolution 32
        --segmenter_steps 4 --segmenter_batch_size 2 --segmenter_width 8 --min_miou 0 --resamples 50""".split()
    run_command(words)
    metrics = (tmp_path / "study" / "metrics.json").read_bytes()
    assert [case["kept"] for case in json.loads(metrics)["cases"]] == [8, 10]
    run_command(words)
    assert (tmp_path / "study" / "metrics.json").read_bytes() == metrics
