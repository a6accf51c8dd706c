"""Promise: the files for clusters launch one process a GPU, and a Slurm job that runs out of time resumes by itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import segcn
from segcn.utils.args import arguments_of

CLUSTER = Path(segcn.__file__).parent / "train" / "cluster"
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


def test_the_configurations_are_installed_with_the_package():
    import tomllib

    listed = tomllib.loads((CLUSTER.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "train/cluster/*" in listed["segcn"]


def test_bash_reads_the_slurm_script_and_slurm_its_settings():
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
    return (folder / f"{name}.calls").read_text() if (folder / f"{name}.calls").is_file() else ""


def test_a_job_out_of_time_commits_and_goes_back_into_the_queue(job, tmp_path):
    process = job(worker=STOPS)
    while not (tmp_path / "training").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 143
    assert (tmp_path / "committed").exists() and "requeue 41" in calls(tmp_path, "scontrol")


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_is_not_requeued(job, tmp_path, code):
    assert job(worker=f"import sys; sys.exit({code})").wait(120) == code
    assert "requeue" not in calls(tmp_path, "scontrol")


def test_a_job_starts_one_launcher_a_node_with_the_command_as_given(job, tmp_path):
    job("--output_dir", "a run", worker="").wait(120)
    launched = calls(tmp_path, "accelerate")
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
