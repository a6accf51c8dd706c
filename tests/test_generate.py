"""Promise: an image depends on its seed and row alone, and what is written is a data set that can be trained on."""

import copy
import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from segcn import models, paint
from segcn.arguments import make
from segcn.augment import AUGMENTS
from segcn.config import GenerateConfig, InferConfig
from segcn.dataset import PairedDataset, read_control_mask
from segcn.errors import UserError
from segcn.generate import generate_dataset, reconstruct_dataset
from segcn.infer import infer
from segcn.masks import read_mask, write_mask
from segcn.pipeline import Painter, find_controlnet, generate
from segcn.records import check_split, read_split, write_metadata


@pytest.fixture(scope="module")
def painter(random_base, landscapes):
    base = models.load_base(random_base)
    controlnet = models.make_controlnet(base.unet).eval()
    return Painter(base, controlnet, read_split(landscapes, "test").palette, "random")


@pytest.fixture
def config(random_base, landscapes, tmp_path):
    return make(
        GenerateConfig,
        "tiny",
        pretrained_model_name_or_path=str(random_base),
        controls=str(landscapes),
        output_dir=str(tmp_path / "out"),
        num_inference_steps=2,
        batch_size=4,
    )


def pixels(folder):
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("images/*.png"))]


def test_a_generated_set_keeps_masks_and_captions_row_by_row(config, painter, landscapes):
    out = read_split(generate_dataset(config, painter))
    source = read_split(landscapes, "test")
    check_split(out)
    assert len(out) == len(source) == 6
    for made, real in zip(out.records, source.records, strict=True):
        assert made.caption == real.caption
        assert np.array_equal(read_mask(made.mask, out.palette), read_mask(real.mask, source.palette))


def test_a_generated_set_opens_with_load_dataset(config, painter, tmp_path):
    out = generate_dataset(config, painter)
    rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["image", "conditioning_image", "text"] and len(rows) == 6
    assert rows[0]["image"].size == rows[0]["conditioning_image"].size == (64, 64)


def test_another_batch_size_moves_no_pixel_by_more_than_one_level(config, painter, tmp_path):
    four = pixels(generate_dataset(config, painter))
    other = dataclasses.replace(config, batch_size=1, output_dir=str(tmp_path / "other"))
    one = pixels(generate_dataset(other, painter))
    assert max(np.abs(a - b).max() for a, b in zip(four, one, strict=True)) <= 1
    assert np.abs(four[0] - four[1]).mean() > 1


def test_the_same_command_finishes_what_was_cut(config, painter, capsys):
    whole = pixels(generate_dataset(config, painter))
    out = Path(config.output_dir)
    for name in ("images/000002.png", "images/000005.png", "metadata.csv"):
        (out / name).unlink()
    again = pixels(generate_dataset(config, painter))
    assert "4 of 6 images stand already" in capsys.readouterr().out
    assert max(np.abs(a - b).max() for a, b in zip(whole, again, strict=True)) <= 1
    assert len(read_split(out)) == 6


def test_other_settings_and_foreign_folders_are_refused(config, painter):
    generate_dataset(config, painter)
    with pytest.raises(UserError, match="seed: was 0, is 1"):
        generate_dataset(dataclasses.replace(config, seed=1), painter)
    with pytest.raises(UserError, match="was not written by segcn generate"):
        generate_dataset(dataclasses.replace(config, output_dir=config.controls), painter)


def test_masks_text_and_control_strength_are_used(config, painter, landscapes):
    split = read_split(landscapes, "test")
    masks = np.stack([read_mask(record.mask, split.palette) for record in split.records[:1]])
    for block in painter.controlnet.controlnet_down_blocks:  # a new ControlNet is silent: give it a voice
        block.weight.data += 0.3
    shown = generate(painter, masks, ["a lake"], [0], config)
    unseen = generate(painter, masks, ["a lake"], [0], dataclasses.replace(config, controlnet_conditioning_scale=0.0))
    plain = generate(painter, None, ["a lake"], [0], config, size=(64, 64))
    other = generate(painter, masks, ["a house"], [0], config)
    assert np.abs(unseen.astype(int) - plain).max() <= 1
    assert (shown != unseen).any() and (shown != other).any()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_control_is_embedded_once_and_no_picture_changes(config, painter, landscapes, monkeypatch, guidance):
    split = read_split(landscapes, "test")
    masks = np.stack([read_mask(record.mask, split.palette) for record in split.records[:2]])
    settings = dataclasses.replace(config, num_inference_steps=3, guidance_scale=guidance)
    heard = dataclasses.replace(painter, controlnet=copy.deepcopy(painter.controlnet))
    for block in heard.controlnet.controlnet_down_blocks:
        block.weight.data += 0.3
    sizes = []
    embedding = heard.controlnet.controlnet_cond_embedding
    embedding.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    once = generate(heard, masks, ["a lake"] * 2, [0, 1], settings)
    assert sizes == [2] and heard.controlnet.controlnet_cond_embedding is embedding
    monkeypatch.setattr("segcn.pipeline.embedding_once", lambda controlnet, pictures: controlnet)
    always = generate(heard, masks, ["a lake"] * 2, [0, 1], settings)
    assert len(sizes) == 4 and np.abs(once.astype(int) - always).max() <= 1


def test_a_folder_of_masks_needs_a_prompt(config, painter, landscapes, tmp_path):
    folder = dataclasses.replace(
        config, controls=str(landscapes / "test" / "masks"), palette=str(landscapes / "palette.json")
    )
    with pytest.raises(UserError, match="--prompt"):
        generate_dataset(folder, painter)
    out = generate_dataset(dataclasses.replace(folder, prompt="a lake", limit=2), painter)
    assert [record.caption for record in read_split(out).records] == ["a lake"] * 2


def test_the_centred_square_of_any_mask_is_painted_at_a_resolution(config, painter, landscapes, tmp_path):
    source = read_split(landscapes, "test")
    wide = tmp_path / "wide"
    wide.mkdir()
    write_mask(wide / "mask.png", read_mask(source[0].mask, source.palette)[:50], source.palette)
    source.palette.save(wide / "palette.json")
    whole = dataclasses.replace(config, controls=str(wide), prompt="a lake")
    with pytest.raises(UserError, match="--resolution"):
        generate_dataset(whole, painter)
    square = dataclasses.replace(whole, resolution=32, output_dir=str(tmp_path / "square"))
    made = read_split(generate_dataset(square, painter))
    check_split(made)
    assert Image.open(made[0].image).size == (32, 32)


def test_the_painted_mask_is_the_one_of_training(landscapes):
    split = read_split(landscapes, "test")
    sample = PairedDataset(split, 40, AUGMENTS["none"], seed=0).sample(0, 0)
    assert np.array_equal(read_control_mask(split[0].mask, split.palette, 40), sample.mask.numpy())


def cut_to(split, folder, height):
    """The first two rows of a split as pictures of that height."""
    for record in split.records[:2]:
        for name, suffix in (("images", record.image_name), ("masks", record.mask_name)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            picture = Image.open(Path(record.folder, suffix))
            picture.crop((0, 64 - height, 64, 64)).save(folder / suffix)
    split.palette.save(folder / "palette.json")
    write_metadata(folder, [(r.image_name, r.mask_name, r.caption) for r in split.records[:2]])
    return read_split(folder)


@pytest.mark.parametrize(("fit", "size"), [("crop", (32, 32)), ("pad", (32, 20)), ("stretch", (32, 32))])
def test_wide_masks_are_painted_as_they_fit_and_without_the_padding(config, painter, landscapes, tmp_path, fit, size):
    wide = cut_to(read_split(landscapes, "test"), tmp_path / "wide", 40)
    given = dataclasses.replace(config, controls=str(wide.folder), resolution=32, fit=fit)
    painted = read_split(generate_dataset(given, painter))
    seen = read_split(reconstruct_dataset(wide, painter.base, tmp_path / "seen", 32, fit=fit))
    for split in (painted, seen):
        check_split(split)
        assert Image.open(split[0].image).size == size
        back = PairedDataset(split, 32, AUGMENTS["none"], 0, fit)[0]
        real = PairedDataset(wide, 32, AUGMENTS["none"], 0, fit)[0]
        assert torch.equal(back.mask, real.mask) and torch.equal(back.valid, real.valid)


def test_a_set_that_stands_is_taken_with_its_settings_or_refused(config, painter, capsys):
    generate_dataset(dataclasses.replace(config, guidance_scale=3.0, limit=4), painter)
    again = paint.as_painted(config)
    assert again == dataclasses.replace(config, guidance_scale=3.0)
    assert len(paint.paint_once(dataclasses.replace(again, limit=2), painter)) == 4
    assert "4 images stand already" in capsys.readouterr().out
    louder = models.make_controlnet(painter.base.unet)
    louder.controlnet_mid_block.weight.data += 1
    with pytest.raises(UserError, match="controlnet_weights: was"):
        paint.paint_once(again, dataclasses.replace(painter, controlnet=louder))


def test_the_latent_factor_is_known_without_the_weights(painter, random_base):
    assert models.latent_factor(random_base) == painter.base.latent_factor == 8


def test_reconstructions_are_a_data_set_of_the_same_masks(painter, landscapes, tmp_path):
    split = read_split(landscapes, "test")
    out = read_split(reconstruct_dataset(split, painter.base, tmp_path / "seen", resolution=64))
    check_split(out)
    assert len(out) == len(split)


def test_infer_writes_one_picture_or_a_grid_and_never_overwrites(random_base, landscapes, tmp_path):
    models.make_controlnet(models.load_base(random_base).unet).save_pretrained(tmp_path / "controlnet")
    settings = make(
        InferConfig,
        "tiny",
        pretrained_model_name_or_path=str(random_base),
        controlnet_model_name_or_path=str(tmp_path / "controlnet"),
        control_image=str(landscapes / "test" / "masks" / "000000.png"),
        prompt=["a lake", "a house"],
        num_images=2,
        num_inference_steps=2,
        output=str(tmp_path / "grid.png"),
    )
    assert Image.open(infer(settings)).size == (128, 128)
    with pytest.raises(UserError, match="exists"):
        infer(settings)


def test_a_base_that_lacks_a_part_is_named(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="vae"):
        models.load_base(tmp_path)
    with pytest.raises(UserError, match="no ControlNet"):
        find_controlnet(str(tmp_path))
