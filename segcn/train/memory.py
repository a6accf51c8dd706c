"""How a training is fitted into the memory of a GPU, and where its bytes go.

GB (10^9 bytes) of a training of Stable Diffusion 1.5, whose parameters are: U-Net 860 M, ControlNet 361 M, text encoder
123 M, VAE 84 M. The encoders leave memory once the cache stands. The activations are those kept for the backward pass,
counted on the architecture at 512 px; CUDA itself takes about 0.5 besides.

| --memory_preset        | none (float32, batch 4) |   24 |   16 |   12 |    8 |
|------------------------|-------------------------|------|------|------|------|
| frozen U-Net           |                    3.44 | 1.72 | 1.72 | 1.72 | 1.72 |
| ControlNet             |                    1.45 | 1.45 | 1.45 | 1.45 | 1.45 |
| its gradients          |                    1.45 | 1.45 | 1.45 | 1.45 | 1.45 |
| its half copies        |                       - | 0.72 | 0.72 | 0.72 | 0.72 |
| optimizer state        |                    2.89 | 2.89 | 2.89 | 2.89 | 0.74 |
| activations            |                    7.24 | 3.64 | 1.82 | 0.24 | 0.24 |
| together               |                   16.47 |11.87 |10.05 | 8.47 | 6.32 |

--use_ema adds 1.45. An image of half the side has a quarter of the activations."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segcn.models.base import computes_fast, give_freed_memory_back, pick_device
from segcn.train.config import TrainConfig
from segcn.utils.args import preset_defaults

PRESETS = {  # GB: images of 512 px in a micro-batch, and what is switched on besides half precision
    8: (1, {"use_8bit_adam": True, "gradient_checkpointing": True}),
    12: (1, {"gradient_checkpointing": True}),
    16: (2, {}),
    24: (4, {}),
}
GB = 10**9


def fit(config: TrainConfig, half: str, fast: bool) -> tuple[TrainConfig, list[str]]:
    """The config as --memory_preset sets it, and what to say about that.

    half: bf16, or fp16 where the device lacks bf16; fast: whether it computes in it by itself, else only the frozen
    weights are held in it. A flag that differs from the default of --preset was given, and stays.
    """
    if config.memory_preset is None:
        return config, []
    images, flags = PRESETS[config.memory_preset]
    wanted: dict[str, Any] = flags | _batch(config, images) | ({"mixed_precision": half} if fast else {})
    given_half = config.mixed_precision if config.mixed_precision in ("fp16", "bf16") else half
    wanted |= {"frozen_precision": given_half, "cache": "latents"}
    wanted = {name: value for name, value in wanted.items() if getattr(config, name) != value}
    fitted = {name: value for name, value in wanted.items() if not given(config, name)}
    kept = [name for name in wanted if name not in fitted]
    lines = [f"--memory_preset {config.memory_preset}: {_flags(fitted) or 'nothing to set'}."]
    if kept:
        lines.append(f"  As given instead: {_flags({name: getattr(config, name) for name in kept})}.")
    return dataclasses.replace(config, **fitted), lines


def given(config: TrainConfig, name: str) -> bool:
    """Whether a flag differs from the default of the config's --preset."""
    default = preset_defaults(TrainConfig, config.preset).get(name, getattr(TrainConfig(), name))
    return getattr(config, name) != default


def _batch(config: TrainConfig, images: int) -> dict[str, int]:
    """The largest micro-batch that fits, with the accumulation that keeps the effective batch; as given, if it is."""
    if given(config, "train_batch_size") or given(config, "gradient_accumulation_steps"):
        return {}
    effective = config.train_batch_size * config.gradient_accumulation_steps
    most = images * (512 / config.resolution) ** 2
    size = max(n for n in range(1, effective + 1) if effective % n == 0 and n <= max(most, 1))
    return {"train_batch_size": size, "gradient_accumulation_steps": effective // size}


def _flags(settings: dict) -> str:
    return ", ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in settings.items())


def half_precision() -> tuple[str, bool]:
    """bf16, or fp16 where the GPU lacks it (V100), and whether the device that is trained on is fast in it."""
    device = torch.device(pick_device())
    if device.type == "cuda" and not computes_fast(torch.bfloat16, device):
        return "fp16", True
    return "bf16", computes_fast(torch.bfloat16, device)


def accounting(unet: nn.Module, controlnet: nn.Module, encoders: Iterable[nn.Module] = (), *, half_copies=False,
               use_8bit_adam=False, use_ema=False) -> dict[str, int]:  # fmt: skip
    """Bytes of a training by component, activations aside, from the networks themselves (on "meta" devices too).

    half_copies: autocast keeps a half-precision copy of the trained weights during a step.
    """
    trained = size_of(controlnet)
    return {
        "frozen U-Net": size_of(unet),
        "encoders": sum(map(size_of, encoders)),
        "ControlNet": trained,
        "its gradients": trained,
        "its half copies": trained // 2 if half_copies else 0,
        "optimizer state": sum(_adam_bytes(p.numel(), use_8bit_adam) for p in controlnet.parameters()),
        "EMA": trained if use_ema else 0,
    }


def size_of(network: nn.Module) -> int:
    """Bytes of a network's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def _adam_bytes(numbers: int, eight_bit: bool) -> int:
    """Both moments of one parameter tensor; bitsandbytes leaves tensors of less than 4096 numbers in 32 bits."""
    if not eight_bit or numbers < 4096:
        return 8 * numbers
    return 2 * numbers + 2 * 4 * -(-numbers // 256)  # 8-bit moments, and a float32 scale for each 256 of them


def peak_bytes(device: torch.device) -> int:
    """The most memory held since `reset_peak`: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def reset_peak(device: torch.device) -> None:
    """Start a new `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        give_freed_memory_back()
        with contextlib.suppress(OSError):  # a sandbox may forbid it: then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def total_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this machine that is free or already this process's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    own = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return int(lines["MemAvailable"].split()[0]) * 1024 + own
