"""Promise: what people have becomes a data set of the contract, pixel for pixel, or a message says why not."""

import csv
import io
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as Stored
from kills import forked
from PIL import Image
from pyarrow.parquet import write_table as write_parquet

from segcn import cli
from segcn.data.captions import classes_of
from segcn.data.config import ImportConfig
from segcn.data.files import read_image
from segcn.data.importers import importer
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import check_split, read_split
from segcn.data.palette import Label, Palette
from segcn.utils.errors import UserError

PALETTE = Palette((Label(0, "sky", (135, 206, 235)), Label(1, "tree", (0, 100, 0)), Label(2, "house", (200, 0, 0))))
SIZE = (8, 6)  # (height, width)
HEADER = ("image", "conditioning_image", "text")


def photo(k):
    return np.random.default_rng(k).integers(0, 256, (*SIZE, 3), np.uint8)


def mask(k):
    """More sky than trees; a house in every second."""
    ids = np.zeros(SIZE, np.uint8)
    ids[5:] = 1
    ids[7, : 3 + k % 3] = 2 * (k % 2)
    return ids


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_files(folder, rows=3, first=0, images="images", masks="masks", ending=""):
    for name in (images, masks):
        (folder / name).mkdir(parents=True)
    for k in range(first, first + rows):
        Image.fromarray(photo(k)).save(folder / images / f"p{k}.png")
        write_mask(folder / masks / f"p{k}{ending}.png", mask(k), PALETTE)
    return folder


@pytest.fixture
def source(tmp_path):
    """Three pairs below images/ and masks/, with a palette.json."""
    folder = make_files(tmp_path / "source")
    PALETTE.save(folder / "palette.json")
    return folder


def run(source, out, **settings):
    """The lines of an import that leaves its source as it was."""
    lines = []
    before = state(Path(source))
    importer.import_dataset(ImportConfig(source=str(source), out=str(out), **settings), lines.append)
    assert settings.get("files") == "rewrite" or state(Path(source)) == before
    return lines


def state(path):
    return {file: file.lstat().st_mtime_ns for file in [path, *path.rglob("*")] if file.exists()}


def refused(source, out, **settings):
    """The message of an import that writes nothing."""
    before = set(Path(out).parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        run(source, out, **settings)
    assert set(Path(out).parent.rglob("*")) == before
    return str(caught.value)


def assert_pairs(out, numbers, split=None):
    """The rows are these photos and masks, in this order; returns their captions."""
    found = read_split(out, split)
    check_split(found)
    assert len(found) == len(numbers)
    for record, k in zip(found.records, numbers, strict=True):
        assert np.array_equal(read_image(record.image), photo(k))
        assert np.array_equal(read_mask(record.mask, found.palette), mask(k))
    return [record.captions for record in found.records]


def opened(out):
    return load_dataset(str(out), cache_dir=str(Path(out).parent / "cache"))


def rows_of(numbers, image, conditioning_image="masks/p{}.png", text="number {}"):
    return [(image.format(k), conditioning_image.format(k), text.format(k)) for k in numbers]


def write_table(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def saved(numbers, features=True):
    """A `datasets` object with the images inside."""
    columns = {"text": [f"number {k}" for k in numbers]}
    for name, pixels in (("image", photo), ("conditioning_image", mask)):
        columns[name] = [{"bytes": png(pixels(k)), "path": None} for k in numbers]
    kinds = Features({"image": Stored(), "conditioning_image": Stored(), "text": Value("string")})
    return Dataset.from_dict(columns, features=kinds if features else None)


def test_pairs_of_files_by_name_with_their_classes_as_captions(source, tmp_path):
    lines = run(source, tmp_path / "out", caption="a scene with {classes}")
    captions = assert_pairs(tmp_path / "out", range(3))
    ids = np.array([[2, 2, 2, 0, 0, 1, 255, 255, 255, 255]], np.uint8)
    assert classes_of(ids, PALETTE) == "house, sky and tree" and classes_of(ids[:, :3], PALETTE) == "house"
    assert [caption.removeprefix("a scene with ") for (caption,) in captions] == [
        "sky and tree", "sky, tree and house", "sky and tree"
    ]  # fmt: skip
    assert (tmp_path / "out/images/000001.png").read_bytes() == (source / "images/p1.png").read_bytes()
    assert (tmp_path / "out/masks/000001.png").read_bytes() == (source / "masks/p1.png").read_bytes()
    assert "3 rows; 3 classes: sky, tree, house" in lines[-2] and lines[-1].startswith("next: segcn validate ")
    rows = opened(tmp_path / "out")["train"]
    assert rows.column_names == ["image", "conditioning_image", "text"]
    assert np.array_equal(np.asarray(rows[1]["image"]), photo(1))
    assert np.array_equal(np.asarray(rows[1]["conditioning_image"].convert("RGB")), PALETTE.table[mask(1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "source"]


def test_each_line_of_a_text_file_is_a_caption_and_many_rows_are_spread_over_folders(source, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "MANY", 2)
    (source / "captions").mkdir()
    (source / "captions/p0.txt").write_text("first\n\n  second \n")
    (source / "images/p1.txt").write_text("one")
    assert "expected a caption, found none; --caption" in refused(source, tmp_path / "out")
    run(source, tmp_path / "out", caption="an image")
    assert assert_pairs(tmp_path / "out", range(3)) == [("first", "second"), ("one",), ("an image",)]
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*/*.png"))
    assert names[:3] == ["images/00/000000.png", "images/00/000001.png", "images/01/000002.png"]
    assert opened(tmp_path / "out")["train"].num_rows == 3


def test_folders_below_are_paired_by_their_whole_path_and_suffixes_are_cut(tmp_path):
    folder = tmp_path / "city"
    for split, first in (("train", 0), ("val", 2)):
        make_files(folder, 2, first, f"leftImg8bit/{split}/a", f"gtFine/{split}/a", "_gtFine_labelIds")
        Image.fromarray(photo(9)).save(folder / f"gtFine/{split}/a/p{first}_gtFine_color.png")
    message = refused(folder, tmp_path / "out", caption="a street")
    assert "2 images in" in message and "a/p0, a/p1" in message and "_gtFine_" in message
    unnamed = refused(folder, tmp_path / "out", caption="{classes}", mask_suffix="_gtFine_labelIds")
    assert "have no names" in unnamed and "segcn palette" in unnamed
    lines = run(folder, tmp_path / "out", caption="a street", mask_suffix="_gtFine_labelIds")
    assert any("proposed from 4 masks" in line for line in lines) and "train 2 rows, val 2 rows" in lines[-2]
    assert_pairs(tmp_path / "out", [0, 1]), assert_pairs(tmp_path / "out", [2, 3], "val")
    assert (tmp_path / "out/palette.json").is_file() and not (tmp_path / "out/val/palette.json").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: (s / "masks/p1.png").unlink(), ["1 images in", "have no mask: p1", "--mask_suffix"]),
    (lambda s: (s / "images/p2.png").unlink(), ["1 masks in", "have no image: p2"]),
    (lambda s: (s / "images/p0.jpg").write_bytes(b""), ["one file of each name", "p0.jpg and p0.png"]),
    (lambda s: (s / "labels").mkdir(), ["expected one of these folders", "masks and labels"]),
    (lambda s: [p.unlink() for p in (s / "masks").iterdir()], ["masks: expected images", "found none"]),
    (lambda s: ((s / "masks/p1.png").unlink(), os.mkfifo(s / "masks/p1.png")), ["have no mask: p1"]),
])  # fmt: skip
def test_files_that_are_no_pairs_are_named(source, tmp_path, change, words):
    change(source)
    message = refused(source, tmp_path / "out", caption="a")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("files", ["copy", "symlink"])
def test_an_old_metadata_file_with_paths_of_every_kind(source, tmp_path, monkeypatch, files):
    """Absolute, with .., relative to the current folder, through a link and with backslashes; columns of its own."""
    (source / "old").mkdir()
    (source / "old/link.png").symlink_to(source / "images/p2.png")
    monkeypatch.chdir(source)
    rows = [
        (str(source / "images/p0.png"), "../masks/p0.png", "absolute, and above"),
        ("images/p1.png", "masks\\p1.png", "two\nlines"),
        ("link.png", str(source / "masks/p2.png"), "a link"),
    ]
    table = write_table(source / "old/rows.csv", ("photo", "seg", "says"), rows)
    columns = {"image_column": "photo", "conditioning_image_column": "seg", "caption_column": "says"}
    assert "expected a column file_name or" in refused(table, tmp_path / "out")
    lines = run(table, tmp_path / "out", files=files, **columns)
    assert "SEGCN_ALLOW_SYMLINKS" not in os.environ
    monkeypatch.setenv("SEGCN_ALLOW_SYMLINKS", "1")
    assert assert_pairs(tmp_path / "out", range(3)) == [("absolute, and above",), ("two lines",), ("a link",)]
    assert opened(tmp_path / "out")["train"][1]["text"] == "two lines"
    links = [path.is_symlink() for path in (tmp_path / "out").rglob("*.png")]
    assert links == [files == "symlink"] * 6
    assert lines[-1].endswith("--allow_symlinks") == (files == "symlink")
    monkeypatch.delenv("SEGCN_ALLOW_SYMLINKS")  # links are not allowed any longer than the check
    if files == "symlink":
        with pytest.raises(UserError, match="allow_symlinks"):
            read_split(tmp_path / "out")


def test_rewrite_writes_metadata_and_palette_and_nothing_else(source, tmp_path):
    rows = rows_of(range(3), str(source / "images/p{}.png"), str(source / "masks/p{}.png"))
    table = write_table(tmp_path / "rows.csv", HEADER, rows)
    (source / "palette.json").rename(tmp_path / "palette.json")
    before = set(source.rglob("*"))
    run(table, source, files="rewrite")
    assert assert_pairs(source, range(3)) == [("number 0",), ("number 1",), ("number 2",)]
    assert set(source.rglob("*")) - before == {source / "metadata.csv", source / "palette.json"}
    assert "images/p1.png,masks/p1.png,number 1" in (source / "metadata.csv").read_text()
    assert "metadata.csv is there already" in refused(table, source, files="rewrite")
    assert "expected a file below" in refused(table, source / "masks", files="rewrite")
    for name, first in (("train", 0), ("test", 3)):
        make_files(tmp_path / "data" / name, 2, first)
    run(tmp_path / "data", tmp_path / "data", files="rewrite", caption="a")
    assert_pairs(tmp_path / "data", [0, 1]), assert_pairs(tmp_path / "data", [3, 4], "test")
    (tmp_path / "data/train/metadata.csv").unlink(), (tmp_path / "data/test/metadata.csv").unlink()
    message = refused(tmp_path / "data", tmp_path / "data", files="rewrite", caption="a", palette="voc")
    assert "palette.json is another one and is never overwritten" in message


def test_jsonl_keeps_lists_of_captions_and_rows_of_one_pair_become_one(source, tmp_path):
    rows = [
        {"image": "images/p0.png", "conditioning_image": "masks/p0.png", "text": ["a", "b"]},
        {"image": "images/p1.png", "conditioning_image": "masks/p1.png", "text": "c"},
        {"image": "images/p0.png", "conditioning_image": "masks/p0.png", "text": "d"},
    ]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(source, tmp_path / "out")
    assert assert_pairs(tmp_path / "out", [0, 1]) == [("a", "b", "d"), ("c",)]
    assert opened(tmp_path / "out")["train"]["text"] == [["a", "b", "d"], ["c"]]
    (source / "prompt.json").write_text(json.dumps(rows[1:2]))
    run(source / "prompt.json", tmp_path / "array")
    assert assert_pairs(tmp_path / "array", [1]) == [("c",)]
    (source / "metadata.jsonl").write_bytes(b'{}\n\n["a"]\n{"image": "\xe9"}')
    assert "line 1: expected a column file_name or" in refused(source, tmp_path / "more")
    (source / "metadata.jsonl").write_bytes(json.dumps(rows[0]).encode() + b'\n\n["a"]\n{"image": "\xe9"}')
    message = refused(source, tmp_path / "more")
    assert "line 3: expected an object of columns, found ['a']; 1 more of 3 rows fail" in message


@pytest.mark.parametrize(("row", "words"), [
    (("https://a.org/p.png", "masks/p0.png", "a"), ["line 3: column image", "URL", "never downloaded"]),
    (("images/p9.png", "masks/p0.png", "a"), ["line 3", "found none at 'images/p9.png' (looked for"]),
    (("images", "masks/p0.png", "a"), ["line 3", "expected a regular file"]),
    (("images/p0.png", "", "a"), ["line 3: column conditioning_image", "expected a file"]),
    (("images/p0.png", "masks/p0.png", " "), ["line 3: column text", "--caption"]),
    (("images/p0.png", "masks/p0.png"), ["line 3", "expected 3 fields, found 2"]),
    (("images/p0.png", "masks/p0.png", "a\nimages/p1.png,masks/p1.png,b"), ["line 3", "double quote"]),
])  # fmt: skip
def test_a_wrong_row_is_named_by_its_line_before_anything_is_written(source, tmp_path, row, words):
    first = rows_of([0], "images/p{}.png")
    write_table(source / "metadata.csv", HEADER, [*first, row])
    message = refused(source, tmp_path / "out")
    assert all(word in message for word in ["metadata.csv", *words]), message
    write_table(source / "metadata.csv", HEADER, [*first, row, *rows_of([7, 8], "no/{}.png")])
    assert "2 more of 4 rows fail" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["saved", "parquet", "parquet in data"])
def test_saved_datasets_and_parquet_files_with_images_inside(tmp_path, kind):
    source = tmp_path / "source"
    whole, splits = saved(range(3)), DatasetDict(train=saved([0, 1]), validation=saved([2], False), test=saved([3]))
    if kind == "saved":
        splits.save_to_disk(source)
        whole.save_to_disk(tmp_path / "whole")
    else:
        below = source / ("data" if "data" in kind else "")
        below.mkdir(parents=True)
        saved([0]).to_parquet(below / "train-00000-of-00002.parquet")
        saved([1]).to_parquet(below / "train-00001-of-00002.parquet")
        for name in ("validation", "test"):
            splits[name].to_parquet(below / f"{name}-00000-of-00001.parquet")
        whole.to_parquet(tmp_path / "whole")
        (tmp_path / "whole").rename(tmp_path / "whole.parquet")
    PALETTE.save(source / "palette.json")
    run(source, tmp_path / "out")
    for split, numbers in (("train", [0, 1]), ("validation", [2]), ("test", [3])):
        assert assert_pairs(tmp_path / "out", numbers, split) == [(f"number {k}",) for k in numbers]
    assert (tmp_path / "out/test/images/000000.png").read_bytes() == png(photo(3))
    rows = {name: len(rows) for name, rows in opened(tmp_path / "out").items()}
    assert rows == {"train": 2, "validation": 1, "test": 1}
    source = next(tmp_path.glob("whole*"))
    run(source, tmp_path / "one")
    assert assert_pairs(tmp_path / "one", range(3)) == [("number 0",), ("number 1",), ("number 2",)]
    assert "use --files copy" in refused(source, tmp_path / "links", files="symlink")
    assert "use --files copy" in refused(source, tmp_path, files="rewrite")


def test_a_parquet_file_with_raw_bytes_lists_columns_of_its_own_and_cells_that_are_no_image(tmp_path):
    jpeg, table = io.BytesIO(), tmp_path / "rows.parquet"
    Image.fromarray(photo(0)).save(jpeg, "JPEG")
    columns = {"a": [jpeg.getvalue()] * 2, "b": [png(mask(0))] * 2, "c": [["one", "two"], ["three"]], "n": [1, 2]}
    write_parquet(pyarrow.table(columns), table)
    names = {"image_column": "a", "conditioning_image_column": "b", "caption_column": "c"}
    run(table, tmp_path / "out", **names)
    record = read_split(tmp_path / "out")[0]
    assert record.captions == ("one", "two") and record.image.read_bytes() == jpeg.getvalue()
    assert record.image_name == "images/000000.jpg"
    assert opened(tmp_path / "out")["train"]["text"] == [["one", "two"], ["three"]]
    message = refused(table, tmp_path / "more", **names | {"image_column": "n"})
    assert "rows.parquet: cannot be read as images in n and b" in message
    assert "expected a column file_name or" in refused(table, tmp_path / "more")
    Image.fromarray(photo(0)).save(tmp_path / "x.png")
    for cell, words in ((None, "expected a file, found"), ("https://a.org/p.png", "never downloaded")):
        columns = {"image": ["x.png", cell], "conditioning_image": [png(mask(0))] * 2, "text": ["a", "b"]}
        write_parquet(pyarrow.table(columns), table)
        message = refused(table, tmp_path / "more")
        assert "rows.parquet, row 1: column image" in message and words in message


def test_folders_of_splits_each_of_a_kind_of_its_own(tmp_path):
    make_files(tmp_path / "data/train", 2)
    (tmp_path / "data/test").mkdir()
    saved([2]).to_parquet(tmp_path / "data/test/0000.parquet")
    make_files(tmp_path / "data/validation", 1, first=3)
    write_table(tmp_path / "data/validation/metadata.csv", HEADER, rows_of([3], "images/p{}.png"))
    run(tmp_path / "data", tmp_path / "out", caption="no words")
    assert assert_pairs(tmp_path / "out", [0, 1]) == [("no words",)] * 2
    assert assert_pairs(tmp_path / "out", [2], "test") == [("number 2",)]
    assert assert_pairs(tmp_path / "out", [3], "validation") == [("number 3",)]


def test_where_it_may_not_write(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "" is the working directory
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for out, words in (
        (tmp_path / "full", "not empty"), (tmp_path / "full/mine.txt", "not empty"), (source / "out", "never changed"),
        ("", "needs two places"),
    ):  # fmt: skip
        assert words in refused(source, out, caption="a")
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path / "out")
    assert "expected images/ and masks/" in refused(tmp_path / "full", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty", caption="a")
    assert_pairs(tmp_path / "empty", range(3))


def test_a_palette_by_name_file_or_beside_the_source_and_errors_that_name_the_masks_of_the_user(source, tmp_path):
    assert "voc" in refused(source, tmp_path / "out", caption="a", palette="nowhere.json")
    message = refused(source, tmp_path / "out", caption="a", palette="binary")  # there is no id 2
    assert "--palette" in message and f"e.g. {source / 'masks/p1.png'}" in message and "partial" not in message
    other = Palette((*PALETTE.labels, Label(9, "lake", (0, 0, 255))))
    other.save(tmp_path / "other.json")
    run(source, tmp_path / "named", caption="a", palette=str(tmp_path / "other.json"))
    assert read_split(tmp_path / "named").palette == other
    assert f"palette: {source / 'palette.json'}" in run(source, tmp_path / "found", caption="a")
    assert read_split(tmp_path / "found").palette == PALETTE
    (source / "masks/p1.png").write_bytes(b"nothing")
    message = refused(source, tmp_path / "out", caption="{classes}")
    assert f"{source / 'masks/p1.png'}: the mask cannot be read" in message and "partial" not in message


def test_what_cannot_be_trained_on_is_written_and_named(source, tmp_path):
    (source / "images/p1.png").write_bytes(b"nothing")
    words = r"out is written, but.*metadata\.csv, line 3 \(row 1\)(?s:.*)segcn validate.*--quarantine"
    with pytest.raises(UserError, match=words):
        run(source, tmp_path / "out", caption="a")
    assert len(read_split(tmp_path / "out")) == 3


def test_an_import_that_stops_half_way_leaves_no_data_set(source, tmp_path, monkeypatch):
    real, calls = shutil.copyfile, []

    def stops(file, target):
        calls.append(file)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(file, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importer.shutil, "copyfile", stops)
        run(source, tmp_path / "out", caption="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    run(source, tmp_path / "out", caption="a")
    assert_pairs(tmp_path / "out", range(3))


def test_a_killed_import_leaves_a_folder_that_is_no_data_set_and_the_next_one_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "_write", lambda *words: os.kill(os.getpid(), signal.SIGKILL))
    assert forked(lambda: run(source, tmp_path / "out", caption="a")) == -signal.SIGKILL
    monkeypatch.undo()
    left = next(tmp_path.glob("out.partial-*"))
    with pytest.raises(UserError, match="found none"):
        read_split(left)
    lines = "\n".join(run(source, tmp_path / "out", caption="a"))
    assert f"{left} was left by an import that was killed" in lines and left.is_dir()
    assert_pairs(tmp_path / "out", range(3))


def test_the_command(source, tmp_path, capsys):
    words = ["import", str(source), str(tmp_path / "out"), "--caption", "a view of {classes}"]
    cli.run_command(words)
    assert "next: segcn validate" in capsys.readouterr().out
    assert assert_pairs(tmp_path / "out", range(3))[0] == ("a view of sky and tree",)
    with pytest.raises(UserError, match="not empty"):
        cli.run_command(words)


def test_rows_may_be_held_out_the_same_at_each_call_and_every_pair_stays_one(tmp_path):
    source, found = make_files(tmp_path / "source", 9), []
    PALETTE.save(source / "palette.json")
    for name in ("one", "two"):
        run(source, tmp_path / name, caption="a", test=3)
        found.append([])
        for split in ("train", "test"):
            rows = read_split(tmp_path / name, split).records
            shown = [[np.array_equal(read_image(row.image), photo(k)) for k in range(9)].index(True) for row in rows]
            assert_pairs(tmp_path / name, shown, split)
            found[-1] += shown
        assert len(shown) == 3
    assert found[0] == found[1] and sorted(found[0]) == list(range(9))
    for count in (-1, 9, 10):  # no more rows than there are
        with pytest.raises(UserError, match=f"--test {count}: expected fewer than the 9 rows"):
            run(source, tmp_path / "out", caption="a", test=count)
    with pytest.raises(UserError, match="use --files copy or symlink"):
        run(source, tmp_path, caption="a", test=1, files="rewrite")


def make_large(folder, sizes=((30, 45), (20, 20), (41, 20)), palette=PALETTE):
    """Pairs of these (height, width), every pixel of an image of its own color; the images and masks."""
    made = []
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k, size in enumerate(sizes):
        image = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        made.append((image, (image[..., 0] % 3).astype(np.uint8)))
        Image.fromarray(image).save(folder / f"images/p{k}.png")
        write_mask(folder / f"masks/p{k}.png", made[-1][1], palette)
    palette.save(folder / "palette.json")
    return made


def test_tiles_are_full_squares_of_image_and_mask_that_cover_every_pixel_and_say_where_they_are(tmp_path):
    made = make_large(tmp_path / "source")
    lines = run(tmp_path / "source", tmp_path / "out", tile=20, overlap=6, caption="{classes}")
    assert any("--test 8 holds out whole images" in line for line in lines)
    found, covered = read_split(tmp_path / "out"), [np.zeros(mask.shape, int) for _, mask in made]
    check_split(found)
    starts = {20: (0,), 30: (0, 10), 41: (0, 14, 21), 45: (0, 14, 25)}
    assert len(found) == 2 * 3 + 1 + 3 == len({record.image_name for record in found.records})
    for record in found.records:
        number, row, column = record.image.stem.split("_")
        image, ids = made[int(number)]
        top, left = starts[len(ids)][int(row[1:])], starts[ids.shape[1]][int(column[1:])]
        there = np.s_[top : top + 20, left : left + 20]
        assert np.array_equal(read_image(record.image), image[there]) and image[there].shape == (20, 20, 3)
        assert (
            np.array_equal(read_mask(record.mask, found.palette), ids[there]) and record.mask.stem == record.image.stem
        )
        covered[int(number)][there] += 1
        origin = f"{record.image_name},{tmp_path / 'source/images'}/p{int(number)}.png"
        assert origin in (tmp_path / "out/sources.csv").read_text()
    assert all(each.min() == 1 for each in covered) and covered[0].max() > 1
    assert sorted(os.listdir(tmp_path / "out/images")) == sorted(record.image.name for record in found.records)


def test_all_tiles_of_an_image_are_on_one_side_of_a_split(tmp_path):
    make_large(tmp_path / "source", [(30, 30)] * 5)
    run(tmp_path / "source", tmp_path / "out", tile=20, caption="a", test=2)
    rows = {}
    for side in ("train", "test"):
        lines = (tmp_path / f"out/{side}/sources.csv").read_text().splitlines()[1:]
        rows[side] = Counter(line.split(",")[1] for line in lines)
    assert [sorted(rows[side].values()) for side in rows] == [[4] * 3, [4] * 2] and not set(rows["train"]) & set(
        rows["test"]
    )


def test_an_image_smaller_than_a_tile_is_refused_by_its_own_name_and_tiles_need_copies(tmp_path):
    source = tmp_path / "source"
    make_large(source)
    message = refused(source, tmp_path / "out", tile=21, caption="a")
    assert f"{source / 'images/p1.png'}: expected 21 x 21 pixels at least, found 20 x 20: use a smaller" in message
    assert "1 more of 3 images fail" in message and "partial" not in message
    assert "expected less than --tile 8" in refused(source, tmp_path / "out", tile=8, overlap=8, caption="a")
    assert "none was given" in refused(source, tmp_path / "out", overlap=8, caption="a")
    assert "use --files copy" in refused(source, tmp_path / "out", tile=8, caption="a", files="symlink")
    write_mask(source / "masks/p0.png", np.zeros((30, 44), np.uint8), PALETTE)
    message = refused(source, tmp_path / "out", tile=20, caption="a")
    assert f"{source / 'images/p0.png'}: expected an image and a mask of one size, found 45 x 30 and 44 x 30" in message
