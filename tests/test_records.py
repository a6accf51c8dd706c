"""Promise: what is odd but right is read exactly; each of hundreds of malformed sets gives one error with its row."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import malformed
import numpy as np
import pytest
from malformed import (
    COLORS,
    HEADER,
    MASK,
    PALETTE,
    csv_of,
    encoded,
    exif_of,
    file_of,
    jsonl,
    jsonl_of,
    png_chunk,
    sound,
)
from PIL import Image

from segcn.data.config import DoctorConfig
from segcn.data.dataset import PairedDataset
from segcn.data.doctor import scan
from segcn.data.doctor.findings import examine
from segcn.data.files import read_image
from segcn.data.masks import code_of, count_ids, read_mask, read_stored_mask, write_mask
from segcn.data.metadata import COLUMNS, check_split, hold_out, read_named_split, read_split, write_metadata
from segcn.data.palette import IGNORE
from segcn.data.transforms import AUGMENTS
from segcn.utils.errors import UserError

CORPUS = malformed.corpus()


@pytest.fixture
def folder(tmp_path):
    return sound(tmp_path / "pairs")


def refused(dataset, check=read_split):
    with pytest.raises(UserError) as caught:
        check(dataset)
    return str(caught.value)


def test_reads_what_was_written(folder):
    split = read_split(folder)
    assert [(record.row, record.line) for record in split.records] == [(0, 2), (1, 3), (2, 4)]
    assert (split[2].caption, split.palette) == ("a hill, number 2", PALETTE)
    assert (split[2].image, split[2].mask) == (folder / "images/2.png", folder / "masks/2.png")
    assert read_split(folder / "metadata.csv").records == read_split(folder, "train").records == split.records
    for name, message in ((folder, "test"), (folder / "metadata.csv", "name the folder above")):
        with pytest.raises(UserError, match=message):
            read_split(name, "test")


def test_splits_are_folders_under_one_palette_and_test_is_held_out(tmp_path, folder):
    for name, rows in (("train", 3), ("test", 2)):
        (sound(tmp_path / "splits" / name, rows) / "palette.json").unlink()
    splits = tmp_path / "splits"
    PALETTE.save(splits / "palette.json")
    assert len(read_split(splits)) == len(read_split(splits, "train")) == 3
    assert len(read_split(splits, "test")) == len(read_split(splits / "test")) == 2
    with pytest.raises(UserError, match="expected a split val, found test, train"):
        read_split(splits, "val")
    assert hold_out(splits) == ("train", "test")
    assert "at least 3 rows, some of them to hold out, found 2" in refused(splits / "test", hold_out)


@pytest.mark.parametrize(("rows", "kept"), [(3, 1), (16, 14), (80, 70), (1024, 896), (2000, 1872)])
def test_without_test_the_last_eighth_is_held_out_at_least_2_and_at_most_128(folder, rows, kept):
    write_metadata(folder, [("images/0.png", "masks/0.png", f"hill {number}") for number in range(rows)])
    for dataset in (folder, folder / "metadata.csv"):
        assert hold_out(dataset) == (f"train[:{kept}]", f"train[{kept}:]")
        assert [len(read_named_split(dataset, name)) for name in hold_out(dataset)] == [kept, rows - kept]


def test_metadata_keep_column_order_quotes_and_commas_and_a_failed_write_leaves_the_old_file(folder):
    write_metadata(folder, [("images/0.png", "masks/0.png", 'a "red"\nhouse, at dusk')])
    before = (folder / "metadata.csv").read_text()
    assert before.splitlines()[0] == ",".join(COLUMNS) and read_split(folder)[0].caption == 'a "red" house, at dusk'
    with pytest.raises(ValueError, match="unpack"):
        write_metadata(folder, [("images/0.png", "a caption")])
    assert (folder / "metadata.csv").read_text() == before and not list(folder.glob(".*"))


def test_a_folder_without_metadata_and_one_with_two_are_refused(tmp_path, folder):
    assert "found none" in refused(tmp_path) and "no such folder" in refused(tmp_path / "nowhere")
    assert "found a .json file" in refused(folder / "palette.json")
    (folder / "metadata.jsonl").write_text("{}")
    assert "expected one metadata file" in refused(folder)


def test_the_message_names_the_first_file_that_does_not_fit_and_how_many_more_rows_fail(folder):
    def message():
        return refused(folder, lambda dataset: check_split(read_split(dataset)))

    for row in (1, 2):
        Image.fromarray(np.full_like(MASK, 9)).save(folder / f"masks/{row}.png")
    for part in ("line 3 (row 1)", "masks/1.png", "value 9 (24 pixels)", "1 more of 3 rows fail"):
        assert part in message()
    write_mask(folder / "masks/1.png", MASK[:, 1:], PALETTE)
    for part in ("metadata.csv, line 3 (row 1)", "6 x 4", "5 x 4", "masks/1.png"):
        assert part in message()
    (folder / "images/0.png").write_bytes(b"nothing")
    assert "line 2 (row 0): column file_name" in message()
    for path in (folder / "images").iterdir():
        path.unlink()
    assert "line 2 (row 0)" in message() and "2 more of 3 rows fail" in message()


def test_the_fingerprint_changes_with_any_file(folder):
    before = read_split(folder).fingerprint
    assert before == read_split(folder).fingerprint == read_split(folder / "metadata.csv").fingerprint
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "images/1.png")
    assert read_split(folder).fingerprint != before


def test_reading_metadata_does_not_import_torch():
    code = "import sys, segcn.data.metadata; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_of_the_data_contract_run(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "data" / "README.md"
    examples = [part.split("```")[0] for part in readme.read_text().split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    for example in examples[:2]:  # the third needs `datasets`, see test_import.py
        exec(compile(example, str(readme), "exec"), values)
    expected = "8 pairs, 2 classes\n(3, 64, 64) (64, 64) a green hill under a clear sky\n"
    assert len(examples) == 3 and capsys.readouterr().out == expected


@pytest.fixture
def no_hang():
    """A test that takes minutes ends with an error."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes too long"))
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What an audit hook notes: every file that is opened while `recording`; imports and the tokenizer come before."""
    paths, recording = [], []

    def note(event, args):
        if recording and event == "open" and isinstance(args[0], (str, bytes)):
            paths.append(os.path.abspath(os.fsdecode(args[0])))

    tokenizer, patch = scan.caption_tokenizer(DoctorConfig().pretrained_model_name_or_path), pytest.MonkeyPatch()
    patch.setattr(scan, "caption_tokenizer", lambda folder: tokenizer)
    examine(DoctorConfig(dataset_name=str(sound(tmp_path_factory.mktemp("first") / "pairs"))), log=len)
    sys.addaudithook(note)
    recording.append(True)
    yield paths
    recording.clear()  # the hook itself stays to the end
    patch.undo()


def listing(folder):
    """Every name below a folder with its kind and bytes."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else b"" for path in folder.rglob("*")}


def test_the_corpus_is_large_and_what_it_breaks_was_sound(folder):
    assert len(CORPUS) >= 150 and malformed.WORDS.keys() <= CORPUS.keys()
    check_split(read_split(folder))


@pytest.mark.parametrize("name", CORPUS)
def test_a_malformed_data_set_is_refused_with_file_and_row_and_no_file_outside_is_opened(
    tmp_path, folder, name, opened, no_hang
):
    """Training names the first fault; the doctor finds it too, in that row alone. Neither leaves the folder."""
    change, where = CORPUS[name]
    change(folder)
    before, rows = listing(tmp_path), {1}
    opened.clear()
    message = refused(folder, lambda dataset: check_split(read_split(dataset)))
    try:
        rows = {finding.row for finding in examine(DoctorConfig(dataset_name=str(folder)), log=len).errors}
    except UserError:
        assert "row 1" not in where
    inside = os.path.realpath(folder) + os.sep
    assert [path for path in opened if not os.path.realpath(path).startswith(inside)] == []
    assert all(part in message for part in (where, str(folder), malformed.WORDS.get(name, "")))
    assert "Traceback" not in message and message.isprintable()
    assert (rows == {1} and opened) or "row 1" not in where
    assert listing(tmp_path) == before


FIRST = "images/0.png,masks/0.png"


def caption(text, written=None):
    """(change, captions of the first row) of a metadata.csv with one row."""
    written = text if written is None else written
    return csv_of(f"{HEADER}\n{FIRST},{written}\n".encode()), (text,)


def renamed(name):
    """The first image has another name."""

    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images/0.png").rename(folder / name)
        escaped = name.replace('"', '""')
        csv_of(f'{HEADER}\n"{escaped}",masks/0.png,a hill\n'.encode())(folder)

    return change


def packed(bits, ids):
    """Class ids in few bits a pixel: the bytes of each row."""
    return [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in ids]


def low_bit(bits):
    """MASK with 1 where it is 7, in a grey PNG of few bits a pixel, which Pillow reads stretched."""
    stream = zlib.compress(b"".join(b"\0" + row for row in packed(bits, np.where(MASK == 7, 1, MASK))))
    header = struct.pack(">IIBBBBB", MASK.shape[1], MASK.shape[0], bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, *zip(*chunks, strict=True)))


def white_is_zero(bits):
    """A grey TIFF of few bits a pixel that stores MASK, with 1 where it is 7, as its brightness turned round."""
    ids = np.where(MASK == 7, 1, MASK)
    rows = b"".join(packed(bits, (2**bits - 1 - ids).astype(np.uint8)))
    tags = {
        256: MASK.shape[1], 257: MASK.shape[0], 258: bits, 259: 1, 262: 0, 273: 8, 277: 1, 278: len(MASK),
        279: len(rows),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


def indexed(mode, **options):
    image = Image.fromarray(MASK)
    image.putpalette(PALETTE.table.tobytes())
    return encoded(image.convert(mode) if mode != "P" else image, "PNG", **options)


def link_inside(folder):
    (folder / "images/0.png").rename(folder / "images/real.png")
    (folder / "images/0.png").symlink_to("real.png")


def linked_folder_inside(folder):
    (folder / "images").rename(folder / "photos")
    (folder / "images").symlink_to("photos")


def hard_link(folder):
    os.link(folder / "images/0.png", folder / "images/twin.png")
    csv_of(f"{HEADER}\nimages/twin.png,masks/0.png,a hill\n")(folder)


def folder_is_a_link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


ROW = f"{FIRST},a hill"
METADATA = {
    "byte order mark": (csv_of(f"\ufeff{HEADER}\n{ROW}\n"), ("a hill",)),
    "Windows line ends": (csv_of(f"{HEADER}\r\n{ROW}\r\n"), ("a hill",)),
    "old Mac line ends": (csv_of(f"{HEADER}\r{ROW}\r"), ("a hill",)),
    "no line end": (csv_of(f"{HEADER}\n{ROW}"), ("a hill",)),
    "blank lines": (csv_of(f"{HEADER}\n\n\n{ROW}\n\n"), ("a hill",)),
    "all quoted": (csv_of('"' + f'{HEADER}"\n"{ROW}"\n'.replace(",", '","')), ("a hill",)),
    "text first": (csv_of(f"text,{HEADER[:-5]}\na hill,{FIRST}\n"), ("a hill",)),
    "more columns": (csv_of(f"id,{HEADER},score\n7,{ROW},0.5\n"), ("a hill",)),
    "a million columns' worth": (csv_of(f"{HEADER},x" + "y" * 10**5 + f"\n{ROW},\n"), ("a hill",)),
    "comma": caption("a hill, at dusk", '"a hill, at dusk"'), "quotes": caption('a "red" house', '"a ""red"" house"'),
    "quotes in a bare field": caption('a 5" pipe'), "line break": caption("a hill\nat dusk", '"a hill\nat dusk"'),
    "Windows line break": caption("a hill\r\nat dusk", '"a hill\r\nat dusk"'),
    "four lines": caption("a\n\nb, c\nd", '"a\n\nb, c\nd"'), "accents": caption("un arbre isolé"),
    "Chinese": caption("黄昏的山"), "Arabic": caption("تلة عند الغسق"), "emoji": caption("a 🌲 and a 👩‍🌾"),
    "combining": caption("e\u0301te\u0301"), "spaces around": caption("  a hill  "), "a number": caption("2024"),
    "NULL as a word": caption("NULL"), "a formula": caption("=1+1"), "HTML": caption("<b>a hill</b>"),
    "100,000 letters": caption("hill " * 20_000), "jsonl": (jsonl_of(jsonl(0)), ("a hill",)),
    "jsonl, byte order mark": (jsonl_of(b"\xef\xbb\xbf" + json.dumps(jsonl(0)).encode()), ("a hill",)),
    "jsonl, Windows line ends": (jsonl_of(json.dumps(jsonl(0)).encode() + b"\r"), ("a hill",)),
    "jsonl, blank lines": (jsonl_of(b"", jsonl(0), b"  ", b""), ("a hill",)),
    "jsonl, more keys": (jsonl_of(jsonl(0) | {"score": 0.5, "tags": [1, {"a": None}]}), ("a hill",)),
    "jsonl, several captions": (jsonl_of(jsonl(0, text=["a hill", "a\nhill"])), ("a hill", "a\nhill")),
    "jsonl, one caption in a list": (jsonl_of(jsonl(0, text=["a hill"])), ("a hill",)),
    "jsonl, escapes": (jsonl_of(jsonl(0, text="\U0001f332 é")), ("\U0001f332 é",)),
    "jsonl, a separator of lines": (jsonl_of(json.dumps(jsonl(0, text="a\u2028b"), ensure_ascii=False)), ("a\u2028b",)),
    "the same pair, another caption": (csv_of(f"{HEADER}\n{ROW}\n{FIRST},a lake\n"), ("a hill",)),
}  # fmt: skip
PLACES = {
    name: renamed(f"images/{name}")
    for name in ("a b.png", "a..b.png", "..a.png", "é.png", "山.png", "100%.png", "#1.png", "a&b.png", "x'y.png",
                 'x"y.png', ".hidden.png", "no suffix", "a,b.png", "deep/er/0.png", "0.jpg.png", "-rf.png", "con.png")
} | {"link inside": link_inside, "linked folder inside": linked_folder_inside, "hard link": hard_link,
     "the folder is a link": folder_is_a_link}  # fmt: skip
BLACK_AND_WHITE = Image.fromarray((MASK == 1).astype(np.uint8) * 255).convert("1")
SEVEN = np.where(MASK == 7, IGNORE, MASK)
MASKS = {
    "P": (indexed("P"), MASK),
    "P of few colors": (encoded(Image.open(io.BytesIO(indexed("P"))).copy(), "PNG", bits=4), MASK),
    "PA": (encoded(Image.merge("LA", [Image.fromarray(MASK), Image.fromarray(MASK)]), "PNG"), MASK),
    "L": (encoded(MASK, "PNG"), MASK), "1-bit": (encoded(BLACK_AND_WHITE, "PNG"), (MASK == 1).astype(int)),
    "1-bit TIFF": (encoded(BLACK_AND_WHITE, "TIFF"), (MASK == 1).astype(int)),
    "2-bit grey": (low_bit(2), np.where(MASK == 7, 1, MASK)), "4-bit grey": (low_bit(4), np.where(MASK == 7, 1, MASK)),
    "2-bit grey TIFF, white is 0": (white_is_zero(2), np.where(MASK == 7, 1, MASK)),
    "4-bit grey TIFF, white is 0": (white_is_zero(4), np.where(MASK == 7, 1, MASK)),
    "8-bit grey TIFF, white is 0": (encoded(MASK, "TIFF", tiffinfo={262: 0}), MASK),
    "I;16": (encoded(MASK.astype(np.uint16), "PNG"), MASK),
    "I;16 TIFF": (encoded(MASK.astype(np.uint16), "TIFF"), MASK),
    "I;16B TIFF": (encoded(Image.frombytes("I;16B", MASK.shape[::-1], MASK.astype(">u2").tobytes()), "TIFF"), MASK),
    "32-bit TIFF": (encoded(MASK.astype(np.int32), "TIFF"), MASK), "RGB": (encoded(COLORS, "PNG"), MASK),
    "RGBA": (encoded(np.dstack([COLORS, MASK * 30]), "PNG"), MASK), "RGB BMP": (encoded(COLORS, "BMP"), MASK),
    "RGB PPM": (encoded(COLORS, "PPM"), MASK), "lossless WebP": (encoded(COLORS, "WEBP", lossless=True), MASK),
    "GIF": (encoded(Image.open(io.BytesIO(indexed("P"))).copy(), "GIF", optimize=False), MASK),
    "compressed TIFF": (encoded(MASK, "TIFF", compression="tiff_lzw"), MASK),
    "unlabelled": (encoded(SEVEN.astype(np.uint8), "PNG"), SEVEN),
    "unlabelled, 16 bits": (encoded(SEVEN.astype(np.uint16), "PNG"), SEVEN),
    "all unlabelled": (encoded(np.full_like(MASK, 255), "PNG"), np.full_like(MASK, 255)),
}  # fmt: skip
PHOTO = malformed.photo(0)
GREY = PHOTO[..., 0]
IMAGES = {
    "grey": (encoded(GREY, "PNG"), np.dstack([GREY] * 3)),
    "grey with alpha": (encoded(Image.fromarray(np.dstack([GREY, GREY]), "LA"), "PNG"), np.dstack([GREY] * 3)),
    "alpha": (encoded(np.dstack([PHOTO, GREY]), "PNG"), PHOTO), "palette": (encoded(COLORS, "PNG"), COLORS),
    "16-bit grey": (encoded(GREY.astype(np.uint16) << 8, "PNG"), np.dstack([GREY] * 3)),
    "1-bit": (encoded(BLACK_AND_WHITE, "PNG"), np.dstack([(MASK == 1) * 255] * 3)),
    "BMP": (encoded(PHOTO, "BMP"), PHOTO), "TIFF": (encoded(PHOTO, "TIFF"), PHOTO),
    "lossless WebP": (encoded(PHOTO, "WEBP", lossless=True), PHOTO),
    "JPEG 2000": (encoded(PHOTO, "JPEG2000", irreversible=False), PHOTO),
    "upside down": (encoded(PHOTO, "PNG", exif=exif_of(3)), PHOTO[::-1, ::-1]),
    "sideways": (encoded(PHOTO.transpose(1, 0, 2), "PNG", exif=exif_of(5)), PHOTO),
}  # fmt: skip


def first_row(folder):
    """The first record, and the split that holds it."""
    split = read_split(folder)
    check_split(split)
    return split[0], split


@pytest.mark.parametrize("name", METADATA)
def test_captions_are_read_exactly(folder, name):
    change, captions = METADATA[name]
    change(folder)
    record, _ = first_row(folder)
    assert record.captions == captions


@pytest.mark.parametrize("name", PLACES)
def test_files_are_found(folder, name):
    PLACES[name](folder)
    record, split = first_row(folder)
    assert (read_image(record.image) == PHOTO).all() and (read_mask(record.mask, split.palette) == MASK).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks_give_their_ids_in_training_too_and_the_same_pixels_of_each(folder, name):
    data, ids = MASKS[name]
    file_of("masks/0.png", data)(folder)
    record, split = first_row(folder)
    mask, stored = read_mask(record.mask, split.palette), read_stored_mask(record.mask)
    assert (mask == ids).all() and np.array_equal(count_ids(mask), np.bincount(ids.ravel(), minlength=256))
    assert np.array_equal(PairedDataset(split, 6, AUGMENTS["none"], 0, "pad")[0].mask[1:5], ids)
    of_value = {code_of(label.color): label.id for label in split.palette.labels} if stored.colored else {}
    assert {of_value.get(value, value): count for value, count in stored.pixels.items()} == {
        value: count for value, count in enumerate(count_ids(mask).tolist()) if count
    }


@pytest.mark.parametrize("name", IMAGES)
def test_images_give_their_pixels(folder, name):
    data, pixels = IMAGES[name]
    file_of("images/0.png", data)(folder)
    assert (read_image(first_row(folder)[0].image) == pixels).all()


def test_a_link_out_of_the_folder_is_read_when_requested(folder, tmp_path, monkeypatch):
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("SEGCN_ALLOW_SYMLINKS", "1")
    assert (read_image(first_row(folder)[0].image) == PHOTO).all()
