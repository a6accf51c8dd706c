"""Start a training in processes of its own, pass on what it prints, and stop it with a checkpoint."""

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator

from segcn.train.config import TrainConfig
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError

STOPPED = 143  # the exit code of a training that was stopped by a signal
LAST_LINES = 20  # shown where a training fails


def training_command(config: TrainConfig, num_processes: int = 1) -> list[str]:
    """`python -m segcn.train ...` for this config; several processes are started by torchrun."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={num_processes}", "-m"] if num_processes > 1 else []
    return [sys.executable, "-m", *launcher, "segcn.train", *arguments_of(config)]


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
