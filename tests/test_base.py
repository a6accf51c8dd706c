"""Promise: the embedded base and its ControlNet generate right after the install, and their recipe runs."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from segcn.data.masks import write_mask
from segcn.models.base import base_fingerprint
from segcn.samples.base_model.recipe import SMOKE, build_base
from segcn.samples.base_model.training import VaeRecipe, build_vae, standardize_latents
from segcn.samples.landscapes.scene import palette
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE


def segcn(*words):
    return subprocess.run([sys.executable, "-m", "segcn.cli", *words], capture_output=True, text=True, timeout=300)


def test_plain_diffusers_opens_the_base_which_is_small():
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    assert pipe.vae_scale_factor == 8 and pipe.safety_checker is None
    assert pipe.tokenizer("a winter landscape at dusk").input_ids != pipe.tokenizer("a summer landscape").input_ids
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 45 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_one_command_generates_from_one_mask(tmp_path):
    mask = np.zeros((128, 128), np.uint8)
    mask[60:], mask[20:40, 20:40] = 4, 2
    write_mask(tmp_path / "mask.png", mask, palette())
    words = ["--control", str(tmp_path / "mask.png"), "--out", str(tmp_path / "out.png"), "--seed", "3"]
    shipped = ["--controlnet_model_name_or_path", str(BASE / "controlnet"), "--num_inference_steps", "4"]
    done = segcn("infer", *words, *shipped, "--prompt", "a summer landscape by day")
    assert done.returncode == 0, done.stderr
    image = np.asarray(Image.open(tmp_path / "out.png")).astype(float)
    sky, grass = image[:15].mean((0, 1)), image[90:].mean((0, 1))
    assert image.shape == (128, 128, 3) and sky[2] > sky[0] + 30 and grass[1] > grass[2] + 30


def test_a_wrong_command_is_answered_in_one_line():
    done = segcn("pain")
    assert done.returncode == 2 and "no command 'pain'" in done.stderr and "Traceback" not in done.stderr
    done = segcn("infer", "--control", "nowhere.png", "--prompt", "a lake", "--out", "o.png")
    assert done.returncode == 2 and "nowhere.png" in done.stderr and "Traceback" not in done.stderr


def test_the_recipe_runs_resumes_and_never_overwrites(tmp_path):
    recipe = dataclasses.replace(SMOKE, landscapes=8, resolution=64)
    out = build_base(tmp_path / "work", tmp_path / "base", recipe, log=lambda line: None)
    first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    said = []
    again = build_base(tmp_path / "work", tmp_path / "again", recipe, said.append)
    assert (again / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
    assert sum("Resuming" in line for line in said) == 2
    with pytest.raises(UserError, match="exists"):
        build_base(tmp_path / "work", out, recipe)
    with pytest.raises(UserError, match="--work"):
        build_base(tmp_path / "work", tmp_path / "other", SMOKE)


def test_standardizing_leaves_the_images_alone():
    vae = build_vae(VaeRecipe(channels=(8, 8, 16, 16))).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(image).latent_dist.mean).sample
        standardize_latents(vae, torch.from_numpy(pixels))
        latents = vae.encode(image).latent_dist.mean
        assert torch.allclose(vae.decode(latents).sample, before, atol=1e-3)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(12), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(12), atol=1e-2)


def test_bases_of_the_hub_are_distinguished_by_name():
    one, other = (base_fingerprint(f"stabilityai/{name}") for name in ("stable-diffusion-2", "stable-diffusion-2-1"))
    assert one != other and len(one) == 16
