"""Training in processes that start fast, to be killed: forked from one that has imported all and computed nothing."""

import ctypes
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.utils.tensorboard
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.utils import io

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)


def die_at(last: int) -> Callable[[], None]:
    """Kill this process before its `last`-th write, fsync, rename or removal; a call of what it returns counts too."""
    count = itertools.count(1)

    def strike() -> None:
        if next(count) == last:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # some kernels come back from the call before the process ends

    def on_event(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in CHANGES:
            strike()

    fsync = os.fsync
    os.fsync = lambda file: (strike(), fsync(file))
    sys.addaudithook(on_event)
    return strike


def forked(work: Callable[[], object]) -> int:
    """Do `work` in a forked process: its exit code, or minus the signal that it died of."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def mount_small_disk(folder: Path, size: int) -> bool:
    """In a process of its own: put a disk of `size` bytes at `folder`; whether the system allows it."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS):
        return False
    for name, text in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
        Path("/proc/self", name).write_text(text)
    return not libc.mount(b"", bytes(folder), b"tmpfs", 0, f"size={size}".encode())


def warm_context() -> multiprocessing.context.BaseContext:
    """Processes started in it are forked from one that has imported this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return context


def train_quietly(config: TrainConfig, save: int = 0, change: int = 0) -> None:
    """Train; with `save`: die of SIGKILL before the `change`-th change to the disk of the `save`-th checkpoint."""
    multiprocessing.set_start_method("fork", force=True)  # of the processes that read data, as in a run of a user's
    commit, saves = io.commit, itertools.count(1)

    def commit_or_die(*arguments):
        if next(saves) == save:
            die_at(change)
        return commit(*arguments)

    io.commit = commit_or_die
    with open(os.devnull, "w") as sys.stdout:
        train(config)


def ended(
    warm: multiprocessing.context.BaseContext, config: TrainConfig, *kill: int, seconds: float = 300
) -> int | None:
    """Train in a warm process, killed after so long; its exit code, or minus the signal that it died of.

    kill: `save` and `change` of `train_quietly`.
    """
    process = warm.Process(target=train_quietly, args=(config, *kill))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def train_as_torchrun(warm: multiprocessing.context.BaseContext, config: TrainConfig, world: int = 2) -> None:
    """Train in `world` warm processes, which find each other by the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = [warm.Process(target=_train_as_one_of, args=(config, rank, world, port)) for rank in range(world)]
    for process in running:
        process.start()
    for process in running:
        process.join(600)
    assert [process.exitcode for process in running] == [0] * world


def _train_as_one_of(config: TrainConfig, rank: int, world: int, port: int) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost"} | {name: str(number) for name, number in numbers.items()}
    torch.set_num_threads(1)
    train_quietly(config)
