"""Promise: frozen weights in half precision and gradient checkpointing save memory and leave the gradients alone."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from segcn.models.base import hold, load_base, precisions
from segcn.models.controlnet import make_controlnet


@pytest.fixture(scope="module")
def unet(random_base):
    return load_base(random_base).unet


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


def test_checkpointing_reaches_the_frozen_decoder_and_leaves_the_gradients_as_they_are(unet):
    plain, kept = backward(unet)
    checkpointed, kept_less = backward(unet, checkpointing=True)
    assert plain.abs().max() > 0 and torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-8)
    assert kept_less["decoder"] < kept["decoder"] / 2 and kept_less["controlnet"] < kept["controlnet"]
    assert kept["encoder"] == 0 < kept["decoder"], "the frozen encoder keeps nothing for the backward pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_held_in_half_precision_give_the_gradients_of_their_rounded_values(unet, dtype):
    held = hold(copy.deepcopy(unet), dtype)
    rounded = copy.deepcopy(unet)
    for parameter, half in zip(rounded.parameters(), held.parameters(), strict=True):
        parameter.copy_(half.float())
    ours, kept = backward(held)
    theirs, kept_before = backward(rounded)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and ours.abs().max() > 1e-5
    assert kept["decoder"] < kept_before["decoder"], "no widened weight may wait for the backward pass"


def test_held_weights_take_half_the_memory_and_normalisations_stay_exact(unet):
    held = hold(copy.deepcopy(unet), torch.bfloat16)
    narrow = sum(p.numel() for p in held.parameters() if p.dtype == torch.bfloat16)
    assert narrow > 0.95 * sum(p.numel() for p in unet.parameters())
    norms = [layer for layer in held.modules() if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm)]
    assert norms and all(layer.weight.dtype == torch.float32 for layer in norms)
    assert held.state_dict().keys() == unet.state_dict().keys()


@pytest.mark.parametrize(
    ("asked", "mixed", "has", "held", "computed"),
    [
        (None, "no", False, torch.float32, torch.float32),
        (None, "bf16", True, torch.bfloat16, torch.bfloat16),
        (None, "bf16", False, torch.bfloat16, torch.float32),
        ("bf16", "no", True, torch.bfloat16, torch.float32),
        ("fp16", "bf16", True, torch.float16, torch.bfloat16),
        ("no", "bf16", True, torch.float32, torch.float32),
    ],
)
def test_frozen_weights_compute_in_mixed_precision_where_that_is_fast(monkeypatch, asked, mixed, has, held, computed):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    assert precisions(asked, mixed, torch.device("cpu")) == (held, computed)
