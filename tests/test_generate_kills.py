"""Promise: killed anywhere, in any number of processes, the same command ends with the same bytes, fit to train on."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from kills import die_at
from runs import tree

from segcn.data.metadata import read_split
from segcn.generate.config import GenerateConfig
from segcn.generate.writer import generate_dataset, records_of
from segcn.samples.landscapes.scene import write_landscapes
from segcn.train.loop import train
from segcn.utils.args import arguments_of, make
from segcn.utils.io import Process

WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def config(random_base, random_controlnet, landscapes, tmp_path_factory):
    """Two images of each of six masks."""
    return make(
        GenerateConfig, "tiny", pretrained_model_name_or_path=str(random_base),
        controlnet_model_name_or_path=str(random_controlnet), controls=str(landscapes),
        output_dir=str(tmp_path_factory.mktemp("sets") / "straight"), num_inference_steps=1, guidance_scale=1.0,
        replicates=2, batch_size=2,
    )  # fmt: skip


def generate_quietly(config, rank, world, port, change=0):
    """Generate as one of `world` processes with one thread; with `change`: die before that change to the disk."""
    torch.set_num_threads(1)
    if world > 1:  # as torchrun sets them
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if change:
        die_at(change)
    with open(os.devnull, "w") as sys.stdout:
        generate_dataset(config, process=Process(rank, world))


def was_killed(warm, config, world, seconds=None, victim=None, change=0):
    """Generate as `world` processes; whether a kill cut that: of all after `seconds`, or of one at a change.

    Where one dies the others are killed, as torchrun does it; one may have failed meanwhile, for want of the dead one.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    work = [(config, rank, world, port, change if rank == victim else 0) for rank in range(world)]
    running = [warm.Process(target=generate_quietly, args=arguments) for arguments in work]
    for process in running:
        process.start()
    until = time.monotonic() + (seconds or 600)
    while any(process.is_alive() for process in running) and time.monotonic() < until:
        if any(process.exitcode not in (None, 0) for process in running):
            break
        time.sleep(0.01)
    for process in running:
        process.kill()
        process.join()
    codes = {process.exitcode for process in running}
    assert codes == {0} or -signal.SIGKILL in codes, codes
    return codes != {0}


def kill_and_resume(warm, config, folder, kills, draw):
    """Kill in worlds 1, 2 and 3 by turns at random moments; each set must equal that of one undisturbed process."""
    began = time.monotonic()
    assert not was_killed(warm, config, 1)
    whole, straight, done = time.monotonic() - began, tree(config.output_dir), 0
    images = len(read_split(config.output_dir))
    assert sum(name.startswith("images/") for name in straight) == images
    assert {"manifest.jsonl", "metadata.csv", "README.md"} <= set(straight)
    assert not [name for name in straight if name.startswith(".")]
    assert images == len(list(records_of(Path(config.output_dir))))
    for turn in itertools.count():
        if done == kills:
            return
        world, own = WORLDS[turn % 3], replace(config, output_dir=str(folder / str(turn)))
        if turn % 2:
            writes = images * 8 // world
            killed = was_killed(warm, own, world, victim=draw.randrange(world), change=draw.randint(1, writes))
        else:
            killed = was_killed(warm, own, world, seconds=draw.uniform(0, whole / world))
        assert not was_killed(warm, own, draw.choice(WORLDS) if done % 2 else world)
        assert tree(own.output_dir) == straight, f"turn {turn}, world {world}"
        done += killed


def test_three_kills_in_worlds_of_one_to_three_change_no_byte(warm, config, tmp_path):
    kill_and_resume(warm, config, tmp_path, 3, random.Random(time.time_ns()))


@pytest.mark.slow
def test_twenty_kills_over_two_hundred_masks_change_no_byte(warm, config, landscapes, tmp_path):
    write_landscapes(tmp_path / "data", 200, resolution=64, workers=1)
    folders = {"controls": str(tmp_path / "data"), "output_dir": str(tmp_path / "straight")}
    own = replace(config, **folders, replicates=1, batch_size=8)
    kill_and_resume(warm, own, tmp_path, 20, random.Random(6))


@pytest.fixture(scope="module")
def generated(config, tmp_path_factory):
    return generate_dataset(replace(config, output_dir=str(tmp_path_factory.mktemp("sets") / "generated")), log=str)


def test_a_generated_folder_trains_with_this_package(generated, quick, tmp_path):
    out = train(quick(tmp_path / "run", dataset_name=str(generated), max_train_steps=2))
    assert ControlNetModel.from_pretrained(out)


@pytest.mark.slow
def test_a_generated_folder_trains_with_the_script_of_diffusers_unchanged(
    generated, random_base, random_controlnet, tmp_path
):
    if not os.environ.get("SEGCN_BASELINE"):
        pytest.skip("set SEGCN_BASELINE=.../examples/controlnet/train_controlnet.py of diffusers to run it")
    words = {
        "pretrained_model_name_or_path": random_base, "controlnet_model_name_or_path": random_controlnet,
        "dataset_name": generated, "output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "resolution": 64,
        "train_batch_size": 2, "max_train_steps": 2, "report_to": "tensorboard",
    }  # fmt: skip
    words = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    done = subprocess.run([sys.executable, os.environ["SEGCN_BASELINE"], *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ControlNetModel.from_pretrained(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torch.distributed.run", "--nproc_per_node=2"],
                                      ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1",
                                       "--mixed_precision=no", "--dynamo_backend=no"]])  # fmt: skip
def test_the_launchers_write_what_one_command_writes(warm, config, tmp_path, launcher):
    assert not was_killed(warm, replace(config, output_dir=str(tmp_path / "one")), 1)
    own = replace(config, output_dir=str(tmp_path / "launched"))
    words = [sys.executable, "-m", *launcher, "-m", "segcn.generate", *arguments_of(own)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert tree(tmp_path / "launched") == tree(tmp_path / "one")
    assert done.stdout.splitlines().count(str(tmp_path / "launched")) == 1
