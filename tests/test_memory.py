"""Promise: a training fits its GPU: presets, half precision, checkpointing, a preflight that measures; freed memory."""

import copy
import ctypes
import json
import math
import os
import platform
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from runs import log_of
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from segcn.models.base import MMAP_MAX, TRIM_THRESHOLD, hold, keep_freed_memory, lay_out, precisions
from segcn.models.controlnet import make_controlnet
from segcn.models.family import XL
from segcn.samples.base_model.sdxl import UNET_XL
from segcn.train import memory, setup
from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.train.memory import GB, Trial, best_batch
from segcn.train.setup import fit_memory, make_optimizer
from segcn.utils.args import make, parse
from segcn.utils.errors import UserError


def fitted(*words, half="bf16", fast=True):
    return fit_memory(parse(TrainConfig, ["--preset", "sd15", *words], "train"), half, fast)


@pytest.mark.parametrize(("gb", "eight_bit", "checkpointing", "batch"), [
    (8, True, True, 1), (12, False, True, 1), (16, False, False, 2), (24, False, False, 4),
])  # fmt: skip
def test_the_presets_switch_off_step_by_step_what_saves_memory(gb, eight_bit, checkpointing, batch):
    config = fitted("--memory_preset", str(gb))[0]
    assert (config.use_8bit_adam, config.gradient_checkpointing) == (eight_bit, checkpointing)
    assert config.train_batch_size == batch == 4 / config.gradient_accumulation_steps
    assert config.mixed_precision == config.frozen_precision == "bf16"


def test_a_preset_says_what_it_set_keeps_what_was_given_and_takes_the_precision_that_the_device_has():
    config, lines = fitted("--memory_preset", "8", "--train_batch_size", "2", "--mixed_precision", "fp16")
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (2, 1)
    assert config.mixed_precision == config.frozen_precision == "fp16"
    assert lines[0] == ("--memory_preset 8: --use_8bit_adam, --gradient_checkpointing, --frozen_precision fp16.")
    assert lines[1] == "  As given instead: --mixed_precision fp16."
    assert fit_memory(config, "bf16", True)[0] == config
    assert fitted("--memory_preset", "8", half="fp16")[0].mixed_precision == "fp16"  # a V100
    slow = fitted("--memory_preset", "8", fast=False)[0]  # a CPU
    assert slow.mixed_precision is None and slow.frozen_precision == "bf16"
    small = make(TrainConfig, "tiny", memory_preset=8)
    assert fit_memory(small, "bf16", False)[0].train_batch_size == small.train_batch_size, "no smaller one is needed"


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_accounting_of_the_optimizer_is_what_it_holds(eight_bit):
    network = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 5))
    config = make(TrainConfig, use_8bit_adam=eight_bit)
    optimizer = make_optimizer(config, list(network.parameters()), SimpleNamespace(num_processes=1))
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


def test_stable_diffusion_xl_at_1024_pixels_fits_24_gb():
    family, kept = XL(), {}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_XL)
        controlnet = make_controlnet(unet)
        latents, image = torch.zeros(1, 4, 128, 128), torch.zeros(1, 3, 1024, 1024)
        given = family.conditions(unet, torch.zeros(1, 78, 2048), torch.zeros(1, 6))
        step = torch.zeros(1, dtype=torch.long)
    counted = memory.accounting(hold(unet, torch.bfloat16), controlnet, half_copies=True, use_8bit_adam=True)
    weights = [*unet.requires_grad_(False).parameters(), *controlnet.parameters()]
    own = {weight.untyped_storage()._cdata for weight in weights}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # not freed, so that no other one takes its place
        return tensor

    for network in (unet, controlnet):
        network.train().enable_gradient_checkpointing()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        family.predict(unet, latents, step, given, family.residuals(controlnet, latents, step, given, image, 1.0))
    activations = sum(storage.nbytes() for storage in kept.values()) / 2  # counted in float32, kept in half precision
    assert activations == pytest.approx(0.91e9, rel=0.01)
    assert sum(counted.values()) + activations == pytest.approx(21.0e9, rel=0.02)  # of 24, with what CUDA takes


@pytest.mark.usefixtures("fresh_precision")
def test_preflight_measures_two_steps_proposes_a_batch_and_writes_no_run(quick, tmp_path, capsys):
    config = quick(tmp_path / "out", preflight=True, max_train_steps=5000, train_batch_size=4, memory_preset=8)
    before = set(Path(config.cache_dir).rglob("*"))
    assert train(config) is None
    printed = capsys.readouterr().out
    assert "Preflight: 2 steps of 4 x 1 rows, 64 px" in printed
    for part in ("frozen U-Net", "its gradients", "optimizer state", "activations and the rest", "peak", " of 8.0\n",
                 "s a step: 5000 steps take", "images a second into the cache"):  # fmt: skip
        assert part in printed
    assert "Proposed: --train_batch_size 4 --gradient_accumulation_steps 1" in printed
    assert not (tmp_path / "out").exists() and set(Path(config.cache_dir).rglob("*")) == before


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
    seen = [Trial(1, 10 * GB, 1.0), Trial(8, 24 * GB, 2.0)]  # 2 GB an image, and 2 GB of gradients once accumulated
    assert best_batch(TrainConfig(train_batch_size=8), seen, total * GB, 2 * GB) == (expected, 2 * GB)
    ran_out = [Trial(1, 5 * GB, 1.0), Trial(8, None, math.nan)]
    assert best_batch(TrainConfig(train_batch_size=8), ran_out, 24 * GB, GB) == (1, None)


def test_processes_share_the_memory_of_a_processor_whose_peak_counts_from_its_reset(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 24 * GB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    device = torch.device("cpu")
    assert memory.memory_budget(TrainConfig(), device) == 12 * GB
    assert memory.memory_budget(TrainConfig(memory_preset=8), device) == 8 * GB
    keep_freed_memory(device)  # a reset gives it back
    torch.ones(30_000_000)
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    torch.ones(30_000_000)
    assert 100e6 < memory.peak_bytes(device) - before < 200e6


def backward(unet, checkpointing=False):
    """A step's gradients of the ControlNet, and the bytes kept for it by ControlNet, U-Net encoder and decoder."""
    unet, kept, place = copy.deepcopy(unet), {"controlnet": {}, "encoder": {}, "decoder": {}}, ["controlnet"]
    torch.manual_seed(0)
    controlnet = make_controlnet(unet).float().requires_grad_(True).train()
    for layer in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.1)
    if checkpointing:
        controlnet.enable_gradient_checkpointing()
        unet.enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for net in (unet, controlnet) for p in net.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[place[0]][storage.data_ptr()] = tensor
        return tensor

    unet.register_forward_pre_hook(lambda *_: place.__setitem__(0, "encoder"))
    unet.mid_block.register_forward_pre_hook(lambda *_: place.__setitem__(0, "decoder"))
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    noisy, text, control = torch.randn(2, channels, 8, 8), torch.randn(2, 7, width), torch.rand(2, 3, 64, 64)
    timestep = torch.tensor([5, 500])
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        down, middle = controlnet(noisy, timestep, text, controlnet_cond=control, return_dict=False)
        predicted = unet(noisy, timestep, text, down_block_additional_residuals=list(down),
                         mid_block_additional_residual=middle).sample  # fmt: skip
    sizes = {name: sum(t.untyped_storage().nbytes() for t in tensors.values()) for name, tensors in kept.items()}
    kept.clear()
    predicted.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in controlnet.parameters()]), sizes


def test_checkpointing_reaches_the_frozen_decoder_and_leaves_the_gradients_as_they_are(base):
    plain, kept = backward(base.unet)
    checkpointed, kept_less = backward(base.unet, checkpointing=True)
    assert plain.abs().max() > 0 and torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)
    assert kept_less["decoder"] < kept["decoder"] / 2 and kept_less["controlnet"] < kept["controlnet"]
    assert kept["encoder"] == 0 < kept["decoder"], "the frozen encoder keeps nothing for the backward pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_held_in_half_precision_give_the_gradients_of_their_rounded_values(base, dtype):
    held, rounded = hold(copy.deepcopy(base.unet), dtype), copy.deepcopy(base.unet)
    for parameter, half in zip(rounded.parameters(), held.parameters(), strict=True):
        parameter.copy_(half.float())
    ours, kept = backward(held)
    theirs, kept_before = backward(rounded)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and ours.abs().max() > 1e-5
    assert kept["decoder"] < kept_before["decoder"], "no widened weight may wait for the backward pass"


def test_held_weights_take_half_the_memory_and_normalisations_stay_exact(base):
    unet, held = base.unet, hold(copy.deepcopy(base.unet), torch.bfloat16)
    narrow = sum(p.numel() for p in held.parameters() if p.dtype == torch.bfloat16)
    assert narrow > 0.95 * sum(p.numel() for p in unet.parameters())
    norms = [layer for layer in held.modules() if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm)]
    assert norms and all(layer.weight.dtype == torch.float32 for layer in norms)
    assert held.state_dict().keys() == unet.state_dict().keys()


@pytest.mark.parametrize(("frozen", "mixed", "has", "held", "computed"), [
    (None, "no", False, torch.float32, torch.float32), (None, "bf16", True, torch.bfloat16, torch.bfloat16),
    (None, "bf16", False, torch.bfloat16, torch.float32), ("bf16", "no", True, torch.bfloat16, torch.float32),
    ("fp16", "bf16", True, torch.float16, torch.bfloat16), ("no", "bf16", True, torch.float32, torch.float32),
])  # fmt: skip
def test_frozen_weights_compute_in_mixed_precision_where_that_is_fast(monkeypatch, frozen, mixed, has, held, computed):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    assert precisions(frozen, mixed, torch.device("cpu")) == (held, computed)


@pytest.mark.usefixtures("fresh_precision")
@pytest.mark.parametrize("precision", ["mixed_precision", "frozen_precision"])
def test_half_precision_trains_like_float32(quick, tmp_path, precision):
    exact = log_of(train(quick(tmp_path / "exact", max_train_steps=2)))
    AcceleratorState._reset_state(reset_partial_state=True)
    half = log_of(train(quick(tmp_path / "half", max_train_steps=2, **{precision: "bf16"})))
    assert [entry["step"] for entry in half] == [1, 2]
    for left, right in zip(exact, half, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02) and right["loss"] != left["loss"]


@pytest.mark.usefixtures("fresh_precision")
def test_a_memory_preset_trains_on_a_processor_and_says_what_it_set(quick, tmp_path, capsys):
    run = train(quick(tmp_path / "out", max_train_steps=2, memory_preset=8))
    recorded = json.loads((run / "train_config.json").read_text())
    assert recorded["use_8bit_adam"] and recorded["gradient_checkpointing"] and recorded["frozen_precision"] == "bf16"
    assert "--memory_preset 8: --use_8bit_adam, --gradient_checkpointing" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_precision")
def test_a_step_that_overflows_in_float16_is_skipped_and_a_cut_run_resumes_with_its_scale(quick, tmp_path, monkeypatch):
    """As on a V100: float16 under autocast, and gradients are scaled so far that the first ones overflow."""
    make_accelerator = setup.make_accelerator

    def scaled(config, output_dir):
        accelerator = make_accelerator(config, output_dir)
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        return accelerator

    monkeypatch.setattr(setup, "make_accelerator", scaled)
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


def pages_taken(size=64 * 2**20):
    """How often the system had to hand out pages, some at once, for memory that was allocated and freed before."""
    b"1" * size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def pages_in_fork(work):
    """What `work` leaves for `pages_taken`, seen in a process of its own."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        work()
        os.write(writer, str(pages_taken()).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reader, 99))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a setting for it")
def test_freed_memory_is_kept_and_not_fetched_again():
    def forget():
        """The defaults of malloc, which an earlier test may have changed."""
        ctypes.CDLL(None).mallopt(MMAP_MAX, 65536)
        ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 128 * 2**10)

    fetched = pages_in_fork(forget)
    assert fetched >= 32  # of 64 MiB, even where a page has 2 MiB
    assert pages_in_fork(keep_freed_memory) < fetched / 5


@pytest.mark.parametrize(("width", "channels_last"), [(32, True), (320, False)])
def test_only_narrow_networks_lie_in_channels_last_on_a_cpu(width, channels_last):
    unet = UNet2DConditionModel(
        block_out_channels=(width,), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    weight = lay_out(unet, "cpu").down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last
