"""Promise: each further family of bases trains, resumes, generates and opens in plain diffusers as the first does."""

import shutil
import signal
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from kills import ended, train_as_torchrun
from PIL import Image
from runs import log_of, loud_controlnet, tree, weights

from segcn.cli import run_command
from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import first_noise, generate, load_pipeline
from segcn.models.base import base_fingerprint, load_base
from segcn.models.controlnet import load_controlnet, make_all_trainable, make_controlnet
from segcn.models.family import family_of
from segcn.train.config import AdaptConfig
from segcn.train.loop import train
from segcn.train.validation import frozen_twin
from segcn.utils.args import make
from segcn.utils.errors import UserError

CAPTIONS, ROWS = ["a winter landscape", "a lake at dusk"], [3, 7]


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def family(toy):
    return family_of(toy)


@pytest.fixture(scope="module")
def plain(family):
    """Its pipeline in diffusers."""
    return getattr(diffusers, f"{family.name}Pipeline")


@pytest.fixture(scope="module")
def straight(six_steps, landscapes, tmp_path_factory):
    """A finished run without a break, with an image while it was trained."""
    shown = {"validation_image": [str(read_split(landscapes, "test")[0].mask)], "validation_prompt": ["a lake"]}
    return train(six_steps(tmp_path_factory.mktemp("runs") / "straight", **shown, validation_steps=6))


@pytest.fixture(scope="module")
def loud(family, straight, tmp_path_factory):
    """The folder of its ControlNet, with a stronger effect."""
    folder = tmp_path_factory.mktemp("models") / "loud"
    loud_controlnet(family.controlnet.from_pretrained(straight)).save_pretrained(folder)
    shutil.copy(straight / "palette.json", folder)
    return folder


def test_a_run_that_is_killed_ends_with_the_same_bytes(six_steps, straight, warm, tmp_path):
    assert [entry["step"] for entry in log_of(straight)] == [1, 2, 3, 4, 5, 6]
    assert Image.open(straight / "validation" / "step-000006.png").size[0] >= 64
    config = six_steps(tmp_path / "cut")
    assert ended(warm, config, 2, 6, seconds=600) == -signal.SIGKILL  # amid the second of its two saves
    assert not (tmp_path / "cut" / "checkpoint-6").exists()
    train(config)
    assert weights(tmp_path / "cut") == weights(straight) and log_of(tmp_path / "cut") == log_of(straight)
    assert tree(tmp_path / "cut" / "checkpoint-6") == tree(straight / "checkpoint-6")


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("sd3", marks=pytest.mark.slow)], indirect=True)
def test_two_processes_train_as_one(six_steps, warm, tmp_path):
    smooth = {"adam_epsilon": 1e-2, "max_train_steps": 3}  # at 1e-8 the first steps are the signs of rounding errors
    one = train(six_steps(tmp_path / "one", train_batch_size=4, **smooth))
    train_as_torchrun(warm, six_steps(tmp_path / "two", train_batch_size=2, **smooth))
    found = [load_controlnet(folder).state_dict() for folder in (one, tmp_path / "two")]
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.parametrize("changes", [
    {"scheduler": "unipc"},  # without a negative prompt: zeros or the empty text, as the base has learned
    {"scheduler": "dpm", "negative_prompt": "a house"},
    {"scheduler": "ddim", "guidance_scale": 1.0},
    {"scheduler": "ddim", "control_guidance_end": 0.5, "controlnet_conditioning_scale": 0.5},
])  # fmt: skip
def test_images_are_those_of_diffusers_pipeline(toy, family, loud, landscapes, changes):
    settings = SampleConfig(pretrained_model_name_or_path=str(toy), controlnet_model_name_or_path=str(loud), seed=1)
    settings = replace(settings, num_inference_steps=4, guidance_scale=5.0)
    changed, split = replace(settings, **changes), read_split(landscapes, "test")
    pipeline = load_pipeline(settings, split.palette)
    masks = np.stack([read_mask(record.mask, split.palette) for record in split.records[:2]])
    ours = generate(pipeline, masks, CAPTIONS, ROWS, changed)

    kind = getattr(diffusers, f"{family.name}ControlNetPipeline")
    pipe = kind.from_pretrained(toy, controlnet=family.controlnet.from_pretrained(loud))
    sampler = pipeline.base.process.sampler(changed.scheduler)
    pipe.scheduler = type(sampler).from_config(sampler.config)
    pipe.set_progress_bar_config(disable=True)
    names = ("controlnet_conditioning_scale", "control_guidance_end", "num_inference_steps", "guidance_scale")
    theirs = pipe(
        CAPTIONS, negative_prompt=[changed.negative_prompt] * 2 if changed.negative_prompt else None,
        **{family.control_argument: [Image.fromarray(colors) for colors in split.palette.table[masks]]},
        latents=first_noise(pipeline.base, ROWS, changed, masks.shape[1:]),
        output_type="np", **{name: getattr(changed, name) for name in names},
    ).images  # fmt: skip
    theirs = (theirs * 255).round().astype(np.uint8)
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and ours.std() > 5
    for other in (
        {"seed": 2},
        {"negative_prompt": "snow", "guidance_scale": 5.0},
        {"controlnet_conditioning_scale": 0},
    ):
        apart = np.abs(generate(pipeline, masks, CAPTIONS, ROWS, replace(changed, **other)).astype(int) - theirs)
        assert apart.max() > 1, other  # more than ours may be apart from theirs


def test_a_large_image_is_made_by_windows_that_are_each_as_an_image_alone(toy, loud, landscapes):
    settings = SampleConfig(pretrained_model_name_or_path=str(toy), controlnet_model_name_or_path=str(loud))
    settings = replace(settings, num_inference_steps=2, resolution=64, guidance_scale=5.0)
    split = read_split(landscapes, "test")
    pipeline = load_pipeline(settings, split.palette)
    mask = np.resize(read_mask(split[0].mask, split.palette), (64, 64))
    whole, tiled = (generate(pipeline, mask[None], CAPTIONS[:1], [3], replace(settings, tiled=tiled))[0]
                    for tiled in (False, True))  # fmt: skip
    assert np.array_equal(whole, tiled)
    wide = generate(pipeline, np.tile(mask, 2)[None, :, :120], CAPTIONS[:1], [3], replace(settings, tiled=True))[0]
    assert wide.shape == (64, 120, 3) and wide.std() > 5


def test_what_is_trained_of_the_base_opens_in_diffusers_and_here(six_steps, toy, family, plain, tmp_path):
    base = load_base(toy)
    latents, time = torch.ones(1, base.latent_channels, 8, 8), torch.tensor([500])
    predict = partial(base.predict, latents, time, torch.ones(1, *base.text_shape), (64, 64))
    folder = train(six_steps(tmp_path / "lora", train_unet="lora", max_train_steps=2, learning_rate=0.01))
    pipe = plain.from_pretrained(toy)
    pipe.load_lora_weights(folder / "lora")
    with torch.no_grad():
        before, there = predict(), predict(network=getattr(pipe, family.part))
        here = predict(network=load_base(toy, lora=str(folder / "lora")).unet)
    assert (there - here).abs().max() < 1e-4 < (there - before).abs().max() / 10

    folder = train(six_steps(tmp_path / "decoder", train_unet="decoder", max_train_steps=2, learning_rate=0.01))
    pipe = plain.from_pretrained(folder / "base")
    with torch.no_grad():
        there, here = (predict(network=each) for each in (getattr(pipe, family.part), load_base(folder / "base").unet))
    assert (there - here).abs().max() < 1e-4 < (there - before).abs().max() / 10
    assert pipe.config.get("force_zeros_for_empty_prompt") == (True if family.reads_sizes else None)


def test_an_adapted_base_with_its_lora_is_a_whole_one(six_steps, family, plain, tmp_path):
    shared = six_steps("x")
    given = {name: getattr(shared, name) for name in ("pretrained_model_name_or_path", "cache_dir", "dataset_name")}
    given |= {"resolution": 64, "train_batch_size": 2, "max_train_steps": 1, "lora_targets": ["to_q"]}
    folder = train(make(AdaptConfig, "tiny", **given, output_dir=str(tmp_path / "out"), merge=True))
    assert plain.from_pretrained(folder).text_encoder_2 is not None
    assert f'pipe = {family.name}Pipeline.from_pretrained("out")' in (folder / "README.md").read_text()


def test_what_it_does_not_support_is_refused_before_anything_is_written(six_steps, toy, family, random_base, tmp_path):
    shared = six_steps("x")
    given = {name: getattr(shared, name) for name in ("pretrained_model_name_or_path", "cache_dir", "dataset_name")}
    adapt = make(AdaptConfig, "tiny", **given, output_dir=str(tmp_path / "out"), lora_text_encoder=True, resolution=64)
    with pytest.raises(UserError, match="--lora_text_encoder: expected a base with one text encoder"):
        train(adapt)
    make_controlnet(load_base(random_base).unet).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="fits the base"):
        train(six_steps(tmp_path / "out", controlnet_model_name_or_path=str(tmp_path / "other")))
    assert not (tmp_path / "out" / "train_config.json").exists()


def test_every_part_of_it_counts_in_the_bases_fingerprint(toy, tmp_path):
    copy = shutil.copytree(toy, tmp_path / "copy")
    assert base_fingerprint(copy) == base_fingerprint(toy)
    (copy / "text_encoder_2" / "config.json").open("a").write(" ")
    assert base_fingerprint(copy) != base_fingerprint(toy)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(UserError, match=r"text_encoder_2/, tokenizer_2/.*, found no tokenizer_2/ in it"):
        load_base(copy)


@pytest.mark.slow
def test_segcn_run_goes_from_rows_to_a_report_on_it(toy, family, landscapes, tmp_path):
    words = f"""run --pretrained_model_name_or_path {toy} --dataset_name {landscapes} --output_dir {tmp_path}
        --resolution 64 --max_train_steps 4 --train_batch_size 2 --faithfulness_rows 2 --limit 4 --floor_limit 2
        --num_inference_steps 2 --segmenter_steps 3"""
    run_command(words.split())
    assert {"report.html", "metrics.json", "story.png", "generated"} <= {path.name for path in tmp_path.iterdir()}
    assert family.controlnet.load_config(tmp_path / "controlnet")["_class_name"] == family.controlnet.__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_twin_that_validates_has_one_precision_and_shares_the_memory_of_what_has_it(toy, dtype):
    controlnet = make_controlnet(load_base(toy).unet)
    make_all_trainable(controlnet)
    trained, weights = controlnet.state_dict(), dict(frozen_twin(controlnet, dtype).named_parameters())
    assert weights.keys() == dict(controlnet.named_parameters()).keys()
    assert {(weight.dtype, weight.requires_grad) for weight in weights.values()} == {(dtype, False)}
    shared = [weight.data_ptr() == trained[name].data_ptr() for name, weight in weights.items()]
    assert all(shared) if dtype == torch.float32 else not any(shared)
