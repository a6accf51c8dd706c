"""Promise: training is refused before anything is written when wrong, and what it writes loads in plain diffusers."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from runs import log_of, weights

from segcn.data.metadata import read_split
from segcn.train.batches import Plan
from segcn.train.loop import train
from segcn.train.setup import prepare
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def straight(quick, tmp_path_factory):
    """A finished run of six steps without a break, with validation images."""
    masks = [str(record.mask) for record in read_split(quick("x").dataset_name, "test").records[:2]]
    validation = {"validation_image": masks, "validation_prompt": ["a lake"], "validation_steps": 6}
    return train(quick(tmp_path_factory.mktemp("runs") / "straight", **validation, report_to="tensorboard"))


def test_a_run_leaves_what_diffusers_opens(straight, random_base, landscapes):
    parts = {"controlnet": ControlNetModel.from_pretrained(straight), "safety_checker": None}
    pipe = StableDiffusionControlNetPipeline.from_pretrained(random_base, **parts, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    record = read_split(landscapes, "test")[0]
    image = pipe("a lake", image=Image.open(record.mask).convert("RGB"), num_inference_steps=2).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 0


def test_a_run_records_what_it_did(straight):
    assert [entry["step"] for entry in log_of(straight)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(entry["loss"]) for entry in log_of(straight))
    assert json.loads((straight / "train_config.json").read_text())["max_train_steps"] == 6
    assert (straight / "palette.json").is_file() and list((straight / "logs").rglob("events*"))
    assert Image.open(straight / "validation" / "step-000006.png").size == (132, 132)


def test_the_old_flags_train_and_resume(quick, tmp_path):
    old = {"preset": "sd15", "use_8bit_adam": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    whole = train(quick(tmp_path / "whole", **old, max_train_steps=4))
    train(quick(tmp_path / "cut", **old, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **old, max_train_steps=4))
    saved = [ControlNetModel.from_pretrained(folder).state_dict() for folder in (cut, whole)]
    assert all(torch.allclose(saved[0][key], saved[1][key], atol=1e-5) for key in saved[0])
    assert [entry["step"] for entry in log_of(cut)] == [1, 2, 3, 4]


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
    given = {"class_balance": 0.9, "fit": "pad", "augment": "affine,fill=cover,sided_captions=rewrite"}
    whole = train(quick(tmp_path / "whole", **given))
    printed = capsys.readouterr().out
    assert "Class balance: 12 rows occur" in printed and "of the rows," in printed
    train(quick(tmp_path / "cut", **given, max_train_steps=3))
    cut = train(quick(tmp_path / "cut", **given))
    assert weights(cut) == weights(whole) and log_of(cut) == log_of(whole)
    with pytest.raises(UserError, match=r"class_balance: was 0\.9, is 0\.5"):
        train(quick(whole, **given | {"class_balance": 0.5}))


def test_an_epoch_counts_the_repeated_rows(quick, tmp_path):
    run = train(quick(tmp_path / "out", preset="sd15", max_train_steps=None, num_train_epochs=1, class_balance=1.0))
    assert json.loads((run / "train_config.json").read_text())["max_train_steps"] > 12 / 2


SCHEDULE = r"--lr_scheduler: expected .*piecewise_constant.*found"
WRONG = [
    ({"augment": "affine,degree=3"}, "augment"), ({"class_balance": 2.0}, "class_balance"),
    ({"proportion_empty_prompts": -0.1}, "proportion_empty_prompts"), ({"logging_steps": 0}, "logging_steps"),
    ({"checkpointing_steps": 0}, "checkpointing_steps"), ({"max_train_samples": -5}, "max_train_samples"),
    ({"lr_scheduler": "cosin"}, SCHEDULE), ({"lr_scheduler": "cosine:3"}, SCHEDULE),
    ({"lr_scheduler": "piecewise_constant"}, SCHEDULE), ({"lr_scheduler": "piecewise_constant:a"}, SCHEDULE),
    ({"lr_scheduler": "piecewise_constant:1:9,0.1:5,0.01"}, SCHEDULE),
    ({"controlnet_model_name_or_path": "nowhere"}, "nowhere: expected a ControlNet"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", WRONG)
def test_what_cannot_be_is_named_before_anything_is_written(quick, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        train(quick(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_order_of_rows_does_not_depend_on_the_number_of_processes(world):
    whole = [key for batch in Plan(10, 7, 0, 9, 1, 8) for key in batch]
    parts = [list(Plan(10, 7, 0, 9, 1, 8 // world, rank, world)) for rank in range(world)]
    shared = [key for step in zip(*parts, strict=True) for batch in step for key in batch]
    assert shared == whole
    assert sorted(row for _, row in whole[:10]) == list(range(10))
    later = [key for batch in Plan(10, 7, 4, 9, 1, 8) for key in batch]
    assert later == whole[4 * 8 :]


def break_data(folder, fault):
    """Spoil row 3 of a copy of the data and return what the message must say."""
    metadata, mask = folder / "metadata.csv", folder / "masks" / "000003.png"
    if fault == "missing file":
        mask.unlink()
    elif fault == "missing column":
        metadata.write_text(metadata.read_text().replace("text", "prompt", 1))
        return "column text"
    elif fault == "other size":
        Image.open(mask).crop((0, 0, 40, 64)).save(mask)
    else:
        colors = np.zeros((64, 64, 3), np.uint8)
        colors[:, :9] = 1, 2, 3
        Image.fromarray(colors).save(mask)
    return "(row 3)"


@pytest.mark.parametrize("fault", ["missing file", "missing column", "other size", "undeclared color"])
def test_wrong_data_are_refused_before_the_first_step(quick, landscapes, tmp_path, fault):
    data = shutil.copytree(landscapes, tmp_path / "data")
    expected = break_data(data / "train", fault)
    with pytest.raises(UserError) as caught:
        train(quick(tmp_path / "out", dataset_name=str(data)))
    assert expected in str(caught.value) and "metadata.csv" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_message_and_no_traceback(quick, landscapes, tmp_path):
    data = shutil.copytree(landscapes, tmp_path / "data")
    break_data(data / "train", "missing file")
    words = arguments_of(quick(tmp_path / "out", dataset_name=str(data)))
    done = subprocess.run([sys.executable, "-m", "segcn.train", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "masks/000003.png" in done.stderr
