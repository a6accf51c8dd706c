"""A training in a process of its own, measured from outside: when each step ended, and how much memory it used.

Both measurements work on any training that writes TensorBoard files, so diffusers' script is measured unchanged and in
the same way as ours: every logged value carries the time at which it was written."""

import contextlib
import os
import platform
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from segcn.utils.errors import UserError

BUSY = 0.2  # cores that other programs may use before times are doubted
LOSS = "loss"  # the tag that is written once a step, by diffusers' scripts and by ours
PATIENCE = 30  # seconds that a process has to end before it is killed


@dataclass(frozen=True)
class Timed:
    """What was measured; all times but `began` in seconds from the start of the process."""

    began: float  # in seconds since 1970
    seconds: float  # until the process ended
    step_ends: dict[int, float]  # when the loss of a step was written
    memory: list[tuple[float, float]]  # (time, peak GiB of resident memory until then), as it grew
    other_load: float  # cores that other programs used meanwhile

    def seconds_per_step(self, first: int, last: int) -> float:
        """Mean of the steps after `first`, up to `last`."""
        return (self.step_ends[last] - self.step_ends[first]) / (last - first)

    def peak_gib(self, until: float = float("inf")) -> float | None:
        """The peak of resident memory up to a time."""
        return max((gib for when, gib in self.memory if when <= until), default=None)


def run_timed(command: list[str], log: Path, events: Path, steps: int, every: float = 0.1) -> Timed:
    """Run the command, its output going to the file `log`, and read its TensorBoard files below `events`.

    It runs in a session of its own; an interruption ends all its processes. UserError if it fails, or does not write
    the loss of each of its `steps`.
    """
    # Without accelerate's own settings, so that only the flags count; nothing is downloaded.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        began, busy, own = time.time(), busy_seconds(), _children_seconds()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        memory: list[tuple[float, float]] = []
        try:
            while process.poll() is None:
                gib = _peak_gib(process.pid)
                if gib and (not memory or gib > memory[-1][1]):
                    memory.append((time.time() - began, gib))
                time.sleep(every)
        finally:
            for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(patience)
    seconds = time.time() - began
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "no output"
        raise UserError(f"{log.stem}: exit code {process.returncode}: {last}\nAll of its output: {log}")
    step_ends = {step: wall - began for step, wall in _read_steps(events).items()}
    missing = [step for step in range(1, steps + 1) if step not in step_ends]
    if missing:
        raise UserError(f"{events}: expected the loss of steps 1 to {steps} in TensorBoard files, found none of step "
                        f"{missing[0]}; see {log}")  # fmt: skip
    other = (busy_seconds() - busy - (_children_seconds() - own)) / seconds
    return Timed(began, seconds, step_ends, memory, other)


def busy_seconds() -> float:
    """Seconds that the machine's cores have worked since it started, those lost to its host included."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def machine() -> str:
    """The processor, its cores, and the GPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    name = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def _peak_gib(process: int) -> float | None:
    """The peak of resident memory so far (VmHWM, which psutil does not have); where there is no /proc, of now."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) / 2**20 if found else None
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).memory_info().rss / 2**30
    return None


def _children_seconds() -> float:
    """Seconds of CPU of the processes that this one started and saw end."""
    times = os.times()
    return times.children_user + times.children_system


def _read_steps(folder: Path) -> dict[int, float]:
    """When the loss of each step was written, in seconds since 1970, from the TensorBoard files below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if any(value.tag == LOSS for value in event.summary.value):
                found[event.step] = event.wall_time
    return dict(sorted(found.items()))
