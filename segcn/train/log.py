"""What a training reports: lines on the terminal, JSON lines in log.jsonl, and trackers; and a training in processes of
its own, whose lines are passed on."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path

import torch

from segcn.train.config import AdaptConfig, TrainConfig
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.progress import Progress

LOG = "log.jsonl"
STOPPED = 143  # the exit code of a training that was stopped by a signal
LAST_LINES = 20  # shown where a training fails


class Log:
    """Collects losses without waiting for the device, and writes every few steps, on the main process only."""

    def __init__(self, accelerator, output_dir: Path, every: int):
        self.accelerator, self.path, self.every = accelerator, output_dir / LOG, every
        self.losses: list[torch.Tensor] = []  # of the micro-batches since the last line; with a reward, [loss, reward]
        self.reward: torch.Tensor | None = None  # how much of the micro-batch's loss is the reward's; none: no reward
        self.norm: torch.Tensor | float = 0.0  # of the last gradient, before clipping
        self.progress: Progress | None = None  # of the steps

    def say(self, text: str) -> None:
        """One line on the terminal, above the bar where there is one."""
        if self.accelerator.is_main_process:
            if self.progress is not None:
                self.progress.say(text)
            else:
                print(text, flush=True)

    say.shows_bars = True  # type: ignore[attr-defined]  # see Progress

    def add(self, loss: torch.Tensor) -> None:
        """Keep the loss of a micro-batch for the next line; what the reward adds to it is kept apart."""
        self.losses.append(loss if self.reward is None else torch.stack([loss - self.reward, self.reward]))

    def start_clock(self, step: int) -> None:
        """Count the time of training from here, at this step."""
        self.start, self.clock, self.aside = step, time.monotonic(), 0.0

    def pace(self, step: int) -> float:
        """Seconds of training per step since the start, validations left out; infinite before the first one."""
        return (time.monotonic() - self.clock - self.aside) / (step - self.start) if step > self.start else math.inf

    def step(self, step: int, total: int, learning_rate: float) -> None:
        """Write a line when it is due: the mean loss since the last one, over all processes."""
        if self.progress is None and self.accelerator.is_main_process:
            self.progress = Progress("steps", total, self.say, start=self.start)
        if self.progress is not None:
            self.progress(step)
        if step % self.every and step != total:
            return
        means = self.accelerator.reduce(torch.stack(self.losses).mean(0), "mean").reshape(-1).tolist()
        found = dict(zip(("loss", "reward_loss"), means, strict=False))  # without the second one where none rewards
        self.losses = []
        pace, norm = self.pace(step), float(self.norm) if math.isfinite(self.norm) else None  # skipped by the scaler
        entry = {"step": step, **found, "learning_rate": learning_rate, "gradient_norm": norm,
                 "seconds_per_step": round(pace, 4)}  # fmt: skip
        self.write(entry)
        self.accelerator.log(found | {"learning_rate": learning_rate}, step=step)
        left = (pace + self.aside / (step - self.start)) * (total - step)
        losses = "  ".join(f"{name.replace('_', ' ')} {mean:.4f}" for name, mean in found.items())
        if self.progress is not None and self.progress.bar is not None:
            self.progress.bar.set_postfix_str(losses, refresh=False)
        else:
            self.say(f"step {step}/{total}  {losses}  {pace:.2f} s/step  {left / 60:.1f} min left")

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


def validation_scores(entries: list[dict]) -> dict[int, dict]:
    """The faithfulness in a log's entries, by step."""
    return {entry["step"]: entry["faithfulness"] for entry in entries if "faithfulness" in entry}


def fractions(entries: list[dict]) -> tuple[list[int], list[float]]:
    """The steps, and the faithfulness there as a share of the ceiling."""
    found = validation_scores(entries)
    return list(found), [score["of_ceiling"] for score in found.values()]


def training_command(config: TrainConfig, num_processes: int = 1) -> list[str]:
    """`python -m segcn.train ...` for this config, or `segcn adapt`; several processes are started by torchrun."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={num_processes}", "-m"] if num_processes > 1 else []
    program = ["segcn.cli", "adapt"] if isinstance(config, AdaptConfig) else ["segcn.train"]
    return [sys.executable, "-m", *launcher, *program, *arguments_of(config)]


def training_lines(config: TrainConfig, num_processes: int = 1) -> Generator[str]:
    """Run the training and yield each line that it prints.

    Where the reader is interrupted or leaves, the training commits a checkpoint and ends, and its last lines are
    printed. UserError with its exit code and last lines where it fails.
    """
    process = subprocess.Popen(
        training_command(config, num_processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C reaches it through the code below alone
    )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        for line in process.stdout:
            last.append(line.rstrip("\n"))
            yield last[-1]
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        for line in process.stdout:  # to its end: the launcher may end before the training does
            print(line, end="", flush=True)
        raise
    finally:
        code = process.wait()
    if code == STOPPED or any(line.startswith("Stopped by SIG") for line in last):  # torchrun ends with code 1
        raise KeyboardInterrupt(last[-1] if last else "")
    if code:
        raise UserError(failure(code, list(last)))


def failure(code: int, last: list[str]) -> str:
    """What to say of a training that ended with another exit code than 0: its own message where it gave one."""
    said = next((place for place, line in enumerate(last) if line.startswith("Error: ")), None)
    if code == 2 and said is not None:
        return "\n".join(last[said:]).removeprefix("Error: ")
    if code < 0:
        memory = " Linux does so where memory runs out." if code == -signal.SIGKILL else ""
        how = f"was ended by {signal.Signals(-code).name}.{memory} Rerun to resume from the last checkpoint"
    else:
        how = f"ended with exit code {code}"
    return "\n  ".join([f"the training {how}. Its last lines:", *last])
