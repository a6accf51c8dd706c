"""Promise: layouts are new masks as the rows might have them, each by the seed, its number and the rows alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import tree

from segcn.data.captions import classes_named
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split
from segcn.data.palette import Palette
from segcn.generate import layouts
from segcn.generate.conditions import read_conditions
from segcn.generate.config import LayoutsConfig
from segcn.generate.layouts import energy_distance, make_layouts, nearest_masks, read_ratios
from segcn.generate.recombine import components, read_real_masks
from segcn.utils.errors import UserError


def quiet(line):
    pass


@pytest.fixture
def given(landscapes, tmp_path):
    """The settings of six layouts of the twelve rows."""
    return LayoutsConfig(str(landscapes), str(tmp_path / "layouts"), count=6)


@pytest.fixture
def made(given):
    """Make layouts with these changes of the settings; the folder."""

    def make(**changes):
        config = replace(given, **changes)
        make_layouts(config, quiet)
        return Path(config.output_dir)

    return make


def masks_of(folder):
    palette = Palette.load(folder / "palette.json")
    return np.stack([read_mask(path, palette) for path in sorted(folder.glob("masks/*.png"))])


def test_a_layout_depends_on_seed_and_number_alone_and_rerunning_resumes(made, tmp_path):
    out = made()
    whole = tree(out)
    (out / "masks" / "000001.png").unlink()
    with (out / layouts.LAYOUT_RECORDS).open("ab") as file:
        file.write(b'\n{"layout": 4, "ro')  # as a kill leaves it
    made()
    again = tree(out)
    assert {name: again[name] for name in whole if name != layouts.LAYOUT_RECORDS} == {
        name: whole[name] for name in whole if name != layouts.LAYOUT_RECORDS
    }
    fewer = tree(made(count=3, output_dir=str(tmp_path / "fewer")))
    assert all(fewer[name] == whole[name] for name in fewer if name.startswith("masks/"))
    other = tree(made(seed=1, output_dir=str(tmp_path / "other")))
    assert any(other[name] != whole[name] for name in whole if name.endswith(".png"))


def test_layouts_are_new_have_the_classes_and_neighbors_of_rows_and_their_captions_name_nothing_else(given, made):
    out = made(count=24)
    real, masks = read_real_masks(given, quiet), masks_of(out)
    assert set(np.unique(masks)) <= set(real.states) and masks.shape == (24, 64, 64)
    found = json.loads((out / layouts.RESULTS).read_text())
    assert found["valid"][0] == 1 and (nearest_masks(masks, real)[0] < 1).all()
    assert not any(real.foreign(real.count(mask).boundary) for mask in masks)
    assert all((real.count(mask).pieces <= real.counted.pieces.max(0) + 2).all() for mask in masks)
    names, rows = real.split.palette.names, [json.loads(line)["row"] for line in records(out)]
    for number, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        caption = (out / f"masks/{number:06d}.txt").read_text().strip()
        assert caption.split(" with ")[0] in real.split[row].caption
        assert classes_named(caption, real.split.palette) <= set(np.unique(mask)), (caption, names)
    wrong = real.masks[0].copy()
    wrong[-20:, 20:40] = names.index("sky")
    wrong[-12:-8, 24:36] = names.index("sun")
    assert real.foreign(real.count(wrong).boundary) > 0


def records(out):
    return [line for line in (out / layouts.LAYOUT_RECORDS).read_text().splitlines() if line]


def test_unlabelled_pixels_stay_unlabelled(given, made, landscapes, tmp_path):
    data = shutil.copytree(landscapes, tmp_path / "data")
    split = read_split(data, "train")
    for record in split.records:
        mask = read_mask(record.mask, split.palette).copy()
        mask[-16:] = 255
        write_mask(record.mask, mask, split.palette)
    masks = masks_of(made(dataset_name=str(data)))
    assert set(np.unique(masks)) <= {*split.palette.ids, 255}
    assert (masks[:, -8:] == 255).all() and (masks[:, :32] != 255).all()


def test_ratios_are_followed_and_mistakes_in_them_are_named(given, made, tmp_path):
    real = read_real_masks(given, quiet)
    out = made(ratios="grass=0.45,tree=0.05", count=8)
    found = json.loads((out / layouts.RESULTS).read_text())
    assert found["ratios"][0] < 0.6 * found["ratios"][1]
    for text, said in (("grass", "such as road=0.2"), ("grass=0.9,tree=0.2", "at most 1"), ("lion=1", "found 'lion'")):
        with pytest.raises(UserError, match=f"--ratios: expected .*{said}"):
            read_ratios(text, real)


def test_generate_takes_the_folder_with_its_captions(made, config, write):
    out = made()
    conditions = read_conditions(replace(config, controls=str(out)))
    assert len(conditions) == 6 and all(conditions.captions)
    assert np.array_equal(conditions.read(2, 0).mask, masks_of(out)[2])
    generated = read_split(write(controls=str(out), prompt="{caption} with {classes}"))
    assert len(generated) == 6
    assert all(
        row.caption.startswith(text[0]) for row, text in zip(generated.records, conditions.captions, strict=True)
    )


def test_other_settings_and_folders_of_something_else_are_refused(made, tmp_path):
    out = made()
    with pytest.raises(UserError, match="set of layouts with other settings:\n  seed: was 0, is 1"):
        made(seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not written by segcn layouts"):
        made(output_dir=str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"--things: expected classes of the rows, .*found 'lion'"):
        made(things="lion", output_dir=str(out.parent / "lions"))


def test_rows_without_objects_are_refused_with_what_to_do_instead(made, landscapes, tmp_path):
    split = read_split(shutil.copytree(landscapes, tmp_path / "data"), "train")
    for record in split.records:
        write_mask(record.mask, np.repeat(np.arange(2, dtype=np.uint8), 32)[:, None].repeat(64, 1), split.palette)
    with pytest.raises(UserError, match=r"no class has objects inside the masks, .* --augment_masks affine draws"):
        made(dataset_name=str(tmp_path / "data"))


def test_components_are_the_connected_pixels_of_a_class_and_equal_sets_have_no_distance():
    mask = np.array([[0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 2]], np.uint8)
    numbers = components(mask)
    assert len(np.unique(numbers)) == 4 and len(np.unique(numbers[mask == 0])) == 1
    assert len(np.unique(numbers[mask == 1])) == 2
    near = np.random.default_rng(0).normal(size=(64, 3))
    assert abs(energy_distance(near, near)) < 1e-9 < energy_distance(near, near + 1)
