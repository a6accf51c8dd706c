"""Promise: a checkpoint stands whole or not at all, and a damaged one is named and skipped."""

import pytest
import torch

from segcn import checkpoint
from segcn.errors import UserError


def commit(folder, step):
    return checkpoint.commit(folder, f"checkpoint-{step}", lambda stage: (stage / "weights").write_text(f"{step}"))


def test_the_newest_whole_checkpoint_is_found_and_a_damaged_one_named(tmp_path):
    commit(tmp_path, 2), commit(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "weights").write_text("flipped")
    said = []
    assert checkpoint.find_latest(tmp_path, said.append) == tmp_path / "checkpoint-2"
    assert "checkpoint-10" in said[0] and "weights" in said[0]


@pytest.mark.parametrize("damage", ["truncate", "delete", "no manifest", "bad manifest"])
def test_every_kind_of_damage_is_seen(tmp_path, damage):
    folder = commit(tmp_path, 1)
    assert checkpoint.problem(folder) is None
    if damage == "truncate":
        (folder / "weights").write_text("")
    elif damage == "delete":
        (folder / "weights").unlink()
    elif damage == "no manifest":
        (folder / checkpoint.MANIFEST).unlink()
    else:
        (folder / checkpoint.MANIFEST).write_text("{")
    assert checkpoint.problem(folder)


def test_no_whole_checkpoint_is_an_error_not_a_restart(tmp_path):
    (commit(tmp_path, 1) / "weights").unlink()
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        checkpoint.find_latest(tmp_path, print)
    assert checkpoint.find_latest(tmp_path / "empty", print) is None


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path):
    commit(tmp_path, 1)

    def fail(stage):
        (stage / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        checkpoint.commit(tmp_path, "checkpoint-2", fail)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoint-1"


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        commit(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert list(checkpoint.steps(tmp_path)) == [3, 10]


def test_optimizer_state_survives_bit_for_bit(tmp_path):
    def make():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5))
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def step(weight, optimizer, count):
        for _ in range(count):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = make()
    step(straight, optimizer, 4)
    resumed, optimizer = make()
    step(resumed, optimizer, 2)
    checkpoint.save_optimizer(optimizer, tmp_path / "o.safetensors")
    fresh = torch.optim.AdamW([resumed], lr=0.7)
    checkpoint.load_optimizer(fresh, tmp_path / "o.safetensors")
    step(resumed, fresh, 2)
    assert torch.equal(straight, resumed)


def test_a_folder_of_the_users_is_set_aside_not_replaced(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "thesis.txt").write_text("years of work")
    commit(tmp_path, 1)
    assert [path.read_text() for path in tmp_path.glob("checkpoint-1.set-aside-*/thesis.txt")] == ["years of work"]
    assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoint-1"
