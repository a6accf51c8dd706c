import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcn.data.masks import write_mask
from segcn.data.metadata import COLUMNS, check_split, read_image, read_split, write_metadata
from segcn.data.palette import Label, Palette
from segcn.utils.errors import UserError

PALETTE = Palette((Label(0, "sky", (135, 206, 235)), Label(1, "tree", (0, 100, 0))))
HEADER = ",".join(COLUMNS)


def make_folder(folder, rows=3):
    """A data set of `rows` pairs of 6 x 4 pixels; returns its folder."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for row in range(rows):
        pixels = np.full((4, 6, 3), 40 * row, np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{row}.png")
        write_mask(folder / f"masks/{row}.png", np.full((4, 6), row % 2, np.uint8), PALETTE)
    PALETTE.save(folder / "palette.json")
    write_metadata(folder, [(f"images/{k}.png", f"masks/{k}.png", f"row {k}, a tree") for k in range(rows)])
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pairs")


def test_reads_what_was_written(folder):
    split = read_split(folder)
    assert len(split) == 3
    assert [record.row for record in split.records] == [0, 1, 2]
    assert [record.line for record in split.records] == [2, 3, 4]
    assert split[2].caption == "row 2, a tree"
    assert split[2].image == folder / "images/2.png"
    assert split[2].mask == folder / "masks/2.png"
    assert split.palette == PALETTE
    check_split(split)


def test_the_metadata_file_itself_is_taken(folder):
    assert read_split(folder / "metadata.csv").records == read_split(folder).records


def test_splits_are_folders_under_one_palette(tmp_path):
    for name, rows in (("train", 3), ("test", 2)):
        (make_folder(tmp_path / name, rows) / "palette.json").unlink()
    PALETTE.save(tmp_path / "palette.json")
    assert len(read_split(tmp_path)) == len(read_split(tmp_path, "train")) == 3
    assert len(read_split(tmp_path, "test")) == len(read_split(tmp_path / "test")) == 2
    with pytest.raises(UserError, match="expected a split val, found test, train"):
        read_split(tmp_path, "val")


def test_a_folder_without_splits_is_its_own_train_split_alone(folder):
    assert read_split(folder, "train") == read_split(folder)
    with pytest.raises(UserError, match="test"):
        read_split(folder, "test")
    with pytest.raises(UserError, match="name the folder above"):
        read_split(folder / "metadata.csv", "test")


def test_written_metadata_keeps_column_order_quotes_and_commas(folder):
    write_metadata(folder, [("images/0.png", "masks/0.png", 'a "red"\nhouse, at dusk')])
    assert (folder / "metadata.csv").read_text().splitlines()[0] == HEADER
    assert read_split(folder)[0].caption == 'a "red" house, at dusk'
    assert not list(folder.glob(".*"))


def test_a_failed_write_leaves_the_old_file(folder):
    before = (folder / "metadata.csv").read_bytes()
    with pytest.raises(ValueError, match="unpack"):
        write_metadata(folder, [("images/0.png", "a caption")])
    assert (folder / "metadata.csv").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_jsonl_gives_the_same_rows(folder):
    rows = list(read_split(folder).records)
    lines = [
        json.dumps(dict(zip(COLUMNS, (f"images/{k.row}.png", f"masks/{k.row}.png", k.caption), strict=True)))
        for k in rows
    ]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    assert [(k.image, k.mask, k.caption) for k in read_split(folder).records] == [
        (k.image, k.mask, k.caption) for k in rows
    ]


@pytest.mark.parametrize("line", ['{"file_name": 1}', "[]", "{", '{"file_name": "images/0.png"}', b"\xff"])
def test_a_wrong_jsonl_line_is_named(folder, line):
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_bytes(b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(UserError, match=r"metadata.jsonl, line 2"):
        read_split(folder)


def test_columns_are_read_by_name_and_others_are_left_alone(folder):
    text = 'text,score,file_name,conditioning_image_file_name\n"a, b",0.5,images/1.png,masks/1.png\n\n'
    (folder / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8", newline="\r\n")
    record = read_split(folder)[0]
    assert (record.caption, record.image.parent.name, record.mask.parent.name) == ("a, b", "images", "masks")


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("", "line 1", "file_name"),
        (HEADER + "\n", "metadata.csv", "at least one row"),
        ("file_name,text\nimages/0.png,a\n", "line 1", "conditioning_image_file_name"),
        ("image,mask,text\n", "line 1", "found 'image,mask,text'"),
        (f"{HEADER},text\n", "line 1", "column text once"),
        (
            f"{HEADER}\nimages/0.png,masks/0.png,a\nimages/9.png,masks/0.png,a\n",
            "line 3 (row 1)",
            "images/9.png",
        ),
        (f"{HEADER}\nimages/0.png,masks/9.png,a\n", "line 2 (row 0)", "column conditioning_image_file_name"),
        (f"{HEADER}\nimages/0.png,masks/0.png, \n", "line 2 (row 0)", "expected a caption"),
        (f"{HEADER}\n\nimages/0.png,masks/0.png,\n", "line 3 (row 0)", "expected a caption"),
        (f"{HEADER}\nimages/0.png,masks/0.png,a,b\n", "line 2", "expected 3 fields, found 4"),
        (f"{HEADER}\nimages/0.png,masks/0.png\n", "line 2", "expected 3 fields, found 2"),
        (f'{HEADER}\nimages/0.png,masks/0.png,"a\nimages/1.png,masks/1.png,b\n', "line 2", "double quote"),
        (
            f'{HEADER}\nimages/0.png,masks/0.png,"a\nimages/1.png,masks/1.png,b"\n',
            "line 2",
            "goes on over a line that names an image",
        ),
        (f"{HEADER}\n../pairs/images/0.png,masks/0.png,a\n", "line 2 (row 0)", "inside the folder"),
        (f"{HEADER}\n/etc/passwd,masks/0.png,a\n", "line 2 (row 0)", "inside the folder"),
        (f"{HEADER}\nC:/images/0.png,masks/0.png,a\n", "line 2 (row 0)", "inside the folder"),
        (f"{HEADER}\nimages\\0.png,masks/0.png,a\n", "line 2 (row 0)", "written with /"),
        (f"{HEADER}\nhttp://a/0.png,masks/0.png,a\n", "line 2 (row 0)", "inside the folder"),
        (f"{HEADER}\n,masks/0.png,a\n", "line 2 (row 0)", "expected a file"),
    ],
)
def test_a_wrong_metadata_file_is_refused(folder, text, where, words):
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_split(folder)
    for part in (str(folder / "metadata.csv"), where, words):
        assert part in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(folder):
    (folder / "metadata.csv").write_bytes(HEADER.encode() + b"\nimages/0.png,masks/0.png,caf\xe9\n")
    with pytest.raises(UserError, match="expected UTF-8 text, found byte 0xe9"):
        read_split(folder)


def test_the_message_says_how_many_more_rows_fail(folder):
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"line 2 .*2 more of 3 rows fail"):
        read_split(folder)


def test_a_folder_without_metadata_and_one_with_two_are_refused(tmp_path, folder):
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match="expected one metadata file"):
        read_split(folder)
    with pytest.raises(UserError, match="found none"):
        read_split(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_split(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"found a \.json file"):
        read_split(folder / "palette.json")


def checked(folder, **options):
    with pytest.raises(UserError) as caught:
        check_split(read_split(folder), **options)
    return str(caught.value)


def test_a_mask_of_another_size_is_named(folder):
    write_mask(folder / "masks/1.png", np.zeros((4, 5), np.uint8), PALETTE)
    message = checked(folder)
    for part in ("metadata.csv, line 3 (row 1)", "6 x 4", "5 x 4", "masks/1.png"):
        assert part in message


def test_undeclared_values_are_named_with_counts_and_the_rows_that_follow(folder):
    for row in (1, 2):
        Image.fromarray(np.full((4, 6), 9, np.uint8)).save(folder / f"masks/{row}.png")
    message = checked(folder)
    for part in ("line 3 (row 1)", "masks/1.png", "value 9 (24 pixels)", "1 more of 3 rows fail"):
        assert part in message


def test_a_broken_image_is_named(folder):
    (folder / "images/0.png").write_bytes(b"nothing")
    assert "line 2 (row 0): column file_name" in checked(folder)


def test_a_truncated_photo_is_found(folder):
    noise = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    Image.fromarray(noise).save(folder / "images/1.png", format="BMP")
    (folder / "images/1.png").write_bytes((folder / "images/1.png").read_bytes()[:-20])
    assert "line 3 (row 1)" in checked(folder)


def test_a_photo_taken_sideways_is_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(folder / "images/0.png", exif=exif)
    assert read_image(folder / "images/0.png").shape == (4, 6, 3)
    check_split(read_split(folder))


def test_grey_and_16_bit_photos_become_rgb(tmp_path):
    Image.fromarray(np.full((2, 2), 7, np.uint8)).save(tmp_path / "l.png")
    Image.fromarray(np.full((2, 2), 7 * 256, np.uint16)).save(tmp_path / "16.png")
    for name in ("l.png", "16.png"):
        image = read_image(tmp_path / name)
        assert image.shape == (2, 2, 3) and image.dtype == np.uint8 and (image == 7).all()


def test_the_fingerprint_changes_with_any_file(folder):
    before = read_split(folder).fingerprint
    assert before == read_split(folder).fingerprint == read_split(folder / "metadata.csv").fingerprint
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "images/1.png")
    assert read_split(folder).fingerprint != before


def test_reading_metadata_does_not_import_torch():
    code = "import sys, segcn.records; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_datasets_reads_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    for name, rows in (("train", 3), ("test", 2)):
        (make_folder(tmp_path / "pairs" / name, rows) / "palette.json").unlink()
    PALETTE.save(tmp_path / "pairs" / "palette.json")
    splits = datasets.load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}
    assert splits["train"].column_names == ["image", "conditioning_image", "text"]
    row = splits["train"][1]
    assert row["text"] == "row 1, a tree"
    assert row["image"].getpixel((0, 0)) == (40, 40, 40)
    assert row["conditioning_image"].convert("RGB").getpixel((0, 0)) == (0, 100, 0)


def test_the_example_of_the_data_contract_runs(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "data" / "README.md"
    example = readme.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(readme), "exec"), {})
    assert capsys.readouterr().out == "8 pairs, 2 classes\n"
