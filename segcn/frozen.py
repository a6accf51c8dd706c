"""Frozen weights held in half precision and computed with in the precision of what comes in.

A frozen convolution or linear layer needs nothing but its weight for the gradient of its input. Held in bfloat16 or
float16, the weight is widened when it is used, once forwards and once backwards, so that no wide copy stays alive
between the two. Normalisations stay as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU_FLAGS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def computes_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies in this precision by itself; a V100 and most CPUs emulate bfloat16, slowly."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(flag) for flag in CPU_FLAGS[dtype])


def precisions(frozen: str | None, mixed: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What holds the frozen weights and what they compute in, for --frozen_precision and --mixed_precision.

    Computed is in --mixed_precision where the device is fast in it, and in float32 where it is not or where the
    weights are held so.
    """
    held, computed = DTYPES[frozen or mixed], DTYPES[mixed]
    exact = held == torch.float32 or not computes_fast(computed, device)
    return held, torch.float32 if exact else computed


def hold(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold the convolutions and linear layers of a frozen network in `dtype`; returns the network."""
    for layer in network.modules():
        if type(layer) in HELD:
            layer.__class__ = HELD[type(layer)]
            layer.to(dtype)
    return network


class HeldLinear(nn.Linear):
    """A frozen linear layer that widens its weight when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, self.weight, self.bias)


class HeldConv2d(nn.Conv2d):
    """A frozen convolution that widens its weight when it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Convolution.apply(x, self.weight, self.bias, (self.stride, self.padding, self.dilation, self.groups))


HELD = {nn.Linear: HeldLinear, nn.Conv2d: HeldConv2d}


def _as(x: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, _as(x, weight), _as(x, bias))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ _as(gradient, ctx.saved_tensors[0]), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape, geometry
        return F.conv2d(x, _as(x, weight), _as(x, bias), *geometry)

    @staticmethod
    def backward(ctx, gradient):
        weight = _as(gradient, ctx.saved_tensors[0])
        return torch.nn.grad.conv2d_input(ctx.size, weight, gradient, *ctx.geometry), None, None, None
