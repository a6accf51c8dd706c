"""Start training as its own processes under accelerate, and stop them together."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

from segcn.arguments import arguments_of
from segcn.errors import UserError
from segcn.train_config import TrainConfig

LAUNCHERS_OWN = (" ", "Traceback", "subprocess.CalledProcessError", "torch.distributed.elastic")
STOPPED = 143  # the exit code of a training that was stopped


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


def training_lines(config: TrainConfig, num_processes: int = 1) -> Iterator[str]:
    """Run the training and yield each line that it prints.

    Interrupted, it lets the processes commit a checkpoint, and yields what they say, before KeyboardInterrupt goes on;
    where the reader is interrupted, or leaves, they are stopped too, and what they say is printed. A message of the
    training ("Error: ...") is raised as UserError without the launcher's traceback that follows it; another failure is
    named by its last line.
    """
    process = start(training_command(config, num_processes))
    said, last = [], ""  # its message, and its last line that is not the launcher's
    try:
        for line in lines_of(process):
            if said or line.startswith("Error: "):
                said.append(line)
            else:
                last = last if line.startswith(LAUNCHERS_OWN) else line.strip() or last
                yield line
    except BaseException:  # the reader was interrupted, or left
        stop(process)
        for line in process.stdout:  # to its end: the launcher may be gone before the training is
            if not line.startswith(LAUNCHERS_OWN):
                print(line, end="", flush=True)
        raise
    finally:
        code = process.wait()
    if code:
        raise UserError(message(said) if said else f"training ended with exit code {code}: {last}")


def lines_of(process: subprocess.Popen) -> Iterator[str]:
    """What a training prints; an interruption stops it, and is raised when its last line is read."""
    interruption = None
    while True:
        try:
            yield from (line.rstrip("\n") for line in process.stdout)
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


def stop(process: subprocess.Popen) -> None:
    """Ask every process of the training to commit a checkpoint and end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def message(said: list[str]) -> str:
    """The training's own message, of several lines perhaps, without what launcher and other processes add to it."""
    foreign = re.compile(r"Traceback |Error: |[EWI]\d{4} ")
    end = next((place for place, line in enumerate(said[1:], 1) if foreign.match(line)), len(said))
    return "\n".join(said[:end]).removeprefix("Error: ")
