"""Promise: a light ControlNet trains a few per cent of a full one, shares the rest with its base, opens elsewhere."""

import re
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from kills import ended
from runs import log_of, tree
from safetensors.torch import load_file

from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import find_controlnet, generate, load_pipeline
from segcn.models.base import load_base
from segcn.models.controlnet import NEW, load_controlnet, make_controlnet, make_light
from segcn.models.lora import changed_layers
from segcn.train.config import LORA_TARGETS
from segcn.train.log import training_lines
from segcn.train.loop import micro_steps, train
from segcn.train.memory import GB, accounting
from segcn.train.setup import prepare, resolve
from segcn.utils.args import make
from segcn.utils.errors import UserError
from segcn.utils.paths import LIGHT_WEIGHTS, WEIGHTS

LIGHT = {"controlnet": "lora", "lora_rank": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def straight(quick, tmp_path_factory):
    """The folder of six steps without a break."""
    return train(quick(tmp_path_factory.mktemp("runs") / "straight", **LIGHT, use_ema=True))


def test_at_stable_diffusions_size_it_trains_a_twentieth_and_holds_no_other_weights():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        full = make_controlnet(unet)
        light = make_light(unet, 16, 16, tuple(LORA_TARGETS))
    trained = changed_layers(light)
    assert sum(weight.numel() for weight in trained.values()) / full.num_parameters() == pytest.approx(0.052, abs=0.001)
    of_the_base = {id(weight) for weight in unet.parameters()}
    assert all(id(weight) in of_the_base for name, weight in light.named_parameters() if name not in trained)
    counted = [accounting(unet, torch.nn.ParameterList(weights)) for weights in (full.parameters(), trained.values())]
    assert [round(sum(count.values()) / GB, 1) for count in counted] == [9.2, 3.7]


def test_steps_change_its_lora_and_its_new_layers_alone(quick, random_base, tmp_path):
    run = prepare(quick(tmp_path / "run", **LIGHT, max_train_steps=3), check=False)
    controlnet = run.own_networks["controlnet"]
    before = {name: weight.clone() for name, weight in controlnet.named_parameters()}
    list(micro_steps(run))
    changed = {name for name, weight in controlnet.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(changed_layers(controlnet)) and all("lora_" in n or n.startswith(NEW) for n in changed)
    saved = UNet2DConditionModel.from_pretrained(random_base, subfolder="unet").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in run.base.unet.state_dict().items())


def test_a_run_that_is_killed_ends_with_the_same_bytes_and_keeps_small_files(quick, straight, warm, tmp_path):
    cut = quick(tmp_path / "cut", **LIGHT, use_ema=True)
    assert ended(warm, cut, 2, 6) == -signal.SIGKILL  # amid the second of its two saves
    assert not (tmp_path / "cut" / "checkpoint-6").exists()
    train(cut)
    assert log_of(tmp_path / "cut") == log_of(straight)
    assert tree(tmp_path / "cut" / "checkpoint-6") == tree(straight / "checkpoint-6")
    assert (tmp_path / "cut" / LIGHT_WEIGHTS).read_bytes() == (straight / LIGHT_WEIGHTS).read_bytes()
    assert not list(straight.rglob(WEIGHTS)) and all(
        "lora_" in n or ".controlnet_" in n for n in load_file(straight / LIGHT_WEIGHTS)
    )


def outputs(controlnet):
    """What a ControlNet gives for one input: its residuals."""
    shape = controlnet.config
    inputs = torch.ones(1, shape.in_channels, 8, 8), 500, torch.ones(1, 77, shape.cross_attention_dim)
    with torch.no_grad():
        down, middle = controlnet(*inputs, controlnet_cond=torch.ones(1, 3, 64, 64) / 2, return_dict=False)
    return torch.cat([one.flatten() for one in (*down, middle)])


def test_it_opens_in_plain_diffusers_by_the_call_on_its_card_and_merged_without_one(
    quick, straight, random_base, landscapes, tmp_path, monkeypatch
):
    base = load_base(random_base)
    ours = outputs(load_controlnet(straight, unet=base.unet))
    code = re.search(r"```python\n(.*?)\npipe", (straight / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "straight").symlink_to(straight)
    (tmp_path / "base").symlink_to(random_base)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    merged = shutil.copytree(straight, tmp_path / "merged")
    train(quick(merged, **LIGHT, use_ema=True, merge=True))
    assert not (merged / LIGHT_WEIGHTS).exists() and (merged / "lora" / LIGHT_WEIGHTS).is_file()
    plain = ControlNetModel.from_pretrained(merged)
    assert (outputs(found["controlnet"]) - ours).abs().max() < 1e-5 * ours.abs().max()
    assert (outputs(plain) - ours).abs().max() < 1e-5 * ours.abs().max()
    assert (outputs(make_controlnet(base.unet)) - ours).abs().max() > 1e-2 * ours.abs().max()

    split, folders = read_split(landscapes, "test"), {"pretrained_model_name_or_path": str(random_base)}
    masks, images = read_mask(split[0].mask, split.palette)[None], []
    for folder in (straight, merged):
        settings = make(
            SampleConfig, "tiny", **folders, controlnet_model_name_or_path=str(folder), num_inference_steps=2
        )
        images.append(generate(load_pipeline(settings, split.palette), masks, ["a lake"], [0], settings).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    monkeypatch.setattr("segcn.generate.pipeline.OUTPUTS", straight.parent)
    assert find_controlnet(str(random_base), split.palette) == str(straight)


@pytest.mark.usefixtures("fresh_precision")
def test_it_goes_on_from_another_with_a_memory_preset_and_validates(quick, straight, landscapes, tmp_path):
    mask = str(read_split(landscapes, "test")[0].mask)
    shown = {"validation_image": [mask], "validation_prompt": ["a lake"], "validation_steps": 1, "max_train_steps": 1}
    more = {"controlnet_model_name_or_path": str(straight), "memory_preset": 8}
    folder = train(quick(tmp_path / "more", **LIGHT | shown | more))
    assert np.isfinite(log_of(folder)[-1]["loss"]) and (folder / "validation" / "step-000001.png").is_file()
    there, here = (load_file(place / LIGHT_WEIGHTS) for place in (straight, folder))
    moved = max((there[name] - here[name]).abs().max() for name in there)
    assert 0 < moved < 0.011  # a step of Adam at most


def test_its_learning_rate_is_higher_unless_one_is_given(quick):
    rates = [resolve(quick("x", preset, **more)).learning_rate for preset in ("sd15", "tiny")
             for more in ({}, {"controlnet": "lora"}, {"controlnet": "lora", "learning_rate": 1e-5})]  # fmt: skip
    assert rates == [5e-6, 1e-4, 1e-5, 1.5e-3, 3e-3, 1e-5]


@pytest.mark.slow
def test_two_processes_train_it_as_one(quick, tmp_path):
    smooth = {
        **LIGHT,
        "adam_epsilon": 1e-2,
        "max_train_steps": 3,
    }  # at 1e-8 first steps are the signs of rounding errors
    one = train(quick(tmp_path / "one", train_batch_size=4, **smooth))
    list(training_lines(quick(tmp_path / "two", train_batch_size=2, **smooth), 2))
    found = [load_file(folder / LIGHT_WEIGHTS) for folder in (one, tmp_path / "two")]
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_what_makes_no_sense_is_named(quick, straight, random_controlnet, tmp_path):
    light, full = ({"controlnet_model_name_or_path": str(place)} for place in (straight, random_controlnet))
    for wrong, message in (
        ({**LIGHT, "train_unet": "lora"}, "--controlnet lora: expected a frozen encoder"),
        ({"merge": True}, "--merge: expected --controlnet lora"),
        ({**LIGHT, **full}, "--controlnet lora: expected a light ControlNet to go on from, found a full one"),
        (light, "expected a full ControlNet, found a light one; go on with it by --controlnet lora"),
        ({**LIGHT, **light, "lora_rank": 4}, "found another; go on with --lora_rank 2 --lora_alpha 2 --lora_targets"),
    ):
        with pytest.raises(UserError, match=message):
            train(quick(tmp_path / "out", **wrong))
    with pytest.raises(UserError, match="make_controlnet: expected --controlnet full"):
        train(quick(tmp_path / "out", **LIGHT), make_controlnet=make_controlnet)
    with torch.device("meta"), pytest.raises(UserError, match="is opened with the base that it was trained on"):
        load_controlnet(straight, unet=UNet2DConditionModel())
