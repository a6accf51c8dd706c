"""Promise: what Stable Diffusion XL alone has: sizes of images, its loss, its autoencoder, its size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from runs import log_of
from torch.utils.data import default_collate
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segcn.data.transforms import Draw, apply, size_ids
from segcn.models.base import hold, load_base
from segcn.models.controlnet import make_controlnet
from segcn.samples.base_model.sdxl import parts_of_sdxl
from segcn.train.batches import Plan
from segcn.train.loop import step_losses, train
from segcn.train.memory import GB, accounting
from segcn.train.setup import prepare
from segcn.utils.errors import UserError


@pytest.fixture(scope="module")
def kind():
    return "sdxl"


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
def test_the_loss_is_that_of_diffusers_script(six_steps, toy, tmp_path, cache):
    """Its arithmetic, from the encoders to the mean squared error, with plain parts of transformers and diffusers."""
    settings = {"augment": "none", "cache": cache, "proportion_empty_prompts": 0.0, "caption_class_dropout": 0.0}
    run = prepare(six_steps(tmp_path / "run", train_batch_size=4, **settings), check=False)
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


def test_the_cache_keeps_what_the_sizes_of_a_row_follow_from(six_steps, tmp_path):
    configs = [six_steps(tmp_path / cache, cache=cache, cache_draws=2) for cache in ("latents", "none")]
    runs = [prepare(config, check=False) for config in configs]
    sizes = [[run.examples[key]["sizes"].tolist() for key in [(0, 0), (1, 0), (1, 5)]] for run in runs]
    assert sizes[0] == sizes[1] and len({tuple(each) for each in sizes[0]}) == 3


@pytest.mark.usefixtures("fresh_precision")
def test_it_trains_with_a_memory_preset_and_its_autoencoder_stays_exact(six_steps, toy, tmp_path):
    folder = train(six_steps(tmp_path / "run", memory_preset=8, max_train_steps=2))
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


def test_an_autoencoder_replaces_the_bases_own_and_another_one_is_another_run(six_steps, toy, tmp_path):
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
    train(six_steps(tmp_path / "run", pretrained_vae_model_name_or_path=places[0], **settings))
    with pytest.raises(UserError, match="pretrained_vae_model_name_or_path_content: was"):
        train(six_steps(tmp_path / "run", pretrained_vae_model_name_or_path=places[1], **settings))
    with pytest.raises(
        UserError, match=r"--pretrained_vae_model_name_or_path .*: expected a folder with the config.json"
    ):
        load_base(toy, vae_folder=str(tmp_path))
