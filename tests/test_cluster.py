"""Promise: the files for clusters launch one process a GPU, and a Slurm job that runs out of time goes on by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import segcn

CLUSTER = Path(segcn.__file__).parent / "cluster"
SBATCH = CLUSTER / "train.sbatch"
# The stand-ins: what each is called with goes to a file of its name.
SRUN = """#!/bin/bash
echo "$@" >> srun.said
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=1 "$@" & task=$!
trap 'kill -USR1 $task $(pgrep -P $task)' USR1  # as Slurm does it: to every process of the step
while kill -0 $task 2>/dev/null; do wait $task; done
wait $task
"""
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol.said\n[[ $1 != show ]] || printf "node7\\nnode8\\n"\n'
ACCELERATE = f"""#!{sys.executable}
import os, subprocess, sys
open("accelerate.said", "a").write(" ".join(sys.argv[1:]) + "\\n")
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


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("one_gpu", 1, 1), ("one_node", 8, 1), ("two_nodes", 16, 2)]
)
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

    listed = tomllib.loads((CLUSTER.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "cluster/*" in listed["segcn"]


def test_bash_reads_the_slurm_script_and_slurm_its_settings():
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    settings = [line.split()[1] for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(settings)


@pytest.fixture
def job(tmp_path):
    """A function from the code of a stand-in for training to the running Slurm script, in tmp_path."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[7-8]"}

    def start(worker):
        (tmp_path / "worker.py").write_text(worker)
        command = ["bash", str(SBATCH), "--output_dir", "a run"]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | slurm | {"PATH": path})

    return start


def said(folder, name):
    return (folder / f"{name}.said").read_text() if (folder / f"{name}.said").is_file() else ""


def test_a_job_out_of_time_commits_and_goes_back_into_the_queue(job, tmp_path):
    process = job(STOPS)
    while not (tmp_path / "training").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 143
    assert (tmp_path / "committed").exists() and "requeue 41" in said(tmp_path, "scontrol")


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_is_not_requeued(job, tmp_path, code):
    assert job(f"import sys; sys.exit({code})").wait(20) == code
    assert "requeue" not in said(tmp_path, "scontrol")


def test_a_job_starts_one_launcher_a_node_with_the_command_as_given(job, tmp_path):
    job("").wait(20)
    launched = said(tmp_path, "accelerate")
    for words in ("--num_machines 2", "--num_processes 8", "--machine_rank 1", "--main_process_ip node7"):
        assert words in launched
    assert launched.endswith("-m segcn.train --output_dir a run\n") and f"{CLUSTER}/two_nodes.yaml" in launched
