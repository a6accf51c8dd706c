"""Promise: both sides generate from the same masks in turns, and what is finished is kept."""

import json
import math

import numpy as np
import pytest

from segcn.bench.config import BenchGenerateConfig
from segcn.bench.generate import Side, bench_generate, generate_table, variant
from segcn.data.files import read_image
from segcn.data.metadata import check_split, read_split
from segcn.evaluate.metrics import color_shift, to_lab
from segcn.generate.config import SampleConfig
from segcn.models.base import load_base
from segcn.models.controlnet import make_controlnet
from segcn.models.segmenter import SegmenterConfig, train_segmenter
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def bench(random_base, landscapes, tmp_path_factory):
    """A function from settings to a config of two steps, six masks and turns of three rows.

    The ControlNet has an effect, and the segmenter is hardly trained.
    """
    folder = tmp_path_factory.mktemp("bench")
    network = make_controlnet(load_base(random_base).unet)
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


def test_with_equal_settings_both_sides_generate_the_same_images_in_turns(bench, tmp_path):
    lines = []
    found = bench_generate(bench(tmp_path, scheduler="unipc", guidance_scale=4.0), lines.append)
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
def test_what_was_generated_is_kept_and_a_stopped_run_resumes(bench, tmp_path, monkeypatch):
    config, calls, generate = bench(tmp_path, plain_guidance_scales=[4.0, 7.5]), [], Side.generate

    def counted(side, masks, captions, rows):
        calls.append((side.title, rows))
        if stop and len(calls) == 6:
            raise KeyboardInterrupt
        return generate(side, masks, captions, rows)

    monkeypatch.setattr(Side, "generate", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        bench_generate(config, len)
    first_turns = [title for title, rows in calls if len(rows) == 3]
    stop, began = False, len(calls)
    found = bench_generate(config, len)
    timed = [one for one in calls[began:] if len(one[1]) == 3]
    assert len(first_turns) - 1 + len(timed) == 3 * 2  # three sides, two turns; the sixth call was cut
    assert found["turns_in_one_run"] == 1
    finished = len(calls)
    assert bench_generate(config, len) == found and len(calls) == finished
    assert "1 of 2 turns were not generated in one run" in (config.out / "bench_generate.txt").read_text()


def test_variants_are_compared_without_the_baseline(bench, tmp_path):
    words = ["guidance_end=0.5", "num_inference_steps=1,scheduler=ddim"]
    found = bench_generate(bench(tmp_path, without_plain=True, variants=words, split="train", limit=4), len)
    assert list(found["sides"]) == [f"segcn {word}" for word in words] and not found["against"]
    assert found["sides"][f"segcn {words[1]}"]["settings"]["scheduler"] == "ddim" and found["images"] == 4
    assert [line.startswith("segcn") for line in generate_table(found)] == [False, True, True]


def test_a_variant_is_read_by_its_flags_types():
    settings = variant(SampleConfig(), "guidance_end=0.5,num_inference_steps=7,negative_prompt=x y")
    assert (settings.guidance_end, settings.num_inference_steps) == (0.5, 7)
    assert settings.negative_prompt == "x y"
    for words in ("guidance=1", "num_inference_steps=few", "resolution=64", "torch_compile=True"):
        with pytest.raises(UserError, match="--variants"):
            variant(SampleConfig(), words)


def test_what_would_fail_after_hours_fails_at_once(bench, tmp_path):
    for wrong in ({"limit": 1}, {"variants": ["guidance_end=2"]}, {"plain_guidance_scales": [1.0]}):
        with pytest.raises(UserError, match="--"):
            bench_generate(bench(tmp_path / "out", **wrong), len)
    assert not (tmp_path / "out").exists()


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
