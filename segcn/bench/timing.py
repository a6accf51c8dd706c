"""A training in a process of its own, measured from outside: when each step ended, and how much memory it held.

Any training that keeps TensorBoard files can be measured so, another project's script unchanged and in the same way as
ours: every logged value carries the time at which it was written.
"""

import contextlib
import os
import platform
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from segcn.utils.errors import UserError

LOSS = "loss"  # the tag that is written once a step, by diffusers' scripts and by ours
PATIENCE = 30  # seconds that a process has to end before it is killed
BUSY = 0.2  # cores that other programs may use before the times are doubted


class OtherLoad:
    """How many cores other programs keep busy from now on; one at a time."""

    def __init__(self):
        psutil.cpu_percent()  # the next call counts from here
        self.began, self.own = time.monotonic(), sum(os.times()[:4])

    def cores(self) -> float:
        """The mean so far; processes that this one started count as its own once they have ended."""
        busy = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
        own = (sum(os.times()[:4]) - self.own) / (time.monotonic() - self.began)
        return max(0.0, busy - own)


def run_timed(command: list[str], log: Path, events: Path, steps: int) -> dict[str, Any]:
    """Run the command, its output going to the file `log`, and read its TensorBoard files below `events`.

    Returns began (in seconds since 1970) and, in seconds from there, seconds until it ended and step_ends, when the
    loss of each step was written; peak_gib, the most memory that it held on the GPU or, without one, its most resident
    memory, looked at every tenth of a second; and other_load, the cores that other programs kept busy meanwhile. It
    runs in a session of its own; whatever interrupts the waiting ends all its processes. UserError if it fails, or does
    not write the loss of each of its `steps`.
    """
    # Without accelerate's own settings, so that the flags alone count; nothing is downloaded.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment = kept | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    held_before = gpu_bytes()  # by others, or by this process
    load, began, peak = OtherLoad(), time.time(), 0
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    resident = process.memory_info().rss
                    peak = max(peak, gpu_bytes() - held_before if torch.cuda.is_available() else resident)
                time.sleep(0.1)
        finally:
            end(process)
    seconds = time.time() - began
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "it wrote nothing"
        raise UserError(f"{log.stem}: exit code {process.returncode}: {last}\nIts whole output: {log}")
    written = read_steps(events)
    missing = [step for step in range(1, steps + 1) if step not in written]
    if missing:
        raise UserError(f"{events}: expected the loss of steps 1 to {steps} in TensorBoard files, found none of step "
                        f"{missing[0]}; see {log}")  # fmt: skip
    measured = {"began": began, "seconds": seconds, "peak_gib": peak / 2**30, "other_load": load.cores()}
    return measured | {"step_ends": [written[step] - began for step in range(1, steps + 1)]}


def gpu_bytes() -> int:
    """Bytes that all programs together hold on the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def end(process: psutil.Popen) -> None:
    """Ask every process of its session to end, and kill what does not."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                process.wait(patience)


def read_steps(folder: Path) -> dict[int, float]:
    """When the loss of each step was written, in seconds since 1970, from the TensorBoard files below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if any(value.tag == LOSS for value in event.summary.value):
                found[event.step] = event.wall_time
    return dict(sorted(found.items()))


def machine() -> str:
    """The processor, its cores, and the GPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    name = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name
