"""Start training as its own processes under accelerate, and stop them together."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import IO

from segcn.train.config import TrainConfig
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError

STOPPED = 143  # the exit code of a training that was stopped
ELASTIC = r"[EWI]\d{4} \S+ \d+ torch/distributed/"  # a line of torchrun's own log
LAUNCHERS = ("subprocess.CalledProcessError", "torch.distributed.elastic", "ChildFailedError")  # errors they end with


def training_command(config: TrainConfig, num_processes: int = 1) -> list[str]:
    """`accelerate launch -m segcn.train ...` for this config. On CPUs several processes are started by torchrun."""
    import torch

    on_cpu = not torch.cuda.is_available()
    if num_processes > 1 and on_cpu:  # accelerate launch --cpu --num_processes 2 starts one process
        launcher = ["torch.distributed.run", f"--nproc_per_node={num_processes}"]
    else:
        launcher = ["accelerate.commands.launch", f"--num_processes={num_processes}", "--num_machines=1"]
        launcher += [f"--mixed_precision={config.mixed_precision or 'no'}", "--dynamo_backend=no"]
        launcher += ["--multi_gpu"] if num_processes > 1 else []
        launcher += [f"--num_cpu_threads_per_process={os.cpu_count()}"] if on_cpu else []
    return [sys.executable, "-m", *launcher, "-m", "segcn.train", *arguments_of(config)]


def training_lines(config: TrainConfig, num_processes: int = 1) -> Generator[str]:
    """Run the training and yield each line that it prints.

    Interrupted, it lets the processes commit a checkpoint, and yields what they say, before KeyboardInterrupt goes on;
    where the reader is interrupted, or leaves, they are stopped too, and what they say is printed. A training that a
    signal of another stopped ends as KeyboardInterrupt, too. A message of the training ("Error: ...") is raised as
    UserError; another failure is named by the process that died, or by its last line.
    """
    process = start(training_command(config, num_processes))
    said: list[str] = []  # its message
    report: list[str] = []  # what the launcher adds
    last = ""  # the newest line of its own
    try:
        for line in own_lines(lines_of(process), report):
            if said or line.startswith("Error: "):
                said.append(line)
            else:
                last = line.strip() or last
                yield line
    except BaseException:  # the reader was interrupted, or left
        stop(process)
        # To the end of its output: the launcher may be gone before the training is.
        for line in own_lines(output_of(process), report):
            print(line.rstrip("\n"), flush=True)
        raise
    finally:
        code = process.wait()
    if code:
        raise failure(said, last, "\n".join(report), code)


def own_lines(lines: Iterable[str], report: list[str]) -> Iterator[str]:
    """The lines of the training; what the launcher says of its end goes to `report`."""
    held: list[str] = []  # a traceback, until its last line tells whose it is
    for line in lines:
        if re.match(ELASTIC, line) or any("ChildFailedError" in past for past in report):
            report.append(line)
        elif line.startswith("Traceback ") or (held and line.startswith(" ")):
            held.append(line)
        else:
            ours = not line.startswith(LAUNCHERS)
            yield from held if ours else ()
            report += [] if ours else [*held, line]
            held = []
            if ours:
                yield line
    yield from held


def failure(said: list[str], last: str, report: str, code: int) -> BaseException:
    """What to raise for a training that ended with another exit code than 0."""
    if said:
        return UserError(message(said))
    rank, end, process = cause(report)
    if end in (STOPPED, -signal.SIGTERM, -signal.SIGUSR1):
        return KeyboardInterrupt(last)
    if end < 0:
        name = signal.Signals(-end).name
        hint = " Linux kills so where memory runs out." if -end == signal.SIGKILL else ""
        return UserError(
            f"training process {rank}{process} died of {name}.{hint} The same command goes on from the last checkpoint."
        )
    return UserError(f"training ended with exit code {end or code}: {last}")


def cause(report: str) -> tuple[int, int, str]:
    """(rank, exit code or minus the signal, " (pid N)" where known) of the first process that died; else code 0."""
    elastic = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+) \(pid: (\d+)\)", report, re.DOTALL)
    if elastic:
        return int(elastic[1]), int(elastic[2]), f" (pid {elastic[3]})"
    died = re.search(r"died with <Signals\.\w+: (\d+)>", report)
    ended = re.search(r"non-zero exit status (\d+)", report)
    return 0, -int(died[1]) if died else int(ended[1]) if ended else 0, ""


def lines_of(process: subprocess.Popen) -> Iterator[str]:
    """What a training prints; an interruption stops it, and is raised when its last line is read."""
    interruption = None
    while True:
        try:
            yield from (line.rstrip("\n") for line in output_of(process))
            break
        except KeyboardInterrupt as error:
            if interruption:
                raise
            interruption = error
            stop(process)
    if interruption:
        raise interruption


def start(command: list[str]) -> subprocess.Popen:
    """The command in a session of its own, so that Ctrl-C reaches it through `stop` alone; its output is one stream."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def output_of(process: subprocess.Popen) -> IO[str]:
    """The stream that `start` opened."""
    assert process.stdout is not None
    return process.stdout


def stop(process: subprocess.Popen) -> None:
    """Ask every process of the training to commit a checkpoint and end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def message(said: list[str]) -> str:
    """The training's own message, of several lines perhaps, without what launcher and other processes add to it."""
    foreign = re.compile(r"Traceback |Error: |[EWI]\d{4} ")
    end = next((place for place, line in enumerate(said[1:], 1) if foreign.match(line)), len(said))
    return "\n".join(said[:end]).removeprefix("Error: ")
