"""A training in a process of its own, watched from outside: when each step ended, and how much memory it held.

Both instruments work on any training that keeps TensorBoard files, so a peer's script is measured unchanged and the
same way as ours: every logged value carries the time at which it was written.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from segcn.errors import UserError

LOSS = "loss"  # the tag that is written once a step, by diffusers' scripts and by ours
PATIENCE = 30  # seconds that a process has to end before it is killed


@dataclass(frozen=True)
class Timed:
    """What was seen; all times but `began` in seconds from the start of the process."""

    began: float  # in seconds since 1970
    seconds: float  # until the process ended
    step_ends: dict[int, float]  # when the loss of a step was written
    memory: list[tuple[float, float]]  # (time, most GiB resident until then), as it grew; empty without /proc
    other_load: float | None  # cores that other programs kept busy meanwhile; None without /proc

    def seconds_per_step(self, first: int, last: int) -> float:
        """Mean of the steps after `first`, up to `last`."""
        return (self.step_ends[last] - self.step_ends[first]) / (last - first)

    def peak_gib(self, until: float = float("inf")) -> float | None:
        """The most resident memory up to a time."""
        return max((gib for when, gib in self.memory if when <= until), default=None)


def run_timed(command: list[str], log: Path, events: Path, steps: int, every: float = 0.1) -> Timed:
    """Run the command, its output going to the file `log`, and read its TensorBoard files below `events`.

    It runs in a session of its own; whatever interrupts the waiting ends all its processes. UserError if it fails, or
    does not write the loss of each of its `steps`.
    """
    with log.open("w") as file:
        began, busy, own = time.time(), busy_seconds(), children_seconds()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        memory: list[tuple[float, float]] = []
        try:
            while process.poll() is None:
                gib = resident_gib(process.pid)
                if gib and (not memory or gib > memory[-1][1]):
                    memory.append((time.time() - began, gib))
                time.sleep(every)
        finally:
            end(process)
    seconds = time.time() - began
    if process.returncode:
        raise UserError(f"{log.stem}: exit code {process.returncode}: {last_line(log)}\nAll it said: {log}")
    step_ends = {step: wall - began for step, wall in read_steps(events).items()}
    missing = [step for step in range(1, steps + 1) if step not in step_ends]
    if missing:
        raise UserError(f"{events}: expected the loss of steps 1 to {steps} in TensorBoard files, found none of step "
                        f"{missing[0]}; see {log}")  # fmt: skip
    now = busy_seconds()
    other = None if busy is None or now is None else (now - busy - (children_seconds() - own)) / seconds
    return Timed(began, seconds, step_ends, memory, other)


def environment() -> dict[str, str]:
    """Ours without accelerate's own settings, so that the flags alone count; nothing is fetched."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return kept | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def end(process: subprocess.Popen) -> None:
    """Ask every process of its session to end, and kill what does not."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def resident_gib(process: int | str) -> float | None:
    """The most memory that a process, or "self", held so far (VmHWM), in GiB; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None


def busy_seconds() -> float | None:
    """Seconds that the machine's cores have worked since it started, those lost to its host included."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """The same of the processes that this one started and saw end."""
    times = os.times()
    return times.children_user + times.children_system


def read_steps(folder: Path) -> dict[int, float]:
    """When the loss of each step was written, in seconds since 1970, from the TensorBoard files below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if any(value.tag == LOSS for value in event.summary.value):
                found[event.step] = event.wall_time
    return dict(sorted(found.items()))


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
