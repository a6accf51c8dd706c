"""Promise: a segmenter rewards a training by its gradient, is kept with the ControlNet, and never scores it."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from kills import ended
from runs import log_of
from safetensors.torch import load_file
from test_resume import assert_same
from torch.utils.data import default_collate

from segcn.data.metadata import read_split
from segcn.generate.conditions import read_conditions
from segcn.generate.config import SampleConfig
from segcn.generate.writer import settings_of
from segcn.models.base import encode_mean, weights_digest
from segcn.models.noise import Diffusion, Flow
from segcn.models.segmenter import (
    REWARD_FOLDER,
    REWARD_SEGMENTER,
    LatentSegmenter,
    SegmenterConfig,
    load_latent_segmenter,
    load_segmenter,
    open_rewarding,
    reward_record,
    segmenter_of,
    shared_folder,
    train_segmenter,
)
from segcn.train import reward, validation
from segcn.train.log import validation_scores
from segcn.train.loop import step_losses, train
from segcn.train.setup import prepare
from segcn.utils import io
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError

SMALL = SegmenterConfig(steps=20, batch_size=4, width=8, resolution=64)


@pytest.fixture(scope="module")
def segmenters(landscapes, tmp_path_factory):
    """Folders of two small segmenters: one scores, one rewards."""
    folder, train_rows = tmp_path_factory.mktemp("segmenters"), read_split(landscapes, "train")
    for seed, name in enumerate(("scores", "rewards")):
        train_segmenter(train_rows, replace(SMALL, seed=seed), folder / name, lambda line: None, "cpu")
    return {name: str(folder / name) for name in ("scores", "rewards")}


@pytest.fixture
def rewarded(quick, segmenters):
    """A function from a folder to the config of a run that is rewarded from its first step on."""
    given = {"reward_weight": 1.0, "reward_start": 0.0, "reward_segmenter": segmenters["rewards"]}
    return lambda out, **settings: quick(out, **given | settings)


@pytest.mark.parametrize("process", [
    Diffusion(DDPMScheduler(beta_schedule="scaled_linear", prediction_type="epsilon")),
    Diffusion(DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")),
    Flow(FlowMatchEulerDiscreteScheduler(shift=3.0)),
])  # fmt: skip
def test_from_the_true_noise_or_v_the_estimate_is_the_clean_image(process):
    clean, noise, timestep = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 200, 500, 700])
    alpha, sigma = process.levels(timestep)
    noisy, prediction = process.noisy(clean, noise, timestep), process.target(clean, noise, timestep)
    assert torch.allclose(noisy, alpha * clean + sigma * noise)
    assert torch.allclose(process.clean(noisy, prediction, timestep), clean, atol=1e-5)
    assert not torch.allclose(process.clean(noisy, -prediction, timestep)[1:], clean[1:], atol=0.1)


@pytest.mark.parametrize("latents", [True, False])
def test_the_reward_reaches_the_controlnet_and_a_few_steps_lower_its_cross_entropy(rewarded, latents, tmp_path):
    given = {"reward_segmenter": None, "max_train_steps": 40} if latents else {}
    run = prepare(rewarded(tmp_path / "run", train_batch_size=4, **given))
    assert isinstance(run.reward_segmenter, LatentSegmenter) == latents
    batch = default_collate([run.examples[0, row] for row in range(4)])
    assert set((batch["reward_timestep"] >= 0).tolist()) == {True, False}  # half of the rows, on average
    plain = step_losses(replace(run, reward_segmenter=None), batch)
    losses, chosen = step_losses(run, batch), batch["reward_timestep"] >= 0
    assert torch.allclose(losses[~chosen], plain[~chosen]) and (losses[chosen] > plain[chosen] + 0.1).all()
    batch["reward_timestep"] = torch.full((4,), 400)
    alone = replace(run, loss=lambda prediction, *rest: prediction.new_zeros(len(prediction)))  # the reward alone
    optimizer, found = torch.optim.AdamW(run.controlnet.parameters(), 3e-3), []
    for _ in range(6):
        found.append(step_losses(alone, batch).mean())
        found[-1].backward()
        assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in run.controlnet.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0] - 0.01
    frozen = [*run.base.unet.parameters(), *run.reward_segmenter.parameters()]
    assert all(weight.grad is None or not weight.grad.any() for weight in frozen)


def test_the_run_folder_keeps_the_segmenter_and_a_resumed_run_uses_it(quick, base, tmp_path, monkeypatch, segmenters):
    config = quick(tmp_path / "run", reward_weight=0.5, reward_start=0.0, max_train_steps=1)
    out = train(config)
    run, record = reward_record(out / "checkpoint-1" / "controlnet")
    kept = load_latent_segmenter(out / REWARD_FOLDER, base.vae, "cpu")
    assert run == out and io.problem(out / REWARD_FOLDER) is None and kept.settings["seed"] == reward.REWARD_SEED
    assert record == {"weights": weights_digest(kept), "folder": None, "weight": 0.5}
    look = config.pretrained_model_name_or_path, read_split(config.dataset_name, "train").palette, 64, "crop"
    opened, image = open_rewarding(out, *look), torch.rand(2, 3, 64, 64) * 2 - 1
    assert weights_digest(opened) == record["weights"] and opened(image).shape == (2, kept.num_classes, 64, 64)
    assert torch.equal(opened(image), kept.network(encode_mean(base.vae, image)))
    assert open_rewarding(out, "no such base", *look[1:]) is None
    with pytest.raises(UserError, match=r"reward_segmenter: expected one that looks at images"):
        load_segmenter(out / REWARD_FOLDER)
    monkeypatch.setattr(reward, "fit", lambda *_: pytest.fail("trained again"))
    train(replace(config, max_train_steps=2))
    after = quick(tmp_path / "after", controlnet_model_name_or_path=str(out), max_train_steps=1)
    assert reward_record(train(after))[1]["weights"] == record["weights"]  # it began with what was rewarded
    assert weights_digest(open_rewarding(after.output_dir, *look)) == record["weights"]
    (out / REWARD_FOLDER / "model.safetensors").write_bytes(b"")
    assert open_rewarding(out, *look) is None
    shutil.rmtree(out / REWARD_FOLDER)
    shutil.copytree(segmenters["scores"], out / REWARD_FOLDER)
    assert open_rewarding(out, *look) is None  # not the one that rewarded


@pytest.mark.parametrize("latents", [True, False])
def test_a_rewarded_run_that_was_killed_ends_with_the_same_bytes(warm, rewarded, latents, tmp_path):
    steps = {"max_train_steps": 2, "checkpointing_steps": 1} | ({"reward_segmenter": None} if latents else {})
    straight = train(rewarded(tmp_path / "straight", **steps))
    config = rewarded(tmp_path / "cut", **steps)
    half = tmp_path / "cut" / f".{REWARD_FOLDER}.staged"  # as a kill in its commit leaves it
    commits = 3  # of the segmenter and the two checkpoints
    assert ended(warm, config, commits, 9) == -signal.SIGKILL
    half.mkdir()
    shutil.rmtree(tmp_path / "cut" / REWARD_FOLDER)
    assert ended(warm, config) == 0
    assert_same(tmp_path / "cut", straight)
    assert io.problem(tmp_path / "cut" / REWARD_FOLDER) is None and not half.exists()


@pytest.mark.slow
def test_two_processes_are_rewarded_as_one(rewarded, tmp_path):
    given = {"reward_segmenter": None, "max_train_steps": 2}
    config = rewarded(tmp_path / "two", train_batch_size=1, **given)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "segcn.train"]
    done = subprocess.run([*launcher, *arguments_of(config)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one = train(rewarded(tmp_path / "one", train_batch_size=2, **given))
    losses = [[entry["loss"] for entry in log_of(run)] for run in (tmp_path / "two", one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    kept = [load_file(run / REWARD_FOLDER / "model.safetensors") for run in (tmp_path / "two", one)]
    for name, weight in kept[0].items():  # on one and on two cores: sums differ in the last digits
        assert torch.allclose(weight, kept[1][name], atol=1e-3), name
    assert io.problem(tmp_path / "two" / REWARD_FOLDER) is None


def test_while_training_both_figures_are_logged_and_it_is_said_when_they_part(
    rewarded, segmenters, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(SampleConfig.PRESETS["tiny"], "num_inference_steps", 1)
    scoring = {"faithfulness_rows": 2, "validation_steps": 1, "max_train_steps": 1, "segmenter": segmenters["scores"]}
    monkeypatch.setattr(validation, "PARTED", -1.0)
    found = validation_scores(log_of(train(rewarded(tmp_path / "run", **scoring))))
    assert list(found) == [0, 1] and all("of_ceiling_by_reward" in score for score in found.values())
    assert any(score["of_ceiling"] != score["of_ceiling_by_reward"] for score in found.values())
    said, score = capsys.readouterr().out, found[1]
    assert f"By the segmenter that rewards it is {score['of_ceiling_by_reward']:.1%} of its ceiling" in said
    monkeypatch.setattr(validation, "PARTED", 9.0)
    train(rewarded(tmp_path / "again", **scoring))
    assert "By the segmenter that rewards" not in capsys.readouterr().out


def test_what_rewards_is_refused_as_what_scores(rewarded, quick, segmenters, landscapes, tmp_path, monkeypatch):
    shutil.copytree(segmenters["rewards"], tmp_path / "copy")
    same = {"faithfulness_rows": 2, "segmenter": str(tmp_path / "copy")}
    with pytest.raises(UserError, match=r"--reward_segmenter .*/rewards has the weights of .*\(.*copy\): expected two"):
        train(rewarded(tmp_path / "run", **same))
    monkeypatch.setattr(reward, "SegmenterConfig", lambda **given: replace(SMALL, steps=2, **given))
    settings, rows = replace(SMALL, steps=2, seed=0), read_split(landscapes, "train")
    segmenter_of(rows, settings, tmp_path / "cache", lambda line: None)  # as one that scored an earlier run
    folder = shared_folder(tmp_path / "cache", rows, settings)
    with pytest.raises(UserError, match=r"the weights of .*\(trained with --seed 0\): expected two"):
        train(rewarded(tmp_path / "other", reward_segmenter=str(folder), faithfulness_rows=2))
    with pytest.raises(UserError, match=r"--reward_segmenter .* expected one trained at 32 px.*found 64 px"):
        train(rewarded(tmp_path / "small", resolution=32))
    with pytest.raises(UserError, match=r"--reward_segmenter .*nowhere: expected a folder with config.json"):
        train(rewarded(tmp_path / "none", reward_segmenter=str(tmp_path / "nowhere")))


def test_a_generated_set_records_what_rewarded_its_controlnet_and_an_older_one_resumes(
    config, write, pipeline, tmp_path
):
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-3" / "controlnet"):
        folder.mkdir(parents=True, exist_ok=True)
    out = write(limit=1)  # before anybody recorded it
    (run / REWARD_SEGMENTER).write_text(json.dumps({"weights": "0123456789abcdef", "weight": 1.0, "folder": None}))
    for folder in (run, run / "checkpoint-3" / "controlnet"):
        pipeline.controlnet_folder, before = str(folder), pipeline.controlnet_folder
        try:
            write(limit=2)
        finally:
            pipeline.controlnet_folder = before
        assert json.loads((out / "generation.json").read_text())["reward_segmenter_weights"] == "0123456789abcdef"
        assert "reward_segmenter_weights" not in settings_of(config, pipeline, read_conditions(config), None)
