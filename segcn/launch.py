"""Start training as its own processes under accelerate, and stop them together."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from segcn.config import ROOT, TrainConfig, arguments_of
from segcn.errors import UserError


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
    """Run the training, yield each line that it prints, and keep them in output_dir/log.txt.

    The processes end when the reader stops or is interrupted. Raises UserError if training fails.
    """
    log = Path(config.output_dir) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        training_command(config, num_processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    reason = ""
    try:
        with log.open("a") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if not reason.startswith("Error:"):  # what follows it is the launcher's own traceback
                    reason = line.strip() or reason
                yield line.rstrip("\n")
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
    if code:
        raise UserError(f"training ended with exit code {code}: {reason} (the whole output: {log})")
