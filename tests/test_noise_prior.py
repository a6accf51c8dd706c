"""Promise: a noise prior holds what real latents are like where a class lies, is made once, and starts the painting."""

import dataclasses

import numpy as np
import pytest
import torch

from segcn.data.dataset import PairedDataset
from segcn.data.metadata import read_split
from segcn.data.palette import Label, Palette
from segcn.data.transforms import AUGMENTS
from segcn.generate import noise_prior
from segcn.generate.config import SampleConfig
from segcn.generate.noise_prior import NoisePrior, cells, measure_prior, open_prior, source_digest
from segcn.generate.pipeline import Pipeline, generate
from segcn.models.base import encode_moments, load_base
from segcn.models.controlnet import make_controlnet
from segcn.utils.errors import UserError

SETTINGS = SampleConfig(num_inference_steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module")
def base(random_base):
    return load_base(random_base)


@pytest.fixture(scope="module")
def pairs(landscapes):
    return PairedDataset(read_split(landscapes, "train"), 64, AUGMENTS["none"], 0)


@pytest.fixture
def painter(base, landscapes, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_prior, "OUTPUTS", tmp_path)
    return Pipeline(base, make_controlnet(base.unet).eval(), read_split(landscapes, "test").palette, "random")


def test_the_statistics_are_those_of_the_latents_where_a_class_lies(pairs, base, monkeypatch):
    monkeypatch.setattr(noise_prior, "ENOUGH", 3)
    prior = measure_prior(pairs, base, len)
    images = torch.stack([sample.image for sample in pairs])
    latents = encode_moments(base.vae, images).chunk(2, 1)[0] * base.vae_config["scaling_factor"]
    ids = torch.stack([sample.mask for sample in pairs])[:, 4::8, 4::8]
    seen_often = seen_rarely = 0
    for label in ids.unique().tolist():
        anywhere = latents.movedim(1, -1)[ids == label]
        assert torch.allclose(prior.class_mean[label], anywhere.mean(0), atol=1e-4)
        assert torch.allclose(prior.class_std[label], anywhere.std(0, correction=0), atol=1e-3)
        for y, x in ((0, 0), (3, 5), (7, 7)):
            here = latents[:, :, y, x][ids[:, y, x] == label]
            expected = here if len(here) >= 3 else anywhere
            seen_often, seen_rarely = seen_often + (len(here) >= 3), seen_rarely + (len(here) < 3)
            assert torch.allclose(prior.mean[label, :, y, x], expected.mean(0), atol=1e-4)
            assert torch.allclose(prior.std[label, :, y, x], expected.std(0, correction=0), atol=1e-3)
    assert seen_often and seen_rarely
    assert torch.allclose(prior.class_mean[-1], latents.mean((0, 2, 3)), atol=1e-4)


def test_each_cell_is_drawn_for_the_class_in_its_middle():
    mean = torch.arange(3.0)[:, None, None, None] * 10 + torch.arange(4.0).view(1, 1, 2, 2)  # 10 a class, 1 a place
    prior = NoisePrior(mean, torch.full_like(mean, 0.5), torch.tensor([[5.0], [6.0], [7.0]]), torch.ones(3, 1))
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[0, :8, 8:], mask[0, 8:, :8], mask[0, 0, 0] = 1, 255, 1
    assert cells(mask, (2, 2)).tolist() == [[[0, 1], [255, 0]]]
    assert prior.draw(mask, torch.zeros(1, 1, 2, 2)).tolist() == [[[[0, 11], [22, 3]]]]
    assert prior.draw(mask, torch.ones(1, 1, 2, 2)).tolist() == [[[[0.5, 11.5], [22.5, 3.5]]]]
    assert prior.draw(mask, torch.zeros(1, 1, 4, 4))[0, 0, 0].tolist() == [5, 5, 6, 6]  # another size: by class alone


def test_painting_sets_out_from_the_noised_prior_and_takes_the_last_steps(painter, pairs, landscapes, monkeypatch):
    masks, seen, steps = pairs[0].mask[None].numpy(), [], []
    settings = dataclasses.replace(SETTINGS, noise_prior=str(landscapes), noise_prior_strength=0.5)
    handle = painter.base.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:1]))
    generate(painter, masks, ["a lake"], [5], settings, on_step=steps.append)
    handle.remove()
    assert steps == [3, 4]
    prior = open_prior(str(landscapes), painter.base, painter.palette, 64)
    noise, drawn = (noise_prior.seeds.normal(seen[0].shape[1:], name, 0, 5)[None] for name in ("paint", "noise prior"))
    level = painter.base.scheduler.alphas_cumprod[499]  # trailing, 4 steps: 999, 749, 499, 249
    assert torch.allclose(seen[0], level.sqrt() * prior.draw(masks, drawn) + (1 - level).sqrt() * noise, atol=1e-4)


def test_under_zero_terminal_snr_all_steps_set_out_from_pure_noise(painter, pairs, landscapes):
    masks = pairs[0].mask[None].numpy()
    plain = generate(painter, masks, ["a lake"], [5], SETTINGS)
    whole = dataclasses.replace(SETTINGS, noise_prior=str(landscapes), noise_prior_strength=1.0)
    most = dataclasses.replace(whole, noise_prior_strength=0.8)
    assert np.abs(plain.astype(int) - generate(painter, masks, ["a lake"], [5], whole)).max() <= 1
    assert np.abs(plain.astype(int) - generate(painter, masks, ["a lake"], [5], most)).max() > 1


def test_it_is_made_once_and_refused_under_another_palette(painter, landscapes, tmp_path, monkeypatch):
    said = []
    made = open_prior(str(landscapes), painter.base, painter.palette, 64, log=said.append)
    files = list(tmp_path.rglob("*"))
    assert {file.suffix for file in files if file.is_file()} == {".safetensors", ".lock"} and "12 rows" in said[-1]
    monkeypatch.setattr(noise_prior, "measure_prior", None)
    again = open_prior(str(landscapes), painter.base, painter.palette, 64, log=said.append)
    path = next(file for file in files if file.suffix == ".safetensors")
    digests = source_digest(str(path)), source_digest(str(landscapes))
    by_name = open_prior(str(path), painter.base, painter.palette, 64)
    assert all(torch.equal(made.mean, other.mean) for other in (again, by_name)) and len(said) == 1
    other = Palette((Label(0, "moon", (1, 2, 3)),))
    for source in (str(path), str(landscapes)):
        with pytest.raises(UserError, match=r"--noise_prior .*palette"):
            open_prior(source, painter.base, other, 64)
    path.write_bytes(b"broken")
    assert source_digest(str(path)) != digests[0] != digests[1] == source_digest(str(landscapes))
    with pytest.raises(UserError, match="expected a noise prior's file"):
        open_prior(str(path), painter.base, painter.palette, 64)
