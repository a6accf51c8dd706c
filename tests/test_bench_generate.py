"""Promise: both ways paint the same masks in turns, what stands is kept, and claims are held to what was measured."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from segcn.bench.config import BenchGenerateConfig
from segcn.bench.generate import (
    Side,
    bench_generate,
    excess_interval,
    jackknife,
    kernel_distance,
    peaks,
    table,
    variant,
    verdicts,
)
from segcn.cli import start
from segcn.data.metadata import check_split, read_image, read_split
from segcn.evaluate.metrics import color_shift, to_lab
from segcn.generate.config import GenerateConfig, SampleConfig
from segcn.models.base import load_base
from segcn.models.controlnet import make_controlnet
from segcn.models.segmenter import SegmenterConfig, train_segmenter
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def controlnet(random_base, landscapes, tmp_path_factory):
    """The folder of a ControlNet that is heard."""
    network = make_controlnet(load_base(random_base).unet)
    for block in network.controlnet_down_blocks:
        block.weight.data += 0.3
    folder = tmp_path_factory.mktemp("bench") / "controlnet"
    network.save_pretrained(folder)
    read_split(landscapes, "test").palette.save(folder / "palette.json")
    return folder


@pytest.fixture(scope="module")
def judge(landscapes, tmp_path_factory):
    """The folder of a hardly trained segmenter."""
    settings = SegmenterConfig(steps=4, batch_size=4, width=16, resolution=64)
    folder = tmp_path_factory.mktemp("bench") / "judge"
    train_segmenter(read_split(landscapes, "train"), settings, folder, len)
    return folder


@pytest.fixture
def bench(random_base, landscapes, controlnet, judge, tmp_path):
    """A function from settings to a config of two steps, six masks and turns of three rows."""
    given = {
        "pretrained_model_name_or_path": str(random_base),
        "controlnet_model_name_or_path": str(controlnet),
        "dataset_name": str(landscapes),
        "output_dir": str(tmp_path / "out"),
        "segmenter": str(judge),
        "num_inference_steps": 2,
        "plain_steps": 2,
        "plain_guidance_scales": [4.0],
        "batch_size": 2,
        "rows_a_turn": 3,
        "memory_masks": 0,
    }
    return lambda **settings: BenchGenerateConfig(**given | settings)


def test_both_ways_with_equal_settings_paint_the_same_pictures_in_turns(bench, tmp_path):
    said = []
    found = bench_generate(bench(scheduler="unipc", guidance_scale=4.0), said.append)
    order = [line.split(", ")[1].split(":")[0] for line in said if line.startswith("rows ")]
    assert order == ["diffusers", "segcn", "segcn", "diffusers"]
    plain, ours = (read_split(side["folder"]) for side in found["sides"].values())
    for one, other in zip(plain.records, ours.records, strict=True):
        first, second = read_image(one.image).astype(int), read_image(other.image)
        assert np.abs(first - second).max() <= 1 and first.std() > 10
    check_split(plain)
    assert len(plain) == len(ours) == found["images"] == 6
    against = found["against"]["segcn"]
    assert abs(against["miou_less_best"]) < 0.02 and against["times_faster"] > 0
    assert abs(against["kernel_distance_less_best"]) < found["sides"]["segcn"]["kernel_distance"] / 10
    assert found["undisturbed"]["together"] == found["undisturbed"]["turns"] == 2
    assert json.loads((tmp_path / "out" / "bench_generate.json").read_text()) == found
    assert (tmp_path / "out" / "bench_generate.txt").read_text().strip() in said[-1]


@pytest.mark.slow
def test_what_was_painted_is_kept_and_a_stopped_one_goes_on(bench, monkeypatch):
    config, painted = bench(plain_guidance_scales=[4.0, 7.5]), []
    paint = Side.paint

    def counted(side, masks, captions, rows):
        painted.append((side.title, rows))
        if stop and len(painted) == 6:
            raise KeyboardInterrupt
        return paint(side, masks, captions, rows)

    monkeypatch.setattr(Side, "paint", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        bench_generate(config, len)
    first_turns = [title for title, rows in painted if len(rows) == 3]
    stop, began = False, len(painted)
    found = bench_generate(config, len)
    timed = [one for one in painted[began:] if len(one[1]) == 3]
    assert len(first_turns) - 1 + len(timed) == 3 * 2  # three ways, two turns; the sixth call was cut
    assert found["undisturbed"]["together"] == 1
    finished = len(painted)
    assert bench_generate(config, len) == found and len(painted) == finished
    assert "1 of 2 turns were not painted in one run" in (config.out / "bench_generate.txt").read_text()


def test_variants_are_painted_and_compared_without_the_plain_way(bench):
    words = ["guidance_end=0.5", "num_inference_steps=1,scheduler=ddim"]
    found = bench_generate(bench(without_plain=True, variants=words, split="train", limit=4), len)
    assert list(found["sides"]) == [f"segcn {word}" for word in words] and not found["against"]
    assert found["sides"][f"segcn {words[1]}"]["settings"]["scheduler"] == "ddim" and found["images"] == 4
    assert len({line.count("+-") for line in table(found)[1:]}) == 1


def test_a_variant_is_read_by_its_flags_types():
    settings = variant(SampleConfig(), "guidance_end=0.5,num_inference_steps=7,negative_prompt=x y")
    assert (settings.guidance_end, settings.num_inference_steps) == (0.5, 7)
    assert settings.negative_prompt == "x y"
    for words in ("guidance=1", "num_inference_steps=few", "resolution=64", "torch_compile=True"):
        with pytest.raises(UserError, match="--variants"):
            variant(SampleConfig(), words)


def test_what_would_fail_after_hours_fails_at_once(bench):
    for wrong in ({"limit": 1}, {"variants": ["guidance_end=2"]}, {"plain_guidance_scales": [1.0]}):
        with pytest.raises(UserError, match="--"):
            bench_generate(bench(**wrong), len)
    assert not bench().out.exists()


def test_the_kernel_distance_grows_with_the_distance_and_its_interval_covers_it():
    numbers = torch.Generator().manual_seed(0)
    near, far = [], []
    for _ in range(60):
        real, same = torch.randn(2, 100, 4, generator=numbers, dtype=torch.float64)
        value, half = jackknife(lambda rows, real=real, same=same: kernel_distance(real[rows], same[rows]), 100)
        near.append(abs(value) <= half)
        far.append(kernel_distance(real, same + 1) > value + half)
    assert sum(near) >= 50 and all(far)


def test_the_jackknife_gives_the_textbooks_interval_of_a_mean_and_pairs_rows():
    numbers = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=numbers, dtype=torch.float64)
    mean, half = jackknife(lambda rows: float(values[rows].mean()), 400)
    assert mean == pytest.approx(float(values.mean()))
    assert half == pytest.approx(1.96 / math.sqrt(400), rel=0.4)
    real, ours = torch.randn(2, 100, 4, generator=numbers, dtype=torch.float64)
    assert excess_interval(real, ours, ours) == (0, 0)
    assert excess_interval(real, ours + 1, ours)[0] > 0 > excess_interval(real, ours, ours + 1)[0]


def test_colors_are_cielab_and_a_shift_has_its_sign():
    known = {(255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20),
             (0, 0, 255): (32.30, 79.19, -107.86), (10, 10, 10): (2.74, 0, 0)}  # fmt: skip
    found = to_lab(np.array(list(known), np.uint8))
    assert np.abs(found - np.array(list(known.values()))).max() < 0.1
    real = [np.full((2, 2, 3), (90, 90, 90), np.uint8), np.full((2, 2, 3), (110, 110, 110), np.uint8)]
    redder = [image + np.array([20, 0, 0], np.uint8) for image in real]
    shift = color_shift(real, redder)
    assert shift["a"] > 5 and shift["L"] > 1
    assert shift["delta_e"] == pytest.approx(math.hypot(shift["L"], shift["a"], shift["b"]))
    assert color_shift(real, real[::-1])["delta_e"] == pytest.approx(0)


@pytest.mark.parametrize(("changes", "missed"), [
    ({}, []),
    ({"times_faster": 3.9}, ["images a second"]),
    ({"miou_less_best": -0.03}, ["mIoU"]),
    ({"kernel_distance_less_best": 0.002}, ["kernel distance"]),
])  # fmt: skip
def test_a_promise_that_is_not_kept_is_called_missed(changes, missed):
    one = {"times_faster": 4.1, "times_faster_range": [4.0, 4.2], "miou_less_best": -0.01,
           "kernel_distance_less_best": 0.0005, "kernel_distance_less_best_interval": 0.001}  # fmt: skip
    peak = {"100": 1.0, "1000": 1.2 if not changes else 1.01}
    lines = list(verdicts({"against": {"segcn": one | changes}, "sides": {"segcn": {"peak_gib": peak}}}))[1:]
    expected = missed if changes else ["peak memory from 100 to 1000"]
    assert len(lines) == 4 and sum("MISSED" in line for line in lines) == 1
    assert expected[0] in next(line for line in lines if "MISSED" in line)


def test_the_command_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        start(["bench", "generate", "--help"])
    said = capsys.readouterr().out
    assert "--plain_guidance_scales" in said and "--memory_masks" in said and "--guidance_end" in said


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(bench, landscapes, tmp_path):
    settings = {field.name: getattr(bench(), field.name) for field in dataclasses.fields(SampleConfig)}
    where = {"controls": str(landscapes), "split": "test", "output_dir": str(tmp_path / "memory")}
    for batch_size, counts in ((2, (2, 6)), (0, (2,))):
        found = peaks(GenerateConfig(**settings, **where, batch_size=batch_size), counts)
        assert list(found) == [str(count) for count in counts] and all(0.2 < gib < 8 for gib in found.values())
    assert not (tmp_path / "memory").exists()
