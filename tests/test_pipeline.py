"""Promise: our denoising loop gives the images of diffusers' pipeline, computes nothing twice, and can be replaced.

Notebook 04 holds it, bit for bit, against a loop that is written out.
"""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from segcn.data.dataset import to_control
from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import (
    Pipeline,
    control_at,
    denoising_loop,
    diffusers_pipeline,
    first_noise,
    generate,
    load_pipeline,
)
from segcn.models.controlnet import make_controlnet
from segcn.utils.errors import UserError

CAPTIONS, ROWS = ["a winter landscape", "a lake at dusk"], [3, 7]
SETTINGS = SampleConfig(num_inference_steps=4, guidance_scale=5.0, negative_prompt="a house", seed=1)


@pytest.fixture(scope="module")
def loud(base, landscapes):
    """A pipeline whose ControlNet has an effect."""
    controlnet = make_controlnet(base.unet).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        block.weight.data += 0.3
    return Pipeline(base, controlnet, read_split(landscapes, "test").palette, "random")


@pytest.fixture
def pipeline(loud):
    """A copy of it, which has generated nothing yet."""
    return Pipeline(copy.deepcopy(loud.base), copy.deepcopy(loud.controlnet), loud.palette, "random")


@pytest.fixture(scope="module")
def masks(landscapes):
    split = read_split(landscapes, "test")
    return np.stack([read_mask(record.mask, split.palette) for record in split.records[:2]])


@pytest.fixture
def images(pipeline, masks):
    """A function from changed settings to the images of the first two masks."""
    return lambda **changes: generate(pipeline, masks, CAPTIONS, ROWS, replace(SETTINGS, **changes))


def by_diffusers(pipeline, masks, settings, **more):
    """The same images by diffusers' own pipeline, in one call."""
    pipe = diffusers_pipeline(pipeline.base, settings, pipeline.controlnet if masks is not None else None)
    size = (64, 64) if masks is None else masks.shape[1:]
    if masks is not None:
        names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
        more |= {name: getattr(settings, name) for name in names} | {"image": to_control(masks, pipeline.palette)}
    images = pipe(
        prompt=CAPTIONS, negative_prompt=[settings.negative_prompt] * 2, height=size[0], width=size[1],
        num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
        latents=first_noise(pipeline.base, ROWS, settings, size), output_type="np", **more,
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
def test_every_scheduler_gives_the_images_of_diffusers_pipeline(pipeline, masks, images, scheduler, kind):
    kinds = {"prediction_type": kind, "rescale_betas_zero_snr": kind == "v_prediction"}
    pipeline.base.scheduler = DDPMScheduler.from_config(pipeline.base.scheduler.config, **kinds)
    ours = images(scheduler=scheduler)
    assert ours.shape == (2, 64, 64, 3) and ours.std() > 10 and apart(ours[0], ours[1]) > 10
    assert apart(ours, by_diffusers(pipeline, masks, replace(SETTINGS, scheduler=scheduler))) <= 1


@pytest.mark.parametrize("changes", [
    {"guidance_scale": 1.0},
    {"controlnet_conditioning_scale": 0.5, "control_guidance_start": 0.25, "control_guidance_end": 0.75},
])  # fmt: skip
def test_without_guidance_and_with_a_window_of_the_mask_it_is_diffusers_too(pipeline, masks, images, changes):
    ours = images(**changes)
    assert apart(ours, by_diffusers(pipeline, masks, replace(SETTINGS, **changes))) <= 1
    assert apart(ours, images()) > 10


def test_guidance_acts_in_its_window_alone_and_other_steps_see_each_image_once(pipeline, masks):
    settings = replace(SETTINGS, guidance_start=0.25, guidance_end=0.75)
    sizes = sizes_seen(pipeline.base.unet)
    ours = generate(pipeline, masks, CAPTIONS, ROWS, settings)
    assert sizes == [2, 4, 4, 2]
    off = 1 + 1e-6  # at 1 itself diffusers' pipeline would no longer double its batch

    def after_step(pipe, step, timestep, values):
        pipe._guidance_scale = settings.guidance_scale if step in (0, 1) else off
        return values

    first_off = replace(settings, guidance_scale=off)
    assert apart(ours, by_diffusers(pipeline, masks, first_off, callback_on_step_end=after_step)) <= 1
    assert apart(ours, by_diffusers(pipeline, masks, settings)) > 10


def test_the_controlnet_runs_only_where_it_acts_and_guidance_is_rescaled_as_diffusers_does(pipeline, images):
    sizes = sizes_seen(pipeline.controlnet.conv_in)
    plain = generate(pipeline, None, CAPTIONS, ROWS, SETTINGS, size=(64, 64))
    assert apart(plain, images(controlnet_conditioning_scale=0.0)) <= 1 and sizes == []
    assert apart(plain, images(control_guidance_end=0.5)) > 10 and sizes == [4, 4]
    rescaled = generate(pipeline, None, CAPTIONS, ROWS, replace(SETTINGS, guidance_rescale=0.7), size=(64, 64))
    assert apart(rescaled, by_diffusers(pipeline, None, SETTINGS, guidance_rescale=0.7)) <= 1
    assert apart(rescaled, by_diffusers(pipeline, None, SETTINGS)) > 3


def test_mask_guidance_leads_away_from_the_image_without_text_and_mask(pipeline, masks):
    """In one step of DDIM latents are linear in the prediction."""
    settings = replace(SETTINGS, num_inference_steps=1, scheduler="ddim", guided_by="text_and_mask")
    noise = first_noise(pipeline.base, ROWS, settings, masks.shape[1:])
    control = to_control(masks, pipeline.palette)
    negative, text = (torch.stack([pipeline.embedding(one) for one in ones]) for ones in (["a house"] * 2, CAPTIONS))
    sizes = sizes_seen(pipeline.controlnet.conv_in)
    found = denoising_loop(pipeline, noise, negative, text, control, settings)
    assert sizes == [2]  # the ControlNet computes half
    plain = replace(settings, guidance_scale=1.0)
    without = denoising_loop(pipeline, noise, negative, negative, None, plain)
    both = denoising_loop(pipeline, noise, negative, text, control, plain)
    assert torch.allclose(found, without + 5 * (both - without), atol=1e-3)
    assert not torch.allclose(found, denoising_loop(pipeline, noise, negative, text, control,
                                                    replace(settings, guided_by="text")), atol=0.1)  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_control_is_embedded_once_and_no_image_changes(pipeline, images, monkeypatch, guidance):
    embedding = pipeline.controlnet.controlnet_cond_embedding
    sizes, changes = sizes_seen(embedding), {"num_inference_steps": 3, "guidance_scale": guidance}
    once = images(**changes)
    assert sizes == [2] and pipeline.controlnet.controlnet_cond_embedding is embedding
    monkeypatch.setattr("segcn.generate.pipeline.embedding_once", lambda controlnet, images: controlnet)
    assert apart(once, images(**changes)) <= 1 and len(sizes) == 4


@pytest.mark.parametrize(("schedule", "weights"), [
    ("constant", [2, 2, 2, 2]), ("linear", [2, 1.5, 1, 0.5]), ("cosine", [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5]),
])  # fmt: skip
def test_the_weight_of_the_mask_falls_as_its_schedule_says(images, schedule, weights):
    changes = {"control_schedule": schedule, "controlnet_conditioning_scale": 2.0}
    assert [control_at(replace(SETTINGS, **changes), step, 4) for step in range(4)] == pytest.approx(weights)
    same = apart(images(**changes), images(**changes | {"control_schedule": "constant"})) == 0
    assert same == (schedule == "constant")


def test_each_caption_is_encoded_once_and_alone_and_what_was_generated_before_changes_no_byte(pipeline, loud, masks):
    sizes = []
    pipeline.base.text_encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))
    fresh = generate(pipeline, masks, CAPTIONS, ROWS, SETTINGS)
    assert sizes == [1, 1, 1]
    assert apart(fresh, generate(pipeline, masks, CAPTIONS[::-1], ROWS, SETTINGS)) > 10 and sizes == [1, 1, 1]
    generate(loud, masks[:1], ["something else"], [0], SETTINGS)
    generate(loud, masks[:1], CAPTIONS[1:], [0], SETTINGS)
    assert np.array_equal(fresh, generate(loud, masks, CAPTIONS, ROWS, SETTINGS))


def test_a_sampler_of_ones_own_replaces_the_loop(pipeline, masks):
    settings = replace(SETTINGS, scheduler="ddim", guidance_end=0.5)

    def ddim(denoise, noise, scheduler):
        """Song et al. 2021 (arXiv:2010.02502), for the base's v-prediction."""
        alphas, latents = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), 1.0], noise
        for step, (now, later) in enumerate(pairwise(alphas)):
            v = denoise(latents, step)
            image, noise = now**0.5 * latents - (1 - now) ** 0.5 * v, now**0.5 * v + (1 - now) ** 0.5 * latents
            latents = later**0.5 * image + (1 - later) ** 0.5 * noise
        return latents

    ours = generate(pipeline, masks, CAPTIONS, ROWS, settings)
    assert apart(ours, generate(pipeline, masks, CAPTIONS, ROWS, settings, sampler=ddim)) <= 1


def test_stop_ends_after_the_step_that_returns_it(pipeline, masks):
    sizes, steps = sizes_seen(pipeline.base.unet), []
    images = generate(pipeline, masks, CAPTIONS, ROWS, SETTINGS, on_step=lambda step: steps.append(step) or step == 2)
    assert steps == [1, 2] and len(sizes) == 2 and images.shape == (2, 64, 64, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may compile")
def test_compiling_is_refused_without_a_gpu(random_base):
    with pytest.raises(UserError, match="--torch_compile: expected a GPU"):
        load_pipeline(SampleConfig(pretrained_model_name_or_path=str(random_base), torch_compile=True))


def test_settings_out_of_range_are_named(images):
    for changes, message in (
        ({"scheduler": "euler"}, "--scheduler: expected one of dpm, unipc, ddim"),
        ({"control_schedule": "square"}, "--control_schedule"),
        ({"num_inference_steps": 0}, "--num_inference_steps: expected 1 or more"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "--guidance_start and --guidance_end"),
        ({"control_guidance_end": 1.5}, "--control_guidance_end: expected 0 to 1, found 1.5"),
        ({"guidance_rescale": -0.1}, "--guidance_rescale: expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            images(**changes)
