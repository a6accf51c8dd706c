"""Promise: masks of every format are read to the same ids through a palette, and what a palette lacks is named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from segcn.data.masks import colorize, read_mask, resize_mask, write_mask
from segcn.data.palette import IGNORE, Label, Palette, find_palette
from segcn.utils.errors import UserError

FEW = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SKY, TREE, LAKE = (Label(0, "sky", (135, 206, 235)), Label(1, "tree", (0, 100, 0)), Label(7, "lake", (0, 0, 200)))
UNLABELLED = Label(IGNORE, "unlabelled", (1, 1, 1), ignore=True)
PALETTE = Palette((SKY, TREE, LAKE, UNLABELLED))
MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from(PALETTE.ids))


def save(path, values, **options):
    Image.fromarray(values).save(path, **options)
    return path


def test_palette_survives_its_file(tmp_path):
    PALETTE.save(tmp_path / "palette.json")
    loaded = Palette.load(tmp_path / "palette.json")
    assert loaded == PALETTE
    assert loaded.fingerprint == PALETTE.fingerprint != Palette((SKY, TREE)).fingerprint
    assert loaded.names == ("sky", "tree", "lake", "unlabelled")
    assert loaded.num_classes == 8


def test_table_colors_declared_ids_and_leaves_the_rest_black():
    assert PALETTE.table.shape == (256, 3)
    assert PALETTE.table[7].tolist() == [0, 0, 200]
    assert PALETTE.table[254].tolist() == [0, 0, 0]
    assert Palette((SKY,)).table[IGNORE].tolist() == [0, 0, 0]
    assert PALETTE.table[IGNORE].tolist() == [1, 1, 1]


def test_a_wrong_label_is_refused():
    for label, words in (
        ((255, "hill", (1, 2, 3)), "at most 255 classes"),
        ((256, "hill", (1, 2, 3), True), "0 to 254"),
        ((1, "hill", (1, 2, 300)), "three numbers"),
        ((1.5, "hill", (1, 2, 3)), "0 to 254"),
        ((1, " ", (1, 2, 3)), "expected a name"),
        ((1, "hill", (1, 2, 3), 1), "ignore true or false"),
    ):
        with pytest.raises(UserError, match=words):
            Label(*label)


def test_the_british_spelling_is_read(tmp_path):
    PALETTE.save(tmp_path / "palette.json")
    written = (tmp_path / "palette.json").read_text()
    assert '"color": [' in written and "colour" not in written
    (tmp_path / "palette.json").write_text(written.replace('"color"', '"colour"'))
    assert Palette.load(tmp_path / "palette.json") == PALETTE


def test_a_wrong_palette_is_refused(tmp_path):
    for labels, words in (
        ([SKY, Label(0, "hill", (1, 2, 3))], "different id"),
        ([SKY, Label(1, "sky", (1, 2, 3))], "different name"),
        ([SKY, Label(1, "hill", SKY.color)], "different color"),
        ([UNLABELLED], "no class"),
    ):
        entries = [{"id": each.id, "name": each.name, "color": each.color, "ignore": each.ignore} for each in labels]
        (tmp_path / "palette.json").write_text(json.dumps({"labels": entries}))
        with pytest.raises(UserError, match=rf"palette.json: .*{words}"):
            Palette.load(tmp_path / "palette.json")


def test_the_palette_is_found_in_the_folder_or_above_it(tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    with pytest.raises(UserError, match=r"no palette.json"):
        find_palette(train)
    PALETTE.save(tmp_path / "palette.json")
    assert find_palette(train) == find_palette(tmp_path) == tmp_path / "palette.json"


@FEW
@given(mask=MASKS)
def test_every_file_format_gives_the_same_ids(mask, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_mask(folder / "p.png", mask, PALETTE)
    save(folder / "l.png", mask)
    save(folder / "16.png", mask.astype(np.uint16))
    save(folder / "rgb.png", colorize(mask, PALETTE))
    save(folder / "rgba.png", np.dstack([colorize(mask, PALETTE), np.full_like(mask, 9)]))
    save(folder / "l.tiff", mask)
    for path in folder.iterdir():
        ids = read_mask(path, PALETTE)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, mask, err_msg=path.name)


@FEW
@given(mask=MASKS)
def test_a_written_mask_is_ids_and_shows_its_colors(mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "0.png"
    write_mask(path, mask, PALETTE)
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colorize(mask, PALETTE))


def test_labels_marked_ignore_are_read_as_unlabelled(tmp_path):
    palette = Palette((SKY, Label(3, "void", (9, 9, 9), ignore=True)))
    mask = np.array([[0, 3, 255]], np.uint8)
    assert read_mask(save(tmp_path / "l.png", mask), palette).tolist() == [[0, 255, 255]]
    assert read_mask(save(tmp_path / "rgb.png", colorize(mask[:, :2], palette)), palette).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            np.array([[0, 5, 5, 5], [1, 1, 9, 255]], np.uint8),
            r"0, 1, 7, 255.*value 5 \(3 pixels\), value 9 \(1 pixels\)",
        ),
        (np.array([[0, 300, 511]], np.uint16), r"value 300 \(1 pixels\), value 511"),
        (np.array([[SKY.color, (9, 8, 7), (9, 8, 7)]], np.uint8), r"color \[9, 8, 7\] \(2 pixels\)"),
    ],
)
def test_what_the_palette_lacks_is_counted(tmp_path, values, words):
    with pytest.raises(UserError, match=rf"0.png: .*{words}"):
        read_mask(save(tmp_path / "0.png", values), PALETTE)


def test_a_jpeg_mask_is_named_as_the_cause(tmp_path):
    mask = np.random.default_rng(0).choice([0, 1, 7], (16, 16)).astype(np.uint8)
    path = save(tmp_path / "0.jpg", colorize(mask, PALETTE))
    with pytest.raises(UserError, match="JPEG compression changes labels"):
        read_mask(path, PALETTE)


def test_a_renumbered_palette_file_is_refused(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([*TREE.color, *SKY.color])
    image.save(tmp_path / "0.png")
    with pytest.raises(UserError, match="value 0 has the color of 'tree', id 1"):
        read_mask(tmp_path / "0.png", PALETTE)


@FEW
@given(mask=MASKS, height=st.integers(1, 12), width=st.integers(1, 12))
def test_resizing_invents_no_class(mask, height, width):
    resized = resize_mask(mask, (height, width))
    assert resized.shape == (height, width)
    assert set(np.unique(resized)) <= set(np.unique(mask))


def test_colorise_takes_stacks():
    mask = np.array([[[0, 1]], [[7, 255]]], np.uint8)
    assert colorize(mask, PALETTE).shape == (2, 1, 2, 3)
    assert colorize(mask, PALETTE)[1, 0, 0].tolist() == [0, 0, 200]


def test_ignored_labels_may_share_a_color(tmp_path):
    ignored = [Label(id, f"void {id}", (0, 0, 0), ignore=True) for id in (0, 1, 4)]
    palette = Palette((*ignored, Label(7, "road", (128, 64, 128))))
    mask = np.array([[0, 1, 4, 7]], np.uint8)
    write_mask(tmp_path / "mask.png", mask, palette)
    Image.fromarray(colorize(mask, palette)).save(tmp_path / "rgb.png")
    for name in ("mask.png", "rgb.png"):
        assert read_mask(tmp_path / name, palette).tolist() == [[255, 255, 255, 7]]
    with pytest.raises(UserError, match="different color for every label"):
        Palette((*ignored, Label(7, "road", (0, 0, 0))))
