"""Promise: a training of one or two processes ends as one, however it ends, and says why."""

import json
import os
import signal
import subprocess
import sys
import time
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

LONG = {"max_train_steps": 100000, "checkpointing_steps": 100000}


def test_a_failed_training_is_reported_by_its_own_message_or_its_last_lines():
    printed = ["step 1", "Error: other settings:", "  seed: was 0, is 1"]
    assert failure(2, printed) == "other settings:\n  seed: was 0, is 1"
    expected = "the training ended with exit code 1. Its last lines:\n  step 1\n  ValueError: x"
    assert failure(1, ["step 1", "ValueError: x"]) == expected
    assert "was ended by SIGKILL. Linux does so where memory runs out. Rerun" in failure(-9, ["step 1"])


def test_a_mistake_is_raised_as_the_message_of_the_training(quick, tmp_path):
    with pytest.raises(UserError, match=r"^missing: no such folder or file; expected a data set folder"):
        list(training_lines(quick(tmp_path / "out", dataset_name="missing")))


def segcn_train(config, **settings):
    """`segcn train` as a process of its own with both streams captured and Ctrl-C on, as at a terminal."""
    words = [sys.executable, "-m", "segcn.cli", "train", *arguments_of(config)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    interrupts = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(words, preexec_fn=interrupts, **streams, **settings)


def children(pid):
    """The processes that a process started, oldest first."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_segcn_train_prints_a_mistake_in_one_line(quick, tmp_path):
    process = segcn_train(quick("out", dataset_name="missing"), cwd=tmp_path)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 2 and "Traceback" not in out
    assert error == "Error: missing: no such folder or file; expected a data set folder (see data/README.md)\n"
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
