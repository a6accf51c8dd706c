"""A corpus of data sets with one fault each: {name: (what breaks a sound one, where the error says it is)}."""

import io
import json
import os
import socket
import struct
import zlib

import numpy as np
from PIL import Image

from segcn.data.masks import write_mask
from segcn.data.metadata import COLUMNS, write_metadata
from segcn.data.palette import Label, Palette

HEADER = ",".join(COLUMNS)
PALETTE = Palette((Label(0, "sky", (135, 206, 235)), Label(1, "grass", (96, 168, 48)), Label(7, "tree", (0, 100, 0))))
MASK = np.array([[0, 0, 7, 7, 0, 0], [0, 1, 7, 7, 1, 0], [1, 1, 7, 7, 1, 1], [1, 1, 1, 1, 1, 1]], np.uint8)
ROW = "images/1.png,masks/1.png,a hill"
LINE = "line 3 (row 1)"  # of the second of three rows, which is the one that breaks


def sound(folder, rows=3):
    """Pairs of 6 x 4 pixels."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for row in range(rows):
        Image.fromarray(photo(row)).save(folder / f"images/{row}.png")
        write_mask(folder / f"masks/{row}.png", MASK, PALETTE)
    PALETTE.save(folder / "palette.json")
    write_metadata(folder, [(f"images/{k}.png", f"masks/{k}.png", f"a hill, number {k}") for k in range(rows)])
    return folder


def photo(seed):
    return np.random.default_rng(seed).integers(0, 255, (*MASK.shape, 3), np.uint8)


def as_bytes(data):
    return data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()


def csv_of(data):
    """metadata.csv holds this and nothing else."""
    return file_of("metadata.csv", as_bytes(data))


def csv_row(data):
    """The second of three rows is this."""
    rows = [HEADER, "images/0.png,masks/0.png,a lake", data, "images/2.png,masks/2.png,a tree\n"]
    return csv_of(b"\n".join(map(as_bytes, rows)))


def jsonl_of(*rows):
    """metadata.jsonl of these objects, texts or bytes, one a line, takes the place of metadata.csv."""

    def change(folder):
        (folder / "metadata.csv").unlink()
        (folder / "metadata.jsonl").write_bytes(b"\n".join(map(as_bytes, rows)))

    return change


def jsonl(row=1, **changes):
    values = zip(COLUMNS, (f"images/{row}.png", f"masks/{row}.png", "a hill"), strict=True)
    return {key: value for key, value in (dict(values) | changes).items() if value != "nothing"}


def file_of(name, data):
    """A file of the folder holds these bytes."""
    return lambda folder: (folder / name).write_bytes(data)


def encoded(pixels, form, **options):
    """Bytes of an image file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height):
    """A PNG that promises this many pixels and holds none."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def png_begun(width, height):
    """As `png_header`, with the first of its pixels, so that it is opened."""
    return png_header(width, height) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def label(**changes):
    """palette.json with one entry like this among sound ones."""
    entry = {"id": 3, "name": "road", "color": [9, 9, 9]} | changes
    entry = {key: value for key, value in entry.items() if value != "nothing"}
    return palette_text({"labels": [*({"id": x.id, "name": x.name, "color": x.color} for x in PALETTE.labels), entry]})


def palette_text(data):
    return file_of("palette.json", as_bytes(data))


def instead(name, make):
    """Something that is no regular file has this name."""

    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def bind_socket(path):
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the name of a socket has to be short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.fchdir(here)
    os.close(here)


def secret(path):
    """A link to an image outside of the folder."""
    outside = path.parents[2] / "outside"
    outside.mkdir(exist_ok=True)
    Image.fromarray(photo(1)).save(outside / "secret.png")
    path.symlink_to(outside / "secret.png")


def through_link(folder):
    """The row's image is reached through a folder that is a link to one outside."""
    secret(folder / "images/1.jpg")
    (folder / "images/linked").symlink_to(folder.parent / "outside")
    csv_row("images/linked/secret.png,masks/1.png,a hill")(folder)


def chain(path):
    secret(path.with_name("hop.png"))
    path.symlink_to(path.with_name("hop.png"))


def renumbered(folder):
    """As an image editor saves it: the same colors, other values."""
    image = Image.fromarray(np.where(MASK == 7, 0, np.where(MASK == 0, 7, MASK)).astype(np.uint8))
    table = PALETTE.table.copy()
    table[[0, 7]] = table[[7, 0]]
    image.putpalette(table.tobytes())
    image.save(folder / "masks/1.png")


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


CSV_FILES = {
    "empty": "", "no row": HEADER + "\n", "only a byte order mark": "\ufeff", "only blank lines": "\n\n\n",
    "binary": bytes(range(256)),
    "no image column": f"conditioning_image_file_name,text\n{ROW}\n", "no mask column": f"file_name,text\n{ROW}\n",
    "no text column": f"file_name,conditioning_image_file_name\n{ROW}\n", "image twice": f"file_name,{HEADER}\n{ROW}\n",
    "mask twice": f"{HEADER},conditioning_image_file_name\n{ROW}\n", "text twice": f"{HEADER},text\n{ROW}\n",
    "swapped columns": f"conditioning_image_file_name,file_name,text\n{ROW}\n",
    "swapped columns, text first": f"text,conditioning_image_file_name,file_name\n{ROW}\n",
    "other names": "image,mask,caption\n" + ROW, "capitals": HEADER.upper() + "\n" + ROW,
    "no header": f"{ROW}\n{ROW}\n", "semicolons": f"{HEADER}\n{ROW}\n".replace(",", ";"),
    "tabs": f"{HEADER}\n{ROW}\n".replace(",", "\t"), "pipes": f"{HEADER}\n{ROW}\n".replace(",", "|"),
    "spaces in the header": HEADER.replace(",", ", ") + "\n" + ROW, "UTF-16": f"{HEADER}\n{ROW}\n".encode("utf-16"),
    "UTF-32": f"{HEADER}\n{ROW}\n".encode("utf-32"), "NUL in the header": HEADER + "\0\n" + ROW,
    "header in Latin-1": f"{HEADER},légende\n{ROW},x\n".encode("latin-1"),
    "open quote in the header": f'"{HEADER}\n{ROW}\n', "JSON": json.dumps([jsonl()]),
    "HTML": "<html><body>404</body></html>",
}  # fmt: skip
CSV_ROWS = {
    "one field": "images/1.png", "two fields": "images/1.png,masks/1.png", "four fields": f"{ROW}, at dusk",
    "a comma too many": f"{ROW},", "forty fields": ROW + ",x" * 37, "only commas": ",,", "one comma": ",",
    "open quote to the end": 'images/1.png,masks/1.png,"a hill', "open quote in the name": f'"{ROW}',
    "open quote that swallows a row": 'images/1.png,masks/1.png,"a hill\nimages/2.png,masks/2.png,"',
    "text after a quote": 'images/1.png,masks/1.png,"a" hill', "NUL in the image": ROW.replace("1.png,m", "1\0.png,m"),
    "NUL in the mask": ROW.replace("masks/1", "masks/\0"), "NUL in the caption": ROW + "\0",
    "Latin-1 caption": "images/1.png,masks/1.png,un arbre isolé".encode("latin-1"),
    "Latin-1 file name": "images/é.png,masks/1.png,a hill".encode("latin-1"),
    "half a character": "images/1.png,masks/1.png,a tree é".encode()[:-1], "a caption of a megabyte": ROW + "x" * 2**20,
    "the same row again": "images/0.png,masks/0.png,a lake", "no caption": "images/1.png,masks/1.png,",
    "quoted nothing": 'images/1.png,masks/1.png,""', "a blank caption": "images/1.png,masks/1.png,   ",
    "a caption of tabs": "images/1.png,masks/1.png,\t\t", "a no-break space": "images/1.png,masks/1.png,\u00a0",
    "no image": ",masks/1.png,a hill", "no mask": "images/1.png,,a hill",
    "mask as image": "masks/1.png,images/1.png,a hill", "image as mask": "images/1.png,images/1.png,a hill",
    "a name with a space": "images/1.png ,masks/1.png,a hill",
    "a name in quotes of a wrong kind": "'images/1.png',masks/1.png,a hill",
    "another case": "Images/1.PNG,masks/1.png,a hill",
}  # fmt: skip
JSONL_ROWS = {
    "no JSON": "images/1.png", "half an object": '{"file_name": ', "an array": [1, 2], "a number": "7",
    "a string": '"x"', "null": "null", "two objects": json.dumps(jsonl()) * 2,
    "a trailing comma": json.dumps(jsonl())[:-1] + ",}", "single quotes": str(jsonl()),
    "not a number": '{"file_name": NaN}', "bytes": b"\xff\xfe\x00", "a deep list": "[" * 10**5,
    "no image": jsonl(file_name="nothing"), "no mask": jsonl(conditioning_image_file_name="nothing"),
    "no text": jsonl(text="nothing"), "image null": jsonl(file_name=None), "image a number": jsonl(file_name=1),
    "image a list": jsonl(file_name=["images/1.png"]), "mask null": jsonl(conditioning_image_file_name=None),
    "mask an object": jsonl(conditioning_image_file_name={}), "text null": jsonl(text=None),
    "text a number": jsonl(text=2024), "text an object": jsonl(text={"en": "a hill"}), "no captions": jsonl(text=[]),
    "an empty one": jsonl(text=["a hill", ""]), "a number among captions": jsonl(text=["a hill", 3]),
    "text true": jsonl(text=True), "empty text": jsonl(text=""), "NUL in the text": jsonl(text="a\0hill"),
    "half a pair in the text": jsonl(text="\ud800"), "half a pair in the name": jsonl(file_name="images/\udfff.png"),
    "a key twice": '{"text": "a", "text": "b"}',
}  # fmt: skip
PATHS = {
    "up": "../pairs/images/1.png", "up in the middle": "images/../../pairs/images/1.png",
    "up to itself": "images/../images/1.png", "absolute": "/etc/passwd", "absolute, twice": "//etc/passwd",
    "home": "~/1.png", "file address": "file:///etc/passwd", "web address": "https://example.org/1.png",
    "bucket": "s3://bucket/1.png", "drive": "C:/images/1.png", "drive alone": "C:1.png", "backslashes": "images\\1.png",
    "backslashes up": "..\\1.png", "network": "\\\\host\\share\\1.png", "device": "/dev/zero",
    "standard input": "/dev/stdin", "process": "/proc/self/environ", "the folder": ".", "a folder": "images",
    "a folder with a slash": "images/", "a file with a slash": "images/1.png/", "below a file": "images/1.png/x",
    "percent signs": "images/%2e%2e/1.png", "a long name": "x" * 300, "a long path": "x/" * 3000, "only dots": "...",
    "a query": "images/1.png?raw=1",
}  # fmt: skip
PALETTES = {
    "empty": palette_text(""), "no JSON": palette_text("labels:"), "a list": palette_text("[]"),
    "null": palette_text("null"), "no labels": palette_text("{}"), "no label": palette_text('{"labels": []}'),
    "labels a number": palette_text('{"labels": 3}'), "label a list": palette_text('{"labels": [[0, "sky"]]}'),
    "negative id": label(id=-1), "id 255": label(id=255), "id 256": label(id=256), "id a fraction": label(id=3.0),
    "id a string": label(id="3"), "id true": label(id=True), "no id": label(id="nothing"),
    "no name": label(name="nothing"), "empty name": label(name=" "), "name a number": label(name=3),
    "no color": label(color="nothing"), "two numbers": label(color=[1, 2]), "four numbers": label(color=[1, 2, 3, 4]),
    "color of 256": label(color=[1, 2, 256]), "negative color": label(color=[-1, 2, 3]),
    "a fraction": label(color=[0.5, 0, 0]), "color name": label(color="red"), "id twice": label(id=7),
    "name twice": label(name="sky"), "color twice": label(color=[135, 206, 235]), "unknown key": label(hue=[1, 2, 3]),
    "ignore a string": label(ignore="yes"),
    "all ignored": palette_text('{"labels": [{"id": 0, "name": "x", "color": [0, 0, 0], "ignore": true}]}'),
    "bytes": palette_text(b"\xff\xfe"), "missing": lambda folder: (folder / "palette.json").unlink(),
}  # fmt: skip
COLORS = PALETTE.table[MASK]
SMOOTH = np.asarray(Image.fromarray(COLORS).resize((12, 8), Image.Resampling.BILINEAR).resize((6, 4)))
MASKS = {
    "another value": encoded(np.where(MASK == 7, 9, MASK).astype(np.uint8), "PNG"),
    "one pixel of another value": encoded(np.where(np.arange(24).reshape(4, 6) == 5, 8, MASK).astype(np.uint8), "PNG"),
    "16-bit, value 256": encoded(np.where(MASK == 7, 256, MASK.astype(np.uint16)).astype(np.uint16), "PNG"),
    "16-bit, stretched": encoded(MASK.astype(np.uint16) * 257, "PNG"),
    "fractions": encoded(MASK.astype(np.float32), "TIFF"),
    "32-bit, negative": encoded(np.where(MASK == 7, -1, MASK.astype(np.int32)).astype(np.int32), "TIFF"),
    "stretched grey": encoded(MASK * 36, "PNG"), "RGB of another color": encoded(COLORS ^ 1, "PNG"),
    "RGB, smoothed": encoded(SMOOTH, "PNG"), "RGB, BGR order": encoded(COLORS[..., ::-1].copy(), "PNG"),
    "RGBA of another color": encoded(np.dstack([COLORS ^ 1, MASK]), "PNG"), "JPEG": encoded(COLORS, "JPEG"),
    "grey JPEG": encoded(MASK * 30, "JPEG", quality=30), "lossy WebP": encoded(COLORS, "WEBP", quality=20),
    "a photo": encoded(photo(9), "PNG"), "larger": encoded(MASK.repeat(2, 0), "PNG"),
    "smaller": encoded(MASK[:, 1:].copy(), "PNG"), "turned": encoded(MASK.T.copy(), "PNG"), "renumbered": renumbered,
}  # fmt: skip
PHOTO = encoded(photo(1), "PNG")
FILES = {
    "no bytes": b"", "one byte": b"\x89", "text": b"a hill", "HTML": b"<html><body>404</body></html>",
    "zip": b"PK\x03\x04" + bytes(99), "zeros": bytes(4096), "half a PNG": PHOTO[: len(PHOTO) // 2],
    "a PNG's first bytes": PHOTO[:8], "a PNG without its end": PHOTO[:-40],
    "a broken chunk": PHOTO.replace(b"IDAT", b"ICAT"), "a broken stream": PHOTO[:50] + b"\0" * 20 + PHOTO[70:],
    "half a BMP": encoded(photo(1), "BMP")[:70], "half a TIFF": encoded(photo(1), "TIFF")[:60],
    "half a WebP": encoded(photo(1), "WEBP")[:60], "half a GIF": encoded(photo(1), "GIF")[:60],
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n", "PDF": b"%PDF-1.4\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a bomb": png_header(30_000, 30_000),
    "a wide bomb": png_header(2**31 - 1, 1), "no width": png_header(0, 4),
}  # fmt: skip
IMAGES = {
    "another size": encoded(photo(1)[:3], "PNG"),
    "turned, and its mask is not": encoded(photo(1), "PNG", exif=exif_of(6)),
    "half a JPEG": encoded(photo(1), "JPEG")[:300],
}  # fmt: skip
NOT_FILES = {
    "nothing": lambda path: None, "a folder": lambda path: path.mkdir(), "a pipe": os.mkfifo, "a socket": bind_socket,
    "a link out": secret, "two links out": chain, "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a secret": lambda path: path.symlink_to("/etc/passwd"), "a loop": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("gone.png"),
}  # fmt: skip


WORDS = {  # that the message of some holds beside file and row
    "csv: empty": "file_name", "csv: no row": "at least one row", "csv: other names": "found 'image,mask,caption'",
    "csv: text twice": "column text once", "images: nothing": "images/1.png", "row: blank lines": "expected a caption",
    "masks: nothing": "column conditioning_image_file_name", "row: four fields": "expected 3 fields, found 4",
    "row: open quote to the end": "double quote", "row: open quote that swallows a row": "runs over a line",
    "path of the image: up": "inside the folder", "path of the mask: backslashes": "written with /",
    "row: Latin-1 caption": "expected UTF-8 text, found byte 0xe9", "palette: id 255": "at most 255 classes",
    "palette: id a fraction": "0 to 254", "palette: id 256": "0 to 254", "palette: empty name": "expected a name",
    "palette: color of 256": "three numbers", "palette: ignore a string": "ignore true or false",
    "palette: id twice": "different id", "palette: name twice": "different name",
    "palette: color twice": "different color", "palette: all ignored": "no class",
}  # fmt: skip


def corpus():
    """{name: (change of a sound folder, words that the error holds)}."""
    found = {f"csv: {name}": (csv_of(text), "metadata.csv") for name, text in CSV_FILES.items()}
    found |= {f"row: {name}": (csv_row(text), LINE) for name, text in CSV_ROWS.items()}
    found["row: blank lines"] = csv_row("\n\nimages/1.png,masks/1.png,"), "line 5 (row 1)"
    rows = {name: jsonl_of(jsonl(0), row, jsonl(2)) for name, row in JSONL_ROWS.items()}
    found |= {f"jsonl: {name}": (change, "line 2 (row 1)") for name, change in rows.items()}
    for column, other in (("{},masks/1.png,a hill", "image"), ("images/1.png,{},a hill", "mask")):
        found |= {f"path of the {other}: {k}": (csv_row(column.format(p)), LINE) for k, p in PATHS.items()}
    found |= {f"palette: {name}": (change, "palette.json") for name, change in PALETTES.items()}
    for folder, table in (("masks", MASKS), ("images", IMAGES), ("masks", FILES), ("images", FILES)):
        for name, data in table.items():
            found[f"{folder}: {name}"] = (file_of(f"{folder}/1.png", data) if isinstance(data, bytes) else data, LINE)
    for folder in ("images", "masks"):
        found |= {f"{folder}: {k}": (instead(f"{folder}/1.png", make), LINE) for k, make in NOT_FILES.items()}
    both = file_of("metadata.jsonl", as_bytes(jsonl()))
    return found | {"both formats": (both, "metadata.jsonl"), "images: through a link": (through_link, LINE)}
