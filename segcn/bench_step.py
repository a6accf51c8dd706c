"""A training step of the networks alone, with memory and weights laid out in each way of devices.py, in turns."""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from segcn.config import BASE
from segcn.devices import keep_freed_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MEMORIES = ("given back", "kept")
RUN = "from segcn.bench_step import time_steps; time_steps({!r}, {!r}, {!r}, {}, {}, {})"


def bench_step(
    pretrained_model_name_or_path: str | Path = BASE,
    resolution: int = 128,
    batch_size: int = 8,
    steps: int = 10,
    rounds: int = 2,
    log: Callable[[str], None] = print,
) -> dict[tuple[str, str], list[float]]:
    """Seconds of a step of ControlNet, U-Net and AdamW in float32 on the CPU, one a round, by (memory, layout).

    Each is measured in a process of its own, where the median of its steps counts. The ratios compare the fastest
    rounds: what else a machine does only ever adds.
    """
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(MEMORIES, LAYOUTS)}
    for number in range(1, rounds + 1):
        for (memory, layout), seconds in found.items():
            code = RUN.format(str(pretrained_model_name_or_path), memory, layout, resolution, batch_size, steps)
            told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            seconds.append(json.loads(told.splitlines()[-1]))
            log(f"round {number}: memory {memory:10}, {layout:13} {seconds[-1]:.3f} s a step")
    plain = found["given back", "contiguous"]
    for (memory, layout), seconds in found.items():
        ratio = min(plain) / min(seconds)
        log(f"memory {memory:10}, {layout:13} {ratio:.2f}x the pace of PyTorch's defaults (fastest of {rounds})")
    return found


def time_steps(base: str, memory: str, layout: str, resolution: int, batch_size: int, steps: int) -> None:
    """Print the median of the seconds of a step; two go before."""
    if memory == "kept":
        keep_freed_memory()
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).requires_grad_(False)
    controlnet = ControlNetModel.from_unet(unet).train()
    for network in (unet, controlnet):
        network.to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-6, fused=True)
    taken = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step(unet, controlnet, optimizer, resolution, batch_size)
        taken.append(time.perf_counter() - began)
    print(json.dumps(statistics.median(taken[2:])))


def step(unet, controlnet, optimizer, resolution: int, batch_size: int) -> None:
    """One update of the ControlNet on noise."""
    channels, side, width = unet.config.in_channels, resolution // 8, unet.config.cross_attention_dim
    latents, control = torch.randn(batch_size, channels, side, side), torch.rand(batch_size, 3, resolution, resolution)
    at = (latents, torch.full((batch_size,), 500), torch.randn(batch_size, 77, width))
    down, middle = controlnet(*at, controlnet_cond=control, return_dict=False)
    said = unet(*at, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    said.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
