"""Promise: a training fits the GPU it is given: presets, half-precision frozen weights, a preflight that measures."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from segcn.models.base import hold, keep_freed_memory
from segcn.models.controlnet import make_controlnet
from segcn.train import memory
from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.train.memory import GB, Trial, best_batch
from segcn.train.setup import fit_memory, make_optimizer
from segcn.utils.args import make, parse
from segcn.utils.errors import UserError


def fitted(*words, half="bf16", fast=True):
    return fit_memory(parse(TrainConfig, list(words), "train"), half, fast)


def test_the_presets_switch_off_step_by_step_what_saves_memory():
    eight, twelve, sixteen, most = (fitted("--memory_preset", str(gb))[0] for gb in (8, 12, 16, 24))
    assert eight.use_8bit_adam and eight.gradient_checkpointing
    assert not twelve.use_8bit_adam and twelve.gradient_checkpointing
    assert not sixteen.use_8bit_adam and not sixteen.gradient_checkpointing
    assert [c.train_batch_size for c in (eight, twelve, sixteen, most)] == [1, 1, 2, 4]
    assert all(c.train_batch_size * c.gradient_accumulation_steps == 4 for c in (eight, twelve, sixteen, most))
    assert all(c.mixed_precision == c.frozen_precision == "bf16" for c in (eight, twelve, sixteen, most))


def test_a_preset_says_what_it_set_and_keeps_what_was_given():
    config, lines = fitted("--memory_preset", "8", "--train_batch_size", "2", "--mixed_precision", "fp16")
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (2, 1)
    assert config.mixed_precision == config.frozen_precision == "fp16"
    assert lines[0] == ("--memory_preset 8: --use_8bit_adam, --gradient_checkpointing, --frozen_precision fp16.")
    assert lines[1] == "  As given instead: --mixed_precision fp16."
    assert fit_memory(config, "bf16", True)[0] == config


def test_a_preset_takes_fp16_on_a_v100_and_only_holds_weights_in_half_on_a_slow_cpu():
    assert fitted("--memory_preset", "8", half="fp16")[0].mixed_precision == "fp16"
    slow = fitted("--memory_preset", "8", fast=False)[0]
    assert slow.mixed_precision is None and slow.frozen_precision == "bf16"
    small = make(TrainConfig, "tiny", memory_preset=8)
    assert fit_memory(small, "bf16", False)[0].train_batch_size == 16, "small images need no smaller batch"


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_accounting_of_the_optimizer_is_what_it_holds(eight_bit):
    network = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 5))
    config = make(TrainConfig, use_8bit_adam=eight_bit)
    optimizer = make_optimizer(config, network, SimpleNamespace(num_processes=1))
    network(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    held = [(name, value) for state in optimizer.state.values() for name, value in state.items()]
    tensors = [value for name, value in held if isinstance(value, torch.Tensor) and not name.startswith("qmap")]
    counted = memory.accounting(network, network, use_8bit_adam=eight_bit)
    assert counted["optimizer state"] == sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1)
    assert counted["its gradients"] == sum(p.grad.nbytes for p in network.parameters())


def test_stable_diffusion_fits_the_cards_that_the_presets_are_named_after():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        controlnet = make_controlnet(unet)
    unet = hold(unet, torch.bfloat16)
    kept = {8: 0.24, 12: 0.24, 16: 1.82, 24: 3.64}  # GB of activations, the docstring's
    for gb, activations in kept.items():
        counted = memory.accounting(unet, controlnet, half_copies=True, use_8bit_adam=gb == 8)
        assert counted["frozen U-Net"] == pytest.approx(1.72e9, rel=0.01)
        assert sum(counted.values()) / GB + activations < 0.9 * gb


def files_of(folder):
    return sorted(str(path) for path in Path(folder).rglob("*")) if Path(folder).exists() else []


@pytest.mark.usefixtures("fresh_precision")
def test_preflight_measures_two_steps_proposes_a_batch_and_writes_no_run(quick, tmp_path, capsys):
    config = quick(tmp_path / "out", preflight=True, max_train_steps=5000, train_batch_size=4, memory_preset=8)
    before = files_of(config.cache_dir)
    assert train(config) is None
    printed = capsys.readouterr().out
    assert "Preflight: 2 steps of 4 x 1 rows, 64 px" in printed
    for part in ("frozen U-Net", "its gradients", "optimizer state", "activations and the rest", "peak", " of 8.0\n",
                 "s a step: 5000 steps take", "images a second into the cache"):  # fmt: skip
        assert part in printed
    assert "Proposed: --train_batch_size 4 --gradient_accumulation_steps 1" in printed
    assert not (tmp_path / "out").exists() and files_of(config.cache_dir) == before


def test_memory_that_runs_out_is_reported_with_what_to_do(quick, tmp_path, capsys, monkeypatch):
    real, fits = memory.two_steps, 1

    def two_steps(run, learn, size):
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(run, learn, size)

    monkeypatch.setattr(memory, "two_steps", two_steps)
    train(quick(tmp_path / "out", preflight=True, train_batch_size=4))
    printed = capsys.readouterr().out
    assert "Memory runs out at --train_batch_size 4" in printed
    assert "Proposed: --train_batch_size 1 --gradient_accumulation_steps 4" in printed
    fits = 0
    with pytest.raises(UserError, match="Try --memory_preset 24"):
        train(quick(tmp_path / "out", preflight=True))


@pytest.mark.parametrize("total, expected", [(40, 8), (21, 4), (17, 2), (14, 1), (9, None)])  # GB, micro-batch
def test_the_proposed_batch_fits_by_the_measured_slope_and_keeps_the_effective_batch(total, expected):
    config = TrainConfig(train_batch_size=8)
    seen = [Trial(1, 10 * GB, 1.0), Trial(8, 24 * GB, 2.0)]  # 2 GB an image, and 2 GB of gradients once accumulated
    size, slope = best_batch(config, seen, total * GB, 2 * GB)
    assert (size, slope) == (expected, 2 * GB)


def test_processes_share_the_memory_of_a_processor(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 24 * GB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_budget(TrainConfig(), torch.device("cpu")) == 12 * GB
    assert memory.memory_budget(TrainConfig(memory_preset=8), torch.device("cpu")) == 8 * GB


def test_a_batch_whose_memory_ran_out_is_not_proposed():
    seen = [Trial(1, 5 * GB, 1.0), Trial(4, None, math.nan)]
    assert best_batch(TrainConfig(train_batch_size=4), seen, 24 * GB, GB) == (1, None)


def test_the_peak_of_this_process_is_measured_from_where_it_was_reset():
    device = torch.device("cpu")
    keep_freed_memory(device)  # a reset gives it back
    torch.ones(30_000_000)
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    torch.ones(30_000_000)
    assert 100e6 < memory.peak_bytes(device) - before < 200e6
