"""Promise: what Stable Diffusion 3 alone has: flow matching, T5, masks through the autoencoder."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from runs import loud_controlnet
from torch.utils.data import default_collate

from segcn.models.base import encode_mean, encode_text, hold, load_base
from segcn.models.controlnet import make_controlnet
from segcn.models.noise import Flow
from segcn.samples.base_model.sd3 import parts_of_sd3
from segcn.train.batches import Plan
from segcn.train.loop import step_losses, train
from segcn.train.memory import GB, accounting
from segcn.train.setup import prepare
from segcn.utils.errors import UserError

CAPTIONS = ["a winter landscape at dusk with a lake", ""]


@pytest.fixture(scope="module")
def kind():
    return "sd3"


@pytest.mark.parametrize("cache", ["none", "latents"])
def test_the_loss_is_that_of_diffusers_script(six_steps, toy, tmp_path, cache):
    """Its arithmetic with plain parts of diffusers; the mask is in [-1, 1], as its pipeline makes it of an image."""
    settings = {"augment": "none", "cache": cache, "proportion_empty_prompts": 0.0, "caption_class_dropout": 0.0}
    run = prepare(six_steps(tmp_path / "run", train_batch_size=4, **settings), check=False)
    loud_controlnet(run.controlnet)
    keys = next(iter(Plan(rows=12, seed=0, start=0, stop=1, accumulate=1, batch=4)))
    batch = default_collate([run.examples[key] for key in keys])
    captions = [run.split[row].caption for _, row in keys]
    pipe, scheduler = StableDiffusion3Pipeline.from_pretrained(toy), FlowMatchEulerDiscreteScheduler(shift=3.0)

    def scaled(latents):
        return (latents - 0.0609) * 1.5305

    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
        images = torch.stack([run.examples.dataset.sample(row, 0).image for _, row in keys])
        posterior = pipe.vae.encode(images).latent_dist
        clean = scaled(posterior.mean + posterior.std * batch["posterior"])
        indices = 999 - batch["timestep"]
        times, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * clean + sigmas * batch["noise"]
        given = {"timestep": times, "encoder_hidden_states": text, "pooled_projections": pooled}

        def loss_with(control):
            seen = scaled(pipe.vae.encode(control).latent_dist.sample())
            (residuals,) = run.controlnet(noisy, controlnet_cond=seen, **given, return_dict=False)
            prediction = pipe.transformer(noisy, block_controlnet_hidden_states=residuals, **given).sample
            return F.mse_loss(prediction, batch["noise"] - clean).item()

        theirs, other = (loss_with(control) for control in (2 * batch["control"] - 1, -batch["control"]))
    ours, near = step_losses(run, batch).mean().item(), {"rel": 2e-5 if cache == "none" else 1e-3}  # it stores float16
    assert ours == pytest.approx(theirs, **near) and ours != pytest.approx(other, **near)


def test_timesteps_are_drawn_logit_normal():
    drawn = np.array([Flow.draw(1000, "test", number) for number in range(3000)])
    inside = ((drawn >= 250) & (drawn < 750)).mean()
    assert inside == pytest.approx(0.728, abs=0.03) and drawn.mean() == pytest.approx(500, abs=15)
    assert drawn.min() >= 0 and drawn.max() < 1000


def test_captions_are_embedded_as_in_diffusers_with_t5_and_without(toy, tmp_path):
    bare = shutil.copytree(toy, tmp_path / "bare")
    shutil.rmtree(bare / "text_encoder_3")
    with pytest.raises(UserError, match="found no text_encoder_3/ in it"):
        load_base(bare)
    shutil.rmtree(bare / "tokenizer_3")
    for folder, without in ((toy, {}), (bare, {"text_encoder_3": None, "tokenizer_3": None})):
        base, pipe = load_base(folder), StableDiffusion3Pipeline.from_pretrained(folder, **without)
        ours = encode_text(base, CAPTIONS)
        with torch.no_grad():
            text, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
        given = base.conditions(ours, None)
        assert ours.shape == (2, *base.text_shape) and (base.text_shape[0] == text.shape[1] + 1)
        assert torch.allclose(given["encoder_hidden_states"], text, atol=1e-4)
        assert torch.allclose(given["pooled_projections"], pooled, atol=1e-4)
        assert bool(text[:, 77:].any()) != bool(without)


def test_a_controlnet_that_was_trained_without_pooled_text_and_shift_is_used_so(toy):
    base = load_base(toy)
    own, other = (loud_controlnet(make_controlnet(base.unet)).eval() for _ in range(2))
    other.register_to_config(force_zeros_for_pooled_projection=True)
    control, text = torch.rand(1, 3, 64, 64), encode_text(base, CAPTIONS[:1])
    shifts = [base.encode_control(control, each) - encode_mean(base.vae, 2 * control - 1) for each in (own, other)]
    assert not shifts[0].any() and torch.allclose(shifts[1], torch.full_like(shifts[1], 0.0609 * 1.5305), atol=1e-5)
    latents, time = torch.zeros(1, 16, 8, 8), torch.tensor([500.0])
    found = [base.residuals(each, latents, time, text, None, shifts[1], 1.0) for each in (own, other)]
    given = base.conditions(text, None) | {"pooled_projections": torch.zeros(1, 36)}
    (expected,) = other(latents, shifts[1], timestep=time, **given, return_dict=False)
    for ours, theirs, apart in zip(found[1]["block_controlnet_hidden_states"], expected,
                                   found[0]["block_controlnet_hidden_states"], strict=True):  # fmt: skip
        assert torch.equal(ours, theirs) and not torch.allclose(ours, apart)


@pytest.mark.parametrize("flag, value", [
    ("snr_gamma", 5.0), ("prediction_type", "v_prediction"), ("rescale_betas_zero_snr", True),
])  # fmt: skip
def test_losses_of_diffusion_are_refused(six_steps, tmp_path, flag, value):
    with pytest.raises(UserError, match=f"--{flag}: expected a base that predicts noise or v"):
        train(six_steps(tmp_path / "out", **{flag: value}))
    assert not (tmp_path / "out" / "train_config.json").exists()


def test_sides_are_multiples_of_16(six_steps, tmp_path):
    with pytest.raises(UserError, match="--resolution: expected a multiple of 16, found 72"):
        train(six_steps(tmp_path / "out", resolution=72))


def test_a_reward_reaches_the_controlnet(six_steps, tmp_path):
    given = {"reward_weight": 1.0, "reward_start": 0.0, "max_train_steps": 4, "train_batch_size": 4}
    run = prepare(six_steps(tmp_path / "run", **given), check=False)
    batch = default_collate([run.examples[0, row] for row in range(4)])
    loss = step_losses(run, batch).mean()
    loss.backward()
    assert run.log.reward > 0 and run.controlnet.controlnet_blocks[0].weight.grad.any()


def test_a_full_base_has_the_published_sizes():
    with torch.device("meta"):
        built = {name: build() for name, build in parts_of_sd3().items()}
        controlnet = make_controlnet(built["transformer"])
    counts = {name: part.num_parameters() for name, part in built.items()}
    assert counts == {
        "transformer": 2_243_171_520, "vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    }  # fmt: skip
    assert built["transformer"].config.num_layers == 24 and controlnet.config.num_layers == 12
    counted = accounting(hold(built["transformer"], torch.bfloat16), controlnet, use_8bit_adam=True)
    assert counted["frozen U-Net"] / GB == pytest.approx(4.49, abs=0.01)
    assert counted["ControlNet"] / GB == pytest.approx(5.04, abs=0.01) and 17 < sum(counted.values()) / GB < 18
