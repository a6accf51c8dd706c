"""Promise: half precision trains to the end: bfloat16, float16 with its gradient scaler, and frozen weights alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segcn.train import setup
from segcn.train.loop import train

pytestmark = pytest.mark.usefixtures("fresh_precision")


@pytest.fixture(scope="module")
def exact(quick, tmp_path_factory):
    return log_of(train(quick(tmp_path_factory.mktemp("runs") / "exact", max_train_steps=2)))


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [{"mixed_precision": "bf16"}, {"frozen_precision": "bf16"}], ids=str)
def test_half_precision_trains_like_float32(quick, exact, tmp_path, settings):
    half = log_of(train(quick(tmp_path / "half", max_train_steps=2, **settings)))
    assert [entry["step"] for entry in half] == [1, 2]
    for left, right in zip(exact, half, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02) and right["loss"] != left["loss"]


def test_a_memory_preset_trains_on_a_processor_and_says_what_it_set(quick, tmp_path, capsys):
    run = train(quick(tmp_path / "out", max_train_steps=2, memory_preset=8))
    recorded = json.loads((run / "train_config.json").read_text())
    assert recorded["use_8bit_adam"] and recorded["gradient_checkpointing"] and recorded["frozen_precision"] == "bf16"
    assert "--memory_preset 8: --use_8bit_adam, --gradient_checkpointing" in capsys.readouterr().out


@pytest.fixture
def scaled(monkeypatch):
    """A processor trains as a V100 does: float16 under autocast, gradients scaled, so far that the first overflow."""
    make_accelerator = setup.make_accelerator

    def make(config, output_dir):
        accelerator = make_accelerator(config, output_dir)
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        return accelerator

    monkeypatch.setattr(setup, "make_accelerator", make)


def test_a_step_that_overflows_in_float16_is_skipped_and_a_cut_run_goes_on_with_its_scale(quick, scaled, tmp_path):
    settings = {"mixed_precision": "fp16", "checkpointing_steps": 1, "max_train_steps": 2, "train_batch_size": 1}
    whole = train(quick(tmp_path / "whole", **settings))
    weights = [load_file(whole / f"checkpoint-{n}/controlnet/diffusion_pytorch_model.safetensors") for n in (1, 2)]
    moved = [stored["controlnet_mid_block.weight"].abs().max().item() for stored in weights]  # it starts at 0
    assert moved[0] == 0 < moved[1] < 1
    states = [json.loads((whole / f"checkpoint-{n}/state.json").read_text()) for n in (1, 2)]
    assert states[0]["scaler"]["scale"] == 2.0**10, "the first step overflowed"
    assert [entry["step"] for entry in log_of(whole)] == [1, 2]
    train(quick(tmp_path / "cut", **settings | {"max_train_steps": 1}))
    cut = train(quick(tmp_path / "cut", **settings))
    assert json.loads((cut / "checkpoint-2/state.json").read_text())["scaler"] == states[1]["scaler"]
    again = load_file(cut / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights[1].items())
