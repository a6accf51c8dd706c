"""Promise: one command measures the embedded base on images that it never saw, and resumes."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from segcn.cli import run_command
from segcn.data.captions import SEASONS, TIMES
from segcn.data.metadata import read_split
from segcn.samples import measure as measuring
from segcn.samples.config import MeasureConfig
from segcn.samples.earth import STYLES, describe_tile
from segcn.samples.landscapes.scene import describe
from segcn.samples.measure import measure_sample_base, measure_table, open_generator
from segcn.samples.recognizer import OF_EARTH, OF_LANDSCAPES, RecognizerRecipe, recognized, train_recognizer, words_of
from segcn.utils.errors import UserError

TOY = MeasureConfig(
    resolution=64, num_inference_steps=2, count=3, held_out=4, earth_count=2, segmenter_steps=2, recognizer_steps=2,
    batch_size=2, timings=1,
)  # fmt: skip


def no_maps(*args, **kwargs):
    raise UserError("the Earth samples need a package: pip install it")


@pytest.fixture(scope="module")
def measured(landscapes, tmp_path_factory):
    config = dataclasses.replace(TOY, output_dir=str(tmp_path_factory.mktemp("measure")))
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "write_earth", no_maps)
        metrics = measure_sample_base(config, read_split(landscapes, "train"), lines.append)
    return config, metrics, lines


def test_everything_is_measured_and_written_and_one_line_says_how_to_get_the_maps(measured):
    config, metrics, lines = measured
    assert metrics == json.loads((config.folder / "measure.json").read_text())
    assert 20 < metrics["autoencoder"]["psnr"] < 60 and 0.5 < metrics["autoencoder"]["ssim"] <= 1
    assert set(metrics["recognized"]) == {"real", "reconstructions", "with_mask", "without_classes", "captions_alone"}
    assert set(metrics["share_of_ceiling"]) == {*metrics["recognized"], "without_captions"}
    assert metrics["share_of_ceiling"]["real"]["mean"] == 1
    assert {one["images"] for one in metrics["faithfulness"].values()} == {3}
    assert metrics["seconds"]["each_of_many"] > 0 and metrics["seconds"]["steps"] == 20
    table = (config.folder / "table.txt").read_text().strip()
    assert table == measure_table(metrics) and table in lines[-1] and "captions alone" in table
    assert metrics["recognized_earth"] is None and "Earth" not in table
    assert sum("left out" in line and "pip install" in line for line in lines) == 1
    image = Image.open(config.folder / "grid.png").convert("RGB")  # a mask and four captions a row
    assert image.height / image.width == pytest.approx(2 / 3, abs=0.1)
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 1000


@pytest.mark.slow
def test_it_resumes_with_more_images(measured, landscapes):
    config, _, _ = measured
    generated = config.folder / "with_mask" / "images" / "000000.png"
    before, lines = generated.stat().st_mtime_ns, []
    more = measure_sample_base(
        dataclasses.replace(config, count=4, earth_count=0), read_split(landscapes, "train"), lines.append
    )
    assert more["faithfulness"]["with_mask"]["images"] == 4 and generated.stat().st_mtime_ns == before
    assert any("3 of 4 images" in line for line in lines)
    assert any("reused" in line for line in lines) and not any("recognizer: " in line for line in lines)


def test_captions_hold_season_time_and_style():
    for season, hour in ((season, hour) for season in range(4) for hour in range(4)):
        assert words_of(describe(SEASONS[season], list(TIMES)[hour], ["a lake"]), OF_LANDSCAPES) == [season, hour]
    assert [words_of(describe_tile(name, np.eye(8)[2]), OF_EARTH) for name in STYLES] == [[0], [1], [2]]


def test_the_recognizer_learns(landscapes, tmp_path):
    train = read_split(landscapes, "train")
    recipe = RecognizerRecipe(steps=80, batch_size=12)
    recognizer = train_recognizer(train, OF_LANDSCAPES, tmp_path, recipe, log=lambda line: None)
    assert min(recognized(train, recognizer).values()) > 0.6
    assert set(recognized(read_split(landscapes, "test"), recognizer)) == {"season", "time of day"}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="--count 600: expected 2 to 256"):
        run_command(["samples", "measure", "--count", "600"])
    with pytest.raises(UserError, match="expected a ControlNet"):
        open_generator(dataclasses.replace(TOY, pretrained_model_name_or_path=str(tmp_path)))
