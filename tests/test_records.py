"""Promise: metadata.csv and metadata.jsonl are read exactly, and what is wrong is named with its line and its file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcn.data.masks import write_mask
from segcn.data.metadata import COLUMNS, check_split, hold_out, read_named_split, read_split, write_metadata
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
    assert [(record.row, record.line) for record in split.records] == [(0, 2), (1, 3), (2, 4)]
    assert (split[2].caption, split.palette) == ("row 2, a tree", PALETTE)
    assert (split[2].image, split[2].mask) == (folder / "images/2.png", folder / "masks/2.png")
    assert read_split(folder / "metadata.csv").records == read_split(folder, "train").records == split.records
    check_split(split)
    for name, message in ((folder, "test"), (folder / "metadata.csv", "name the folder above")):
        with pytest.raises(UserError, match=message):
            read_split(name, "test")


def test_splits_are_folders_under_one_palette(tmp_path):
    for name, rows in (("train", 3), ("test", 2)):
        (make_folder(tmp_path / name, rows) / "palette.json").unlink()
    PALETTE.save(tmp_path / "palette.json")
    assert len(read_split(tmp_path)) == len(read_split(tmp_path, "train")) == 3
    assert len(read_split(tmp_path, "test")) == len(read_split(tmp_path / "test")) == 2
    with pytest.raises(UserError, match="expected a split val, found test, train"):
        read_split(tmp_path, "val")


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


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [  # malformed.py has hundreds; these are held to their words
        ("", "line 1", "file_name"),
        (HEADER + "\n", "metadata.csv", "at least one row"),
        ("image,mask,text\n", "line 1", "found 'image,mask,text'"),
        (f"{HEADER},text\n", "line 1", "column text once"),
        (f"{HEADER}\nimages/0.png,masks/0.png,a\nimages/9.png,masks/0.png,a\n", "line 3 (row 1)", "images/9.png"),
        (f"{HEADER}\nimages/0.png,masks/9.png,a\n", "line 2 (row 0)", "column conditioning_image_file_name"),
        (f"{HEADER}\n\nimages/0.png,masks/0.png,\n", "line 3 (row 0)", "expected a caption"),
        (f"{HEADER}\nimages/0.png,masks/0.png,a,b\n", "line 2", "expected 3 fields, found 4"),
        (f'{HEADER}\nimages/0.png,masks/0.png,"a\nimages/1.png,masks/1.png,b\n', "line 2", "double quote"),
        (f'{HEADER}\nimages/0.png,masks/0.png,"a\nimages/1.png,masks/1.png,b"\n', "line 2", "runs over a line"),
        (f"{HEADER}\n../pairs/images/0.png,masks/0.png,a\n", "line 2 (row 0)", "inside the folder"),
        (f"{HEADER}\nimages\\0.png,masks/0.png,a\n", "line 2 (row 0)", "written with /"),
        (f"{HEADER}\nimages/0.png,masks/0.png,caf\udce9\n", "line 2", "expected UTF-8 text, found byte 0xe9"),
    ],
)
def test_a_wrong_metadata_file_is_refused(folder, text, where, words):
    (folder / "metadata.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_split(folder)
    for part in (str(folder / "metadata.csv"), where, words):
        assert part in str(caught.value)


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


def test_a_file_that_does_not_fit_is_named(folder):
    def message():
        with pytest.raises(UserError) as caught:
            check_split(read_split(folder))
        return str(caught.value)

    for row in (1, 2):
        Image.fromarray(np.full((4, 6), 9, np.uint8)).save(folder / f"masks/{row}.png")
    for part in ("line 3 (row 1)", "masks/1.png", "value 9 (24 pixels)", "1 more of 3 rows fail"):
        assert part in message()
    write_mask(folder / "masks/1.png", np.zeros((4, 5), np.uint8), PALETTE)
    for part in ("metadata.csv, line 3 (row 1)", "6 x 4", "5 x 4", "masks/1.png"):
        assert part in message()
    (folder / "images/0.png").write_bytes(b"nothing")
    assert "line 2 (row 0): column file_name" in message()


def test_the_fingerprint_changes_with_any_file(folder):
    before = read_split(folder).fingerprint
    assert before == read_split(folder).fingerprint == read_split(folder / "metadata.csv").fingerprint
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "images/1.png")
    assert read_split(folder).fingerprint != before


def test_reading_metadata_does_not_import_torch():
    code = "import sys, segcn.data.metadata; sys.exit('torch' in sys.modules)"
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


def test_the_examples_of_the_data_contract_run(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "data" / "README.md"
    examples = [part.split("```")[0] for part in readme.read_text().split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    for example in examples[:2]:  # the third needs `datasets`, see above
        exec(compile(example, str(readme), "exec"), values)
    expected = "8 pairs, 2 classes\n(3, 64, 64) (64, 64) a green hill under a clear sky\n"
    assert len(examples) == 3 and capsys.readouterr().out == expected


@pytest.mark.parametrize(("rows", "kept"), [(3, 1), (16, 14), (80, 70), (1024, 896), (2000, 1872)])
def test_without_test_the_last_eighth_is_held_out_at_least_2_and_at_most_128(folder, rows, kept):
    write_metadata(folder, [("images/0.png", "masks/0.png", f"hill {number}") for number in range(rows)])
    for dataset in (folder, folder / "metadata.csv"):
        assert hold_out(dataset) == (f"train[:{kept}]", f"train[{kept}:]")
        assert [len(read_named_split(dataset, name)) for name in hold_out(dataset)] == [kept, rows - kept]


def test_a_test_split_is_held_out_and_two_rows_are_too_few(tmp_path):
    for name in ("train", "test"):
        make_folder(tmp_path / "splits" / name)
    assert hold_out(tmp_path / "splits") == ("train", "test")
    with pytest.raises(UserError, match="at least 3 rows, some of them to hold out, found 2"):
        hold_out(make_folder(tmp_path / "two", rows=2))
