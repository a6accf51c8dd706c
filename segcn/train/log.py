"""What a training run tells: lines on the terminal, JSON lines in log.jsonl, trackers, validation images."""

import json
import math
import time
from pathlib import Path

import torch

from segcn.utils.io import write_text

LOG = "log.jsonl"


class Log:
    """Collects losses without waiting for the device, and speaks every few steps, on the main process only."""

    def __init__(self, accelerator, output_dir: Path, every: int):
        self.accelerator = accelerator
        self.path = output_dir / LOG
        self.every = every
        self.losses: list[torch.Tensor] = []
        self.norm: torch.Tensor | float = 0.0

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def began(self, step: int) -> None:
        """Start the clock at a step."""
        self.start, self.clock, self.aside = step, time.monotonic(), 0.0

    def validated(self, seconds: float) -> None:
        """What a validation took is no time of training."""
        self.aside += seconds

    def pace(self, step: int) -> float:
        """Seconds of training a step, since the start; infinite before the first one."""
        return (time.monotonic() - self.clock - self.aside) / (step - self.start) if step > self.start else math.inf

    def loss(self, loss: torch.Tensor) -> None:
        """Remember the loss of a micro-batch."""
        self.losses.append(loss.detach())

    def gradient(self, norm: torch.Tensor) -> None:
        """Remember the gradient's norm before clipping."""
        self.norm = norm

    def step(self, step: int, total: int, learning_rate: float) -> None:
        """Write a line when it is due: the mean loss since the last one, over all processes."""
        if step % self.every and step != total:
            return
        mean = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        self.losses = []
        pace, norm = self.pace(step), float(self.norm) if math.isfinite(self.norm) else None  # skipped by the scaler
        entry = {"step": step, "loss": mean, "learning_rate": learning_rate, "gradient_norm": norm,
                 "seconds_per_step": round(pace, 4)}  # fmt: skip
        self.write(entry)
        self.accelerator.log({"loss": mean, "learning_rate": learning_rate}, step=step)
        left = (pace + self.aside / (step - self.start)) * (total - step)
        self.say(f"step {step}/{total}  loss {mean:.4f}  {pace:.2f} s/step  {left / 60:.1f} min left")

    def write(self, entry: dict) -> None:
        """One line of log.jsonl; it holds its step."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, which a resumed run writes again."""
        if self.accelerator.is_main_process and self.path.is_file():
            kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl, a half-written last line left out."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
