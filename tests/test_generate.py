"""Promise: an image depends on its seed and row alone, and what is written is a data set that can be trained on."""

import json
import os
import re
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from kills import forked
from malformed import png_begun
from PIL import Image
from runs import tree

from segcn.data.captions import classes_of, without_classes
from segcn.data.dataset import PairedDataset
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import check_split, read_split, write_metadata
from segcn.data.palette import Label, Palette
from segcn.data.transforms import AUGMENTS
from segcn.generate import writer
from segcn.generate.conditions import read_conditions
from segcn.generate.pipeline import find_controlnet, generate
from segcn.generate.writer import differences, generate_dataset, reconstruct_dataset, records_of
from segcn.models.base import latent_factor, load_base
from segcn.models.controlnet import make_controlnet
from segcn.notebook import workspace
from segcn.utils import io
from segcn.utils.errors import UserError
from segcn.utils.io import Process


@pytest.fixture
def opened(tmp_path):
    """The rows of a folder, opened with `datasets`."""
    return lambda folder: datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def no_generation(monkeypatch):
    """Generating fails the test."""
    monkeypatch.setattr(writer, "generate", lambda *_, **__: pytest.fail("generated before the fault was found"))


@pytest.fixture
def quick_images(monkeypatch):
    """Each image has one color, by what its noise depends on; returns the calls."""
    calls = []

    def one_color(pipeline, masks, captions, rows, settings, size, start):
        calls.append(rows)
        return np.stack([np.full((*size, 3), row % 251, np.uint8) for row in rows])

    monkeypatch.setattr(writer, "generate", one_color)
    return calls


def pixels(folder):
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("images/*.png"))]


def test_a_set_keeps_masks_and_captions_by_row_and_a_batch_size_or_a_cut_moves_no_pixel_by_two_levels(
    write, landscapes, tmp_path, capsys
):
    out = write()
    made, source, whole = read_split(out), read_split(landscapes, "test"), pixels(out)
    check_split(made)
    assert len(made) == len(source) == 6
    for one, real in zip(made.records, source.records, strict=True):
        assert one.caption == real.caption
        assert np.array_equal(read_mask(one.mask, made.palette), read_mask(real.mask, source.palette))
    singly = pixels(write(batch_size=1, output_dir=str(tmp_path / "other")))
    assert max(np.abs(a - b).max() for a, b in zip(whole, singly, strict=True)) <= 1
    assert np.abs(whole[0] - whole[1]).mean() > 1
    for name in ("images/000002.png", "images/000005.png", "metadata.csv"):
        (out / name).unlink()
    again = pixels(write())
    assert "4 of 6 images exist already" in capsys.readouterr().out
    assert max(np.abs(a - b).max() for a, b in zip(whole, again, strict=True)) <= 1 and len(read_split(out)) == 6


def test_the_manifest_has_a_line_for_each_image_in_order_and_a_batch_with_a_gap_is_generated_whole(write, quick_images):
    out = write(replicates=2)
    records = list(records_of(out))
    assert [(one["image"], one["row"], one["replicate"]) for one in records] == [(k, k // 2, k % 2) for k in range(12)]
    assert [one["text"] for one in records] == [row.caption for row in read_split(out).records]
    assert all((out / one["file_name"]).is_file() and one["kept"] for one in records)
    assert set(records[0]) == {"image", "row", "replicate", "attempt", "kept", "text", "file_name",
                               "conditioning_image_file_name"}  # fmt: skip
    (out / "images" / "000001.png").unlink()
    before, first = (out / "images" / "000000.png").stat().st_mtime_ns, quick_images[0]
    del quick_images[:]
    for name in ("metadata.csv", writer.SETTINGS_FILE):  # what a kill leaves, half written
        forked(partial(io.write_whole, out / name, lambda staged: (staged.touch(), os._exit(1))))
    assert sum(name.startswith(".") for name in tree(out)) == 2
    write(replicates=2)
    assert quick_images == [first] and (out / "images" / "000000.png").stat().st_mtime_ns == before
    assert not any(name.startswith(".") for name in tree(out))


def test_a_second_command_on_a_folder_is_refused_by_the_name_of_the_first(config, write, no_generation):
    out = Path(config.output_dir)
    out.mkdir()
    io.lock(out, print, "generates")

    def second():
        with pytest.raises(UserError, match=f"in use: process {os.getppid()} on .* generates there"):
            write()

    try:
        assert forked(second) == 0 and list(out.iterdir()) == [out / io.LOCK]
    finally:
        io.release()


def test_replicates_differ_and_the_first_is_the_image_of_a_run_without(write, tmp_path):
    one, several = pixels(write()), pixels(write(replicates=3, limit=4, output_dir=str(tmp_path / "three")))
    assert len(several) == 12 and max(np.abs(a - b).max() for a, b in zip(one[:4], several[::3], strict=True)) <= 1
    assert min(np.abs(several[k] - several[k + 1]).mean() for k in (0, 1)) > 1


def test_a_prompt_may_name_the_classes_of_each_mask(write, quick_images):
    out = read_split(write(prompt="a scene of {classes}"))
    named = [f"a scene of {classes_of(read_mask(row.mask, out.palette), out.palette)}" for row in out.records]
    assert [row.caption for row in out.records] == named and len(set(named)) > 1


@pytest.fixture
def own(landscapes):
    """The captions of the test rows."""
    return [row.caption for row in read_split(landscapes, "test").records]


def prompts_of(config, replicates):
    """The prompt of each (row, replicate), the same each time it is drawn."""
    keys = [(row, replicate) for row in range(6) for replicate in range(replicates)]
    drawn, again = ([read.prompt(*key) for key in keys] for read in (read_conditions(config), read_conditions(config)))
    assert drawn == again
    return dict(zip(keys, drawn, strict=True))


def test_a_prompt_may_hold_the_rows_caption_and_choices_drawn_for_each_image(own, config):
    prompts = prompts_of(replace(config, prompt="{caption}, {in fog|in rain|}"), 5)
    assert {text.removeprefix(own[row]) for (row, _), text in prompts.items()} == {", in fog", ", in rain", ", "}
    both = replace(config, prompt="a view {by day|at night} of {classes}")
    assert "of {classes}" in read_conditions(both).prompt(0, 0)


def test_mixed_prompts_are_the_captions_exchanged_between_the_rows(write, quick_images, own):
    mixed = [record["text"] for record in records_of(write(mix_prompts=True, replicates=2))]
    assert Counter(mixed[::2]) == Counter(mixed[1::2]) == Counter(own)
    assert mixed[::2] != own and mixed[::2] != mixed[1::2]
    with pytest.raises(UserError, match="leave out --prompt"):
        write(mix_prompts=True, replicates=2, prompt="a lake")


def test_without_class_words_captions_keep_how_it_looks(write, quick_images, own, landscapes):
    palette = read_split(landscapes, "test").palette
    out = write(without_class_words=True)
    cut = [without_classes(text, palette) for text in own]
    assert [record["text"] for record in records_of(out)] == cut != own
    assert all(re.fullmatch(r"an? \w+ landscape (by|at) \w+", text) for text in cut)
    assert json.loads((out / "generation.json").read_text())["without_class_words"] is True
    assert "the phrases that name them are cut out" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="without_class_words: was True, is False"):
        write()
    with pytest.raises(UserError, match=r"--without_class_words cuts the captions.*\{caption\}"):
        write(without_class_words=True, prompt="a view")


def test_an_empty_prompt_is_generated_from_and_its_row_gets_a_caption(
    config, write, pipeline, landscapes, opened, tmp_path
):
    data = shutil.copytree(landscapes / "test", tmp_path / "data")
    shutil.copy(landscapes / "palette.json", data)
    rows = [(record.image_name, record.mask_name, "a lake") for record in read_split(data).records]
    write_metadata(data, [*rows[:2], (*rows[2][:2], "fog, a lake")])
    out = write(controls=str(data), without_class_words=True)
    assert [record["text"] for record in records_of(out)] == ["", "", "fog"]
    split = read_split(out)  # every row of a data set has a caption
    named = [classes_of(read_mask(row.mask, split.palette), split.palette) for row in split.records]
    assert [row.caption for row in split.records] == [*named[:2], "fog"] == [row["text"] for row in opened(out)]
    masks = np.stack([read_mask(row.mask, split.palette) for row in split.records])
    images = [Image.open(row.image) for row in split.records]
    assert np.array_equal(images, generate(pipeline, masks, ["", "", "fog"], [0, 1, 2], config))


def test_varied_words_are_exchanged_within_their_group_and_nothing_else_of_a_caption_changes(config, own):
    seasons, hours = "a spring|a summer|an autumn|a winter", "at dawn|by day|at dusk|at night"
    prompts = prompts_of(replace(config, vary=[seasons, hours], limit=None), 16)

    def drawn_words(text: str) -> tuple[str, str]:
        return re.search(seasons, text)[0], re.search(hours, text)[0]

    def rest(text: str) -> str:
        return re.sub(hours, "HOUR", re.sub(seasons, "SEASON", text))

    assert {rest(text) == rest(own[row]) for (row, _), text in prompts.items()} == {True}
    assert len({drawn_words(text) for text in prompts.values()}) == 16  # the groups are drawn independently
    assert len({drawn_words(prompts[0, replicate])[0] for replicate in range(16)}) > 1, "one row has several seasons"


def test_a_group_of_words_that_would_vary_nothing_is_refused(config):
    for group, match in (
        ("by day", "with bars between"), ("by day|", "with bars"), ("by day|by day", "with bars"),
        ("benign|malignant", "no caption of .* has one of these words"), ("spri|wint", "no caption"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            read_conditions(replace(config, vary=[group]))


def test_augmented_masks_are_new_layouts_that_fill_the_frame_and_are_used(write, landscapes, monkeypatch):
    seen = []
    monkeypatch.setattr(
        writer, "generate", lambda pipeline, masks, *_, **__: seen.extend(masks) or np.stack([masks] * 3, -1)
    )
    made, source = read_split(write(augment_masks="affine,degrees=30", replicates=2)), read_split(landscapes, "test")
    masks, real = ([read_mask(row.mask, split.palette) for row in split.records] for split in (made, source))
    assert all((a == b).all() for a, b in zip(masks, seen, strict=True)) and not (np.stack(masks) == 255).any()
    assert all((masks[k] != real[k // 2]).any() for k in range(12)) and (masks[0] != masks[1]).any()
    with pytest.raises(UserError, match="--augment_masks: expected affine"):
        write(augment_masks="swirl", replicates=2)


def test_a_set_of_one_image_opens_with_load_dataset_and_keeps_its_rows(write, quick_images, opened):
    rows = opened(write(limit=1))
    assert rows.column_names == ["image", "conditioning_image", "text"] and len(rows) == 1
    assert rows[0]["image"].size == rows[0]["conditioning_image"].size == (64, 64)
    write(limit=3)
    assert len(read_split(write(limit=2))) == 3


def test_a_large_job_is_written_to_folders_of_bounded_size(write, quick_images, opened, monkeypatch):
    monkeypatch.setattr(writer, "FLAT", 4)
    out = write(limit=5)
    assert sorted(path.parent.name for path in out.glob("images/*/*.png")) == ["000"] * 4 + ["001"]
    check_split(read_split(write()))
    rows = opened(out)
    assert len(rows) == 6 and rows[5]["image"].getpixel((0, 0)) == (5, 5, 5)


def test_the_card_names_models_settings_and_figures_and_reads_no_prompt_as_html(write, quick_images, opened, tmp_path):
    evil = '<script>alert("1")</script> | ![x](http://x) $a$ 草'
    given = {"prompt": evil, "negative_prompt": evil, "seed": 7}
    out = write(**given)
    card = (out / "README.md").read_text()
    recorded = json.loads((out / "generation.json").read_text())
    for text in (recorded["base_fingerprint"], recorded["controlnet_weights"], "| seed | 7;",
                 "| num_inference_steps | 2 |", "| images | 6 |", "| filter | none |", "| 0 | sky | `#"):  # fmt: skip
        assert text in card
    assert "<script" not in card and "![x]" not in card and "http:" not in card and str(tmp_path.parent) not in card
    assert read_split(out)[0].caption == opened(out)[0]["text"] == evil
    (out / "README.md").write_text("my own words")
    (out / "metadata.csv").unlink()
    write(**given)
    assert (out / "README.md").read_text() == "my own words"


HOSTILE = {
    "unknown colors": (lambda path: Image.new("L", (64, 64), 77).save(path), r"value 77 \(4096 pixels\)"),
    "an empty file": (lambda path: path.write_bytes(b""), "cannot be read"),
    "30,000 x 30,000 pixels": (lambda path: path.write_bytes(png_begun(30000, 30000)), "too large"),
    "an odd size": (lambda path: write_mask(path, np.zeros((64, 63), np.uint8), FIRST), "--resolution"),
}
FIRST = Palette((Label(0, "sky", (135, 206, 235)),))


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_mask_that_cannot_be_used_is_named_before_anything_is_generated(
    config, write, pipeline, tmp_path, no_generation, fault
):
    spoil, match = HOSTILE[fault]
    masks = tmp_path / "masks"
    masks.mkdir()
    pipeline.palette.save(masks / "palette.json")
    for name in "abc":
        write_mask(masks / f"{name}.png", np.zeros((64, 64), np.uint8), pipeline.palette)
    spoil(masks / "b.png")
    spoil(masks / "c.png")
    with pytest.raises(UserError, match=f"b.png.*{match}.*1 more of 3 masks fail"):
        write(controls=str(masks), prompt="a lake")
    assert {path.name for path in Path(config.output_dir).iterdir()} == {io.LOCK}


def test_settings_that_cannot_be_are_named_before_a_folder_is_made(config, write, no_generation):
    for changed, match in (
        ({"output_dir": ""}, "--output_dir"), ({"replicates": 0}, "--replicates"), ({"min_miou": 60.0}, "--min_miou"),
        ({"batch_size": 0}, "--batch_size"), ({"controls": "nowhere"}, "nowhere: no su"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            write(**changed)
    assert not Path(config.output_dir).exists()


def test_an_output_that_cannot_be_written_is_named_and_one_that_exists_keeps_every_byte(
    write, landscapes, tmp_path, no_generation
):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below", "/proc/nowhere"):
        with pytest.raises(UserError, match="cannot be written"):
            write(output_dir=str(tmp_path / name))
    before = tree(landscapes)
    with pytest.raises(UserError, match="was not written by segcn generate"):
        write(output_dir=str(landscapes))
    assert tree(landscapes) == before and (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_leaves_whole_images_and_the_same_command_resumes(write, quick_images, monkeypatch):
    save, saved = Image.Image.save, []

    def full(image, *rest, **options):
        saved.append(image)
        if len(saved) > 5:
            raise OSError(28, "No space left on device")
        return save(image, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"No space left on device.*rerun the same command to resume"):
            write()
    check_split(read_split(write()))


def test_memory_does_not_grow_with_the_number_of_masks(write, pipeline, quick_images, tmp_path):
    peaks = []
    for count in (16, 96):
        folder = tmp_path / str(count)
        folder.mkdir()
        for row in range(count):
            write_mask(folder / f"{row:03d}.png", np.full((256, 256), row % 9, np.uint8), pipeline.palette)
        pipeline.palette.save(folder / "palette.json")
        tracemalloc.start()
        write(controls=str(folder), prompt="a lake", output_dir=str(tmp_path / f"{count}o"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20 * 256 * 256  # 80 masks more would be four times that


def test_other_settings_are_refused(config, write, pipeline):
    out, trained = write(), make_controlnet(pipeline.base.unet)
    assert differences(out, config, pipeline) == []
    assert differences(out, replace(config, seed=1), pipeline) == ["seed: was 0, is 1"]
    trained.controlnet_mid_block.weight.data += 1
    (changed,) = differences(out, config, replace(pipeline, controlnet=trained))
    assert changed.startswith("controlnet_weights:")
    with pytest.raises(UserError, match="seed: was 0, is 1"):
        write(seed=1)


def test_without_a_launcher_the_first_process_says_what_is_missing_and_how_to_finish(config, pipeline, quick_images):
    missing = r"2 of 6 images are still missing, from process 1 of 2.*rerun the same command"
    with pytest.raises(UserError, match=missing):
        generate_dataset(config, pipeline, print, Process(0, 2))
    assert len(read_split(generate_dataset(config, pipeline))) == 6 and quick_images == [[0, 1, 2, 3], [4, 5]]


def test_a_folder_of_masks_needs_a_prompt_and_is_used_by_its_centered_squares(write, landscapes, tmp_path):
    source, wide = read_split(landscapes, "test"), tmp_path / "wide"
    given = {"controls": str(landscapes / "test" / "masks"), "palette": str(landscapes / "palette.json")}
    with pytest.raises(UserError, match="--prompt"):
        write(**given)
    out = write(**given, prompt="a lake", limit=2)
    assert [record.caption for record in read_split(out).records] == ["a lake"] * 2
    wide.mkdir()
    write_mask(wide / "mask.png", read_mask(source[0].mask, source.palette)[:50], source.palette)
    given |= {"controls": str(wide), "prompt": "a lake", "output_dir": str(tmp_path / "square")}
    with pytest.raises(UserError, match="--resolution"):
        write(**given)
    made = read_split(write(**given, resolution=32))
    check_split(made)
    assert Image.open(made[0].image).size == (32, 32)


def cut_to(split, folder, height):
    """The first two rows of a split as images of that height."""
    for record in split.records[:2]:
        for name, suffix in (("images", record.image_name), ("masks", record.mask_name)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image = Image.open(Path(record.folder, suffix))
            image.crop((0, 64 - height, 64, 64)).save(folder / suffix)
    split.palette.save(folder / "palette.json")
    write_metadata(folder, [(r.image_name, r.mask_name, r.caption) for r in split.records[:2]])
    return read_split(folder)


@pytest.mark.parametrize(("fit", "size"), [("crop", (32, 32)), ("pad", (32, 20)), ("stretch", (32, 32))])
def test_wide_masks_are_used_as_they_fit_and_without_the_padding(write, pipeline, landscapes, tmp_path, fit, size):
    wide = cut_to(read_split(landscapes, "test"), tmp_path / "wide", 40)
    generated = read_split(write(controls=str(wide.folder), resolution=32, fit=fit))
    seen = read_split(reconstruct_dataset(wide, pipeline.base, tmp_path / "seen", 32, fit=fit))
    for split in (generated, seen):
        check_split(split)
        assert Image.open(split[0].image).size == size and len(split) == 2
        back = PairedDataset(split, 32, AUGMENTS["none"], 0, fit)[0]
        real = PairedDataset(wide, 32, AUGMENTS["none"], 0, fit)[0]
        assert torch.equal(back.mask, real.mask) and torch.equal(back.valid, real.valid)


def test_a_notebook_reuses_a_set_with_its_settings(config, write, pipeline, capsys):
    write(guidance_scale=3.0, limit=4)
    again = workspace.as_generated(config)
    assert again == replace(config, guidance_scale=3.0)
    assert len(workspace.generate_once(replace(again, limit=2), pipeline)) == 4
    assert "2 of 2 images exist already" in capsys.readouterr().out


def test_a_base_that_lacks_a_part_is_named_and_its_latent_factor_is_known_without_the_weights(
    pipeline, random_base, tmp_path
):
    assert latent_factor(random_base) == pipeline.base.latent_factor == 8
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="vae"):
        load_base(tmp_path)
    with pytest.raises(UserError, match="no ControlNet"):
        find_controlnet(str(tmp_path))
