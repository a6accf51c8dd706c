"""Promise: what is odd but right is accepted and read exactly: the same ids, pixels and captions."""

import io
import json
import os
import struct
import zlib

import malformed
import numpy as np
import pytest
from malformed import COLORS, HEADER, MASK, PALETTE, csv_of, encoded, exif_of, file_of, jsonl, jsonl_of, png_chunk
from PIL import Image

from segcn.data.dataset import PairedDataset
from segcn.data.files import read_image
from segcn.data.masks import code_of, count_ids, read_mask, read_stored_mask
from segcn.data.metadata import check_split, read_split
from segcn.data.palette import IGNORE
from segcn.data.transforms import AUGMENTS

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
def test_captions_are_read_exactly(tmp_path, name):
    change, captions = METADATA[name]
    change(malformed.sound(tmp_path / "pairs"))
    record, _ = first_row(tmp_path / "pairs")
    assert record.captions == captions


@pytest.mark.parametrize("name", PLACES)
def test_files_are_found(tmp_path, name):
    PLACES[name](malformed.sound(tmp_path / "pairs"))
    record, split = first_row(tmp_path / "pairs")
    assert (read_image(record.image) == PHOTO).all() and (read_mask(record.mask, split.palette) == MASK).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks_give_their_ids_in_training_too_and_the_same_pixels_of_each(tmp_path, name):
    data, ids = MASKS[name]
    file_of("masks/0.png", data)(malformed.sound(tmp_path / "pairs"))
    record, split = first_row(tmp_path / "pairs")
    mask, stored = read_mask(record.mask, split.palette), read_stored_mask(record.mask)
    assert (mask == ids).all() and np.array_equal(count_ids(mask), np.bincount(ids.ravel(), minlength=256))
    assert np.array_equal(PairedDataset(split, 6, AUGMENTS["none"], 0, "pad")[0].mask[1:5], ids)
    of_value = {code_of(label.color): label.id for label in split.palette.labels} if stored.colored else {}
    assert {of_value.get(value, value): count for value, count in stored.pixels.items()} == {
        value: count for value, count in enumerate(count_ids(mask).tolist()) if count
    }


@pytest.mark.parametrize("name", IMAGES)
def test_images_give_their_pixels(tmp_path, name):
    data, pixels = IMAGES[name]
    file_of("images/0.png", data)(malformed.sound(tmp_path / "pairs"))
    assert (read_image(first_row(tmp_path / "pairs")[0].image) == pixels).all()


def test_a_link_out_of_the_folder_is_read_when_asked_for(tmp_path, monkeypatch):
    folder = malformed.sound(tmp_path / "pairs")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("SEGCN_ALLOW_SYMLINKS", "1")
    assert (read_image(first_row(folder)[0].image) == PHOTO).all()
