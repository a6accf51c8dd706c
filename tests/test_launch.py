"""Promise: processes train as one, end as one and say why; a Slurm job that runs out of time resumes by itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from runs import log_of

from segcn.train import checkpoint, log
from segcn.train.log import failure, training_lines
from segcn.train.loop import train
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError
from segcn.utils.paths import ROOT

LONG = {"max_train_steps": 100000, "checkpointing_steps": 100000}
CLUSTER = ROOT / "segcn" / "train" / "cluster"
SBATCH = CLUSTER / "train.sbatch"
# Replacements of commands: what each is called with goes to a file of its name.
SRUN = """#!/bin/bash
echo "$@" >> srun.calls
while [[ $1 == --* ]]; do shift; done
"$@" & task=$!
trap 'kill -USR1 $task $(pgrep -P $task)' USR1  # as Slurm does it: to every process of the step
while kill -0 $task 2>/dev/null; do wait $task; done
wait $task
"""
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol.calls\n[[ $1 != show ]] || printf "localhost\\nnode8\\n"\n'
ACCELERATE = f"""#!{sys.executable}
import os, subprocess, sys
open("accelerate.calls", "a").write(" ".join(sys.argv[1:]) + "\\n")
worker = subprocess.run([sys.executable, "worker.py"]).returncode
sys.exit(worker and (2 if worker == 2 else 1))  # the launcher makes 1 of the 143 of a stopped training
"""
STOPS = """import signal, sys, time, pathlib
def stop(*_):
    pathlib.Path("committed").touch()
    sys.exit(143)
signal.signal(signal.SIGUSR1, stop)
pathlib.Path("training").touch()
time.sleep(60)
"""


def test_a_failed_training_is_reported_by_its_own_message_or_its_last_lines():
    printed = ["step 1", "Error: other settings:", "  seed: was 0, is 1"]
    assert failure(2, printed) == "other settings:\n  seed: was 0, is 1"
    expected = "the training ended with exit code 1. Its last lines:\n  step 1\n  ValueError: x"
    assert failure(1, ["step 1", "ValueError: x"]) == expected
    assert "was ended by SIGKILL. Linux does so where memory runs out. Rerun" in failure(-9, ["step 1"])


def segcn_train(config, **settings):
    """`segcn train` as a process of its own with both streams captured and Ctrl-C on, as at a terminal."""
    words = [sys.executable, "-m", "segcn.cli", "train", *arguments_of(config)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words, preexec_fn=interrupts, **streams, **settings)


def children(pid):
    """The processes that a process started, oldest first."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_mistake_is_one_line_of_segcn_train_and_the_message_of_a_launched_training(quick, tmp_path):
    message = "missing: no such folder or file; expected a data set folder (see data/README.md)"
    process = segcn_train(quick("out", dataset_name="missing"), cwd=tmp_path)
    out, error = process.communicate(timeout=600)
    assert (process.returncode, error) == (2, f"Error: {message}\n") and "Traceback" not in out
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        list(training_lines(quick(tmp_path / "out", dataset_name="missing")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, times, worker", [
    pytest.param(signal.SIGINT, 2, False, id="Ctrl-C twice"),
    pytest.param(signal.SIGTERM, 1, False, id="SIGTERM", marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, 1, False, id="SIGUSR1", marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, 1, True, id="SIGUSR1 to the worker", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_stopped_segcn_train_commits_its_checkpoint(quick, tmp_path, number, times, worker):
    process = segcn_train(quick(tmp_path / "out", dataloader_num_workers=0 if number == signal.SIGINT else 2, **LONG))
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None, process.stderr.read()
    target = children(process.pid)[0] if worker else process.pid
    for _ in range(times):
        os.kill(target, number)
        time.sleep(0.1)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 143 and not error and "Traceback" not in out
    assert "Stopped by SIG" in out.splitlines()[-1]
    assert checkpoint.find_latest(tmp_path / "out", print)


def test_two_processes_train_as_one(quick, tmp_path):
    smooth = {"adam_epsilon": 1e-2}  # at 1e-8 Adam's first steps are the signs of gradients, rounding errors too
    one = train(quick(tmp_path / "one", train_batch_size=4, **smooth))
    config = quick(tmp_path / "two", train_batch_size=2, **smooth)
    list(training_lines(config, 2))
    assert json.loads((tmp_path / "two" / "train_config.json").read_text())["processes"] == 2
    for left, right in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)
    folders = (one / "checkpoint-3" / "controlnet", one, tmp_path / "two")
    begun, *saved = (ControlNetModel.from_pretrained(folder).state_dict() for folder in folders)
    moved = max((begun[key] - saved[0][key]).abs().max() for key in begun)
    apart = max((saved[0][key] - saved[1][key]).abs().max() for key in begun)
    assert apart < moved / 1000, f"{apart} apart, {moved} moved in three steps"


class Two:
    """A training of two processes on this machine, read line by line."""

    def __init__(self, config, monkeypatch):
        self.started, start = [], subprocess.Popen
        record = lambda *words, **given: self.started.append(start(*words, **given)) or self.started[-1]  # noqa: E731
        monkeypatch.setattr(log.subprocess, "Popen", record)
        self.lines = training_lines(config, 2)

    def until(self, words):
        """Read up to a line that begins so; the processes that train."""
        assert any(line.startswith(words) for line in self.lines)
        return children(self.started[0].pid)


@pytest.mark.slow
def test_a_killed_process_of_two_ends_the_training_within_a_minute_and_is_named(quick, tmp_path, monkeypatch):
    two = Two(quick(tmp_path / "out", **LONG), monkeypatch)
    victim, began = two.until("step 2/")[1], time.monotonic()
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"exit code 1(?s:.*){victim}(?s:.*)SIGKILL"):
        list(two.lines)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_and_the_run_can_resume(quick, tmp_path, monkeypatch):
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 4, "checkpointing_steps": 100, "max_train_steps": 30}
    two = Two(quick(tmp_path / "out", **settings), monkeypatch)
    os.kill(two.until("step 4/")[1], signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        list(two.lines)
    (step,) = checkpoint.steps(tmp_path / "out")
    assert 4 <= step < 30
    for out in ("out", "straight"):
        list(training_lines(quick(tmp_path / out, **settings), 2))
    assert log_of(tmp_path / "out") == log_of(tmp_path / "straight")
    saved = [ControlNetModel.from_pretrained(tmp_path / out).state_dict() for out in ("out", "straight")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize("name, processes, machines", [("one_gpu", 1, 1), ("one_node", 8, 1), ("two_nodes", 16, 2)])
def test_accelerate_reads_its_configurations(name, processes, machines):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(CLUSTER / f"{name}.yaml")
    assert load_config_from_file(path).num_processes == processes
    words = ["--config_file", path, "-m", "segcn.train", "--max_train_steps", "3"]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (launch.num_processes, launch.num_machines, launch.multi_gpu) == (processes, machines, processes > 1)
    assert launch.module and launch.training_script == "segcn.train" and launch.mixed_precision == "bf16"


def test_bash_reads_the_slurm_script_and_slurm_its_settings():
    assert '"train/cluster/*"' in (ROOT / "pyproject.toml").read_text()  # they are installed with the package
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    settings = [line.split()[1] for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(settings)


@pytest.fixture
def job(tmp_path):
    """A function from the words behind the Slurm script to that script at work in tmp_path, in a job of two nodes.

    With a `worker`, code that replaces the training, the launcher is replaced, too; without one both are real.
    """

    def start(*words, worker=None, nodes=2, gpus=4):
        replaced = {"srun": SRUN, "scontrol": SCONTROL} | ({"accelerate": ACCELERATE} if worker is not None else {})
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "worker.py").write_text(worker or "")
        for name, text in replaced.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {"JOB_ID": "41", "NNODES": nodes, "GPUS_ON_NODE": gpus, "JOB_NODELIST": "n[7-8]", "NODEID": nodes - 1}
        environment = {f"SLURM_{key}": str(value) for key, value in slurm.items()} | {"PATH": path}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", SBATCH, *words], cwd=tmp_path, env=os.environ | environment, **streams)

    return start


def calls(folder, name):
    return "".join(path.read_text() for path in folder.glob(f"{name}.calls"))


def test_a_job_out_of_time_commits_and_goes_back_into_the_queue(job, tmp_path):
    process = job(worker=STOPS)
    while not (tmp_path / "training").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 143
    assert (tmp_path / "committed").exists() and "requeue 41" in calls(tmp_path, "scontrol")


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_starts_a_launcher_a_node_and_is_not_requeued_when_it_ends_by_itself(job, tmp_path, code):
    assert job("--output_dir", "a run", worker=f"import sys; sys.exit({code})").wait(120) == code
    launched = calls(tmp_path, "accelerate")
    assert "requeue" not in calls(tmp_path, "scontrol")
    for words in ("--num_machines 2", "--num_processes 8", "--machine_rank 1", "--main_process_ip localhost"):
        assert words in launched
    assert launched.endswith("-m segcn.train --output_dir a run\n") and f"{CLUSTER}/two_nodes.yaml" in launched


@pytest.mark.slow
def test_a_real_training_of_two_processes_is_stopped_requeued_and_resumed(job, quick, tmp_path):
    words = [*arguments_of(quick(tmp_path / "run", checkpointing_steps=100000)), "--mixed_precision", "no"]
    process = job(*words, "--max_train_steps", "100000", nodes=1, gpus=2)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 143 and "requeue 41" in calls(tmp_path, "scontrol")
    stopped = int(re.search(r"Stopped by SIGUSR1 at step (\d+)", printed)[1])
    again = job(*words, "--max_train_steps", str(stopped + 2), nodes=1, gpus=2)
    printed = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and f"Resuming from {tmp_path}/run/checkpoint-{stopped}" in printed
    assert (tmp_path / "run" / "README.md").is_file() and calls(tmp_path, "scontrol").count("requeue") == 1
