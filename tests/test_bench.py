"""Promise: training and generation are measured beside an unchanged baseline in turns, and resume."""

import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

from segcn.bench import gpu, train
from segcn.bench.config import VARIANTS, BenchGenerateConfig, BenchGpuConfig, BenchTrainConfig
from segcn.bench.generate import Side, bench_generate, generate_table, read_masks, variant
from segcn.bench.gpu import bench_gpu
from segcn.bench.timing import run_timed
from segcn.bench.train import CheckpointScorer, bench_train, by_round, command, count_tflop, variant_words
from segcn.cli import run_command
from segcn.data.colors import to_lab
from segcn.data.files import read_image
from segcn.data.metadata import check_split, read_split
from segcn.evaluate.metrics import color_shift
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline
from segcn.models.base import load_base
from segcn.models.controlnet import make_controlnet
from segcn.models.segmenter import SegmenterConfig, train_segmenter
from segcn.samples.base_model import recipe
from segcn.train import validation
from segcn.utils.errors import UserError

USED = "StableDiffusionControlNetPipeline"  # by diffusers' script
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
held = b"x" * ({megabytes} * 2**20)  # {used}
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
        (tmp_path / f"{side}.py").write_text(STAND_IN.format(side=side, pace=pace, megabytes=megabytes, used=USED))
    monkeypatch.setattr(train, "OURS", [sys.executable, str(tmp_path / "ours.py")])
    given = {
        "baseline": str(tmp_path / "baseline.py"), "pretrained_model_name_or_path": str(random_base),
        "dataset_name": str(landscapes), "output_dir": str(tmp_path / "bench"), "resolution": 64, "warmup_steps": 1,
        "measured_steps": 3, "variants": "same",
    }  # fmt: skip
    return lambda **settings: BenchTrainConfig(**given | settings)


def test_sides_run_in_turns_give_ratios_and_finished_runs_are_kept(bench):
    lines = []
    config = bench(rounds=2)
    entries = bench_train(config, lines.append)
    assert (config.folder / "journal.txt").read_text().split() == ["baseline", "ours", "ours", "baseline"]
    assert by_round(entries, "same", "samples_per_second").ratio.tolist() == pytest.approx([2, 2])
    assert by_round(entries, "same", "peak_gib").ratio.max() < 0.6
    assert json.loads((config.folder / "train.json").read_text()) == entries
    assert {"command", "versions", "machine", "other_load", "step_ends"} <= entries[0].keys()
    assert any("same optimizer" in line and line.count("x") >= 3 for line in lines[-1].splitlines())
    assert (config.folder / "train.txt").read_text().strip() in lines[-1]
    assert not list((config.folder / "runs").glob("*/"))
    assert bench_train(bench(rounds=3), lines.append)[:4] == entries
    assert (config.folder / "journal.txt").read_text().split()[4:] == ["baseline", "ours"]


def test_start_up_and_saving_do_not_count_as_steady_steps(bench, tmp_path):
    slow_start = (tmp_path / "ours.py").read_text().replace("clock = time.time()", "clock = time.time() + 100")
    saving = slow_start.replace("    weights.write_text", "    clock += 1000; weights.write_text")
    (tmp_path / "ours.py").write_text(saving)
    entry = next(entry for entry in bench_train(bench(rounds=1), len) if entry["side"] == "ours")
    assert entry["seconds_per_step"] == pytest.approx(10) and entry["samples_per_second"] == pytest.approx(0.8)
    assert 110 < entry["first_step"] < 140 and 140 < 4 * 8 / entry["samples_per_second_with_start"] < 170


def test_both_sides_get_the_same_flags_and_train_the_same_network(bench, base):
    config = bench(max_train_samples=7)
    lines = [command(config, side, Path("/x"), 5, 5, variant_words(config, "bf16", side)) for side in train.SIDES]
    theirs, ours = ([word for word in line if word.startswith("--")] for line in lines)
    assert [name for name in ours if name not in theirs] == ["--logging_steps", "--augment", "--reward_weight"]
    assert set(theirs) <= set(ours)
    assert variant_words(config, "memory", "baseline") == variant_words(config, "ours", "baseline")
    alone = bench(baseline="")
    other, own = (command(alone, side, Path("/x"), 5, 5, variant_words(alone, "same", side)) for side in train.SIDES)
    assert [word for word in " ".join(other).split("--") if word not in " ".join(own).split("--")] == ["cache none "]
    start = ControlNetModel.from_pretrained(variant_words(config, "ours", "ours")[-1])
    assert start.config.conditioning_embedding_out_channels == [16, 32, 96, 256]
    assert make_controlnet(base.unet).num_parameters() < start.num_parameters()


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


@pytest.mark.parametrize(("settings", "script", "said"), [
    ({"baseline": "nowhere.py"}, None, "nowhere.py: no such file"),
    ({}, "StableDiffusionXLControlNetPipeline", "a script for Stable Diffusion 1.x or 2.x, which uses StableDiffusion"),
    ({"variants": "fast"}, None, "--variants fast: expected some of same, ours"),
    ({"max_train_samples": 99}, None, "--max_train_samples 99: .*landscapes has 12 rows"),
    ({"dataset_name": "nowhere"}, None, "nowhere: no such folder"),
    ({"until_faithful": True, "faithful_steps": 2}, None, "2: expected at least --checkpointing_steps, 50"),
    ({}, f"raise ImportError('diffusers 9')  # {USED}", "same-baseline-1: exit code 1: ImportError: diffusers 9"),
    ({}, f"# {USED}", "found none of step 1; see .*same-baseline-1.log"),
])  # fmt: skip
def test_mistakes_are_named(bench, tmp_path, settings, script, said):
    if script is not None:
        (tmp_path / "baseline.py").write_text(script)
    with pytest.raises(UserError, match=said):
        bench_train(bench(**settings), len)


def test_the_time_until_masks_are_followed_is_that_of_checkpoints_scored_later(bench, monkeypatch):
    scored = []

    class StandInScorer(CheckpointScorer):
        """Images follow their masks by 0.004 more each step; the ceiling is 0.06."""

        def __init__(self, config, log):
            self.ceiling, self.log = 0.06, log

        def faithfulness_of(self, controlnet):
            scored.append(controlnet)
            return 0.004 * int(controlnet.parent.name.split("-")[1])

    monkeypatch.setattr(train, "CheckpointScorer", StandInScorer)
    lines = []
    config = bench(rounds=1, until_faithful=True, faithful_steps=10, checkpointing_steps=2, variants="",
                   baseline_learning_rates=[1e-5, 1e-3])  # fmt: skip
    entries = bench_train(config, lines.append)
    titles = ["diffusers at 1e-05", "diffusers at 0.001", "segcn at its defaults"]
    assert [entry["title"] for entry in entries] == titles
    assert [entry["reached"] for entry in entries] == [8, 8, 8] and len(scored) == 3 * 4
    assert [160 < entry["saved_at"]["8"] < 180 for entry in entries] == [True, True, False]
    assert 80 < entries[2]["saved_at"]["8"] < 100 and "the fastest baseline / segcn: " in lines[-1]
    assert bench_train(config, lines.append) == entries and len(scored) == 3 * 4
    assert len((config.folder / "journal.txt").read_text().split()) == 3


def test_a_checkpoint_is_scored_by_what_it_generates(bench, random_base, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "SegmenterConfig", partial(SegmenterConfig, steps=2, width=8))
    config = bench(faithfulness_rows=1)
    config.folder.mkdir()
    scorer = CheckpointScorer(config, len)
    for step in (5, 10):
        make_controlnet(scorer.base.unet).save_pretrained(tmp_path / "run/out" / f"checkpoint-{step}" / "controlnet")
    scorer.ceiling, entry = 9.0, {"title": "a run", "where": str(tmp_path / "run")}
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


@pytest.mark.parametrize(("resolution", "limit"), [(256, 1.58), pytest.param(512, 1.50, marks=pytest.mark.slow)])
def test_arithmetic_limits_what_caching_can_give_for_a_base_of_stable_diffusions_size(
    configs_of_sd15, resolution, limit
):
    folder, counts = configs_of_sd15
    text, rest = {"text_encoder": 123_060_480}, {"unet": 859_520_964, "vae": 83_653_863, "controlnet": 361_279_120}
    assert counts == text | rest
    counted = count_tflop(folder, resolution)
    assert sum(counted.values()) / counted["train"] == pytest.approx(limit, abs=0.005)


def test_the_large_base_is_written_in_the_layout_that_is_read(tmp_path, monkeypatch, base):
    monkeypatch.setattr(recipe, "PARTS", {name: partial(getattr, base, name) for name in recipe.PARTS})
    run_command(["samples", "sd15", str(tmp_path / "large")])
    large = load_base(tmp_path / "large")
    assert large.tokenizer("a winter landscape").input_ids[1:-1] and large.tokenizer.model_max_length == 77
    assert large.scheduler.config.prediction_type == "epsilon"
    with pytest.raises(UserError, match="exists: choose another folder"):
        recipe.build_sd15(tmp_path / "large")
    monkeypatch.setattr(recipe, "SIZE_OF_SD15", 1e18)
    with pytest.raises(UserError, match="of free disk space"):
        recipe.build_sd15(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.skipif("SEGCN_BASELINE" not in os.environ, reason="set SEGCN_BASELINE=.../train_controlnet.py")
def test_the_real_script_is_timed_unchanged(landscapes, random_base, tmp_path):
    began = time.time()
    words = f"""bench train --baseline {os.environ["SEGCN_BASELINE"]} --pretrained_model_name_or_path {random_base}
        --dataset_name {landscapes} --output_dir {tmp_path} --resolution 64 --rounds 1 --measured_steps 2
        --warmup_steps 1 --variants {",".join(VARIANTS)}""".split()
    run_command(words)
    entries = json.loads((tmp_path / "train.json").read_text())
    assert len(entries) == 2 * len(VARIANTS)
    assert all(entry["began"] > began and entry["samples_per_second"] > 0 for entry in entries)
    assert "not measured" not in (tmp_path / "train.txt").read_text()


@pytest.fixture(scope="module")
def kind():
    """The family of the toy."""
    return "sdxl"


def test_each_size_is_trained_and_generated_once_and_the_table_is_of_both(bench, landscapes, tmp_path, monkeypatch):
    stand_ins, lines = bench(), []
    monkeypatch.setattr(gpu, "sample_landscapes", lambda: landscapes)
    monkeypatch.setattr(gpu, "TRAININGS", {"sd15": ("ours", "bf16", "preset-8"), "sdxl": ("bf16", "bf16-light")})
    config = BenchGpuConfig(
        baseline=stand_ins.baseline, output_dir=str(tmp_path / "gpu"), resolutions=[64], toy=True, warmup_steps=1,
        measured_steps=2, batch_sizes=[1, 2], num_inference_steps=2,
    )  # fmt: skip
    found = bench_gpu(config, lines.append)
    assert (config.folder / "gpu.md").read_text().splitlines() == found
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found if line.startswith("|")]
    assert [row[0] for row in rows].count("Stable Diffusion XL") == 3 and len(rows) == 4 + 3 + 4
    heads, first = rows[0], rows[2]
    assert float(first[heads.index("ratio")]) == pytest.approx(2) and first[heads.index("diffusers")] == "0.05"
    images = dict(zip(rows[-4], rows[-2], strict=True))
    assert images["architecture"] == "Stable Diffusion 1.5" and float(images["ratio"]) > 0
    journals = sorted(config.folder.glob("*/journal.txt"))
    ran = [sorted(journal.read_text().split()) for journal in journals]
    # two commands of the baseline for three variants; without a script for XL, segcn is the baseline of each
    assert ran == [["baseline"] * 2 + ["ours"] * 3, ["ours"] * 4]
    assert bench_gpu(config, lines.append) == found
    assert [sorted(journal.read_text().split()) for journal in journals] == ran  # nothing is run again


def test_both_sides_generate_the_same_images_of_xl_however_many_at_once(toy, landscapes, tmp_path):
    base = load_base(toy)
    split = read_split(landscapes, "train").first(3)
    pipeline = Pipeline(base, make_controlnet(base.unet).eval(), split.palette, "")
    settings = SampleConfig(num_inference_steps=2, guidance_scale=7.5, scheduler="unipc", resolution=64)
    masks, captions = read_masks(split, settings), [row.caption for row in split.records]
    images = [Side("", settings, plain, size, pipeline, tmp_path, "").generate(masks, captions, [0, 1, 2])
              for plain, size in ((True, 1), (True, 2), (False, 3))]  # fmt: skip
    assert all(np.abs(images[0].astype(int) - other).max() <= 1 for other in images[1:])
    assert images[0].std() > 5


@pytest.fixture(scope="module")
def generating(base, random_base, landscapes, tmp_path_factory):
    """A function from settings to a config of two steps and turns of three rows; the ControlNet has an effect."""
    folder = tmp_path_factory.mktemp("generating")
    network = make_controlnet(base.unet)
    for block in network.controlnet_down_blocks:
        block.weight.data += 0.3
    network.save_pretrained(folder / "controlnet")
    read_split(landscapes, "test").palette.save(folder / "controlnet" / "palette.json")
    settings = SegmenterConfig(steps=4, batch_size=4, width=16, resolution=64)
    train_segmenter(read_split(landscapes, "train"), settings, folder / "segmenter", len)
    given = {
        "pretrained_model_name_or_path": str(random_base), "dataset_name": str(landscapes),
        "controlnet_model_name_or_path": str(folder / "controlnet"), "segmenter": str(folder / "segmenter"),
        "num_inference_steps": 2, "plain_steps": 2, "plain_guidance_scales": [4.0], "batch_size": 2, "rows_a_turn": 3,
    }  # fmt: skip
    return lambda out, **settings: BenchGenerateConfig(**given | settings, output_dir=str(out))


def test_with_equal_settings_both_sides_generate_the_same_images_in_turns(generating, tmp_path):
    lines = []
    found = bench_generate(generating(tmp_path, scheduler="unipc", guidance_scale=4.0), lines.append)
    order = [line.split(", ")[1].split(":")[0] for line in lines if line.startswith("rows ")]
    assert order == ["diffusers", "segcn", "segcn", "diffusers"]
    plain, ours = (read_split(side["folder"]) for side in found["sides"].values())
    for one, other in zip(plain.records, ours.records, strict=True):
        first, second = read_image(one.image).astype(int), read_image(other.image)
        assert np.abs(first - second).max() <= 1 and first.std() > 10
    check_split(plain)
    assert len(plain) == len(ours) == found["images"] == 6
    against, intervals = found["against"]["segcn"], found["against"]["segcn"]["intervals"]
    assert abs(against["miou_less_best"]) < 0.02 and against["times_faster"] > 0
    low, high = intervals["kernel_distance_less_best"]  # paired: far narrower than the distance's own
    own = found["sides"]["segcn"]["intervals"]["kernel_distance"]
    assert low <= against["kernel_distance_less_best"] <= high and high - low < (own[1] - own[0]) / 10
    assert found["turns_in_one_run"] == found["turns"] == 2
    assert json.loads((tmp_path / "bench_generate.json").read_text()) == found
    assert (tmp_path / "bench_generate.txt").read_text().strip() in lines[-1]


@pytest.mark.slow
def test_what_was_generated_is_kept_and_a_stopped_run_resumes(generating, tmp_path, monkeypatch):
    config, calls, generate = generating(tmp_path, plain_guidance_scales=[4.0, 7.5]), [], Side.generate

    def cut(side, masks, captions, rows):
        calls.append(len(rows))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return generate(side, masks, captions, rows)

    monkeypatch.setattr(Side, "generate", cut)
    with pytest.raises(KeyboardInterrupt):
        bench_generate(config, len)
    found = bench_generate(config, len)
    assert calls.count(3) - 1 == 3 * 2  # three sides, two turns; the sixth call was cut
    assert found["turns_in_one_run"] == 1
    finished = len(calls)
    assert bench_generate(config, len) == found and len(calls) == finished
    assert "1 of 2 turns were not generated in one run" in (config.out / "bench_generate.txt").read_text()


def test_variants_are_compared_without_the_baseline(generating, tmp_path):
    words = ["guidance_end=0.5", "num_inference_steps=1,scheduler=ddim"]
    found = bench_generate(generating(tmp_path, without_plain=True, variants=words, split="train", limit=4), len)
    assert list(found["sides"]) == [f"segcn {word}" for word in words] and not found["against"]
    assert found["sides"][f"segcn {words[1]}"]["settings"]["scheduler"] == "ddim" and found["images"] == 4
    assert [line.startswith("segcn") for line in generate_table(found)] == [False, True, True]


def test_a_variant_is_read_by_its_flags_types_and_what_would_fail_later_fails_at_once(generating, tmp_path):
    settings = variant(SampleConfig(), "guidance_end=0.5,num_inference_steps=7,negative_prompt=x y")
    assert (settings.guidance_end, settings.num_inference_steps) == (0.5, 7)
    assert settings.negative_prompt == "x y"
    for words in ("guidance=1", "num_inference_steps=few", "resolution=64", "torch_compile=True"):
        with pytest.raises(UserError, match="--variants"):
            variant(SampleConfig(), words)
    for wrong in ({"limit": 1}, {"variants": ["guidance_end=2"]}, {"plain_guidance_scales": [1.0]}):
        with pytest.raises(UserError, match="--"):
            bench_generate(generating(tmp_path / "out", **wrong), len)
    assert not (tmp_path / "out").exists()


def test_colors_are_cielab_and_a_shift_has_its_sign():
    colors = np.array([(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255), (10, 10, 10)], np.uint8)
    known = [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86), (2.74, 0, 0)]
    assert np.abs(to_lab(colors) - known).max() < 0.1
    real = [np.full((2, 2, 3), gray, np.uint8) for gray in (90, 110)]
    redder = [image + np.array([20, 0, 0], np.uint8) for image in real]
    shift = color_shift(real, redder)
    assert shift["a"] > 5 and shift["L"] > 1
    assert shift["delta_e"] == pytest.approx(math.hypot(shift["L"], shift["a"], shift["b"]))
    assert color_shift(real, real[::-1])["delta_e"] == pytest.approx(0)
