"""Promise: --preflight measures a run before it begins, proposes a batch that fits, and writes no run."""

import math
from pathlib import Path

import pytest
import torch

from segcn.models.base import keep_freed_memory
from segcn.train import memory
from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.train.memory import Trial, best_batch
from segcn.utils.errors import UserError

GB = memory.GB


def files_of(folder):
    return sorted(str(path) for path in Path(folder).rglob("*")) if Path(folder).exists() else []


@pytest.mark.usefixtures("fresh_precision")
def test_preflight_measures_two_steps_proposes_a_batch_and_writes_no_run(quick, tmp_path, capsys):
    config = quick(tmp_path / "out", preflight=True, max_train_steps=5000, train_batch_size=4, memory_preset=8)
    before = files_of(config.cache_dir)
    assert train(config) is None
    printed = capsys.readouterr().out
    assert "Preflight: 2 steps of 4 x 1 rows, 64 px" in printed
    for part in ("frozen U-Net", "its gradients", "optimizer state", "activations and the rest", "peak"):
        assert part in printed
    assert (
        " of 8.0\n" in printed
        and "s a step: 5000 steps take" in printed
        and "images a second into the cache" in printed
    )
    assert "Proposed: --train_batch_size 4 --gradient_accumulation_steps 1" in printed
    assert not (tmp_path / "out").exists() and files_of(config.cache_dir) == before


def test_memory_that_runs_out_is_said_with_what_to_do(quick, tmp_path, capsys, monkeypatch):
    real = memory.two_steps

    def two_steps(run, learn, size):
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(run, learn, size)

    monkeypatch.setattr(memory, "two_steps", two_steps)
    train(quick(tmp_path / "out", preflight=True, train_batch_size=4))
    printed = capsys.readouterr().out
    assert "Memory runs out at --train_batch_size 4" in printed
    assert "Proposed: --train_batch_size 1 --gradient_accumulation_steps 4" in printed

    def nothing_fits(run, learn, size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "two_steps", nothing_fits)
    with pytest.raises(UserError, match="Try --memory_preset 24"):
        train(quick(tmp_path / "out", preflight=True))


@pytest.mark.parametrize(
    ("total", "expected"),
    [(40, 8), (21, 4), (17, 2), (14, 1), (9, None)],  # GB of the card, micro-batch
)
def test_the_proposed_batch_fits_by_the_measured_slope_and_keeps_the_effective_batch(total, expected):
    config = TrainConfig(train_batch_size=8)
    seen = [Trial(1, 10 * GB, 1.0), Trial(8, 24 * GB, 2.0)]  # 2 GB an image, and 2 GB of gradients once accumulated
    size, slope = best_batch(config, seen, total * GB, 2 * GB)
    assert (size, slope) == (expected, 2 * GB)


def test_processes_share_the_memory_of_a_processor(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 24 * GB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_budget(TrainConfig(), torch.device("cpu")) == 12 * GB
    assert memory.memory_budget(TrainConfig(memory_preset=8), torch.device("cpu")) == 8 * GB


def test_a_batch_whose_memory_ran_out_is_not_proposed():
    seen = [Trial(1, 5 * GB, 1.0), Trial(4, None, math.nan)]
    assert best_batch(TrainConfig(train_batch_size=4), seen, 24 * GB, GB) == (1, None)


def test_the_peak_of_this_process_is_measured_from_where_it_was_reset():
    device = torch.device("cpu")
    keep_freed_memory(device)  # a reset gives it back
    torch.ones(30_000_000)
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    torch.ones(30_000_000)
    assert 100e6 < memory.peak_bytes(device) - before < 200e6
