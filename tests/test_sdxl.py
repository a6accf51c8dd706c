"""Promise: Stable Diffusion XL trains, resumes, generates and opens in plain diffusers as the other bases do."""

import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from kills import train_as_torchrun, train_quietly
from PIL import Image
from runs import log_of, tree, weights
from torch.utils.data import default_collate
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segcn.bench.config import BenchTrainConfig
from segcn.bench.train import check_bench
from segcn.cli import run_command
from segcn.data.dataset import to_control
from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.data.transforms import Draw, apply, size_ids
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import SCHEDULERS, first_noise, generate, load_pipeline
from segcn.models.base import base_fingerprint, hold, load_base
from segcn.models.controlnet import make_controlnet
from segcn.samples.base_model.sdxl import parts_of_sdxl
from segcn.train.batches import Plan
from segcn.train.config import AdaptConfig
from segcn.train.loop import step_losses, train
from segcn.train.memory import GB, accounting
from segcn.train.setup import prepare
from segcn.utils.args import make
from segcn.utils.errors import UserError

CAPTIONS, ROWS = ["a winter landscape", "a lake at dusk"], [3, 7]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a base of Stable Diffusion XL's architecture with a few random weights."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    run_command(["samples", "sdxl", str(folder), "--toy"])
    return folder


@pytest.fixture(scope="module")
def xl(quick, toy):
    """A function from settings to the config of six quick steps on it."""
    return lambda out, **settings: quick(out, pretrained_model_name_or_path=str(toy), **settings)


@pytest.fixture(scope="module")
def straight(xl, landscapes, tmp_path_factory):
    """A finished run without a break, with an image while it was trained."""
    shown = {"validation_image": [str(read_split(landscapes, "test")[0].mask)], "validation_prompt": ["a lake"]}
    return train(xl(tmp_path_factory.mktemp("runs") / "straight", **shown, validation_steps=6))


@pytest.fixture(scope="module")
def loud(straight, tmp_path_factory):
    """The folder of its ControlNet, with a stronger effect."""
    folder = tmp_path_factory.mktemp("models") / "loud"
    controlnet = ControlNetModel.from_pretrained(straight)
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        block.weight.data += 0.3
    controlnet.save_pretrained(folder)
    shutil.copy(straight / "palette.json", folder)
    return folder


def test_a_run_that_is_killed_ends_with_the_same_bytes(xl, straight, warm, tmp_path):
    assert [entry["step"] for entry in log_of(straight)] == [1, 2, 3, 4, 5, 6]
    assert Image.open(straight / "validation" / "step-000006.png").size[0] >= 64
    process = warm.Process(target=train_quietly, args=(xl(tmp_path / "cut"), 2, 6))  # amid the second of its two saves
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "cut" / "checkpoint-6").exists()
    train(xl(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(straight) and log_of(tmp_path / "cut") == log_of(straight)
    assert tree(tmp_path / "cut" / "checkpoint-6") == tree(straight / "checkpoint-6")


def test_two_processes_train_as_one(xl, warm, tmp_path):
    smooth = {"adam_epsilon": 1e-2, "max_train_steps": 3}  # at 1e-8 the first steps are the signs of rounding errors
    one = train(xl(tmp_path / "one", train_batch_size=4, **smooth))
    train_as_torchrun(warm, xl(tmp_path / "two", train_batch_size=2, **smooth))
    found = [ControlNetModel.from_pretrained(folder).state_dict() for folder in (one, tmp_path / "two")]
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.parametrize("changes", [
    {"scheduler": "unipc"},  # without a negative prompt the base's own zeros
    {"scheduler": "dpm", "negative_prompt": "a house"},
    {"scheduler": "ddim", "guidance_scale": 1.0},
    {"scheduler": "unipc", "control_guidance_end": 0.5, "controlnet_conditioning_scale": 0.5},
])  # fmt: skip
def test_images_are_those_of_diffusers_pipeline(toy, loud, landscapes, changes):
    settings = SampleConfig(pretrained_model_name_or_path=str(toy), controlnet_model_name_or_path=str(loud), seed=1)
    settings = replace(settings, num_inference_steps=4, guidance_scale=5.0)
    changed, split = replace(settings, **changes), read_split(landscapes, "test")
    pipeline = load_pipeline(settings, split.palette)
    masks = np.stack([read_mask(record.mask, split.palette) for record in split.records[:2]])
    ours = generate(pipeline, masks, CAPTIONS, ROWS, changed)

    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(toy, controlnet=ControlNetModel.from_pretrained(loud))
    pipe.scheduler = SCHEDULERS[changed.scheduler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    names = ("controlnet_conditioning_scale", "control_guidance_end", "num_inference_steps", "guidance_scale")
    theirs = pipe(
        CAPTIONS, negative_prompt=[changed.negative_prompt] * 2 if changed.negative_prompt else None,
        image=to_control(masks, split.palette), latents=first_noise(pipeline.base, ROWS, changed, masks.shape[1:]),
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
    wide = generate(pipeline, np.tile(mask, 2)[None], CAPTIONS[:1], [3], replace(settings, tiled=True))[0]
    assert wide.shape == (64, 128, 3) and wide.std() > 5


def test_the_sizes_of_an_image_say_what_was_cut_off():
    ramp = torch.arange(96).expand(3, 64, 96).to(torch.uint8)
    for draw, size, resolution, expected in (
        (Draw(), (64, 64), 64, [64, 64, 0, 0, 64, 64]),
        (Draw(), (64, 96), 32, [64, 96, 0, 8, 32, 32]),
        (Draw(fit="pad"), (64, 96), 32, [64, 96, 0, 0, 32, 32]),
        (Draw(crop=(0.5, 0.25, 0.5)), (64, 96), 64, [64, 96, 32, 32, 64, 64]),
        (Draw(crop=(0.5, 0.25, 0.5), flip=True), (64, 96), 64, [64, 96, 32, 96, 64, 64]),
        (Draw(scale=2.0), (64, 64), 64, [64, 64, 32, 32, 64, 64]),
        (Draw(translate_x=-0.25, angle=30.0, shear_x=5.0), (64, 64), 64, [64, 64, 0, 16, 64, 64]),
    ):
        found = size_ids(draw, size, resolution)
        assert found == expected
        if size == (64, 96) and draw.fit == "crop" and not draw.flip:  # where its first column was in the original
            column = apply(ramp, torch.zeros(1, 64, 96, dtype=torch.uint8), draw, resolution)[0][0, 0, 0].item()
            assert column == pytest.approx(found[3] * (64 * draw.crop[2] / resolution), abs=1)


@pytest.mark.parametrize("cache", ["none", "latents"])
def test_the_loss_is_that_of_diffusers_script(xl, toy, tmp_path, cache):
    """Its arithmetic, from the encoders to the mean squared error, with plain parts of transformers and diffusers."""
    settings = {"augment": "none", "cache": cache, "proportion_empty_prompts": 0.0, "caption_class_dropout": 0.0}
    run = prepare(xl(tmp_path / "run", train_batch_size=4, **settings), check=False)
    keys = next(iter(Plan(rows=12, seed=0, start=0, stop=1, accumulate=1, batch=4)))
    batch = default_collate([run.examples[key] for key in keys])
    captions = [run.split[row].caption for _, row in keys]

    hidden = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(toy, subfolder=name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            output = kind.from_pretrained(toy, subfolder=name)(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    vae = AutoencoderKL.from_pretrained(toy, subfolder="vae")
    with torch.no_grad():
        images = torch.stack([run.examples.dataset.sample(row, 0).image for _, row in keys])
        posterior = vae.encode(images).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior"]) * 0.13025
    noise, timestep = batch["noise"], batch["timestep"]
    noisy = DDPMScheduler.from_pretrained(toy, subfolder="scheduler").add_noise(latents, noise, timestep)

    def loss_with(sizes):
        added = {"text_embeds": output.text_embeds, "time_ids": torch.tensor([sizes] * 4)}
        given = {"encoder_hidden_states": torch.cat(hidden, dim=-1), "added_cond_kwargs": added}
        unet = UNet2DConditionModel.from_pretrained(toy, subfolder="unet")
        down, middle = run.controlnet(noisy, timestep, controlnet_cond=batch["control"], **given, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return F.mse_loss(unet(noisy, timestep, **given, **residuals).sample, noise).item()

    ours, near = step_losses(run, batch).mean().item(), {"rel": 1e-6 if cache == "none" else 1e-4}  # it stores float16
    assert ours == pytest.approx(loss_with([64, 64, 0, 0, 64, 64]), **near)  # original, crop, target
    assert ours != pytest.approx(loss_with([512, 768, 0, 128, 64, 64]), **near)


def test_the_cache_keeps_what_the_sizes_of_a_row_follow_from(xl, tmp_path):
    runs = [prepare(xl(tmp_path / cache, cache=cache, cache_draws=2), check=False) for cache in ("latents", "none")]
    sizes = [[run.examples[key]["sizes"].tolist() for key in [(0, 0), (1, 0), (1, 5)]] for run in runs]
    assert sizes[0] == sizes[1] and len({tuple(each) for each in sizes[0]}) == 3


@pytest.mark.usefixtures("fresh_precision")
def test_it_trains_with_a_memory_preset_and_its_autoencoder_stays_exact(xl, toy, tmp_path):
    folder = train(xl(tmp_path / "run", memory_preset=8, max_train_steps=2))
    assert np.isfinite([entry["loss"] for entry in log_of(folder)]).all()
    base = load_base(toy, dtype=torch.bfloat16)
    assert (base.vae.dtype, base.unet.dtype, base.text_encoder.dtype) == (torch.float32, *[torch.bfloat16] * 2)


def test_a_full_base_has_the_published_sizes_and_fits_24_gb_with_preset_8():
    with torch.device("meta"):
        built = {name: build() for name, build in parts_of_sdxl().items()}
        controlnet = make_controlnet(built["unet"])
    counts = {name: part.num_parameters() for name, part in built.items()}
    assert counts == {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    }  # fmt: skip
    counted = accounting(hold(built["unet"], torch.bfloat16), controlnet, use_8bit_adam=True)
    assert counted["frozen U-Net"] / GB == pytest.approx(5.14, abs=0.01)
    assert counted["ControlNet"] / GB == pytest.approx(5.0, abs=0.01) and 17 < sum(counted.values()) / GB < 18


def test_an_autoencoder_replaces_the_bases_own_and_another_one_is_another_run(xl, toy, tmp_path):
    places = [str(tmp_path / name) for name in ("one", "other")]
    for number, place in enumerate(places):
        vae = AutoencoderKL.from_pretrained(toy, subfolder="vae")
        vae.register_to_config(force_upcast=False)
        vae.decoder.conv_out.bias.data += number + 1
        vae.save_pretrained(place)
    own, given = (load_base(toy, dtype=torch.bfloat16, vae_folder=place).vae for place in (None, places[0]))
    assert given.dtype == torch.bfloat16
    assert torch.allclose(given.decoder.conv_out.bias.float() - own.decoder.conv_out.bias, torch.ones(3), atol=0.01)
    settings = {"cache": "none", "max_train_steps": 1}
    train(xl(tmp_path / "run", pretrained_vae_model_name_or_path=places[0], **settings))
    with pytest.raises(UserError, match="pretrained_vae_model_name_or_path_content: was"):
        train(xl(tmp_path / "run", pretrained_vae_model_name_or_path=places[1], **settings))
    with pytest.raises(
        UserError, match=r"--pretrained_vae_model_name_or_path .*: expected a folder with the config.json"
    ):
        load_base(toy, vae_folder=str(tmp_path))


def test_what_is_trained_of_the_base_opens_in_diffusers_and_here(xl, toy, tmp_path):
    inputs = torch.ones(1, 4, 8, 8), 500
    base = load_base(toy)
    given = base.conditions(torch.ones(1, *base.text_shape), (64, 64))
    folder = train(xl(tmp_path / "lora", train_unet="lora", max_train_steps=2, learning_rate=0.01))
    pipe = StableDiffusionXLPipeline.from_pretrained(toy)
    pipe.load_lora_weights(folder / "lora")
    with torch.no_grad():
        before, there = (unet(*inputs, **given).sample for unet in (base.unet, pipe.unet))
        here = load_base(toy, lora=str(folder / "lora")).unet(*inputs, **given).sample
    assert (there - here).abs().max() < 1e-4 < (there - before).abs().max() / 10

    folder = train(xl(tmp_path / "decoder", train_unet="decoder", max_train_steps=2, learning_rate=0.01))
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "base")
    with torch.no_grad():
        there, here = (unet(*inputs, **given).sample for unet in (pipe.unet, load_base(folder / "base").unet))
    assert (there - here).abs().max() < 1e-4 < (there - before).abs().max() / 10
    assert pipe.config.force_zeros_for_empty_prompt


def test_an_adapted_base_with_its_lora_is_a_whole_one(xl, tmp_path):
    given = {name: getattr(xl("x"), name) for name in ("pretrained_model_name_or_path", "cache_dir", "dataset_name")}
    given |= {"resolution": 64, "train_batch_size": 2, "max_train_steps": 1, "lora_targets": ["to_q"]}
    folder = train(make(AdaptConfig, "tiny", **given, output_dir=str(tmp_path / "out"), merge=True))
    assert StableDiffusionXLPipeline.from_pretrained(folder).text_encoder_2 is not None
    assert 'pipe = StableDiffusionXLPipeline.from_pretrained("out")' in (folder / "README.md").read_text()


def test_what_it_does_not_support_is_refused_before_anything_is_written(xl, toy, random_base, tmp_path):
    shared = {name: getattr(xl("x"), name) for name in ("pretrained_model_name_or_path", "cache_dir", "dataset_name")}
    adapt = make(AdaptConfig, "tiny", **shared, output_dir=str(tmp_path / "out"), lora_text_encoder=True, resolution=64)
    with pytest.raises(UserError, match="--lora_text_encoder: expected a base with one text encoder"):
        train(adapt)
    with pytest.raises(UserError, match=r"segcn bench train.* found Stable Diffusion XL"):
        check_bench(BenchTrainConfig(pretrained_model_name_or_path=str(toy)))
    make_controlnet(load_base(random_base).unet).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="fits the base"):
        train(xl(tmp_path / "out", controlnet_model_name_or_path=str(tmp_path / "other")))
    assert not (tmp_path / "out" / "train_config.json").exists()


def test_every_part_of_it_counts_in_the_bases_fingerprint(toy, tmp_path):
    copy = shutil.copytree(toy, tmp_path / "copy")
    assert base_fingerprint(copy) == base_fingerprint(toy)
    (copy / "text_encoder_2" / "config.json").open("a").write(" ")
    assert base_fingerprint(copy) != base_fingerprint(toy)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(UserError, match="text_encoder_2/, tokenizer_2/, found no tokenizer_2/ in it"):
        load_base(copy)


@pytest.mark.slow
def test_segcn_run_goes_from_rows_to_a_report_on_it(toy, landscapes, tmp_path):
    words = f"""run --pretrained_model_name_or_path {toy} --dataset_name {landscapes} --output_dir {tmp_path}
        --resolution 64 --max_train_steps 4 --train_batch_size 2 --faithfulness_rows 2 --limit 4 --floor_limit 2
        --num_inference_steps 2 --segmenter_steps 3"""
    run_command(words.split())
    assert {"report.html", "metrics.json", "story.png", "generated"} <= {path.name for path in tmp_path.iterdir()}
    assert ControlNetModel.load_config(tmp_path / "controlnet")["addition_embed_type"] == "text_time"
