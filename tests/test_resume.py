"""Promise: killed or stopped anywhere, the same command ends with the same bytes; a run folder belongs to one run."""

import csv
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from diffusers import ControlNetModel
from kills import ended, forked
from runs import log_of, tree, weights

from segcn.data.metadata import read_split
from segcn.generate import pipeline
from segcn.models import segmenter
from segcn.train import checkpoint
from segcn.train import loop as training
from segcn.train.log import STOPPED
from segcn.train.loop import train
from segcn.utils import io
from segcn.utils.errors import UserError

FILE = "diffusion_pytorch_model.safetensors"
# no line of the log falls on a checkpoint
ODD = {"gradient_accumulation_steps": 2, "logging_steps": 4, "use_ema": True, "snr_gamma": 5.0}


@pytest.fixture(autouse=True)
def signals():
    """As in a process that ignores none: under nohup SIGHUP is ignored, in a job of a script's background SIGINT."""
    usual = dict.fromkeys((signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1), signal.SIG_DFL)
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    checkpoint.stopping_signals.cache_clear()
    yield
    checkpoint.stopping_signals.cache_clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(quick, tmp_path_factory):
    """A finished run of six steps without a break."""
    return train(quick(tmp_path_factory.mktemp("runs") / "straight", **ODD))


@pytest.fixture
def out(straight, tmp_path):
    """A copy of that run."""
    return shutil.copytree(straight, tmp_path / "out")


def names(folder):
    return {path.name for path in Path(folder).iterdir() if "checkpoint" in path.name}


def assert_same(run, other):
    """Both runs ended with the same bytes: weights, optimizer, average, schedule, pending losses, log."""
    assert weights(run) == weights(other) and log_of(run) == log_of(other)
    last = f"checkpoint-{max(checkpoint.steps(run))}"
    assert tree(run / last) == tree(other / last)


def send_at(monkeypatch, micro_batch, number=signal.SIGTERM):
    """Send this process a signal while it computes its n-th micro-batch from here on; returns the losses it made."""
    losses, compute = [], training.step_losses

    def step_losses(run, batch):
        losses.append(compute(run, batch))
        if len(losses) == micro_batch:
            os.kill(os.getpid(), number)
        return losses[-1]

    monkeypatch.setattr(training, "step_losses", step_losses)
    return losses


def stopped(config):
    """Train until a signal ends it with exit code 143."""
    with pytest.raises(SystemExit) as caught:
        train(config)
    assert caught.value.code == 143


@pytest.mark.parametrize("number, at, workers", [(signal.SIGTERM, 7, 0), (signal.SIGUSR1, 9, 2), (signal.SIGINT, 8, 0)])
def test_a_signal_amid_a_step_saves_the_step_before_it(quick, straight, tmp_path, monkeypatch, number, at, workers):
    config = quick(tmp_path / "out", **ODD, dataloader_num_workers=workers)
    with monkeypatch.context() as patch:
        losses = send_at(patch, at, number)
        stopped(config)
    step = at // 2
    assert len(losses) == at and names(config.output_dir) == {"checkpoint-3", f"checkpoint-{step}"}
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "state.json").read_text())
    unlogged = [loss.mean().item() for loss in losses[: step * 2]] if step < 4 else []  # step 4 has the first line
    assert state["losses"] == ([unlogged] if unlogged else [])
    train(config)
    assert_same(tmp_path / "out", straight)


def test_a_signal_before_the_first_step_ends_with_143_and_the_run_can_begin(quick, straight, tmp_path, monkeypatch):
    config = quick(tmp_path / "out", **ODD)
    with monkeypatch.context() as patch:
        patch.setattr("segcn.train.setup.make_trainable", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        stopped(config)
    with monkeypatch.context() as patch:
        send_at(patch, 1)
        stopped(config)
    assert not names(config.output_dir)
    train(config)
    assert_same(tmp_path / "out", straight)


def test_a_run_killed_before_its_average_is_written_writes_it_when_started_again(quick, out, straight):
    last = straight / "checkpoint-6"
    assert weights(straight) == weights(last / "controlnet_ema") != weights(last / "controlnet")
    (out / FILE).write_bytes(weights(straight)[:1000])
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(quick(out, **ODD))
    assert_same(out, straight)


def test_from_an_older_checkpoint_the_later_ones_are_set_aside_by_name(quick, out, straight, capsys):
    train(quick(out, **ODD, resume_from_checkpoint="checkpoint-3"))
    (aside,) = names(out) - {"checkpoint-3", "checkpoint-6"}
    assert aside.startswith("checkpoint-6.set-aside-") and aside in capsys.readouterr().out
    assert_same(out, straight)
    with pytest.raises(UserError, match="checkpoint-5: there is no such folder"):
        train(quick(out, **ODD, resume_from_checkpoint="checkpoint-5"))


def test_a_full_disk_names_the_bytes_and_the_run_resumes_when_there_is_room(quick, straight, out, monkeypatch):
    config = quick(out, **ODD)
    shutil.rmtree(out / "checkpoint-6")
    size = sum(path.stat().st_size for path in (out / "checkpoint-3").rglob("*.*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 0, size - 1))
        with pytest.raises(UserError, match=f"checkpoint-6 cannot be written.*{size - 1:,} bytes are free"):
            train(config)
    assert names(out) == {"checkpoint-3"}
    train(config)
    assert_same(out, straight)


def test_as_in_the_old_script_only_the_newest_are_kept_also_where_the_limit_comes_later(quick, tmp_path):
    given = {"preset": "sd15", "checkpointing_steps": 2}
    train(quick(tmp_path, **given))
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    later = {"max_train_steps": 8, "resume_from_checkpoint": "checkpoint-6", "checkpoints_total_limit": 2}
    train(quick(tmp_path, **given, **later))
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-8"}


def test_a_damaged_checkpoint_is_skipped_by_name_and_set_aside(quick, out, straight, capsys):
    (out / "checkpoint-6" / "state.json").write_text("{}")
    train(quick(out, **ODD, checkpointing_steps=4, checkpoints_total_limit=1))
    printed = capsys.readouterr().out
    assert "Skipping" in printed and "Resuming from" in printed
    assert_same(out, straight)
    (aside,) = names(out) - {"checkpoint-6"}
    assert aside.startswith("checkpoint-6.set-aside-") and aside in printed


def holder(folder, ready, child=None):
    """In a process of its own: hold the folder's lock until killed."""
    io.lock(folder, None)
    if child:
        os.fork()  # as a process that reads data
    ready.touch()
    time.sleep(60)
    os._exit(0)  # a fork must not continue as the test


def test_a_second_run_in_the_same_folder_is_refused_by_name_until_the_first_is_killed(warm, quick, out, tmp_path):
    ready = tmp_path / "ready"
    process = warm.Process(target=holder, args=(out, ready, True))
    process.start()
    pid = process.pid
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.01)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match=rf"in use: process {pid} on {os.uname().nodename}, started \d{{4}}-"):
        train(quick(out, **ODD))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    process.kill()
    process.join()
    train(quick(out, **ODD))
    assert ControlNetModel.from_pretrained(out)


def test_a_run_frees_its_folder_when_it_ends_and_one_killed_at_its_start_can_begin(quick, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    io.lock(out, None)
    assert forked(lambda: io.lock(out, None)) == 1
    io.release()
    assert forked(lambda: io.lock(out, None)) == 0
    (out / ".train_config.json.staged").write_text("{")
    train(quick(out, max_train_steps=1))
    assert forked(lambda: io.lock(out, None)) == 0


def test_changed_data_are_shown_and_refused_unless_allowed(quick, straight, out, landscapes, tmp_path, capsys):
    data = shutil.copytree(landscapes, tmp_path / "data")
    metadata = data / "train" / "metadata.csv"
    rows = list(csv.reader(metadata.open()))
    rows[3][-1] += " and a boat"
    with metadata.open("w") as file:
        csv.writer(file).writerows(rows)
    moved = {"dataset_name": str(data), "max_train_steps": 7}
    with pytest.raises(UserError, match="data_fingerprint: was") as caught:
        train(quick(out, **ODD, **moved))
    assert "--allow_changes" in str(caught.value) and weights(out) == weights(straight)
    train(quick(out, **ODD, **moved, allow_changes=True))
    assert "Changed: data_fingerprint" in capsys.readouterr().out and "checkpoint-7" in names(out)


def test_a_run_on_images_of_several_shapes_that_is_killed_ends_with_the_same_bytes(warm, quick, mixed, tmp_path):
    """With all that reads shapes: reward, class weights, images while it is trained, two micro-batches a step."""
    masks = [str(record.mask) for record in read_split(mixed, "test").records[1:3]]
    shown = {"validation_image": masks, "validation_prompt": ["a lake"], "validation_steps": 5}
    shapes = {"dataset_name": str(mixed), "buckets": True, "reward_weight": 1.0, "class_weighting": 0.5}
    settings = shapes | shown | {"gradient_accumulation_steps": 2, "max_train_steps": 5}
    straight = train(quick(tmp_path / "straight", **settings))
    assert [entry["step"] for entry in log_of(straight)] == [1, 2, 3, 4, 5]
    code = ended(warm, quick(tmp_path / "out", **settings), 3, 6)  # in the save after the segmenter and step 3
    assert code == -signal.SIGKILL
    assert list(checkpoint.steps(tmp_path / "out")) == [3]
    train(quick(tmp_path / "out", **settings))
    assert_same(tmp_path / "out", straight)


def kill_and_resume(warm, quick, folder, kills, settings, draw):
    """Kill runs at random moments, half of them inside a save; each resumed one must equal a straight one."""
    straight, done = quick(folder / "straight", **settings), 0
    for _ in range(2):  # the first one builds the cache
        shutil.rmtree(straight.output_dir, ignore_errors=True)
        began = time.monotonic()
        assert ended(warm, straight) == 0
    whole = time.monotonic() - began
    while done < kills:
        config = quick(folder / str(done), **settings)
        if done % 2:
            code = ended(warm, config, draw.randint(1, 3), draw.randint(1, 25))
        else:
            code = ended(warm, config, seconds=draw.uniform(0, whole))
        assert ended(warm, config) == 0
        assert_same(Path(config.output_dir), Path(straight.output_dir))
        shutil.rmtree(config.output_dir)
        done += code == -signal.SIGKILL


def test_three_runs_killed_at_random_moments_end_with_the_same_bytes(warm, quick, tmp_path):
    kill_and_resume(warm, quick, tmp_path, 3, ODD | {"checkpointing_steps": 2}, random.Random(time.time_ns()))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_fifty_runs_killed_at_random_moments_end_with_the_same_bytes(warm, quick, tmp_path, accumulate, workers):
    counts = {"gradient_accumulation_steps": accumulate, "dataloader_num_workers": workers}
    settings = ODD | counts | {"checkpointing_steps": 2, "checkpoints_total_limit": 2}
    kill_and_resume(warm, quick, tmp_path, 12 + (workers == 2), settings, random.Random(accumulate + workers))


def test_a_copied_checkout_resumes_with_its_run_its_cache_and_its_controlnet(
    quick, landscapes, random_base, tmp_path, monkeypatch, capsys
):
    here, there = tmp_path / "here", tmp_path / "elsewhere"
    for source, name in ((landscapes, "data"), (random_base, "base")):
        shutil.copytree(source, here / name)

    def config(place, steps):
        places = {"dataset_name": str(place / "data"), "pretrained_model_name_or_path": str(place / "base")}
        return quick(place / "outputs" / "run", cache_dir=str(place / "cache"), max_train_steps=steps, **places)

    train(config(here, 3))
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # with other times than the files had
    capsys.readouterr()
    train(config(there, 4))
    said = capsys.readouterr().out
    assert "Training steps 4 to 4" in said and "checked when this run began" in said
    assert "Encoding" not in said and "Changed" not in said
    monkeypatch.setattr(pipeline, "OUTPUTS", there / "outputs")
    assert pipeline.find_controlnet(str(there / "base")) == str(there / "outputs" / "run")


def test_a_signal_acts_while_a_segmenter_is_trained(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segmenter, "SAID_EVERY", 0.0)
    compute = segmenter.segmentation_loss

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGUSR1)
        return compute(*given)

    monkeypatch.setattr(segmenter, "segmentation_loss", interrupted)
    with pytest.raises(SystemExit) as ended:
        train(quick(tmp_path / "run", faithfulness_rows=2, validation_steps=3))
    assert ended.value.code == STOPPED
    assert "Stopped while the segmenter was trained; rerun" in capsys.readouterr().out
