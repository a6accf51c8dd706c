"""Promise: a checkpoint is complete or does not exist, and a damaged one is named and skipped."""

import errno
import itertools
import json
import os
import shutil
import signal

import pytest
import torch
from kills import die_at, forked, mount_small_disk
from safetensors.torch import save_file

from segcn.train import checkpoint
from segcn.utils import io
from segcn.utils.errors import UserError

FILES = ("config.json", "controlnet/weights", "state.json")


def commit(folder, step, content="", strike=lambda: None):
    """A checkpoint of three files with this content, each written in two halves."""

    def write(stage):
        for name in FILES:
            (stage / name).parent.mkdir(exist_ok=True)
            with (stage / name).open("w") as file:
                file.write((content or str(step)) + " first,")
                file.flush()
                strike()
                file.write((content or str(step)) + " second")

    return io.commit(folder, f"checkpoint-{step}", write)


def content(folder):
    """The content of a checkpoint of `commit`, the same in all of its files."""
    (text,) = {(folder / name).read_text() for name in FILES}
    (word,) = {part.split()[0] for part in text.split(",")}
    return word


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
def test_killed_at_any_write_fsync_or_rename_the_old_checkpoint_or_the_new_one_is_complete(tmp_path, step):
    seen, code, kill = set(), -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        kill += 1
        folder = tmp_path / str(kill)
        commit(folder, 1), commit(folder, 2, "old")

        def work(folder=folder, kill=kill):
            commit(folder, step, "new", die_at(kill))
            checkpoint.prune(folder, 1)

        code = forked(work)
        seen.add(content(checkpoint.find_latest(folder, pytest.fail)))
        commit(folder, 9)
        assert not hidden(folder)
    assert code == 0 and seen == {"old", "new"} and kill > 20


@pytest.mark.parametrize("name", [*FILES, io.MANIFEST])
def test_a_file_that_is_cut_gone_or_changed_in_any_byte_is_seen(tmp_path, name):
    folder = commit(tmp_path, 1)
    path = folder / name
    good = path.read_bytes()
    assert io.problem(folder) is None
    for place, flip in itertools.product(range(len(good)), (0x01, 0x07, 0x20, 0x80)):
        path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
        assert io.problem(folder), f"{name}: byte {place} ^ {flip}"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert io.problem(folder), f"{name}: cut to {length}"
    path.unlink()
    assert io.problem(folder)


def test_a_file_that_the_manifest_leaves_out_is_seen_and_a_hidden_one_allowed(tmp_path):
    folder = commit(tmp_path, 1)
    (folder / ".DS_Store").touch()
    assert io.problem(folder) is None
    manifest = folder / io.MANIFEST
    hashes = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: hashes[name] for name in FILES[:2]}, indent=1, sort_keys=True))
    assert io.problem(folder) == "state.json is not in manifest.json"
    manifest.write_text("{}")
    assert io.problem(folder)


def test_no_whole_checkpoint_is_an_error_not_a_restart_and_a_folder_of_the_users_is_set_aside(tmp_path):
    (commit(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        checkpoint.find_latest(tmp_path, print)
    assert checkpoint.find_latest(tmp_path / "empty", print) is None
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "thesis.txt").write_text("years of work")
    commit(tmp_path, 7)
    assert [path.read_text() for path in tmp_path.glob("checkpoint-7.set-aside-*/thesis.txt")] == ["years of work"]
    assert checkpoint.find_latest(tmp_path, print) == tmp_path / "checkpoint-7"


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space"), OSError(errno.EDQUOT, "quota"), ValueError("a tensor of ours"),
    Exception("I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_save_that_fails_leaves_the_previous_checkpoint_and_a_full_disk_is_named(tmp_path, error):
    commit(tmp_path, 1)

    def fail(stage):
        (stage / "weights").write_text("half")
        raise error

    full = UserError, r"checkpoint-2 cannot be written: it needs 1,000 bytes, [\d,]+ bytes are free"
    kind, words = (ValueError, "a tensor of ours") if isinstance(error, ValueError) else full
    with pytest.raises(kind, match=words):
        io.commit(tmp_path, "checkpoint-2", fail, 1000)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoint-1" and not hidden(tmp_path)


def test_a_disk_too_small_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    usage = shutil._ntuple_diskusage(10_000, 9_000, 1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="it needs 1,001 bytes, 1,000 bytes are free"):
        io.commit(tmp_path, "checkpoint-2", pytest.fail, 1001)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_on_a_real_disk_that_is_full_the_error_names_it(tmp_path):
    weights = {"weight": torch.zeros(2**19)}  # 2 MiB

    def work():
        if not mount_small_disk(tmp_path, 2**20):
            return os._exit(77)
        commit(tmp_path, 1)
        with pytest.raises(UserError, match=r"it needs more bytes than are free, [\d,]+ bytes are free"):
            io.commit(tmp_path, "checkpoint-2", lambda stage: save_file(weights, stage / "weights.safetensors"))
        assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoint-1" and not hidden(tmp_path)

    code = forked(work)
    if code == 77:
        pytest.skip("this system lets nobody mount a small disk")
    assert code == 0


def test_prune_keeps_the_newest_and_the_named(tmp_path):
    for step in (1, 2, 3, 10):
        commit(tmp_path, step)
    for limit, keep, left in ((2, ["checkpoint-1"], [1, 3, 10]), (2, [], [3, 10]), (None, [], [3, 10])):
        checkpoint.prune(tmp_path, limit, keep=keep)
        assert list(checkpoint.steps(tmp_path)) == left


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_survives_bit_for_bit(tmp_path, layout):
    def step(weight, optimizer, count):
        for _ in range(count):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    start = torch.randn(9, 8, 3, 2)
    straight, resumed = (torch.nn.Parameter(start.clone().to(memory_format=layout)) for _ in range(2))
    step(straight, torch.optim.AdamW([straight], lr=0.1), 4)
    saved = step(resumed, torch.optim.AdamW([resumed], lr=0.1), 2)
    checkpoint.save_optimizer(saved, tmp_path / "o.safetensors")
    fresh = torch.optim.AdamW([resumed], lr=0.7)
    checkpoint.load_optimizer(fresh, tmp_path / "o.safetensors")
    step(resumed, fresh, 2)
    assert torch.equal(straight, resumed)
