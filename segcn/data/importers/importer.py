"""Where the files of an imported data set go: copied, linked, or left where they are."""

import glob
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from segcn.data.captions import classes_of
from segcn.data.config import ImportConfig
from segcn.data.files import READABLE
from segcn.data.importers.palettes import READY, check, propose, ready
from segcn.data.importers.sources import Source, find_sources
from segcn.data.masks import read_mask
from segcn.data.metadata import METADATA, STRAY, check_split, read_split, write_metadata
from segcn.data.palette import Palette, find_palette
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.paths import SYMLINKS
from segcn.utils.progress import Progress

# --- placing: Where the files of an imported data set go: copied, linked, or left where they are.

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
    except Exception:  # a broken image is copied too: the check names its row
        return ".png"


def _put(content: Path | bytes, target: Path, where: str, files: str) -> None:
    try:
        if isinstance(content, bytes):
            if files == "symlink":
                raise UserError(f"{where}: the image lies inside the table, where no link leads: use --files copy")
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
            raise UserError(f"{row.where}: the image lies inside the table, where no path leads: use --files copy")
        try:
            image, mask = (_below(content, folder) for content in (row.image, row.mask))
            placed.append(Placed(row.where, image, mask, row.captions))
        except UserError as error:
            problems.append(f"{row.where}: {error}")
    refuse_failed(problems, source.count, fix=". Name a folder above all files, or use --files copy")
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


# --- importer: `segcn import`: what people have becomes a data set of the contract, in one step and without touching the source.


def import_dataset(config: ImportConfig, log: Callable[[str], None] = print) -> Path:
    """Write the data set, check all of it, and say what was written; UserError names what is wrong with the source.

    A new data set appears whole, by one rename: whatever stops the import before leaves none.
    """
    out = claim(config)
    given = _given_palette(config)
    sources = find_sources(config)
    palette = given or _found_palette(sources, log)
    if palette is None and "{classes}" in (config.caption or ""):
        raise UserError(
            f"{config.source}: no palette.json here or in the folder above, so the classes in --caption have no names;"
            " write one by segcn palette MASKS --names sky,grass,... --output FILE, and give it by --palette FILE"
        )
    if config.files == "rewrite":
        refuse_metadata(out, sources)
        rows = {name: rewritten(found, out / name) for name, found in sources.items()}
        palette = _write(out, rows, palette, config, log)
    else:
        with staged(out, log) as folder:
            rows = {name: copied(name, found, folder / name, config, log) for name, found in sources.items()}
            palette = _write(folder, rows, palette, config, log)
    _check(config, rows, out, log)
    for line in _summary(rows, palette, out, config):
        log(line)
    return out


def _given_palette(config: ImportConfig) -> Palette | None:
    """The palette of --palette; for rewrite that of the target, which must be the same where both are there."""
    given = None
    if config.palette:
        if config.palette not in READY and not Path(config.palette).is_file():
            raise UserError(
                f"--palette: expected a palette.json, or one of {', '.join(READY)}; found {config.palette!r}"
            )
        given = ready(config.palette) if config.palette in READY else Palette.load(config.palette)
    own = Path(config.out) / "palette.json"
    if config.files == "rewrite" and own.is_file():
        if given is not None and Palette.load(own) != given:
            raise UserError(
                f"--palette: {own} is another one and is never overwritten: move it away, or leave the flag out"
            )
        return Palette.load(own)
    return given


def _found_palette(sources: dict[str, Source], log: Callable[[str], None]) -> Palette | None:
    """The one that lies with the source; UserError where splits have different ones."""
    found: dict[Palette, Path] = {}
    for source in sources.values():
        try:
            path = find_palette(source.folder)
        except UserError:
            continue
        found.setdefault(Palette.load(path), path)
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found.values()))} differ: choose one by --palette FILE")
    for path in found.values():
        log(f"palette: {path}")
    return next(iter(found), None)


def _write(
    folder: Path, rows: dict[str, list[Placed]], palette: Palette | None, config: ImportConfig, log: Callable
) -> Palette:
    """The palette, captions that name classes and, last, the metadata; of the splits, train last."""
    masks = [folder / name / row.mask for name, placed in rows.items() for row in placed]
    if palette is None:
        log(f"No palette.json and no --palette: proposed from {len(masks)} masks; look through its names and colors.")
        palette = propose(masks)
    elif config.palette in READY:
        for warning in _fitting(masks, palette):
            log(f"Warning: {warning}")
    captioned = {name: list(_captioned(folder / name, rows[name], palette, config.caption or "")) for name in rows}
    if not (folder / "palette.json").exists():
        palette.save(folder / "palette.json")
    for name in sorted(rows, key=lambda name: name == "train"):
        (folder / name).mkdir(exist_ok=True)
        write_metadata(folder / name, captioned[name])
    return palette


def _fitting(masks: Sequence[Path], palette: Palette) -> list[str]:
    try:
        return check(masks, palette)
    except UserError as error:
        raise UserError(str(error).replace("--ready", "--palette")) from None


def _captioned(
    folder: Path, rows: Iterable[Placed], palette: Palette, caption: str
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Rows with --caption where they have none of their own."""
    for row in rows:
        told = row.captions or (caption,)
        if not row.captions and "{classes}" in caption:
            try:
                told = (caption.replace("{classes}", classes_of(read_mask(folder / row.mask, palette), palette)),)
            except UserError as error:
                raise UserError(f"{row.where}: --caption needs the classes of its mask: {error}") from None
        yield row.image, row.mask, told


def _check(config: ImportConfig, rows: Iterable[str], out: Path, log: Callable[[str], None]) -> None:
    """Read all that was written, as training will."""
    if config.files == "symlink":
        log("The files are links: training on them needs --allow_symlinks.")
    before = os.environ.get(SYMLINKS)
    try:
        os.environ[SYMLINKS] = "1" if config.files == "symlink" else before or ""
        for name in rows:
            check_split(read_split(out / name), log)
    except UserError as error:
        raise UserError(
            f"{out} is written, but not all of it can be trained on. {error}\n`segcn validate {out}` lists every fault;"
            f" with `--quarantine {out}/good.csv` it parts the good rows from the bad ones"
        ) from None
    finally:
        os.environ.pop(SYMLINKS)
        os.environ.update({SYMLINKS: before} if before is not None else {})


def _summary(rows: dict[str, list[Placed]], palette: Palette, out: Path, config: ImportConfig) -> Iterator[str]:
    counts = ", ".join(f"{name} {len(placed)} rows" if name else f"{len(placed)} rows" for name, placed in rows.items())
    names = palette.class_names
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    yield f"{out}: {counts}; {len(names)} classes: {shown}"
    yield f"next: segcn validate {out}{' --allow_symlinks' if config.files == 'symlink' else ''}"
