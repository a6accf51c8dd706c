"""Promise: training resumes exactly, is refused before anything is written when wrong, and loads in plain diffusers."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from segcn import checkpoint
from segcn.arguments import arguments_of
from segcn.errors import UserError
from segcn.examples import Plan
from segcn.launch import message
from segcn.masks import read_mask
from segcn.prepare import prepare
from segcn.records import read_split
from segcn.train import train


@pytest.fixture(scope="module")
def straight(quick, tmp_path_factory):
    """A finished run of six steps without a break, with validation pictures."""
    split = read_split(quick("x").dataset_name, "test")
    masks = [str(record.mask) for record in split.records[:2]]
    config = quick(
        tmp_path_factory.mktemp("runs") / "straight",
        validation_image=masks,
        validation_prompt=["a lake"],
        validation_steps=6,
        report_to="tensorboard",
    )
    return train(config)


def weights(folder):
    return (Path(folder) / "diffusion_pytorch_model.safetensors").read_bytes()


def log_of(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in lines]


def test_a_run_leaves_what_diffusers_opens(straight, random_base, landscapes):
    controlnet = ControlNetModel.from_pretrained(straight)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        random_base, controlnet=controlnet, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    record = read_split(landscapes, "test")[0]
    image = pipe("a lake", image=Image.open(record.mask).convert("RGB"), num_inference_steps=2).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 0


def test_a_run_tells_what_it_did(straight):
    assert [entry["step"] for entry in log_of(straight)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(entry["loss"]) for entry in log_of(straight))
    assert json.loads((straight / "train_config.json").read_text())["max_train_steps"] == 6
    assert (straight / "palette.json").is_file() and list((straight / "logs").rglob("events*"))
    assert Image.open(straight / "validation" / "step-000006.png").size == (128, 128)


def test_a_run_that_was_cut_ends_with_the_same_bytes(quick, straight, tmp_path):
    out = tmp_path / "cut"
    train(quick(out, max_train_steps=4, checkpointing_steps=4))
    shutil.rmtree(out / "checkpoint-4")
    train(quick(out, max_train_steps=3))
    train(quick(out))
    assert weights(out) == weights(straight)
    optimizers = [run / "checkpoint-6" / "optimizer.safetensors" for run in (out, straight)]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()
    assert log_of(out) == log_of(straight)


def test_the_old_flags_train_and_resume(quick, tmp_path):
    old = {"preset": "sd15", "use_8bit_adam": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    whole = train(quick(tmp_path / "whole", **old, max_train_steps=4))
    train(quick(tmp_path / "cut", **old, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **old, max_train_steps=4))
    saved = [ControlNetModel.from_pretrained(folder).state_dict() for folder in (cut, whole)]
    assert all(torch.allclose(saved[0][key], saved[1][key], atol=1e-5) for key in saved[0])
    assert [entry["step"] for entry in log_of(cut)] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_named_and_passed_over(quick, straight, tmp_path, capsys):
    out = tmp_path / "damaged"
    shutil.copytree(straight, out)
    (out / "checkpoint-6" / "state.json").write_text("{}")
    train(quick(out))
    assert "Skipping" in capsys.readouterr().out and weights(out) == weights(straight)


def test_changed_settings_are_shown_and_refused(quick, straight):
    before = weights(straight)
    with pytest.raises(UserError, match=r"learning_rate: was 0\.002, is 0\.1"):
        train(quick(straight, learning_rate=0.1))
    assert weights(straight) == before


def test_a_folder_of_something_else_is_left_alone(quick, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        train(quick(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_the_cache_the_network_sees_the_same(quick, tmp_path):
    cached, direct = (prepare(quick(tmp_path / cache, cache=cache)).examples[1, 5] for cache in ("latents", "none"))
    for name in ("control", "cells", "noise", "posterior"):
        assert torch.equal(cached[name], direct[name]), name
    assert cached["timestep"] == direct["timestep"]
    out = train(quick(tmp_path / "uncached", cache="none", max_train_steps=2))
    assert [entry["step"] for entry in log_of(out)] == [1, 2]


def test_a_balanced_run_that_was_cut_ends_with_the_same_bytes(quick, tmp_path, capsys):
    told = {"class_balance": 0.9, "fit": "pad", "augment": "affine,fill=cover,sided_captions=rewrite"}
    whole = train(quick(tmp_path / "whole", **told))
    printed = capsys.readouterr().out
    assert "Class balance: 12 rows stand" in printed and "of the rows," in printed
    train(quick(tmp_path / "cut", **told, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **told))
    assert weights(cut) == weights(whole) and log_of(cut) == log_of(whole)
    with pytest.raises(UserError, match=r"class_balance: was 0\.9, is 0\.5"):
        train(quick(whole, **told | {"class_balance": 0.5}))


def test_an_epoch_counts_the_repeated_rows(quick, tmp_path):
    run = train(quick(tmp_path / "out", preset="sd15", max_train_steps=None, num_train_epochs=1, class_balance=1.0))
    assert json.loads((run / "train_config.json").read_text())["max_train_steps"] > 12 / 2


@pytest.mark.parametrize("wrong", [{"augment": "affine,degree=3"}, {"class_balance": 2.0}])
def test_augmentation_and_balance_are_checked_before_anything_is_written(quick, tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        train(quick(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_order_of_rows_does_not_depend_on_the_number_of_processes(world):
    whole = [key for batch in Plan(10, 7, 0, 9, 1, 8) for key in batch]
    parts = [list(Plan(10, 7, 0, 9, 1, 8 // world, rank, world)) for rank in range(world)]
    dealt = [key for step in zip(*parts, strict=True) for batch in step for key in batch]
    assert dealt == whole
    assert sorted(row for _, row in whole[:10]) == list(range(10))
    later = [key for batch in Plan(10, 7, 4, 9, 1, 8) for key in batch]
    assert later == whole[4 * 8 :]


def test_two_processes_train_as_one(quick, tmp_path):
    one = train(quick(tmp_path / "one", train_batch_size=4, max_train_steps=2))
    config = quick(tmp_path / "two", train_batch_size=2, max_train_steps=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "segcn.train"]
    done = subprocess.run([*launcher, *arguments_of(config)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "train_config.json").read_text())["processes"] == 2
    for left, right in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    saved = [ControlNetModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    assert all(torch.allclose(saved[0][key], saved[1][key], atol=2e-3) for key in saved[0])


def break_data(folder, fault):
    """Spoil row 3 of a copy of the data and return what the message must say."""
    metadata = folder / "metadata.csv"
    lines = metadata.read_text().splitlines()
    mask = folder / "masks" / "000003.png"
    if fault == "missing file":
        mask.unlink()
    elif fault == "missing column":
        metadata.write_text("\n".join([lines[0].replace("text", "prompt"), *lines[1:]]) + "\n")
        return "column text"
    elif fault == "other size":
        Image.open(mask).crop((0, 0, 40, 64)).save(mask)
    else:
        colours = np.zeros((64, 64, 3), np.uint8)
        colours[:, :9] = 1, 2, 3
        Image.fromarray(colours).save(mask)
    return "(row 3)"


@pytest.mark.parametrize("fault", ["missing file", "missing column", "other size", "undeclared colour"])
def test_wrong_data_are_refused_before_the_first_step(quick, landscapes, tmp_path, fault):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(landscapes, data)
    expected = break_data(data / "train", fault)
    with pytest.raises(UserError) as caught:
        train(quick(out, dataset_name=str(data)))
    assert expected in str(caught.value) and "metadata.csv" in str(caught.value)
    assert not out.exists()


def test_the_command_ends_with_one_message_and_no_traceback(quick, landscapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(landscapes, data)
    break_data(data / "train", "missing file")
    words = arguments_of(quick(tmp_path / "out", dataset_name=str(data)))
    done = subprocess.run([sys.executable, "-m", "segcn.train", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "masks/000003.png" in done.stderr


def segcn_train(config, **settings):
    """`segcn train` as a process of its own, its two streams captured."""
    words = [sys.executable, "-m", "segcn.cli", "train", *arguments_of(config)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, preexec_fn=hear_interrupts, **streams, **settings)


def hear_interrupts():
    """As at a terminal, also where a shell started the tests in the background and made them deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_segcn_train_says_a_mistake_in_one_line(quick, tmp_path):
    process = segcn_train(quick("out", dataset_name="missing"), cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in out
    assert error == "Error: missing: no such folder or file; expected a data set folder (see data/README.md)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_segcn_train_commits_its_checkpoint(quick, tmp_path, number):
    config = quick(tmp_path / "out", max_train_steps=100000, checkpointing_steps=100000)
    process = segcn_train(config)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 143 and not error
    assert "Stopped by SIGTERM at step" in out.splitlines()[-1]
    assert checkpoint.find_latest(tmp_path / "out", print)


def test_a_message_of_several_lines_is_told_from_what_follows_it():
    said = ["Error: a run with other settings:", "  seed: was 0, is 1", "E1122 17:00 torch", "Traceback (m"]
    assert message(said) == "a run with other settings:\n  seed: was 0, is 1"


def test_masks_in_the_fixture_hold_several_classes(landscapes):
    split = read_split(landscapes, "train")
    assert len(np.unique(read_mask(split[0].mask, split.palette))) > 2
