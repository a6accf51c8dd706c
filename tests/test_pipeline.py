"""Promise: our sampling loop paints what diffusers' pipeline paints, does nothing twice, and guides where told."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from segcn.data.dataset import to_control
from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline, control_at, diffusers_pipeline, first_noise, generate, load_pipeline
from segcn.models.base import load_base
from segcn.models.controlnet import make_controlnet
from segcn.utils.errors import UserError

CAPTIONS, ROWS = ["a winter landscape", "a lake at dusk"], [3, 7]
SETTINGS = SampleConfig(num_inference_steps=4, guidance_scale=5.0, negative_prompt="a house", seed=1)


@pytest.fixture(scope="module")
def loud(random_base, landscapes):
    """A painter whose ControlNet is heard."""
    base = load_base(random_base)
    controlnet = make_controlnet(base.unet).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        block.weight.data += 0.3
    return Pipeline(base, controlnet, read_split(landscapes, "test").palette, "random")


@pytest.fixture
def painter(loud):
    """A copy of it, which has painted nothing yet."""
    return Pipeline(copy.deepcopy(loud.base), copy.deepcopy(loud.controlnet), loud.palette, "random")


@pytest.fixture(scope="module")
def masks(landscapes):
    split = read_split(landscapes, "test")
    return np.stack([read_mask(record.mask, split.palette) for record in split.records[:2]])


def by_diffusers(painter, masks, settings, **more):
    """The same images by diffusers' own pipeline, in one call."""
    pipe = diffusers_pipeline(painter.base, settings, painter.controlnet if masks is not None else None)
    size = (64, 64) if masks is None else masks.shape[1:]
    if masks is not None:
        more |= {
            "image": to_control(masks, painter.palette),
            "controlnet_conditioning_scale": settings.controlnet_conditioning_scale,
            "control_guidance_start": settings.control_guidance_start,
            "control_guidance_end": settings.control_guidance_end,
        }
    images = pipe(
        prompt=CAPTIONS, negative_prompt=[settings.negative_prompt] * 2, height=size[0], width=size[1],
        num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
        latents=first_noise(painter.base, ROWS, settings, size), output_type="np", **more,
    ).images  # fmt: skip
    return (images * 255).round().astype(np.uint8)


def apart(one, other):
    """The largest difference of two sets of images, in grey levels."""
    return np.abs(one.astype(int) - other).max()


def sizes_seen(network):
    """How many images each call of a network sees, from now on."""
    sizes = []
    network.register_forward_pre_hook(lambda module, inputs, named: sizes.append(len(inputs[0])), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("scheduler", ["dpm", "unipc", "ddim"])
def test_every_sampler_paints_what_diffusers_pipeline_paints(painter, masks, scheduler, kind):
    config = painter.base.scheduler.config
    painter.base.scheduler = DDPMScheduler.from_config(
        config, prediction_type=kind, rescale_betas_zero_snr=kind[0] == "v"
    )
    settings = dataclasses.replace(SETTINGS, scheduler=scheduler)
    ours = generate(painter, masks, CAPTIONS, ROWS, settings)
    assert ours.shape == (2, 64, 64, 3) and ours.std() > 10 and apart(ours[0], ours[1]) > 10
    assert apart(ours, by_diffusers(painter, masks, settings)) <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"controlnet_conditioning_scale": 0.5, "control_guidance_start": 0.25, "control_guidance_end": 0.75},
    ],
)
def test_without_guidance_and_with_a_window_of_the_mask_it_is_diffusers_too(painter, masks, changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    ours = generate(painter, masks, CAPTIONS, ROWS, settings)
    assert apart(ours, by_diffusers(painter, masks, settings)) <= 1
    assert apart(ours, generate(painter, masks, CAPTIONS, ROWS, SETTINGS)) > 10


def test_guidance_acts_in_its_window_alone_and_other_steps_see_each_picture_once(painter, masks):
    settings = dataclasses.replace(SETTINGS, guidance_start=0.25, guidance_end=0.75)
    sizes = sizes_seen(painter.base.unet)
    ours = generate(painter, masks, CAPTIONS, ROWS, settings)
    assert sizes == [2, 4, 4, 2]
    off = 1 + 1e-6  # at 1 itself diffusers' pipeline would no longer double its batch

    def after_step(pipe, step, timestep, values):
        pipe._guidance_scale = settings.guidance_scale if step in (0, 1) else off
        return values

    first_off = dataclasses.replace(settings, guidance_scale=off)
    assert apart(ours, by_diffusers(painter, masks, first_off, callback_on_step_end=after_step)) <= 1
    assert apart(ours, by_diffusers(painter, masks, settings)) > 10


def test_guidance_is_rescaled_as_diffusers_does(painter):
    settings = dataclasses.replace(SETTINGS, guidance_rescale=0.7)
    ours = generate(painter, None, CAPTIONS, ROWS, settings, (64, 64))
    assert apart(ours, by_diffusers(painter, None, settings, guidance_rescale=0.7)) <= 1
    assert apart(ours, by_diffusers(painter, None, settings)) > 3


def test_the_controlnet_is_asked_only_where_it_acts(painter, masks):
    sizes = sizes_seen(painter.controlnet.conv_in)
    generate(painter, masks, CAPTIONS, ROWS, dataclasses.replace(SETTINGS, control_guidance_end=0.5))
    assert sizes == [4, 4]
    sizes.clear()
    generate(painter, masks, CAPTIONS, ROWS, dataclasses.replace(SETTINGS, controlnet_conditioning_scale=0.0))
    assert sizes == []


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("constant", [2, 2, 2, 2]),
        ("linear", [2, 1.5, 1, 0.5]),
        ("cosine", [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5]),
    ],
)
def test_the_weight_of_the_mask_falls_as_its_schedule_says(painter, masks, schedule, weights):
    settings = dataclasses.replace(SETTINGS, control_schedule=schedule, controlnet_conditioning_scale=2.0)
    assert [control_at(settings, step, 4) for step in range(4)] == pytest.approx(weights)
    painted = generate(painter, masks, CAPTIONS, ROWS, settings)
    constant = generate(painter, masks, CAPTIONS, ROWS, dataclasses.replace(settings, control_schedule="constant"))
    assert (apart(painted, constant) == 0) == (schedule == "constant")


def test_each_caption_is_encoded_once_and_alone(painter, masks):
    sizes = []
    painter.base.text_encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))
    first = generate(painter, masks, CAPTIONS, ROWS, SETTINGS)
    assert sizes == [1, 1, 1]
    again = generate(painter, masks, CAPTIONS[::-1], ROWS, SETTINGS)
    assert sizes == [1, 1, 1] and apart(first, again) > 10


def test_what_was_painted_before_changes_no_byte(painter, loud, masks):
    generate(loud, masks[:1], ["something else"], [0], SETTINGS)
    generate(loud, masks[:1], CAPTIONS[1:], [0], SETTINGS)
    fresh = generate(painter, masks, CAPTIONS, ROWS, SETTINGS)
    assert np.array_equal(fresh, generate(loud, masks, CAPTIONS, ROWS, SETTINGS))


def test_stop_ends_after_the_step_in_which_it_was_asked_for(painter, masks):
    sizes = sizes_seen(painter.base.unet)
    steps = []
    images = generate(painter, masks, CAPTIONS, ROWS, SETTINGS, on_step=lambda step: steps.append(step) or step == 2)
    assert steps == [1, 2] and len(sizes) == 2 and images.shape == (2, 64, 64, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may compile")
def test_compiling_is_refused_without_a_gpu(random_base):
    with pytest.raises(UserError, match="--torch_compile: expected a GPU"):
        load_pipeline(SampleConfig(pretrained_model_name_or_path=str(random_base), torch_compile=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheduler": "euler"}, "--scheduler: expected one of dpm, unipc, ddim"),
        ({"control_schedule": "square"}, "--control_schedule"),
        ({"num_inference_steps": 0}, "--num_inference_steps: expected at least 1"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "--guidance_start and --guidance_end"),
        ({"control_guidance_end": 1.5}, "found 0.0 and 1.5"),
        ({"guidance_rescale": -0.1}, "--guidance_rescale: expected 0 to 1"),
    ],
)
def test_settings_out_of_range_are_named(painter, masks, changes, said):
    with pytest.raises(UserError, match=said):
        generate(painter, masks, CAPTIONS, ROWS, dataclasses.replace(SETTINGS, **changes))
