"""Which files of a data set may be opened (regular ones inside its folder), and images of known formats and sizes."""

import hashlib
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import MAX_PIXELS, OUTPUTS, SYMLINKS

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF")  # none of them runs a program
OUTSIDE = re.compile(r"\\|://|^[/~]|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)")
KEPT_DIGESTS = 500  # files read at once, from which on their digests are kept
LISTED_AFTER = 100  # names in a folder
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
KINDS |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
DEEP = 2**13  # the largest number of a 16-bit image, from which on it is not called dark
ORIENTATION = 0x0112  # the EXIF tag
warnings.filterwarnings("ignore", module=r"PIL\.")  # images that it only warns of are refused here
Image.init()
PAGED = ("TIFF", "GIF")  # formats of which people have stacks and films
READABLE = tuple(name for name in FORMATS if name in Image.OPEN)


class Unreadable(UserError):
    """An image that gives no pixels; `kind` is truncated, undecodable or too_large."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


@contextmanager
def open_image(path: str | Path, what: str = "image", max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """An image, for as long as the block lasts; Unreadable where opening it, or decoding it in the block, fails.

    An image of more pixels than the limit is refused from its header, before it takes any memory.
    """
    try:
        with Image.open(str(path), formats=READABLE) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, the limit is {max_pixels:,}")
            pages = getattr(image, "n_frames", 1) if image.format in PAGED else 1
            if pages > 1:
                raise Unreadable(
                    f"{path}: expected one {what}, found {pages} pages: save each as a file", "undecodable"
                )
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{path}: the {what} is too large: {error}", "too_large") from None
    except Exception as error:  # decoders of broken files raise anything
        reason = str(error).replace(f"{str(path)!r}", "").strip() or type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "undecodable"
        raise Unreadable(f"{path}: the {what} cannot be read: {reason}", kind) from None


def read_image(path: str | Path) -> np.ndarray:
    """Read a photo upright (by its EXIF orientation), uint8 [H, W, 3]; UserError where it is broken."""
    with open_image(path) as image:
        return np.array(upright(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a photo that `read_image` reads, by its header; UserError where that is broken."""
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION, 1) > 4 else (height, width)  # turned by 90 degrees


def upright(image: Image.Image) -> Image.Image:
    """An open photo as RGB, turned by its EXIF orientation; of 16 bits the upper 8, alpha is left out.

    Unreadable where it holds fractions, or numbers that 16 bits do not hold.
    """
    name, numbers = getattr(image, "filename", "an image"), np.asarray(image) if image.mode[0] in "IF" else None
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if numbers is not None:
        if image.mode == "F" or numbers.min() < 0 or numbers.max() >= 2**16:
            expected = f"{name}: expected numbers of 8 or 16 bits, found {numbers.min():g} to {numbers.max():g}"
            raise Unreadable(f"{expected}: segcn import SOURCE OUT --window LOW,HIGH scales them", "undecodable")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


class Boundary:
    """A data set folder that its rows may not leave."""

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self.inside = os.path.realpath(folder).rstrip("/") + "/"
        self.links_allowed = os.environ.get(SYMLINKS, "") == "1"
        self._found: Counter[str] = Counter()  # names found in each folder below
        self._listed: dict[str, set[str]] = {}  # the regular files of those folders that many names are in

    def problem(self, name: str) -> tuple[str, str] | None:
        """Why a file that a row names may not be opened, as (kind, message): kind is path or missing.

        It must be a regular file inside the folder; a link that leads out needs --allow_symlinks.
        """
        below, _, own = name.rpartition("/")
        if own in self._listed.get(below, ()):
            return None
        if OUTSIDE.search(name):
            return "path", f"expected a path inside the folder, written with /, found {name!r}"
        path = f"{self.folder}/{name}"
        try:
            mode, real = os.stat(path).st_mode, os.path.realpath(path)
            if not self.links_allowed and not real.startswith(self.inside):
                found = f"expected a file inside the folder, found a link to {real} at {name!r}"
                return "path", f"{found}; copy the file, or allow links by --allow_symlinks"
            if not stat.S_ISREG(mode):
                return "path", f"expected a file, found {KINDS.get(stat.S_IFMT(mode), 'something else')} at {name!r}"
            self._found[below] += 1
            if self._found[below] == LISTED_AFTER:  # much quicker than a look at each of a million
                with os.scandir(f"{self.folder}/{below}") as entries:
                    self._listed[below] = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except (OSError, ValueError):
            return "missing", f"expected a file, found none at {name!r} (looked for {path})"
        return None


def digests(folder: Path, names: Sequence[str]) -> list[str]:
    """A digest of the bytes of each file in a folder, "missing" where one cannot be read.

    Of many files they are kept in outputs/cache: a file is read again when its size or time has changed.
    """
    kept = OUTPUTS / "cache" / "digests" / f"{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}.json"
    known: dict[str, list] = {}
    with suppress(OSError, ValueError):
        known = json.loads(kept.read_text(encoding="utf-8"))

    def state(name: str) -> list:
        try:
            with open(f"{folder}/{name}", "rb") as file:
                status = os.fstat(file.fileno())
                found = [status.st_size, status.st_mtime_ns]
                if known.get(name, [])[:2] == found:
                    return known[name]
                return [*found, hashlib.file_digest(file, "sha256").hexdigest()[:16]]
        except (OSError, ValueError):
            return [0, 0, "missing"]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(names, pool.map(state, names), strict=True))
    if sum(known.get(name) != one for name, one in found.items()) >= KEPT_DIGESTS:
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(known | found))
    return [found[name][2] for name in names]
