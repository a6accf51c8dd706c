"""Promise: a training of one or two processes ends as one, however it ends, and says why in one message."""

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

from segcn.train import checkpoint, launch
from segcn.train.launch import failure, message, own_lines, training_lines
from segcn.train.loop import train
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError

LONG = {"max_train_steps": 100000, "checkpointing_steps": 100000}
ELASTIC_REPORT = """\
E1123 00:12:47.554000 19811 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 19827)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_00:12:41
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 19828)  (SIGKILL)
  traceback : Signal 9 (SIGKILL) received by PID 19828
============================================================"""
ACCELERATE_REPORT = """\
Traceback (most recent call last):
  File "launch.py", line 889, in simple_launcher
subprocess.CalledProcessError: Command '['python', '-m', 'segcn.train']' """
BUG = "Traceback (most recent call last):\n  File train.py\nValueError: a bug of ours"


def ended(printed, report):
    """What a training that printed this and a launcher that reported that show, and what is raised."""
    kept = []
    lines = list(own_lines([*printed.splitlines(), *report.splitlines()], kept))
    return lines, failure([], lines[-1], "\n".join(kept), 1)


def test_the_launchers_report_is_not_shown_but_names_who_died_and_how():
    lines, error = ended("step 1/9", ELASTIC_REPORT)
    assert lines == ["step 1/9"] and "training process 1 (pid 19828) died of SIGKILL" in str(error)
    lines, error = ended("step 1/9", ACCELERATE_REPORT + "died with <Signals.SIGSEGV: 11>.")
    assert lines == ["step 1/9"] and "training process 0 died of SIGSEGV" in str(error)


@pytest.mark.parametrize("end", ["returned non-zero exit status 143.", "died with <Signals.SIGTERM: 15>."])
def test_a_stopped_worker_is_told_from_a_failed_one(end):
    lines, error = ended("Stopped by SIGTERM at step 7", ACCELERATE_REPORT + end)
    assert lines == ["Stopped by SIGTERM at step 7"] and isinstance(error, KeyboardInterrupt)
    stopped = ELASTIC_REPORT.replace("exitcode  : -9", "exitcode  : 143")
    assert isinstance(ended("step 1/9", stopped)[1], KeyboardInterrupt)


def test_a_bug_shows_its_own_traceback_without_the_launchers():
    lines, error = ended(BUG, ACCELERATE_REPORT + "returned non-zero exit status 1.")
    assert lines == BUG.splitlines()
    assert isinstance(error, UserError) and str(error) == "training ended with exit code 1: ValueError: a bug of ours"


def test_a_message_of_several_lines_is_told_from_what_follows_it():
    said = ["Error: a run with other settings:", "  seed: was 0, is 1", "E1122 17:00 torch", "Traceback (m"]
    assert message(said) == "a run with other settings:\n  seed: was 0, is 1"


def segcn_train(config, **settings):
    """`segcn train` as a process of its own, its two streams captured."""
    words = [sys.executable, "-m", "segcn.cli", "train", *arguments_of(config)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, preexec_fn=hear_interrupts, **streams, **settings)


def hear_interrupts():
    """As at a terminal, also where a shell started the tests in the background and made them deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def children(pid):
    """The processes that a process started, oldest first."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_segcn_train_says_a_mistake_in_one_line(quick, tmp_path):
    process = segcn_train(quick("out", dataset_name="missing"), cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in out
    assert error == "Error: missing: no such folder or file; expected a data set folder (see data/README.md)\n"
    assert not list(tmp_path.iterdir())


SLOW = [
    pytest.param(signal.SIGTERM, 1, False, id="SIGTERM", marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, 1, False, id="SIGUSR1", marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, 1, True, id="SIGUSR1 to the worker", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("number, times, worker", [pytest.param(signal.SIGINT, 2, False, id="Ctrl-C twice"), *SLOW])
def test_a_stopped_segcn_train_commits_its_checkpoint(quick, tmp_path, number, times, worker):
    process = segcn_train(quick(tmp_path / "out", dataloader_num_workers=0 if number == signal.SIGINT else 2, **LONG))
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None, process.stderr.read()
    target = children(children(process.pid)[0])[0] if worker else process.pid
    for _ in range(times):
        os.kill(target, number)
        time.sleep(0.1)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 143 and not error and "Traceback" not in out
    assert "Stopped by SIG" in out.splitlines()[-1]
    assert checkpoint.find_latest(tmp_path / "out", print)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(quick, tmp_path):
    smooth = {"adam_epsilon": 1e-2}  # at 1e-8 Adam's first steps are the signs of gradients, rounding errors too
    one = train(quick(tmp_path / "one", train_batch_size=4, **smooth))
    config = quick(tmp_path / "two", train_batch_size=2, **smooth)
    for line in training_lines(config, 2):
        print(line)
    assert json.loads((tmp_path / "two" / "train_config.json").read_text())["processes"] == 2
    for left, right in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)
    begun, *saved = (
        ControlNetModel.from_pretrained(folder).state_dict()
        for folder in (one / "checkpoint-3" / "controlnet", one, tmp_path / "two")
    )
    moved = max((begun[key] - saved[0][key]).abs().max() for key in begun)
    apart = max((saved[0][key] - saved[1][key]).abs().max() for key in begun)
    assert apart < moved / 1000, f"{apart} apart, {moved} moved in three steps"


class Two:
    """A training of two processes on this machine, watched line by line."""

    def __init__(self, config, monkeypatch):
        self.started, start = [], launch.start
        monkeypatch.setattr(launch, "start", lambda command: self.started.append(start(command)) or self.started[-1])
        self.lines = training_lines(config, 2)

    def until(self, words):
        """Read up to a line that begins so."""
        assert any(line.startswith(words) for line in self.lines)
        return children(self.started[0].pid)


@pytest.mark.slow
def test_a_killed_process_of_two_ends_the_training_within_a_minute_and_is_named(quick, tmp_path, monkeypatch):
    two = Two(quick(tmp_path / "out", **LONG), monkeypatch)
    victim, began = two.until("step 2/")[1], time.monotonic()
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"training process 1 \(pid {victim}\) died of SIGKILL"):
        list(two.lines)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_and_the_run_goes_on(quick, tmp_path, monkeypatch):
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 4, "checkpointing_steps": 100, "max_train_steps": 30}
    two = Two(quick(tmp_path / "out", **settings), monkeypatch)
    os.kill(two.until("step 4/")[1], signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        list(two.lines)
    (step,) = checkpoint.steps(tmp_path / "out")
    assert 4 <= step < 30
    for out in ("out", "straight"):
        list(training_lines(quick(tmp_path / out, **settings), 2))
    logs = [[entry | {"seconds_per_step": 0} for entry in log_of(tmp_path / out)] for out in ("out", "straight")]
    assert logs[0] == logs[1]
    saved = [ControlNetModel.from_pretrained(tmp_path / out).state_dict() for out in ("out", "straight")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
