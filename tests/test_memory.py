"""Promise: a training fits the card it is given: presets, half-precision frozen weights, checkpointing, preflight."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from segcn.models.base import hold
from segcn.models.controlnet import make_controlnet
from segcn.train import memory
from segcn.train.config import TrainConfig
from segcn.train.setup import fit_memory, make_optimizer
from segcn.utils.args import make, parse

CPU = torch.device("cpu")


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
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and not name.startswith("qmap")
    )
    counted = memory.accounting(network, network, use_8bit_adam=eight_bit)
    assert counted["optimizer state"] == held
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
        assert sum(counted.values()) / memory.GB + activations < 0.9 * gb
