"""What both trainings of the embedded base share: the schedule, one descent, progress, checkpoints, the device."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from segcn import checkpoint

SAVE_EVERY = 300  # seconds
LOG_EVERY = 100  # steps


class Learning:
    """Steps of AdamW over `model`, whose `recipe` says how many and at what rate; resumes from `folder`."""

    def __init__(self, name: str, model: torch.nn.Module, recipe, folder: Path, log: Callable[[str], None], **adamw):
        self.name, self.model, self.recipe, self.folder, self.log = name, model, recipe, folder, log
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, fused=True, **adamw)
        self.losses: list[torch.Tensor] = []  # of the last steps; read only when they are logged

    def steps(self) -> Iterator[int]:
        """The steps that are left; logs and commits a checkpoint now and then, and at the end."""
        start, total = self.resume(), self.recipe.steps
        began = saved = time.monotonic()
        for step in range(start, total):
            set_learning_rate(self.optimizer, self.recipe.learning_rate, step, total)
            yield step
            done, now = step + 1, time.monotonic()
            if done % LOG_EVERY == 0 or done == total:
                loss = torch.stack(self.losses).mean().item()
                pace = (now - began) / (done - start)
                self.log(f"{self.name} step {done}/{total} loss {loss:.4f} {pace:.3f} s/step")
                self.losses.clear()
            if now - saved > SAVE_EVERY or done == total:
                self.save(done)
                saved = time.monotonic()

    def descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient, its norm clipped at 1."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def save(self, step: int) -> None:
        """Commit weights and optimizer as checkpoint-STEP and drop the older one."""

        def write(stage: Path) -> None:
            save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, stage / "model.safetensors")
            checkpoint.save_optimizer(self.optimizer, stage / "optimizer.safetensors")

        checkpoint.commit(self.folder, f"checkpoint-{step}", write)
        checkpoint.prune(self.folder, 1)

    def resume(self) -> int:
        """Load the newest whole checkpoint; returns the steps already done, 0 where none is."""
        latest = checkpoint.find_latest(self.folder, self.log)
        if latest is None:
            return 0
        self.model.load_state_dict(load_file(latest / "model.safetensors"))
        checkpoint.load_optimizer(self.optimizer, latest / "optimizer.safetensors")
        self.log(f"Resuming from {latest}.")
        return int(latest.name.rsplit("-", 1)[1])


def set_learning_rate(optimizer, peak: float, step: int, steps: int, warmup: int = 100) -> None:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(function: Callable, device: torch.device, mode: str = "default") -> Callable:
    """Compiled where it pays, on a GPU; "reduce-overhead" makes CUDA graphs, for many small kernels."""
    return torch.compile(function, mode=mode) if device.type == "cuda" else function


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W] in [-1,1], stored channels last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
