"""Promise: what people really bring is read right or refused with the way out, by import, palette and doctor alike."""

import csv
import json
import struct
import unicodedata
import zlib

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from segcn.data.config import DoctorConfig, ImportConfig, PaletteConfig
from segcn.data.doctor.findings import examine
from segcn.data.importers.importer import ORIGINS, import_dataset
from segcn.data.importers.palettes import make_palette
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import finish_dataset, read_row, read_split, write_pair
from segcn.data.palette import Label, Palette
from segcn.utils.errors import UserError

SIDE = 32
TWO = Palette((Label(0, "wall", (0, 0, 0)), Label(1, "crack", (255, 255, 255))))
THREE = Palette((Label(0, "sky", (0, 0, 255)), Label(1, "hill", (0, 255, 0)), Label(2, "house", (255, 0, 0))))


def ids(k, classes=3):
    """uint8 [32, 32]: a hill, and a square of each further class."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[20:] = 1
    for label in range(2, classes):
        at = 4 + 7 * (label - 2) + k % 3
        mask[at : at + 6, at : at + 6] = label
    return mask


def disc(k):
    return (ids(k) == 2).astype(np.uint8)


def photo(k):
    noise = np.random.default_rng(k).integers(0, 60, (SIDE, SIDE, 3))
    return (noise + 60 * ids(k)[..., None] + 20).astype(np.uint8)


def pairs(folder, mask, image=photo, count=4, images="images", masks="masks", names=("{}.png", "{}.png"), **how):
    """Files of images and masks as arrays; how: what the masks are saved with."""
    (folder / images).mkdir(parents=True)
    (folder / masks).mkdir(parents=True)
    for k in range(count):
        Image.fromarray(image(k)).save(folder / images / names[0].format(k))
        Image.fromarray(mask(k)).save(folder / masks / names[1].format(k), **how)
    return folder


def brought(folder, out, **settings):
    """Import, and the masks as they are read, in the order of the rows, with the lines that were said."""
    lines = []
    import_dataset(ImportConfig(str(folder), str(out), caption="a scene", **settings), lines.append)
    split = read_split(out)
    assert examine(DoctorConfig(str(out)), lines.append).errors == ()
    return [read_mask(record.mask, split.palette) for record in split.records], lines


def same(found, expected):
    return len(found) == len(expected) and all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dark", [0, 1])
@pytest.mark.parametrize("colored", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_masks_of_two_values_are_binary_and_255_is_a_class_there(tmp_path, dark, colored, own):
    def white(k):
        mask = np.where(disc(k), 255, dark).astype(np.uint8)
        return np.dstack([mask] * 3) if colored else mask

    folder = pairs(tmp_path / "in", white)
    if own:
        TWO.save(folder / "palette.json")
    found, said = brought(folder, tmp_path / "out")
    assert same(found, [disc(k) for k in range(4)])
    assert (colored and own and dark == 0) or any("read as binary" in line for line in said)  # else the colors say so
    if not own:
        make_palette(PaletteConfig(str(folder / "masks"), output=str(tmp_path / "palette.json")), said.append)
        assert Palette.load(tmp_path / "palette.json").ids == (0, 1)


def test_a_data_set_of_white_masks_is_no_unlabelled_one_for_the_doctor(tmp_path):
    rows = [(f"images/{k}.png", f"masks/{k}.png", "a wall") for k in range(3)]
    for k, (image, mask, _) in enumerate(rows):
        write_pair(tmp_path, (image, mask), photo(k), disc(k) * 255, TWO)
        Image.fromarray(disc(k) * 255).save(tmp_path / mask)
    finish_dataset(tmp_path, rows, TWO)
    assert [found.kind for found in examine(DoctorConfig(str(tmp_path)), str).errors] == ["white_masks"]


def test_a_palette_that_declares_255_keeps_it_unlabelled(tmp_path):
    folder = pairs(tmp_path / "in", lambda k: disc(k) * 255)
    Palette((*TWO.labels[:1], Label(255, "void", (9, 9, 9), ignore=True))).save(folder / "palette.json")
    assert same(brought(folder, tmp_path / "out")[0], [disc(k) * 255 for k in range(4)])


def test_someone_says_what_255_means_where_it_covers_most(tmp_path):
    mostly = lambda k: np.where(np.arange(SIDE) < 24, 255, ids(k)).astype(np.uint8)  # noqa: E731
    folder = pairs(tmp_path / "in", mostly)
    with pytest.raises(UserError, match=r"255 covers 75% .* --unlabelled 255"):
        brought(folder, tmp_path / "out")
    assert same(brought(folder, tmp_path / "out", unlabelled=[255])[0], [mostly(k) for k in range(4)])
    seldom = lambda k: np.where(np.arange(SIDE) < 4, 255, ids(k)).astype(np.uint8)  # noqa: E731
    assert same(brought(pairs(tmp_path / "few", seldom), tmp_path / "o2")[0], [seldom(k) for k in range(4)])


def smooth(k):
    return np.asarray(Image.fromarray(disc(k) * 255).resize((24, 24), Image.Resampling.BICUBIC).resize((SIDE, SIDE)))


@pytest.mark.parametrize(
    ("mask", "ending", "how", "error"),
    [
        (smooth, "png", {}, "resized by another filter.* --threshold 128"),
        (lambda k: disc(k) * 255, "jpg", {}, r"masks.0\.jpg: .*lossy.*--threshold 128"),
        (lambda k: ids(k) * 80, "webp", {"quality": 50}, r"masks.0\.webp: .*lossy"),
    ],
)  # fmt: skip
def test_smoothed_and_lossy_masks_are_refused_alike_with_the_command_that_reads_them(
    tmp_path, mask, ending, how, error
):
    folder = pairs(tmp_path / "in", mask, names=("{}.png", "{}." + ending), **how)
    with pytest.raises(UserError, match=error):
        brought(folder, tmp_path / "out")
    with pytest.raises(UserError, match=error):
        make_palette(PaletteConfig(str(folder / "masks"), output=str(tmp_path / "palette.json")), str)
    found, _ = brought(folder, tmp_path / "out", threshold=128)
    assert np.mean([one == disc(k) for k, one in enumerate(found)]) > 0.97


def test_lossless_webp_masks_are_read(tmp_path):
    folder = pairs(tmp_path / "in", lambda k: THREE.table[ids(k)], names=("{}.png", "{}.webp"), lossless=True)
    THREE.save(folder / "palette.json")
    assert same(brought(folder, tmp_path / "out")[0], [ids(k) for k in range(4)])


def test_grey_in_three_channels_are_ids_and_names_follow_the_ids(tmp_path):
    folder = pairs(tmp_path / "in", lambda k: np.dstack([ids(k)] * 3))
    make_palette(PaletteConfig(str(folder / "masks"), names="sky,hill,house", output=str(tmp_path / "p.json")), str)
    palette = Palette.load(tmp_path / "p.json")
    assert [(label.id, label.name) for label in palette.labels] == [(0, "sky"), (1, "hill"), (2, "house")]
    assert np.ptp([label.color for label in palette.labels], axis=0).max() > 100
    assert same(brought(folder, tmp_path / "out", palette=str(tmp_path / "p.json"))[0], [ids(k) for k in range(4)])


def test_colors_of_segments_are_not_classes(tmp_path):
    def segments(k):
        codes = np.random.default_rng(k).integers(1, 2**24, 3)[ids(k)]
        return np.dstack([codes % 256, codes // 256 % 256, codes // 65536]).astype(np.uint8)

    folder = pairs(tmp_path / "in", segments)
    with pytest.raises(UserError, match="12 of 12 colors are in one mask alone: these are segments"):
        brought(folder, tmp_path / "out")
    with pytest.raises(UserError, match="segments"):
        make_palette(PaletteConfig(str(folder / "masks"), output=str(tmp_path / "p.json")), str)


def deep(k):
    return photo(k)[..., 0].astype(np.uint16) * 16


@pytest.mark.parametrize(("window", "low", "high"), [("", None, None), ("0,4095", 0, 4095), ("0%,100%", None, None)])
def test_images_of_more_than_8_bits_are_scaled_by_a_stated_rule(tmp_path, window, low, high):
    folder = pairs(tmp_path / "in", ids, image=deep)
    _, said = brought(folder, tmp_path / "out", window=window)
    line = next(line for line in said if "becomes black" in line)
    images = [read_row(read_split(tmp_path / "out"), k)[0] for k in range(4)]
    assert np.ptp(images) > 200 or high == 4095
    if high is not None:
        wanted = ((deep(0).astype(float) - low) / (high - low) * 255).round().astype(np.uint8)
        assert np.array_equal(images[0][..., 0], wanted) and "0 becomes black, 4095 white" in line


def test_float_images_are_refused_where_they_are_and_scaled_at_import(tmp_path):
    folder = pairs(tmp_path / "in", ids, image=lambda k: deep(k).astype(np.float32) / 7, names=("{}.tif", "{}.png"))
    brought(folder, tmp_path / "out", window="0,500")
    image = read_row(read_split(tmp_path / "out"), 0)[0][..., 0]
    assert np.array_equal(image, (deep(0) / 7 / 500 * 255).clip(0, 255).round().astype(np.uint8))
    rows = [("images/0.tif", "masks/0.png", "a scan")]
    finish_dataset(folder, rows, THREE)
    errors = examine(DoctorConfig(str(folder)), str).errors
    assert [one.kind for one in errors] == ["undecodable"] and "--window LOW,HIGH" in errors[0].message


def test_dark_flat_and_transparent_images_are_named_and_never_the_same_image_twice(tmp_path):
    images = [deep(0), np.full((SIDE, SIDE), 7, np.uint8), np.full((SIDE, SIDE), 7, np.uint8)]
    images.append(np.dstack([photo(3), np.where(np.arange(SIDE) < 9, 0, 255)[None].repeat(SIDE, 0)]).astype(np.uint8))
    rows = [(f"images/{k}.png", f"masks/{k}.png", "a scan") for k in range(4)]
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / rows[k][0])
        write_mask(tmp_path / rows[k][1], ids(k), THREE)
    finish_dataset(tmp_path, rows, THREE)
    found = [(one.kind, one.row) for one in examine(DoctorConfig(str(tmp_path)), str).findings]
    assert found == [("flat", 1), ("flat", 2), ("dark", 0), ("alpha", 3)]


def test_files_of_several_pages_are_refused(tmp_path):
    folder = pairs(tmp_path / "in", ids)
    pages = [Image.fromarray(photo(k)) for k in range(3)]
    pages[0].save(folder / "images" / "0.tif", save_all=True, append_images=pages[1:])
    (folder / "images" / "0.png").unlink()
    with pytest.raises(UserError, match=r"expected one image, found 3 pages.*in the source: .*images.0\.tif"):
        brought(folder, tmp_path / "out")


def test_hidden_folders_are_not_data(tmp_path):
    folder = pairs(tmp_path / "in", ids)
    for name in ("images", "masks"):
        (folder / name / ".ipynb_checkpoints").mkdir()
        (folder / name / ".ipynb_checkpoints" / "2-checkpoint.png").write_bytes((folder / name / "2.png").read_bytes())
    assert same(brought(folder, tmp_path / "out")[0], [ids(k) for k in range(4)])


def test_any_name_of_a_folder_works_and_the_only_folder_is_entered(tmp_path):
    folder = tmp_path / "in" / "[D] v1*?"
    pairs(folder, ids)
    cells = [[{"bytes": (folder / kind / f"{k}.png").read_bytes(), "path": None} for k in range(4)]
             for kind in ("images", "masks")]  # fmt: skip
    (tmp_path / "[P]").mkdir()
    table = pyarrow.table({"image": cells[0], "conditioning_image": cells[1], "text": ["a scene"] * 4})
    parquet.write_table(table, tmp_path / "[P]" / "train.parquet")
    assert same(brought(tmp_path / "in", tmp_path / "out")[0], [ids(k) for k in range(4)])
    import_dataset(ImportConfig(str(tmp_path / "[P]"), str(tmp_path / "o2")), str)
    assert len(read_split(tmp_path / "o2")) == 4


@pytest.mark.parametrize(("how", "wanted"), [("one", [0, 1, 1, 1]), ("name", [0, 1, 2, 1])])
def test_one_file_an_object_is_merged_on_request(tmp_path, how, wanted):
    pairs(tmp_path / "in", ids, names=("dog{}.png", "x{}.png"))
    for k in range(4):
        (tmp_path / "in" / "masks" / f"x{k}.png").unlink()
        (tmp_path / "in" / "masks" / f"dog{k}").mkdir()
        for label, name in ((1, "cat_0"), (2, "dog_1"), (3, "cat_2")):
            object_mask = (ids(k, 4) == label).astype(np.uint8) * 255
            Image.fromarray(object_mask).save(tmp_path / "in" / "masks" / f"dog{k}" / f"{name}.png")
    with pytest.raises(UserError, match=r"--merge_masks one .* --merge_masks name"):
        brought(tmp_path / "in", tmp_path / "out")
    found, _ = brought(tmp_path / "in", tmp_path / "out", merge_masks=how)
    assert same(found, [np.array(wanted, np.uint8)[ids(k, 4)] for k in range(4)])
    assert read_split(tmp_path / "out").palette.names[1:] == (("object",) if how == "one" else ("cat", "dog"))


def test_what_has_no_partner_is_named_or_left_out_and_counted(tmp_path, capsys):
    folder = pairs(tmp_path / "in", ids, count=6)
    (folder / "masks" / "1.png").unlink()
    (folder / "images" / "4.png").unlink()
    with pytest.raises(UserError, match=r"1 images .* have no mask: 1; 1 masks .* have no image: 4.* --skip_unpaired"):
        brought(folder, tmp_path / "out")
    found, _ = brought(folder, tmp_path / "out", skip_unpaired=True)
    assert same(found, [ids(k) for k in (0, 2, 3, 5)])
    assert "left out: 2 files without a partner: 1, 4" in capsys.readouterr().out


def test_images_that_exif_turns_are_said_at_import(tmp_path):
    folder = pairs(tmp_path / "in", ids)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(photo(0)).save(folder / "images" / "0.png", exif=exif)
    _, said = brought(folder, tmp_path / "out")
    assert any("Warning: 1 images, such as" in line and "0.png" in line for line in said)


@pytest.mark.parametrize("sign", [";", "\t", ","])
def test_the_delimiter_of_a_table_is_recognized_and_further_columns_are_kept(tmp_path, sign):
    folder = pairs(tmp_path / "in", ids)
    lines = [["image", "conditioning_image", "text", "patient"]]
    lines += [[f"images/{k}.png", f"masks/{k}.png", "ein Hügel", f"P{k}"] for k in range(4)]
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=sign).writerows(lines)
    assert same(brought(folder, tmp_path / "out")[0], [ids(k) for k in range(4)])
    with (tmp_path / "out" / "metadata.csv").open() as file:
        assert [row["patient"] for row in csv.DictReader(file)] == ["P0", "P1", "P2", "P3"]


def test_names_are_compared_in_one_form_and_prefixes_are_guessed(tmp_path):
    folder = pairs(tmp_path / "in", ids, names=(unicodedata.normalize("NFD", "café{}.png"), "CAFÉ{}.png"))
    assert same(brought(folder, tmp_path / "out")[0], [ids(k) for k in range(4)])
    folder = pairs(tmp_path / "prefix", ids, names=("img_{}.png", "mask_{}.png"))
    with pytest.raises(UserError, match=r"Here --image_prefix=img --mask_prefix=mask\?"):
        brought(folder, tmp_path / "o2")
    assert same(brought(folder, tmp_path / "o2", image_prefix="img", mask_prefix="mask")[0], [ids(k) for k in range(4)])


def test_folders_of_areas_are_one_split_and_no_data_can_be_said(tmp_path, capsys):
    for area in ("Rural", "Urban"):
        pairs(tmp_path / "in" / "Train" / area, lambda k: ids(k) + 1, count=2, images="images_png", masks="masks_png")
    import_dataset(ImportConfig(str(tmp_path / "in"), str(tmp_path / "out"), caption="a scene", unlabelled=[1]), str)
    split = read_split(tmp_path / "out" / "train")
    wanted = [np.where(ids(k) == 0, 255, ids(k) + 1) for k in (0, 1, 0, 1)]
    assert same([read_mask(record.mask, split.palette) for record in split.records], wanted)
    assert "4 rows of Rural, Urban" in capsys.readouterr().out


def test_rows_without_masks_are_left_out_and_the_column_of_splits_is_used(tmp_path, capsys):
    folder = pairs(tmp_path / "in", ids, count=6, images="sat", masks="seg")
    rows = ["id,split,sat_path,mask_path"]
    rows += [f"{k},{'train' if k < 4 else 'val'},sat/{k}.png,{'' if k in (1, 5) else f'seg/{k}.png'}" for k in range(6)]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    columns = {"image_column": "sat_path", "conditioning_image_column": "mask_path", "caption": "a scene"}
    with pytest.raises(UserError, match=r"line 3: column mask_path.* --skip_unpaired leaves such rows out"):
        import_dataset(ImportConfig(str(folder), str(tmp_path / "out"), **columns), str)
    import_dataset(ImportConfig(str(folder), str(tmp_path / "out"), skip_unpaired=True, **columns), str)
    assert {name: len(read_split(tmp_path / "out", name)) for name in ("train", "val")} == {"train": 3, "val": 1}
    assert "left out: 2 rows" in capsys.readouterr().out
    with (tmp_path / "out" / "train" / ORIGINS).open() as file:
        assert [row["mask"].rpartition("/")[2] for row in csv.DictReader(file)] == ["0.png", "2.png", "3.png"]


def test_an_error_names_the_users_own_file(tmp_path):
    folder = pairs(tmp_path / "in", lambda k: ids(k) + 3 * (k == 2))
    THREE.save(folder / "palette.json")
    with pytest.raises(UserError) as error:
        brought(folder, tmp_path / "out")
    assert str(folder / "masks" / "2.png") in str(error.value) and "partial" not in str(error.value)


def test_a_palette_in_the_folder_above_is_warned_of(tmp_path):
    folder = pairs(tmp_path / "in", ids)
    (tmp_path / "palette.json").write_text(json.dumps({"labels": [
        {"id": label.id, "name": label.name, "color": list(label.color)} for label in THREE.labels
    ]}))  # fmt: skip
    assert any("Warning: it lies in the folder above" in line for line in brought(folder, tmp_path / "out")[1])


def test_colors_of_16_bits_that_come_out_dark_are_an_error(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in photo(0).astype(np.uint16) * 16)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    (tmp_path / "masks").mkdir()
    write_mask(tmp_path / "masks" / "0.png", ids(0), THREE)
    finish_dataset(tmp_path, [("images/0.png", "masks/0.png", "a scan")], THREE)
    assert [one.kind for one in examine(DoctorConfig(str(tmp_path)), str).errors] == ["dark"]


def test_masks_of_many_classes_are_no_smoothed_ones_and_other_numbers_are_named(tmp_path):
    def many(k):
        mask = ids(k) % 2
        mask[0, :8] = np.arange(2 + 8 * (k % 3), 10 + 8 * (k % 3))
        mask[1, 0] = 255
        return mask

    folder = pairs(tmp_path / "in", many)
    assert same(brought(folder, tmp_path / "out")[0], [many(k) for k in range(4)])
    deep = pairs(tmp_path / "deep", lambda k: np.where(ids(k) == 2, np.uint16(65535), ids(k)))
    found, _ = brought(deep, tmp_path / "o2", unlabelled=[65535])
    assert same(found, [np.where(ids(k) == 2, 255, ids(k)) for k in range(4)])
    with pytest.raises(UserError, match=r"found value 65535 \("):
        brought(deep, tmp_path / "o3")
