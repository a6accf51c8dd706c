"""Promise: training is timed beside an unchanged baseline in turns and by the same instrument, and resumes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from segcn.bench import train
from segcn.bench.config import VARIANTS, BenchTrainConfig
from segcn.bench.timing import run_timed
from segcn.bench.train import (
    CheckpointScorer,
    bench_train,
    by_round,
    command,
    step_tflop,
    variant_words,
)
from segcn.cli import run_command
from segcn.models.base import load_base
from segcn.models.controlnet import make_controlnet
from segcn.models.segmenter import SegmenterConfig
from segcn.samples.base_model import recipe
from segcn.train import validation
from segcn.utils.errors import UserError

STAND_IN = """
import os, sys, time
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

value = lambda name: sys.argv[sys.argv.index("--" + name) + 1]
out = Path(value("output_dir"))
with (out.parents[2] / "journal.txt").open("a") as journal:
    print("{side}", file=journal)
held = b"x" * ({megabytes} * 2**20)
writer = EventFileWriter(str(out / "logs" / value("report_to")))
clock = time.time()
for step in range(1, int(value("max_train_steps")) + 1):
    clock += {pace}
    if step % int(value("checkpointing_steps")) == 0:
        weights = out / f"checkpoint-{{step}}" / "controlnet" / "diffusion_pytorch_model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_text("")
        os.utime(weights, (clock, clock))
    loss = Summary(value=[Summary.Value(tag="loss", simple_value=0.5)])
    writer.add_event(Event(wall_time=clock, step=step, summary=loss))
time.sleep(0.2)
writer.close()
"""


@pytest.fixture
def bench(tmp_path, landscapes, random_base, monkeypatch):
    """A function from settings to a config whose baseline takes 20 s a step by its clock and 200 MiB, ours 10 s."""
    for side, pace, megabytes in (("baseline", 20, 200), ("ours", 10, 1)):
        (tmp_path / f"{side}.py").write_text(STAND_IN.format(side=side, pace=pace, megabytes=megabytes))
    monkeypatch.setattr(train, "OURS", [sys.executable, str(tmp_path / "ours.py")])
    given = {
        "peer": str(tmp_path / "baseline.py"), "pretrained_model_name_or_path": str(random_base),
        "dataset_name": str(landscapes), "output_dir": str(tmp_path / "bench"), "resolution": 64, "warmup_steps": 1,
        "measured_steps": 3, "variants": "same",
    }  # fmt: skip
    return lambda **settings: BenchTrainConfig(**given | settings)


def journal(config):
    path = config.folder / "journal.txt"
    return path.read_text().split() if path.is_file() else []


def test_sides_run_in_turns_give_ratios_and_finished_runs_are_kept(bench):
    lines = []
    config = bench(rounds=2)
    entries = bench_train(config, lines.append)
    assert journal(config) == ["baseline", "ours", "ours", "baseline"]
    assert by_round(entries, "same", "samples_per_second").ratio.tolist() == pytest.approx([2, 2])
    assert by_round(entries, "same", "peak_gib").ratio.max() < 0.6
    assert json.loads((config.folder / "train.json").read_text()) == entries
    assert {"command", "versions", "machine", "other_load", "step_ends"} <= entries[0].keys()
    assert any("same optimizer" in line and line.count("x") >= 3 for line in lines[-1].splitlines())
    assert (config.folder / "train.txt").read_text().strip() in lines[-1]
    assert not list((config.folder / "runs").glob("*/"))
    older = (config.folder / "train.json").read_text().replace('"side": "baseline"', '"side": "peer"')
    (config.folder / "train.json").write_text(older)  # as it was called once
    assert bench_train(bench(rounds=3), lines.append)[:4] == entries
    assert journal(config) == ["baseline", "ours", "ours", "baseline", "baseline", "ours"]


def test_start_up_and_saving_do_not_count_as_steady_steps(bench, tmp_path):
    slow_start = (tmp_path / "ours.py").read_text().replace("clock = time.time()", "clock = time.time() + 100")
    saving = slow_start.replace("    weights.write_text", "    clock += 1000; weights.write_text")
    (tmp_path / "ours.py").write_text(saving)
    entry = next(entry for entry in bench_train(bench(rounds=1), len) if entry["side"] == "ours")
    assert entry["seconds_per_step"] == pytest.approx(10) and entry["samples_per_second"] == pytest.approx(0.8)
    assert 110 < entry["first_step"] < 140 and 140 < 4 * 8 / entry["samples_per_second_with_start"] < 170


def test_both_sides_get_the_same_flags(bench):
    config = bench(max_train_samples=7)
    lines = [command(config, side, Path("/x"), 5, 5, variant_words(config, "bf16", side)) for side in train.SIDES]
    theirs, ours = ([word for word in line if word.startswith("--")] for line in lines)
    assert [name for name in ours if name not in theirs] == ["--logging_steps", "--augment"]
    assert set(theirs) <= set(ours)
    assert variant_words(config, "memory", "baseline") == variant_words(config, "ours", "baseline")
    alone = bench(peer="")
    other, own = (command(alone, side, Path("/x"), 5, 5, variant_words(alone, "same", side)) for side in train.SIDES)
    assert [word for word in " ".join(other).split("--") if word not in " ".join(own).split("--")] == ["cache none "]


def test_both_sides_train_the_same_network(bench, random_base):
    bench().folder.mkdir()
    start = ControlNetModel.from_pretrained(variant_words(bench(), "ours", "ours")[-1])
    assert start.config.conditioning_embedding_out_channels == [16, 32, 96, 256]
    narrow = make_controlnet(load_base(random_base).unet)
    assert narrow.num_parameters() < start.num_parameters()


def test_interrupted_it_ends_the_training(tmp_path):
    script = tmp_path / "forever.py"
    script.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_timed([sys.executable, str(script)], tmp_path / "log", tmp_path, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


@pytest.mark.parametrize(
    ("settings", "script", "said"),
    [
        ({"peer": "nowhere.py"}, None, "nowhere.py: no such file"),
        ({"variants": "fast"}, None, "--variants fast: expected some of same, ours"),
        ({"max_train_samples": 99}, None, "--max_train_samples 99: .*landscapes has 12 rows"),
        ({"dataset_name": "nowhere"}, None, "nowhere: no such folder"),
        ({"until_faithful": True, "faithful_steps": 2}, None, "2: expected at least --checkpointing_steps, 50"),
        ({}, "raise ImportError('diffusers 9')", "same-baseline-1: exit code 1: ImportError: diffusers 9"),
        ({}, "", "found none of step 1; see .*same-baseline-1.log"),
    ],
)
def test_mistakes_are_named(bench, tmp_path, settings, script, said):
    if script is not None:
        (tmp_path / "baseline.py").write_text(script)
    with pytest.raises(UserError, match=said):
        bench_train(bench(**settings), len)


class StandInScorer(CheckpointScorer):
    """Images follow their masks by 0.004 more each step; the ceiling is 0.06."""

    scored: list = []  # noqa: RUF012

    def __init__(self, config, log):
        self.ceiling, self.log = 0.06, log

    def faithfulness_of(self, controlnet):
        self.scored.append(controlnet.parent.parent.name)
        return 0.004 * int(controlnet.parent.name.split("-")[1])


def test_the_time_until_masks_are_followed_is_that_of_checkpoints_scored_later(bench, monkeypatch):
    monkeypatch.setattr(train, "CheckpointScorer", StandInScorer)
    lines = []
    config = bench(rounds=1, until_faithful=True, faithful_steps=10, checkpointing_steps=2, variants="",
                   peer_learning_rates=[1e-5, 1e-3])  # fmt: skip
    entries = bench_train(config, lines.append)
    titles = ["diffusers at 1e-05", "diffusers at 0.001", "segcn at its defaults"]
    assert [entry["title"] for entry in entries] == titles
    assert [entry["reached"] for entry in entries] == [8, 8, 8] and len(StandInScorer.scored) == 3 * 4
    assert [160 < entry["saved_at"]["8"] < 180 for entry in entries] == [True, True, False]
    assert 80 < entries[2]["saved_at"]["8"] < 100
    assert "the fastest baseline / segcn: " in lines[-1]
    assert bench_train(config, lines.append) == entries
    assert len(journal(config)) == 3 and len(StandInScorer.scored) == 3 * 4


def test_a_checkpoint_is_scored_by_what_it_generates(bench, random_base, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "SegmenterConfig", lambda **given: SegmenterConfig(steps=2, width=8, **given))
    config = bench(faithfulness_rows=1)
    config.folder.mkdir()
    scorer = CheckpointScorer(config, len)
    where = tmp_path / "run"
    for step in (5, 10):
        weights = where / "out" / f"checkpoint-{step}" / "controlnet"
        make_controlnet(scorer.base.unet).save_pretrained(weights)
    scorer.ceiling, entry = 9.0, {"title": "a run", "where": str(where)}
    scorer.score(entry)
    assert entry["reached"] is None and list(entry["scores"]) == ["5", "10"]
    assert all(0 <= miou < 1 for miou in entry["scores"].values())
    scorer.ceiling = 0.0
    scorer.score(entry)
    assert entry["reached"] == 5


@pytest.fixture(scope="module")
def configs_of_sd15(tmp_path_factory):
    """The folder without its weights, and its parameters by part."""
    folder, counts = tmp_path_factory.mktemp("sd15"), {}
    with torch.device("meta"):
        for name, build in recipe.PARTS.items():
            part = build()
            counts[name] = part.num_parameters()
            (folder / name).mkdir()
            config = part.config if name == "text_encoder" else part
            (folder / name / "config.json").write_text(config.to_json_string())
            if name == "unet":
                counts["controlnet"] = ControlNetModel.from_unet(part).num_parameters()
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir()
    return folder, counts


def test_the_large_base_has_the_size_of_stable_diffusion(configs_of_sd15):
    assert configs_of_sd15[1] == {
        "unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "controlnet": 361_279_120
    }  # fmt: skip


@pytest.mark.parametrize(("resolution", "limit"), [(256, 1.58), pytest.param(512, 1.50, marks=pytest.mark.slow)])
def test_arithmetic_limits_what_caching_can_give(configs_of_sd15, resolution, limit):
    counted = step_tflop(configs_of_sd15[0], resolution)
    assert sum(counted.values()) / counted["train"] == pytest.approx(limit, abs=0.005)


def test_the_large_base_is_written_in_the_layout_that_is_read(tmp_path, monkeypatch, random_base):
    small = load_base(random_base)
    parts = {name: lambda name=name: getattr(small, name) for name in recipe.PARTS}
    monkeypatch.setattr(recipe, "PARTS", parts)
    run_command(["samples", "sd15", str(tmp_path / "large")])
    base = load_base(tmp_path / "large")
    assert base.tokenizer("a winter landscape").input_ids[1:-1] and base.tokenizer.model_max_length == 77
    assert base.scheduler.config.prediction_type == "epsilon"
    with pytest.raises(UserError, match="exists: choose another folder"):
        recipe.build_sd15(tmp_path / "large")
    monkeypatch.setattr(recipe, "SIZE_OF_SD15", 1e18)
    with pytest.raises(UserError, match="of free disk space"):
        recipe.build_sd15(tmp_path / "other")


@pytest.mark.slow
def test_the_real_script_is_timed_unchanged(landscapes, random_base, tmp_path):
    if not os.environ.get("SEGCN_PEER"):
        pytest.skip("set SEGCN_PEER=.../examples/controlnet/train_controlnet.py of diffusers to run it")
    began = time.time()
    words = {
        "peer": os.environ["SEGCN_PEER"], "pretrained_model_name_or_path": random_base, "dataset_name": landscapes,
        "output_dir": tmp_path, "resolution": 64, "rounds": 1, "measured_steps": 2, "warmup_steps": 1,
        "variants": ",".join(VARIANTS),
    }  # fmt: skip
    run_command(["bench", "train", *(str(word) for name, value in words.items() for word in (f"--{name}", value))])
    entries = json.loads((tmp_path / "train.json").read_text())
    assert len(entries) == 2 * len(VARIANTS)
    assert all(entry["began"] > began and entry["samples_per_second"] > 0 for entry in entries)
    assert "not measured" not in (tmp_path / "train.txt").read_text()
