"""What a training reports: lines on the terminal, JSON lines in log.jsonl, and trackers."""

import json
import math
import time
from pathlib import Path

import torch

from segcn.utils.io import write_text

LOG = "log.jsonl"


class Log:
    """Collects losses without waiting for the device, and writes every few steps, on the main process only."""

    def __init__(self, accelerator, output_dir: Path, every: int):
        self.accelerator, self.path, self.every = accelerator, output_dir / LOG, every
        self.losses: list[torch.Tensor] = []  # of the micro-batches since the last line
        self.norm: torch.Tensor | float = 0.0  # of the last gradient, before clipping

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def start_clock(self, step: int) -> None:
        """Count the time of training from here, at this step."""
        self.start, self.clock, self.aside = step, time.monotonic(), 0.0

    def pace(self, step: int) -> float:
        """Seconds of training per step since the start, validations left out; infinite before the first one."""
        return (time.monotonic() - self.clock - self.aside) / (step - self.start) if step > self.start else math.inf

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
