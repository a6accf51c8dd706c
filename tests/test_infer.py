"""Promise: one mask and some words become an image, or a grid of them, that can be made again from what it holds."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from malformed import png_begun
from PIL import Image

from segcn.data.masks import write_mask
from segcn.data.metadata import read_split
from segcn.generate import infer as inferring
from segcn.generate.config import InferConfig, SampleConfig
from segcn.generate.infer import infer, read_settings
from segcn.generate.pipeline import Pipeline, load_pipeline
from segcn.models.base import base_fingerprint
from segcn.models.controlnet import load_controlnet
from segcn.utils.args import make
from segcn.utils.errors import UserError


@pytest.fixture
def config(random_base, random_controlnet, landscapes, tmp_path):
    return make(
        InferConfig, "tiny", pretrained_model_name_or_path=str(random_base),
        controlnet_model_name_or_path=str(random_controlnet),
        control=str(landscapes / "test" / "masks" / "000000.png"), prompt=["a lake", "a house"],
        num_inference_steps=2, out=str(tmp_path / "grid.png"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(base, random_controlnet, landscapes):
    palette = read_split(landscapes, "test").palette
    return Pipeline(base, load_controlnet(random_controlnet).eval(), palette, str(random_controlnet))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, pipeline):
    monkeypatch.setattr(inferring, "load_pipeline", lambda *_: pipeline)


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a network fails the test."""
    monkeypatch.setattr(inferring, "load_pipeline", lambda *_: pytest.fail("loaded"))


def test_prompts_are_rows_and_seeds_are_columns_and_nothing_is_overwritten(config, tmp_path):
    grid = np.asarray(Image.open(infer(replace(config, seeds=[3, 9, 3]))))
    assert grid.shape == (128, 192, 3)
    assert (grid[:, :64] == grid[:, 128:]).all() and (grid[:, :64] != grid[:, 64:128]).any()
    alone = replace(config, prompt=["a house"], seed=9, out=str(tmp_path / "one.png"))
    one = np.asarray(Image.open(infer(alone))).astype(int)
    assert np.abs(one - grid[64:, 64:128]).max() <= 1
    with pytest.raises(UserError, match="exists"):
        infer(config)


def test_the_image_holds_every_setting_and_can_be_made_again_from_them(config, tmp_path):
    wanted = replace(config, prompt=['<b>"a lake"</b> 草'], num_images=2, guidance_scale=3.5)
    found = read_settings(infer(wanted))
    assert set(found["settings"]) == {field.name for field in dataclasses.fields(SampleConfig)}
    assert found["prompt"] == wanted.prompt and found["seeds"] == [[0, 0], [0, 1]] and found["control"] == "000000.png"
    assert found["base_fingerprint"] == base_fingerprint(config.pretrained_model_name_or_path)
    assert len(found["controlnet_weights"]) == 16
    again = InferConfig(**found["settings"], control=config.control, prompt=found["prompt"], num_images=2,
                        out=str(tmp_path / "again.png"))  # fmt: skip
    assert infer(again).read_bytes() == (tmp_path / "grid.png").read_bytes()
    with pytest.raises(UserError, match="found no settings in it"):
        read_settings(config.control)


def test_any_size_that_the_base_takes_is_generated_and_another_is_named(config, landscapes, tmp_path):
    split = read_split(landscapes, "test")
    for name, shape in (("wide", (32, 72)), ("odd", (32, 70))):
        write_mask(tmp_path / f"{name}.png", np.zeros(shape, np.uint8), split.palette)
    wide = replace(config, control=str(tmp_path / "wide.png"), palette=str(landscapes / "palette.json"))
    assert Image.open(infer(wide)).size == (72, 64)
    with pytest.raises(UserError, match="70 x 32"):
        infer(replace(wide, control=str(tmp_path / "odd.png"), out=str(tmp_path / "odd_out.png")))


def test_what_cannot_be_is_named_before_a_network_is_loaded(config, no_loading):
    for changed, found in (
        ({"control": "nowhere.png"}, "--control nowhere.png"), ({"prompt": []}, "needs --control"),
        ({"out": "/proc/nowhere/o.png"}, "cannot be written"), ({"out": "o.jpg"}, "ends in .png"),
        ({"num_images": 0}, "--num_images"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=found):
            infer(replace(config, **changed))


@pytest.mark.parametrize("content, palette, found", [
    (b"", None, r"mask\.png.*cannot be read"), (png_begun(30000, 30000), None, r"mask\.png.*too large"),
    (png_begun(64, 64), "{", r"palette\.json"),
], ids=["broken", "huge", "broken palette"])  # fmt: skip
def test_a_mask_or_palette_that_cannot_be_read_is_named_before_a_network_is_loaded(
    config, landscapes, tmp_path, no_loading, content, palette, found
):
    (tmp_path / "mask.png").write_bytes(content)
    (tmp_path / "palette.json").write_text(palette or (landscapes / "palette.json").read_text())
    with pytest.raises(UserError, match=found):
        infer(replace(config, control=str(tmp_path / "mask.png")))


def test_a_mask_of_unknown_colors_is_named_without_a_palette_of_its_own_too(config, tmp_path):
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"color \[1, 2, 3\] \(4096 pixels\)"):
        infer(replace(config, control=str(tmp_path / "mask.png")))


def test_a_controlnet_that_is_not_there_is_named(random_base, landscapes):
    settings = SampleConfig(pretrained_model_name_or_path=str(random_base), controlnet_model_name_or_path="nowhere")
    for palette in (None, read_split(landscapes, "test").palette):
        with pytest.raises(UserError, match="nowhere: expected a ControlNet"):
            load_pipeline(settings, palette)
