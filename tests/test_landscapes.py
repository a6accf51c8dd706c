"""Promise: landscapes are deterministic, exactly labelled, truthfully captioned; the base made from them generates."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from runs import tree, weights

from segcn.cli import run_command
from segcn.data.captions import SEASONS, TIMES
from segcn.data.masks import write_mask
from segcn.data.metadata import check_split, read_split
from segcn.models.base import base_fingerprint
from segcn.samples.base_model.recipe import SMOKE, build_base
from segcn.samples.base_model.training import VaeRecipe, build_vae, standardize_latents
from segcn.samples.landscapes.rendering import rasterize, rectangle
from segcn.samples.landscapes.scene import LANDSCAPE_CLASSES, SMALLEST, draw_landscape, palette, write_landscapes
from segcn.samples.writer import split_seed
from segcn.utils.errors import UserError
from segcn.utils.paths import BASE

NAMED = {
    "cloud": ("clouds",), "mountain": ("mountains",), "water": ("a lake", "a river"), "road": ("a road",),
    "tree": ("tree",), "house": ("house",),
}  # fmt: skip


@pytest.fixture(scope="module")
def landscapes():
    return [draw_landscape(0, index) for index in range(60)]


def test_an_image_is_a_function_of_seed_and_index(landscapes):
    again = draw_landscape(0, 7)
    assert np.array_equal(again.image, landscapes[7].image) and np.array_equal(again.mask, landscapes[7].mask)
    assert again.caption == landscapes[7].caption
    assert len({landscape.image.tobytes() for landscape in landscapes}) == 60
    assert not np.array_equal(draw_landscape(1, 0).image, landscapes[0].image)
    small = draw_landscape(0, 7, resolution=64)
    assert (small.image.shape, small.mask.shape, small.caption) == ((64, 64, 3), (64, 64), again.caption)
    assert small.image.dtype == small.mask.dtype == np.uint8


def test_masks_hold_the_nine_classes_and_captions_name_what_they_hold(landscapes):
    found = set(np.unique([landscape.mask for landscape in landscapes]).tolist())
    assert found == {entry[0] for entry in LANDSCAPE_CLASSES} == set(range(9))
    ids = {name: label for label, name, _ in LANDSCAPE_CLASSES}
    for landscape in landscapes:
        assert f"{landscape.season} landscape {TIMES[landscape.time]}" in landscape.caption
        for name, words in NAMED.items():
            shown = (landscape.mask == ids[name]).sum()
            assert any(word in landscape.caption for word in words) == (shown > 0), landscape.caption
            assert shown == 0 or shown >= SMALLEST


def test_rare_classes_are_in_three_of_a_hundred_landscapes_and_the_others_are_as_always():
    rare, usual, few = {6, 8}, set[int](), list[int]()
    for index in range(100):
        found, always = (draw_landscape(0, index, 32, ids) for ids in (tuple(rare), ()))
        held, natural = ({*np.unique(each.mask).tolist()} & rare for each in (found, always))
        assert held in (set(), rare)
        assert held or natural or np.array_equal(found.image, always.image)
        few += [index] if held else []
        usual |= natural
    assert 1 <= len(few) <= 8 and usual == rare


def test_seasons_times_and_layouts_differ(landscapes):
    """A random other mask agrees with a mask on few pixels, so that agreement means something."""
    assert {landscape.season for landscape in landscapes} == set(SEASONS)
    assert {landscape.time for landscape in landscapes} == set(TIMES)
    masks = np.stack([landscape.mask for landscape in landscapes])
    assert (masks == np.roll(masks, 1, axis=0)).mean() < 0.75
    assert np.std([(mask == 4).any(axis=1).argmax() for mask in masks]) > 8


def test_label_is_the_class_at_the_pixel_center():
    box, cover, center = rasterize([rectangle(0.0, 0.0, 2.4 / 8, 1.0)], 8)
    columns = np.zeros(8, bool)
    columns[box[1]] = center[0]
    assert columns.tolist() == [True, True] + [False] * 6
    assert cover[0, 2, 0] == pytest.approx(1 / 3, abs=0.01)


def test_written_folder_reads_back(tmp_path):
    out = write_landscapes(tmp_path / "set", 3, resolution=64, seed=5)
    split = read_split(str(out))
    check_split(split)
    landscape = draw_landscape(5, 1, 64)
    assert split[1].caption == landscape.caption and split.palette.names[8] == "house"
    assert np.array_equal(np.asarray(Image.open(out / "images/000001.png")), landscape.image)
    mask = Image.open(out / "masks/000001.png")
    assert mask.mode == "P" and np.array_equal(np.asarray(mask), landscape.mask)
    assert (out / "metadata.csv").read_text().startswith("file_name,conditioning_image_file_name,text")


def test_a_finished_set_is_reused_an_unfinished_one_completed_and_another_one_refused(tmp_path, capsys):
    write_landscapes(tmp_path, 2, resolution=32)
    content, times = tree(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert "already holds this set" not in capsys.readouterr().out
    write_landscapes(tmp_path, 2, resolution=32)
    assert "already holds this set" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    (tmp_path / "masks/000001.png").unlink()
    write_landscapes(tmp_path, 2, resolution=32)
    assert tree(tmp_path) == content
    with pytest.raises(UserError, match="another set"):
        write_landscapes(tmp_path, 2, resolution=32, seed=1)


@pytest.mark.parametrize(("settings", "said"), [
    ({"count": 0}, "--count"), ({"resolution": 8}, "32 to 1024"), ({"seed": -1}, "--seed"), ({"test": 0}, "--test"),
    ({}, "something else than landscapes"),
])  # fmt: skip
def test_senseless_settings_and_a_folder_of_something_else_are_refused(tmp_path, settings, said):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=said):
        write_landscapes(tmp_path, **{"count": 1, **settings})
    assert tree(tmp_path) == {"thesis.txt": b"mine"}


def test_train_and_test_share_no_image_and_workers_change_nothing(tmp_path):
    out, other = (write_landscapes(tmp_path / str(n), 40, resolution=32, test=4, workers=n) for n in (1, 2))
    assert tree(out) == tree(other)
    train, test = ({path.read_bytes() for path in out.glob(f"{name}/images/*.png")} for name in ("train", "test"))
    assert (len(train), len(test)) == (40, 4) and not train & test
    assert (out / "palette.json").is_file() and len(read_split(str(out), "test")) == 4
    assert len({split_seed(0, "train"), split_seed(0, "test"), 0}) == 3


def test_plain_diffusers_opens_the_base_which_is_small():
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    assert pipe.vae_scale_factor == 8 and pipe.safety_checker is None
    one, other = (base_fingerprint(f"stabilityai/{name}") for name in ("stable-diffusion-2", "stable-diffusion-2-1"))
    assert one != other and len(one) == 16  # bases of the hub are distinguished by name
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
    run_command(["infer", *words, *shipped, "--prompt", "a summer landscape by day"])
    image = np.asarray(Image.open(tmp_path / "out.png")).astype(float)
    sky, grass = image[:15].mean((0, 1)), image[90:].mean((0, 1))
    assert image.shape == (128, 128, 3) and sky[2] > sky[0] + 30 and grass[1] > grass[2] + 30


def test_the_recipe_of_the_base_runs_resumes_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", torch.get_num_threads)  # the tests after it keep their threads
    recipe = dataclasses.replace(SMOKE, landscapes=8, resolution=64)
    out = build_base(tmp_path / "work", tmp_path / "base", recipe, log=lambda line: None)
    said = []
    again = build_base(tmp_path / "work", tmp_path / "again", recipe, said.append)
    assert weights(again / "unet") == weights(out / "unet")
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
