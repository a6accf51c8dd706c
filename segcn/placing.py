"""Where the files of an imported data set go: copied, linked, or left where they are."""

import glob
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from segcn.config import ImportConfig
from segcn.errors import UserError, refuse_failed
from segcn.files import READABLE
from segcn.metadata import STRAY
from segcn.progress import Progress
from segcn.records import METADATA
from segcn.sources import Source

MANY = 10_000  # files in a folder
EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}  # of other formats: their name


class Placed(NamedTuple):
    """A row of the data set that is written: names relative to its folder, and where it comes from."""

    where: str
    image: str
    mask: str
    captions: tuple[str, ...]


def claim(config: ImportConfig) -> Path:
    """The folder to write, empty or absent; for rewrite, a folder that is there."""
    if not (config.source and config.out):
        raise UserError("segcn import needs two places: segcn import SOURCE OUT")
    source, out = Path(config.source).resolve(), Path(config.out).resolve()
    if config.files == "rewrite":
        if config.test:
            raise UserError("--test: the files would have to lie in train/ and test/; use --files copy or symlink")
        if not out.is_dir():
            raise UserError(f"--files rewrite: expected a folder that holds all files, found none at {out}")
        return out
    if source.is_dir() and out.is_relative_to(source):
        raise UserError(f"{out} is inside {source}, which is never changed: name a folder elsewhere")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty: name another folder, or move it away")
    if os.path.ismount(out):
        raise UserError(f"{out} is a mount point, which cannot be renamed to: name a folder below it")
    return out


@contextmanager
def staged(out: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside the target that becomes it in one step where all goes well, and goes again where not."""
    for left in sorted(out.parent.glob(f"{glob.escape(out.name)}.partial-*")):
        log(f"{left} was left by an import that was killed; it may be removed.")
    folder = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.is_dir():
            out.rmdir()  # empty, or this fails
        folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copied(name: str, source: Source, folder: Path, config: ImportConfig, log: Callable[[str], None]) -> list[Placed]:
    """Every file as images/000000.EXT, or images/00/000000.EXT of more than 10,000 rows."""
    told = Progress(f"{name or 'rows'} {'linked' if config.files == 'symlink' else 'copied'}", source.count, log)
    placed = []
    for k, row in enumerate(source.rows()):
        stem = f"{k // MANY:02d}/{k:06d}" if source.count > MANY else f"{k:06d}"
        names = []
        for kind, content in (("images", row.image), ("masks", row.mask)):
            names.append(f"{kind}/{stem}{_extension(content)}")
            (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            _put(content, folder / names[-1], row.where, config.files)
        placed.append(Placed(row.where, names[0], names[1], row.captions))
        told(k + 1)
    return placed


def _extension(content: Path | bytes) -> str:
    """A file keeps its own; bytes get that of their format, .png where they have none."""
    if isinstance(content, Path):
        return content.suffix.lower()
    try:
        with Image.open(io.BytesIO(content), formats=READABLE) as image:
            name = image.format or "PNG"
            return EXTENSIONS.get(name, f".{name.lower()}")
    except Exception:  # a broken picture is copied too: the check names its row
        return ".png"


def _put(content: Path | bytes, target: Path, where: str, files: str) -> None:
    try:
        if isinstance(content, bytes):
            if files == "symlink":
                raise UserError(f"{where}: the picture lies inside the table, where no link leads: use --files copy")
            target.write_bytes(content)
        elif files == "symlink":
            target.symlink_to(content.resolve())
        else:
            shutil.copyfile(content, target)
    except OSError as error:
        raise UserError(f"{where}: cannot be copied: {error}") from None


def rewritten(source: Source, folder: Path) -> list[Placed]:
    """The rows with paths relative to the folder they will be written to; nothing is copied."""
    placed, problems = [], []
    for row in source.rows():
        if isinstance(row.image, bytes) or isinstance(row.mask, bytes):
            raise UserError(f"{row.where}: the picture lies inside the table, where no path leads: use --files copy")
        try:
            image, mask = (_below(content, folder) for content in (row.image, row.mask))
            placed.append(Placed(row.where, image, mask, row.captions))
        except UserError as error:
            problems.append(f"{row.where}: {error}")
    refuse_failed(problems, source.count, mend=". Name a folder above all files, or use --files copy")
    return placed


def _below(file: Path, folder: Path) -> str:
    for path in (file.resolve(), file):  # a link may lead into the folder, or stand in it
        if path.is_relative_to(folder):
            name = path.relative_to(folder).as_posix()
            if STRAY.search(name):
                raise UserError(f"--files rewrite: expected a file name in UTF-8, found {name!r}")
            return name
    raise UserError(f"--files rewrite: expected a file below {folder}, found {file}")


def refuse_metadata(out: Path, sources: Iterable[str]) -> None:
    """UserError where the target, or one of its splits, has a metadata file."""
    for folder in {out, *(out / name for name in sources)}:
        for path in (folder / name for name in METADATA):
            if os.path.lexists(path):
                raise UserError(f"--files rewrite: {path} is there already and is never overwritten: rename it first")
