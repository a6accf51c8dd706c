"""Promise: masks of every format are read through a palette, proposed or chosen, or a message says why not."""

import os
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from segcn.cli import run_command
from segcn.data.colors import ciede2000, look_alike, said_alike
from segcn.data.config import PaletteConfig
from segcn.data.importers import palettes
from segcn.data.importers.palettes import READY, make_palette, mask_files, palette_table_text, ready, spread_colors
from segcn.data.importers.palettes import survey as surveyed
from segcn.data.masks import colorize, read_mask, resize_mask, write_mask
from segcn.data.palette import IGNORE, Label, Palette, find_palette
from segcn.samples.echo import ECHO_PALETTE
from segcn.samples.landscapes.scene import palette as landscapes_palette
from segcn.utils.errors import UserError

ANCHORS = {  # how many classes; id, name and color of some
    "ade20k": (150, (1, "wall", (120, 120, 120)), (3, "sky", (6, 230, 230)), (150, "flag", (92, 0, 255))),
    "ade20k-from-0": (150, (0, "wall", (120, 120, 120)), (149, "flag", (92, 0, 255))),
    "cityscapes": (19, (0, "road", (128, 64, 128)), (13, "car", (0, 0, 142)), (18, "bicycle", (119, 11, 32))),
    "cityscapes-labelids": (19, (7, "road", (128, 64, 128)), (26, "car", (0, 0, 142)), (33, "bicycle", (119, 11, 32))),
    "voc": (21, (0, "background", (0, 0, 0)), (15, "person", (192, 128, 128)), (20, "tvmonitor", (0, 64, 128))),
    "coco-stuff": (171, (0, "person", (0, 192, 64)), (12, "stop sign", (0, 0, 224)),
                   (156, "sky-other", (64, 224, 64)), (181, "wood", (64, 64, 0))),
    "coco-stuff-from-0": (171, (11, "stop sign", (0, 0, 224)), (170, "wood", (64, 64, 0))),
    "binary": (2, (1, "foreground", (255, 255, 255))),
}  # fmt: skip


def blocks(values, count=3):
    """Masks, uint8 [48, 16], that hold all these values."""
    for k in range(count):
        yield np.resize(np.roll(np.asarray(values, np.uint8), k), 48).repeat(16).reshape(48, 16)


def write(folder, masks, save=lambda path, mask: Image.fromarray(mask).save(path)):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, mask in enumerate(masks):
        paths.append(folder / f"{k:03}.png")
        save(paths[-1], mask)
    return paths


def propose(paths, names=None):
    return palettes.propose(surveyed(paths), names)


def check(paths, palette):
    return palettes.check_fit(surveyed(paths), palette)


@pytest.mark.parametrize("name", READY)
def test_ready_palettes_have_the_published_classes_and_colors(name):
    palette, (classes, *labels) = ready(name), ANCHORS[name]
    assert len(palette.class_names) == classes
    assert {Label(*label) for label in labels} <= set(palette.labels)


def test_ready_palettes_say_what_is_unlabelled_and_agree_where_the_same_classes_are_numbered_otherwise():
    labels = {name: ready(name).labels for name in READY}
    ignored = {name: [label.id for label in labels[name] if label.ignore] for name in READY}
    assert ignored["ade20k"] == [0] and ignored["binary"] == []
    assert ignored["cityscapes-labelids"] == [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]
    assert all(ignored[name] == [255] for name in ("ade20k-from-0", "cityscapes", "voc", "coco-stuff"))
    assert ready("voc").table[255].tolist() == [224, 224, 192]
    classes = {name: [(x.name, x.color) for x in labels[name] if not x.ignore] for name in READY}
    assert classes["ade20k"] == classes["ade20k-from-0"] and classes["coco-stuff"] == classes["coco-stuff-from-0"]
    assert set(classes["cityscapes"]) == set(classes["cityscapes-labelids"])
    assert [x.id for x in labels["coco-stuff-from-0"]] == [*range(171), 255]
    assert set(range(182)) - set(ready("coco-stuff").ids) == {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def test_every_ready_palette_is_packaged():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "data/palettes/*.json" in project["tool"]["setuptools"]["package-data"]["segcn"]
    assert sorted(READY) == sorted(path.stem for path in palettes.FOLDER.iterdir())


SAVED = {  # test_records.py has every other format
    "L": lambda path, mask: Image.fromarray(mask).save(path),
    "P": lambda path, mask: write_mask(path, mask, ready("voc")),
    "P without colors": lambda path, mask: write_mask(path, mask, Palette((Label(9, "x", (0, 0, 0)),))),
    "RGB": lambda path, mask: Image.fromarray(ready("voc").table[mask]).save(path),
    "1": lambda path, mask: Image.fromarray(mask.astype(bool)).save(path),
}


@pytest.mark.parametrize("kind", SAVED)
def test_survey_and_proposal_read_masks_as_training_does_however_they_were_saved(tmp_path, kind):
    masks = np.stack(list(blocks([0, 0, 0, 1] if kind == "1" else [0, 0, 0, 2, 2, 7, 15])))
    paths = write(tmp_path, masks, SAVED[kind])
    found = surveyed(paths)
    palette = palettes.propose(found)
    read = np.stack([read_mask(path, palette) for path in paths])
    if kind == "RGB":  # numbered by their pixels, most first
        assert palette.ids == (0, 1, 2, 3) and (np.diff(np.bincount(read.ravel())) <= 0).all()
        assert (palette.table[read] == ready("voc").table[masks]).all()
    else:
        assert palette.ids == ((0, 1) if kind == "1" else (0, 2, 7, 15)) and (read == masks).all()
    counted = [(read == label.id).sum() for label in palette.labels]
    assert [found.pixels[found.value_of(label)] for label in palette.labels] == counted
    assert palette.names == tuple(f"class_{id}" for id in palette.ids)


def test_a_palette_file_keeps_its_colors_where_they_can_be_told_apart_and_255_is_unlabelled(tmp_path):
    palette = propose(write(tmp_path / "voc", blocks([0, 2, 15, 255]), SAVED["P"]))
    labels = (0, (0, 0, 0)), (2, (0, 128, 0)), (15, (192, 128, 128)), (255, (224, 224, 192))
    assert [(x.id, x.color, x.ignore) for x in palette.labels] == [(*label, label[0] == 255) for label in labels]
    ramp = Palette(tuple(Label(k, str(k), (k, k, k)) for k in range(9)))
    paths = write(tmp_path / "ramp", blocks([1, 2, 3]), lambda path, mask: write_mask(path, mask, ramp))
    palette = propose(paths)
    assert [label.color for label in palette.labels] == list(spread_colors()[:3])
    assert read_mask(paths[0], palette)[0, 0] == 1


def test_spread_colors_lie_far_apart_and_from_black():
    colors = np.array([(0, 0, 0), *spread_colors()[:24]])
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1) + 999 * np.eye(25)
    assert distances.min() > 64
    assert len(set(spread_colors())) == 510


def test_files_that_an_editor_renumbered_are_refused(tmp_path):
    def by_first_appearance(path, mask):
        found, first = np.unique(mask, return_index=True)
        order = found[np.argsort(first)]
        image = Image.fromarray(np.argsort(order)[np.searchsorted(found, mask)].astype(np.uint8))
        image.putpalette(ready("voc").table[order].tobytes())
        image.save(path)

    masks = [np.uint8([[0, 0, 0, 15, 2]]), np.uint8([[15, 15, 15, 2, 0]])]
    with pytest.raises(UserError, match=r"renumbered each file.*Save the masks as RGB"):
        propose(write(tmp_path, masks, by_first_appearance))


def test_names_are_given_in_the_order_of_ids(tmp_path):
    paths = write(tmp_path, blocks([0, 3, 9, 255]))
    assert propose(paths, ["sky", "hill", "lake"]).names == ("sky", "hill", "lake", "unlabelled")
    with pytest.raises(UserError, match=r"expected 3 names for the classes 0 #ffffff, 3 #\w+, 9 #\w+, found 2"):
        propose(paths, ["sky", "hill"])
    with pytest.raises(UserError, match="different name"):
        propose(paths, ["sky", "sky", "lake"])


def test_values_and_colors_that_are_no_classes_are_named_with_their_pixels(tmp_path):
    mask = np.array([[0, 1, 300, 300, 1000]], np.uint16)
    depth = np.arange(400, dtype=np.uint16).reshape(20, 20)
    noise = np.random.default_rng(0).choice(np.uint8([1, 2, 3]), (20, 20))
    smooth = np.array(Image.fromarray(ready("ade20k").table[noise]).resize((61, 61), Image.Resampling.BICUBIC))
    many = np.random.default_rng(0).integers(0, 256, (2, 10, 20, 3), np.uint8)
    for number, (masks, words) in enumerate([
        ([mask, mask, mask % 256], r"value 300 \(4 pixels in 2 files, e.g. .*000.png\), value 1000 \(2 pixels"),
        ([depth], r"000.png: .*found 400 values; from 0 to 399: is it a depth map"),
        ([smooth], r"000.png: .*colors; was it smoothed.*: #\w{6} \([\d,]+ pixels\)"),
        (many, "found 400 colors in all masks"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=words):
            propose(write(tmp_path / str(number), masks))
    with pytest.raises(UserError, match="expected masks, found none"):
        propose([])


def test_black_and_white_bytes_are_explained(tmp_path):
    paths = write(tmp_path, blocks([0, 255]))
    for attempt in (lambda: propose(paths), lambda: check(paths, ready("binary"))):
        with pytest.raises(UserError, match="save each as 1-bit"):
            attempt()
    for path in paths:
        Image.open(path).convert("1").save(path)  # as the message says
    assert propose(paths).ids == (0, 1) and check(paths, ready("binary")) == []


def test_jpeg_mixed_and_broken_masks_are_refused_by_name(tmp_path):
    paths = write(tmp_path, blocks([0, 1]))
    jpeg = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(jpeg)
    with pytest.raises(UserError, match=r"photo.jpg: .*lossy format, which changes labels"):
        propose([*paths, jpeg])
    color = write(tmp_path / "rgb", blocks([0, 1]), SAVED["RGB"])
    with pytest.raises(UserError, match=r"one kind, found colors in .*rgb/000.png and class ids in .*000.png"):
        propose(paths + color)
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(UserError, match=r"001.png: the mask cannot be read"):
        propose(paths)


@pytest.mark.parametrize(("values", "name", "words"), [
    ([0, 7, 21, 26], "cityscapes", r"value 21 \(\d+ pixels in 3 files.*palettes fit: .*cityscapes-labelids"),
    ([0, 1, 150], "ade20k-from-0", r"value 150 .*these ready palettes fit: ade20k, coco-stuff"),
    (None, "voc", r"color #010203 .*no ready palette fits"),
])  # fmt: skip
def test_the_message_for_masks_that_do_not_fit_names_the_ready_palettes_that_do(tmp_path, values, name, words):
    masks = np.full((1, 4, 4, 3), (1, 2, 3), np.uint8) if values is None else blocks(values)
    with pytest.raises(UserError, match=words):
        check(write(tmp_path, masks), ready(name))


def test_a_warning_says_where_ids_may_start_at_0_or_1_unless_255_or_colors_of_the_files_settle_it(tmp_path):
    ambiguous = write(tmp_path / "open", blocks([0, 3, 3, 13]))
    for name, words in (
        ("ade20k", r"fit ade20k-from-0 as well\. Here value 3 .* 'sky', there it is 'floor'"),
        ("ade20k-from-0", r"fit ade20k as well\. Here value 3 .* 'floor', there it is 'sky'"),
    ):
        (warning,) = check(ambiguous, ready(name))
        assert re.search(words, warning), warning
    exported = write(tmp_path / "exported", blocks([0, 3, 13, 255]))
    assert check(exported, ready("ade20k-from-0")) == []
    assert "255 occurs" in check(exported, ready("ade20k"))[0]
    assert check(write(tmp_path / "full", blocks([0, 1, 150])), ready("ade20k")) == []
    from_0 = ready("ade20k-from-0")
    paths = write(tmp_path / "colors", blocks([0, 3, 13]), lambda path, mask: write_mask(path, mask, from_0))
    assert check(paths, from_0) == []
    with pytest.raises(UserError, match=r"value 0 has the color of id 1 .*palettes fit: ade20k-from-0"):
        check(paths, ready("ade20k"))


def test_masks_are_found_where_a_data_set_keeps_them(tmp_path, landscapes):
    flat = write(tmp_path / "flat", blocks([0, 1]))
    assert mask_files(tmp_path / "flat") == flat
    nested = write(tmp_path / "nested/masks", blocks([0, 1]))
    write(tmp_path / "nested/images", blocks([5]))
    assert mask_files(tmp_path / "nested") == nested
    split = [*write(tmp_path / "split/test/masks", blocks([1])), *write(tmp_path / "split/train/masks", blocks([0]))]
    assert mask_files(tmp_path / "split") == split
    assert len(mask_files(landscapes)) == 18
    assert mask_files(landscapes / "train") == mask_files(landscapes / "train/metadata.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected mask files here"):
        mask_files(tmp_path / "empty")


def test_only_regular_files_inside_the_folder_are_masks(tmp_path):
    (outside,) = write(tmp_path / "outside", blocks([7], 1))
    folder = tmp_path / "data"
    paths = write(folder / "masks", blocks([0, 1]))
    (folder / "masks/link.png").symlink_to(outside)
    (folder / "masks/folder.png").mkdir()
    (folder / "masks/._000.png").write_bytes(b"what a Mac leaves behind")
    os.mkfifo(folder / "masks/pipe.png")
    assert mask_files(folder) == mask_files(folder / "masks") == paths
    rows = ["a.png,masks/000.png,a", "b.png,../b.png,b", "c.png,masks/link.png,c", "d.png,masks/9.png,d"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,conditioning_image_file_name,text", *rows]))
    said = []
    assert mask_files(folder, said.append) == paths[:1]
    assert said == ["Left out: 3 rows whose mask is not to be found; segcn validate names them"]


def test_the_table_shows_the_labels_that_occur(tmp_path):
    found = surveyed(write(tmp_path, blocks([*range(40), 255])))
    lines = palette_table_text(ready("ade20k"), found)
    assert lines[0].split() == ["id", "name", "color", "pixels", "files"]
    assert len(lines) == 33 and lines[-1].endswith("111 that occur in no mask") and "more" in lines[-2]
    assert "\x1b[48;2;120;120;120m" in "\n".join(palette_table_text(ready("ade20k"), found, swatches=True))


def test_the_command_proposes_and_never_overwrites_and_writes_a_ready_palette(tmp_path, capsys):
    paths, target = write(tmp_path / "masks", blocks([0, 0, 0, 4])), tmp_path / "voc.json"
    run_command(["palette", str(tmp_path), "--names", "sky, far hill"])
    out = capsys.readouterr().out
    assert "far hill" in out and "\x1b" not in out and out.splitlines()[-1] == str(tmp_path / "palette.json")
    palette = Palette.load(tmp_path / "palette.json")
    assert palette.names == ("sky", "far hill") and read_mask(paths[0], palette).max() == 4
    with pytest.raises(UserError, match="never overwritten: remove it, or name another file with --output"):
        run_command(["palette", str(tmp_path)])
    assert Palette.load(tmp_path / "palette.json") == palette
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="never overwritten"):
        make_palette(PaletteConfig(ready="voc", output=str(tmp_path / "link.json")))
    run_command(["palette", "--ready", "voc", "--output", str(target)])
    assert Palette.load(target) == ready("voc")
    masks = write(tmp_path / "ambiguous", blocks([0, 3, 13]))[0].parent
    run_command(["palette", str(masks), "--ready", "ade20k"])
    assert "Warning: the values fit ade20k-from-0 as well" in capsys.readouterr().out
    assert Palette.load(masks / "palette.json").labels[3].name == "sky"


@pytest.mark.parametrize(("words", "message"), [
    ([], "segcn palette needs masks"), (["--ready", "voc"], "segcn palette needs masks"),
    (["--ready", "ade", "--output", "x.json"], "no ready palette 'ade'; there are ade20k, ade20k-from-0, cityscapes"),
    (["nowhere"], "no such folder"), (["nowhere", "--ready", "voc", "--names", "a"], "one of --ready and --names"),
    (["--ready", "voc", "--output", "no/such/folder.json"], "cannot be written"),
])  # fmt: skip
def test_mistakes_on_the_command_line_are_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_command(["palette", *words])


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
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no palette.json"):
        find_palette(tmp_path / "train")
    PALETTE.save(tmp_path / "palette.json")
    assert find_palette(tmp_path / "train") == find_palette(tmp_path) == tmp_path / "palette.json"


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
     "lossy format, which changes labels"),
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


SHARMA = [  # L*a*b* of two colors and their CIEDE2000: of table 1 of Sharma, Wu and Dalal 2005
    (50, 2.6772, -79.7751, 50, 0, -82.7485, 2.0425), (50, 3.1571, -77.2803, 50, 0, -82.7485, 2.8615),
    (50, -1.3802, -84.2814, 50, 0, -82.7485, 1.0), (50, 0, 0, 50, -1, 2, 2.3669),
    (50, 2.49, -0.001, 50, -2.49, 0.0009, 7.1792), (50, 2.49, -0.001, 50, -2.49, 0.0011, 7.2195),
    (50, 2.5, 0, 50, 0, -2.5, 4.3065), (50, 2.5, 0, 73, 25, -18, 27.1492), (50, 2.5, 0, 50, 3.1736, 0.5854, 1.0),
    (60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644),
    (6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377),
    (2.0776, 0.0795, -1.135, 0.9033, -0.0636, -0.5514, 0.9082),
]  # fmt: skip


def test_the_difference_of_two_colors_is_that_of_the_published_pairs():
    pairs = np.array(SHARMA)
    assert np.abs(ciede2000(pairs[:, :3], pairs[:, 3:6]) - pairs[:, 6]).max() < 1e-4
    assert np.abs(ciede2000(pairs[:, 3:6], pairs[:, :3]) - pairs[:, 6]).max() < 1e-4


@pytest.mark.parametrize("sample", [landscapes_palette(), ECHO_PALETTE], ids=["landscapes", "echo"])
def test_the_sample_palettes_are_told_apart_by_everyone(sample):
    assert look_alike(sample) == []
    assert look_alike(Palette((*landscapes_palette().labels, Label(255, "unlabelled", (0, 0, 0), ignore=True)))) == []


def test_classes_that_look_alike_are_named_with_whom_they_look_alike_to():
    colors = {"house": (195, 60, 50), "tree": (20, 85, 40), "sky": (135, 206, 235), "one": (80, 80, 80),
              "two": (82, 82, 82)}  # fmt: skip
    labels = Palette(tuple(Label(id, name, color) for id, (name, color) in enumerate(colors.items())))
    [line] = said_alike(labels, [0, 1, 2])
    assert line.startswith("house and tree look alike to people with protanopia: difference 4.4")
    [alike, line] = said_alike(labels, [0, 1, 2, 3, 4])
    assert alike.startswith("one and two look alike: difference 0.7") and "people with" in line
    assert said_alike(labels, [1, 2]) == []
