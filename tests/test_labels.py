"""Promise: masks of every format are read to the same ids through a palette, and what a palette lacks is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from segcn.data.masks import colorize, read_mask, resize_mask, write_mask
from segcn.data.palette import IGNORE, Label, Palette, find_palette
from segcn.utils.errors import UserError

RENUMBERED = Image.fromarray(np.array([[0, 1]], np.uint8))
RENUMBERED.putpalette([0, 100, 0, 135, 206, 235])
FEW = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SKY, TREE, LAKE = (Label(0, "sky", (135, 206, 235)), Label(1, "tree", (0, 100, 0)), Label(7, "lake", (0, 0, 200)))
UNLABELLED = Label(IGNORE, "unlabelled", (1, 1, 1), ignore=True)
PALETTE = Palette((SKY, TREE, LAKE, UNLABELLED))
MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from(PALETTE.ids))


def save(path, values, **options):
    Image.fromarray(values).save(path, **options)
    return path


def test_palette_survives_its_file_and_the_british_spelling_is_read(tmp_path):
    PALETTE.save(tmp_path / "palette.json")
    loaded = Palette.load(tmp_path / "palette.json")
    assert loaded == PALETTE
    assert loaded.fingerprint == PALETTE.fingerprint != Palette((SKY, TREE)).fingerprint
    assert loaded.names == ("sky", "tree", "lake", "unlabelled")
    assert loaded.num_classes == 8
    written = (tmp_path / "palette.json").read_text()
    assert '"color": [' in written and "colour" not in written
    (tmp_path / "palette.json").write_text(written.replace('"color"', '"colour"'))
    assert Palette.load(tmp_path / "palette.json") == PALETTE


def test_the_table_colors_declared_ids_and_stacks_of_masks_and_leaves_the_rest_black():
    assert PALETTE.table.shape == (256, 3)
    assert PALETTE.table[[7, 254, IGNORE]].tolist() == [[0, 0, 200], [0, 0, 0], [1, 1, 1]]
    assert Palette((SKY,)).table[IGNORE].tolist() == [0, 0, 0]
    stack = np.array([[[0, 1]], [[7, 255]]], np.uint8)
    assert np.array_equal(colorize(stack, PALETTE), PALETTE.table[stack])


def test_the_palette_is_found_in_the_folder_or_above_it(tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    with pytest.raises(UserError, match=r"no palette.json"):
        find_palette(train)
    PALETTE.save(tmp_path / "palette.json")
    assert find_palette(train) == find_palette(tmp_path) == tmp_path / "palette.json"


@FEW
@given(mask=MASKS)
def test_a_written_mask_is_ids_that_show_their_colors_and_from_its_colors_the_ids_are_read(mask, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_mask(folder / "p.png", mask, PALETTE)
    save(folder / "rgb.png", colorize(mask, PALETTE))
    with Image.open(folder / "p.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colorize(mask, PALETTE))
    for path in folder.iterdir():
        ids = read_mask(path, PALETTE)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, mask, err_msg=path.name)


@pytest.mark.parametrize(("name", "image", "words"), [
    ("0.png", [[0, 5, 5, 5], [1, 1, 9, 255]], r"0, 1, 7, 255.*value 5 \(3 pixels\), value 9 \(1 pixels\)"),
    ("0.png", np.array([[0, 300, 511]], np.uint16), r"value 300 \(1 pixels\), value 511"),
    ("0.png", [[SKY.color, (9, 8, 7), (9, 8, 7)]], r"color \[9, 8, 7\] \(2 pixels\)"),
    ("0.jpg", colorize(np.random.default_rng(0).choice(np.uint8([0, 1, 7]), (16, 16)), PALETTE),
     "JPEG compression changes labels"),
    ("0.png", RENUMBERED, "value 0 has the color of 'tree', id 1"),
])  # fmt: skip
def test_what_the_palette_lacks_is_counted_and_its_cause_named(tmp_path, name, image, words):
    if isinstance(image, list):
        image = np.array(image, np.uint8)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: .*{words}"):
        read_mask(tmp_path / name, PALETTE)


@FEW
@given(mask=MASKS, height=st.integers(1, 12), width=st.integers(1, 12))
def test_resizing_invents_no_class(mask, height, width):
    resized = resize_mask(mask, (height, width))
    assert resized.shape == (height, width)
    assert set(np.unique(resized)) <= set(np.unique(mask))


def test_labels_marked_ignore_are_read_as_unlabelled_and_may_share_a_color(tmp_path):
    ignored = [Label(id, f"void {id}", (0, 0, 0), ignore=True) for id in (0, 1, 4)]
    palette = Palette((*ignored, Label(7, "road", (128, 64, 128))))
    mask = np.array([[0, 1, 4, 7]], np.uint8)
    write_mask(tmp_path / "p.png", mask, palette)
    save(tmp_path / "l.png", mask)
    save(tmp_path / "rgb.png", colorize(mask, palette))
    for path in tmp_path.iterdir():
        assert read_mask(path, palette).tolist() == [[255, 255, 255, 7]]
    with pytest.raises(UserError, match="different color for every label"):
        Palette((*ignored, Label(7, "road", (0, 0, 0))))
