"""`segcn import`: what people have becomes a data set of the contract, in one step and without touching the source."""

import glob
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from segcn.data.captions import classes_of
from segcn.data.config import ImportConfig
from segcn.data.files import READABLE
from segcn.data.importers.palettes import READY, check_fit, propose, ready, survey
from segcn.data.importers.sources import Source, find_sources
from segcn.data.importers.tables import Row
from segcn.data.masks import read_mask
from segcn.data.metadata import METADATA, STRAY, check_split, read_split, write_metadata
from segcn.data.palette import Palette, find_palette
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.paths import SYMLINKS
from segcn.utils.progress import Progress

MANY = 10_000  # files in a folder
EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}  # of other formats: their name


class Placed(NamedTuple):
    """A row of the data set that is written: names relative to its folder, and where it comes from."""

    source: Row
    image: str
    mask: str


def import_dataset(config: ImportConfig, log: Callable[[str], None] = print) -> Path:
    """Write the data set, check all of it, and say what was written; UserError names what is wrong with the source.

    A new data set appears whole, by one rename: whatever stops the import before leaves none.
    """
    out = _target(config)
    if config.palette and config.palette not in READY and not Path(config.palette).is_file():
        raise UserError(f"--palette: expected a palette.json, or one of {', '.join(READY)}; found {config.palette!r}")
    sources = find_sources(config)
    palette = _choose_palette(config, sources, log)
    if config.files == "rewrite":
        for path in (out / name / metadata for name in dict.fromkeys(("", *sources)) for metadata in METADATA):
            if os.path.lexists(path):
                raise UserError(f"--files rewrite: {path} is there already and is never overwritten: rename it first")
        rows = {name: _rewritten(found, out / name) for name, found in sources.items()}
        palette = _write(out, rows, palette, config, log)
    else:
        with _staged(out, log) as folder:
            rows = {name: _copied(name, found, folder / name, config, log) for name, found in sources.items()}
            try:
                palette = _write(folder, rows, palette, config, lambda line: log(line.replace(str(folder), str(out))))
            except UserError as error:
                raise UserError(_naming_sources(str(error), folder, rows)) from None
    _check_written(config, rows, out, log)
    counts = ", ".join(f"{name} {len(placed)} rows".strip() for name, placed in rows.items())
    names = palette.class_names
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    log(f"{out}: {counts}; {len(names)} classes: {shown}")
    log(f"next: segcn validate {out}{' --allow_symlinks' if config.files == 'symlink' else ''}")
    return out


# --- Where it is written


def _target(config: ImportConfig) -> Path:
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
def _staged(out: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside the target that becomes it in one step where all goes well, and is removed where not."""
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


# --- Where its files are: copied, linked, or left where they are


def _copied(name: str, source: Source, folder: Path, config: ImportConfig, log: Callable[[str], None]) -> list[Placed]:
    """Every file as images/000000.EXT, or images/00/000000.EXT of more than 10,000 rows."""
    progress = Progress(f"{name or 'rows'} {'linked' if config.files == 'symlink' else 'copied'}", source.count, log)
    placed = []
    for k, row in enumerate(source.rows()):
        stem = f"{k // MANY:02d}/{k:06d}" if source.count > MANY else f"{k:06d}"
        names = []
        for kind, content in (("images", row.image), ("masks", row.mask)):
            names.append(f"{kind}/{stem}{_extension(content)}")
            target = folder / names[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes) and config.files == "symlink":
                raise UserError(f"{row.where}: the image lies inside the table, where no link leads: use --files copy")
            try:
                if isinstance(content, bytes):
                    target.write_bytes(content)
                elif config.files == "symlink":
                    target.symlink_to(content.resolve())
                else:
                    shutil.copyfile(content, target)
            except OSError as error:
                raise UserError(f"{row.where}: cannot be copied: {error}") from None
        placed.append(Placed(row, *names))
        progress(k + 1)
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


def _rewritten(source: Source, folder: Path) -> list[Placed]:
    """The rows with paths relative to the folder they will be written to; nothing is copied."""

    def below(file: Path) -> str:
        for path in (file.resolve(), file):  # a link may lead into the folder, or lie in it
            if path.is_relative_to(folder):
                name = path.relative_to(folder).as_posix()
                if STRAY.search(name):
                    raise UserError(f"--files rewrite: expected a file name in UTF-8, found {name!r}")
                return name
        raise UserError(f"--files rewrite: expected a file below {folder}, found {file}")

    placed, problems = [], []
    for row in source.rows():
        if isinstance(row.image, bytes) or isinstance(row.mask, bytes):
            raise UserError(f"{row.where}: the image lies inside the table, where no path leads: use --files copy")
        try:
            placed.append(Placed(row, below(row.image), below(row.mask)))
        except UserError as error:
            problems.append(f"{row.where}: {error}")
    refuse_failed(problems, source.count, fix=". Name a folder above all files, or use --files copy")
    return placed


# --- Its palette, captions and metadata


def _choose_palette(config: ImportConfig, sources: dict[str, Source], log: Callable[[str], None]) -> Palette | None:
    """That of --palette, else the one that lies with the source, else none; for rewrite never another than OUT's."""
    given, paths = None, []
    if config.palette:
        given = ready(config.palette) if config.palette in READY else Palette.load(config.palette)
    own = Path(config.out) / "palette.json"
    if config.files == "rewrite" and own.is_file():
        if given is not None and Palette.load(own) != given:
            raise UserError(f"--palette: {own} is another one and is never overwritten: move it, or drop the flag")
        return Palette.load(own)
    if given:
        return given
    for source in sources.values():
        with suppress(UserError):  # none there
            paths.append(find_palette(source.folder))
    found = {Palette.load(path): path for path in reversed(paths)}
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found.values()))} differ: choose one by --palette FILE")
    for palette, path in found.items():
        log(f"palette: {path}")
        return palette
    if "{classes}" in (config.caption or ""):
        raise UserError(
            f"{config.source}: no palette.json here or in the folder above, so the classes in --caption have no names;"
            " write one by segcn palette MASKS --names sky,grass,... --output FILE, and give it by --palette FILE"
        )
    return None


def _write(
    folder: Path, rows: dict[str, list[Placed]], palette: Palette | None, config: ImportConfig, log: Callable
) -> Palette:
    """The palette, captions that name classes and, last, the metadata; of the splits, train last."""
    masks = [folder / name / row.mask for name, placed in rows.items() for row in placed]
    if palette is None:
        log(f"No palette.json and no --palette: proposed from {len(masks)} masks; look through its names and colors.")
        palette = propose(survey(masks, log))
    elif config.palette in READY:
        try:
            for warning in check_fit(survey(masks, log), palette):
                log(f"Warning: {warning}")
        except UserError as error:
            raise UserError(str(error).replace("--ready", "--palette")) from None
    captioned = {name: [_captioned(folder / name, row, palette, config.caption or "") for row in placed]
                 for name, placed in rows.items()}  # fmt: skip
    if not (folder / "palette.json").exists():
        palette.save(folder / "palette.json")
    for name in sorted(rows, key=lambda name: name == "train"):
        (folder / name).mkdir(exist_ok=True)
        write_metadata(folder / name, captioned[name])
    return palette


def _naming_sources(message: str, folder: Path, rows: dict[str, list[Placed]]) -> str:
    """A message about copies in a folder that is removed, with the user's own files or rows in their place."""
    for name, placed in rows.items() if str(folder) in message else ():
        for row in placed:
            own = row.source.where if isinstance(row.source.mask, bytes) else str(row.source.mask)
            message = message.replace(str(folder / name / row.mask), own)
    return message


def _captioned(folder: Path, row: Placed, palette: Palette, caption: str) -> tuple[str, str, tuple[str, ...]]:
    """A row with --caption where it has none of its own."""
    captions = row.source.captions or (caption,)
    if not row.source.captions and "{classes}" in caption:
        try:
            captions = (caption.replace("{classes}", classes_of(read_mask(folder / row.mask, palette), palette)),)
        except UserError as error:
            raise UserError(f"{row.source.where}: --caption needs the classes of its mask: {error}") from None
    return row.image, row.mask, captions


def _check_written(config: ImportConfig, splits: Iterable[str], out: Path, log: Callable[[str], None]) -> None:
    """Read all that was written, as training will."""
    if config.files == "symlink":
        log("The files are links: training on them needs --allow_symlinks.")
    before = os.environ.get(SYMLINKS)
    try:
        os.environ[SYMLINKS] = "1" if config.files == "symlink" else before or ""
        for name in splits:
            check_split(read_split(out / name), log)
    except UserError as error:
        raise UserError(
            f"{out} is written, but not all of it can be trained on. {error}\n`segcn validate {out}` lists every fault;"
            f" with `--quarantine {out}/good.csv` it parts the good rows from the bad ones"
        ) from None
    finally:
        os.environ.pop(SYMLINKS)
        os.environ.update({SYMLINKS: before} if before is not None else {})
