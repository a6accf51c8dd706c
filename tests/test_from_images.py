"""Promise: generation can start from a row's own image, changes of it what was requested, and is as deterministic."""

import json
import shutil
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline
from diffusers.pipelines.controlnet import pipeline_controlnet_img2img as img2img
from PIL import Image
from runs import tree
from test_generate import cut_to, pixels

from segcn.data.dataset import to_control, to_image, to_uint8
from segcn.data.masks import colorize, read_mask
from segcn.data.metadata import check_split, read_split
from segcn.generate import writer
from segcn.generate.conditions import read_conditions
from segcn.generate.filtering import Filter
from segcn.generate.pipeline import Start, diffusers_pipeline, first_noise, generate
from segcn.generate.writer import generate_dataset, records_of
from segcn.models.base import reconstruct
from segcn.models.controlnet import make_controlnet
from segcn.models.segmenter import build_segmenter
from segcn.utils.errors import UserError
from segcn.utils.io import Process

CAPTIONS = ["a winter landscape", "a lake at dusk"]


@pytest.fixture(scope="module")
def real(landscapes):
    return read_split(landscapes, "test")


@pytest.fixture(scope="module")
def pairs(real):
    """Images, uint8 [6, 64, 64, 3], and masks, uint8 [6, 64, 64], of the test rows."""
    images = [np.asarray(Image.open(record.image).convert("RGB")) for record in real.records]
    return np.stack(images), np.stack([read_mask(record.mask, real.palette) for record in real.records])


@pytest.fixture
def common(real, pairs):
    """A class that some masks hold and others do not: its name, and where it is, bool [6, 64, 64]."""
    found = {label.name: pairs[1] == label.id for label in real.palette.labels}
    return next(one for one in found.items() if 2 <= one[1].any((1, 2)).sum() < 6)


@pytest.fixture
def loud(pipeline):
    """The pipeline with a ControlNet that has an effect."""
    controlnet = make_controlnet(pipeline.base.unet).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        block.weight.data += 0.3
    return replace(pipeline, controlnet=controlnet)


@pytest.mark.parametrize("scheduler", ["dpm", "unipc", "ddim"])
def test_every_scheduler_gives_the_images_of_diffusers_img2img_pipeline(loud, pairs, config, scheduler, monkeypatch):
    images, masks = pairs[0][:2], pairs[1][:2]
    settings = replace(config, scheduler=scheduler, num_inference_steps=6, guidance_end=1.0, guided_by="text",
                       control_guidance_end=0.7)  # fmt: skip
    noise = first_noise(loud.base, [3, 7], settings, (64, 64))
    monkeypatch.setattr(img2img, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(img2img, "retrieve_latents", lambda encoded, generator: encoded.latent_dist.mode())
    parts = diffusers_pipeline(loud.base, settings, loud.controlnet).components
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt=CAPTIONS, negative_prompt=[""] * 2, image=torch.from_numpy(images).movedim(-1, 1) / 255,
        control_image=to_control(masks, loud.palette), strength=0.6, num_inference_steps=6,
        guidance_scale=settings.guidance_scale, output_type="np", control_guidance_end=0.7,
        controlnet_conditioning_scale=settings.controlnet_conditioning_scale,
    ).images  # fmt: skip
    steps, masked = [], []
    loud.base.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    loud.controlnet.register_forward_pre_hook(lambda *_: masked.append(1))
    ours = generate(loud, masks, CAPTIONS, [3, 7], settings, start=Start(images, 0.6))
    assert np.abs(ours - (expected * 255).round()).max() <= 1
    assert (len(steps), len(masked)) == (3, 2)  # of 6: those before the noise of the start are skipped


def test_a_strength_near_0_gives_the_reconstruction_and_1_the_bytes_of_generation_from_noise(
    write, pipeline, pairs, tmp_path
):
    out = write(from_images=0.01)
    expected = torch.from_numpy(pairs[0]).movedim(-1, 1)
    expected = [to_uint8(reconstruct(pipeline.base.vae, to_image(some))) for some in expected.split(4)]
    assert np.array_equal(pixels(out), np.concatenate(expected))
    assert json.loads((out / "generation.json").read_text())["from_images"] == 0.01
    assert "can be close to that image" in (out / "README.md").read_text()
    whole, noise = (write(output_dir=str(tmp_path / name), from_images=one) for name, one in (("1", 1), ("no", None)))
    assert np.array_equal(pixels(whole), pixels(noise))
    half = pixels(write(output_dir=str(tmp_path / "half"), from_images=0.5))
    assert all(np.abs(one - other).mean() > 1 for one, other in zip(half, pixels(noise), strict=True))


@pytest.mark.parametrize("strength", [None, 0.5])
def test_inpainting_changes_the_class_alone_and_leaves_out_rows_without_it(write, real, pairs, common, strength):
    (name, where), (images, masks) = common, pairs
    out = write(inpaint=[name], from_images=strength)
    rows = np.flatnonzero(where.any((1, 2)))
    made = read_split(out)
    check_split(made)
    assert [row.caption for row in made.records] == [real[row].caption for row in rows]
    for image, row in zip(pixels(out), rows, strict=True):
        cells = where[row].reshape(8, 8, 8, 8).any((1, 3))
        near = np.pad(cells, 1)
        near = (
            np.any([near[y : y + 8, x : x + 8] for y in range(3) for x in range(3)], axis=0).repeat(8, 0).repeat(8, 1)
        )
        assert np.array_equal(image[~near], images[row][~near]) and np.abs(image - images[row])[where[row]].mean() > 5
        assert np.array_equal(read_mask(made[list(rows).index(row)].mask, made.palette), masks[row])
    assert json.loads((out / "generation.json").read_text())["inpaint"] == [name]


@pytest.mark.parametrize("changes", [{}, {"augment_masks": "affine,degrees=30"}])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_image_and_mask_are_cut_fitted_and_moved_alike(config, real, tmp_path, fit, changes):
    wide = cut_to(real, tmp_path / "wide", 40)
    for record in wide.records:  # images that show their masks
        Image.fromarray(colorize(read_mask(record.mask, wide.palette), wide.palette)).save(record.image)
    given = {"controls": str(wide.folder), "resolution": 32, "fit": fit, "from_images": 0.5} | changes
    conditions = read_conditions(replace(config, **given))
    for replicate in range(3):
        found = conditions.read(1, replicate)
        shown, expected = found.frame.of(found.image), found.frame.of(colorize(found.mask, wide.palette))
        assert shown.shape == expected.shape and (np.abs(shown.astype(int) - expected).max(-1) < 60).mean() > 0.8


def test_a_set_from_images_that_was_cut_or_shared_by_processes_ends_with_the_same_bytes(
    config, write, pipeline, common, tmp_path
):
    given = {"from_images": 0.5, "inpaint": [common[0]], "replicates": 2, "augment_masks": "affine", "batch_size": 2}
    out = write(**given)
    whole = tree(out)
    (out / "metadata.csv").unlink()
    (out / "images" / "000002.png").unlink()
    write(**given)
    assert tree(out) == whole
    shared = replace(config, **given, output_dir=str(tmp_path / "shared"))
    with pytest.raises(UserError, match="still missing"):
        generate_dataset(shared, pipeline, print, Process(0, 2))
    generate_dataset(shared, pipeline, print, Process(1, 2))
    assert tree(generate_dataset(shared, pipeline, print, Process(0, 2))) == whole
    singly = pixels(write(**given | {"batch_size": 1}, output_dir=str(tmp_path / "singly")))
    assert max(np.abs(a - b).max() for a, b in zip(pixels(out), singly, strict=True)) <= 1


def test_an_image_that_fails_the_filter_is_generated_again_from_its_own_image_with_other_noise(
    write, monkeypatch, tmp_path
):
    segmenter, calls = build_segmenter(9, 8), count()
    segmenter.settings = {"resolution": 64}
    first = pixels(write(from_images=0.5, limit=2))
    monkeypatch.setattr(writer, "open_filter", lambda *_: Filter(segmenter, 0.5, 2))
    monkeypatch.setattr(Filter, "score", lambda *_: float(next(calls) >= 2))
    out = write(from_images=0.5, limit=2, min_miou=0.5, output_dir=str(tmp_path / "filtered"))
    assert [(record["attempt"], record["kept"]) for record in records_of(out)] == [(1, True)] * 2
    assert all(np.abs(a - b).mean() > 1 for a, b in zip(first, pixels(out), strict=True))


def test_what_cannot_be_started_from_is_named_before_anything_is_generated(
    write, landscapes, real, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "generate", lambda *_, **__: pytest.fail("generated before the fault was found"))
    masks = {"controls": str(landscapes / "test" / "masks"), "palette": str(landscapes / "palette.json")}
    data = shutil.copytree(landscapes / "test", tmp_path / "data")
    real.palette.save(data / "palette.json")
    Image.new("RGB", (32, 32)).save(data / real[1].image_name)
    for changes, match in (
        ({"from_images": 0.0}, "--from_images: expected more than 0, at most 1, found 0"),
        ({"from_images": 1.5}, "--from_images: expected more than 0"),
        ({**masks, "prompt": "a lake", "from_images": 0.5}, "--from_images starts from real images"),
        ({**masks, "prompt": "a lake", "inpaint": ["tree"]}, "--inpaint starts from real images"),
        ({"inpaint": ["tre"]}, "--inpaint: expected a class of palette.json, found 'tre'. Did you mean tree?"),
        ({"inpaint": ["house"], "limit": 1, "split": "test[:1]"}, "--inpaint house: no mask of .* has it"),
        ({"controls": str(data), "from_images": 0.5}, r"metadata.csv, line 3 \(row 1\).*mask of its image's size"),
    ):
        with pytest.raises(UserError, match=match):
            write(**changes)
