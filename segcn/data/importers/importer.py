"""`segcn import`: what people have becomes a data set of the contract, in one step and without touching the source."""

import glob
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from segcn.data.captions import classes_of
from segcn.data.config import READY, ImportConfig
from segcn.data.files import ORIENTATION, READABLE, open_image, read_image
from segcn.data.importers.formats import DICOM, class_dict, read_dicom, window_of
from segcn.data.importers.palettes import (
    Reading,
    check_fit,
    choose_reading,
    propose,
    ready,
    spread_colors,
    survey,
)
from segcn.data.importers.sources import Source, find_sources
from segcn.data.importers.tables import Row
from segcn.data.masks import read_mask, read_stored_mask, write_mask
from segcn.data.metadata import METADATA, STRAY, check_split, read_split, write_csv, write_metadata
from segcn.data.palette import Label, Palette, find_palette
from segcn.data.transforms import Box, window_starts
from segcn.utils.errors import UserError, refuse_failed
from segcn.utils.paths import SYMLINKS
from segcn.utils.progress import Progress

ORIGINS = "sources.csv"  # what each row was in the source
WINDOW_IMAGES = 64  # deep images of which the numbers are counted for a window
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
    window = look_at_images(config, sources, log)
    if config.files == "rewrite":
        for path in (out / name / metadata for name in dict.fromkeys(("", *sources)) for metadata in METADATA):
            if os.path.lexists(path):
                raise UserError(f"--files rewrite: {path} is there already and is never overwritten: rename it first")
        rows = {name: _rewritten(found, out / name) for name, found in sources.items()}
        palette = _write(out, rows, palette, config, log)
    else:
        with _staged(out, log) as folder:
            if config.merge_masks:
                palette = merged_palette(config, sources, palette)
            rows = {name: _copied(name, found, folder / name, config, window, palette, log)
                    for name, found in sources.items()}  # fmt: skip
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
    if config.overlap >= (config.tile or 1):
        raise UserError(f"--overlap {config.overlap}: expected less than --tile {config.tile or '(none was given)'}")
    if config.tile and config.files != "copy":
        raise UserError(f"--tile: tiles are new files, as --files {config.files} does not write: use --files copy")
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


def look_at_images(config: ImportConfig, sources: dict[str, Source], log: Callable) -> tuple[float, float] | None:
    """Warn of images that EXIF turns, and choose the window of those of more than 8 bits: what becomes black and white.

    Without --window it is from the 0.5th to the 99.5th percentile of the numbers in 64 of the images.
    """
    turned, deep = [], []
    for source in sources.values():
        for row in source.rows():
            if not isinstance(row.image, Path):
                break  # inside a table: nothing is decoded twice
            if row.image.suffix.lower() == DICOM:
                deep.append(row.image)
                continue
            with suppress(Exception), Image.open(row.image, formats=READABLE) as image:  # the check names its row
                turned += [row.image] if image.getexif().get(ORIENTATION, 1) != 1 else []
                deep += [row.image] if image.mode[0] in "IF" else []
    if turned:
        log(
            f"Warning: {len(turned)} images, such as {turned[0]}, are turned by their EXIF orientation, and masks are"
            " not: where a mask was drawn on the pixels as they are stored, it does not lie on its image. Look at some"
        )
    if not deep or (config.files != "copy" and not config.window):
        return None  # of 16 bits the upper 8 are read
    text, window = config.window or "0.5%,99.5%", window_of(config.window)
    if config.files != "copy":
        raise UserError(f"--window: the images are written again, as --files {config.files} does not: use --files copy")
    values = np.concatenate([read_numbers(path).ravel()[::7] for path in deep[:: -(-len(deep) // WINDOW_IMAGES)]])
    low, high = window(values)
    log(f"{len(deep)} images of more than 8 bits: {low:g} becomes black, {high:g} white ({text}); --window sets others")
    return low, high


def read_numbers(path: Path) -> np.ndarray:
    """An image of one channel as it is stored, [H, W], upright; of DICOM in its units, such as Hounsfield's."""
    if path.suffix.lower() == DICOM:
        return read_dicom(path)
    with open_image(path) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def merged_palette(config: ImportConfig, sources: dict[str, Source], palette: Palette | None) -> Palette:
    """Of --merge_masks: that of --palette, or background and the classes in the masks' names.

    UserError where a palette lacks one of these.
    """
    rows = (row for source in sources.values() for row in source.rows())
    paths = (path for row in rows if isinstance(row.mask, tuple) for path in row.mask)
    names = ["background", *sorted({object_class(config, path) for path in paths})]
    if palette is not None:
        missing = [name for name in names[1:] if name not in palette.names]
        if missing:
            raise UserError(f"--merge_masks: no class {missing[0]!r} in the palette of {', '.join(palette.names)}")
        return palette
    colors = ((0, 0, 0), *spread_colors())
    return Palette(tuple(Label(id, *each) for id, each in enumerate(zip(names, colors, strict=False))))


def object_class(config: ImportConfig, path: Path) -> str:
    """The class of an object's mask: "object", or its file's name without numbers and the name of its image."""
    name = path.stem.removeprefix(path.parent.name).strip("_- 0123456789") if config.merge_masks == "name" else ""
    return name or "object"


def _merged(config: ImportConfig, paths: Sequence[Path], palette: Palette) -> np.ndarray:
    """Masks of one object each as class ids, uint8 [H, W]; where they overlap, the later file's object is in front."""
    ids = {label.name: label.id for label in palette.labels}
    inside = [read_stored_mask(path).values != 0 for path in paths]
    merged = np.zeros(inside[0].shape, np.uint8)
    for path, one in zip(paths, inside, strict=True):
        if one.shape != merged.shape:
            raise UserError(f"{path}: expected the size of the other masks of its image")
        merged[one] = ids[object_class(config, path)]
    return merged


def _scaled(path: Path, window: tuple[float, float]) -> Image.Image | None:
    """An image of more than 8 bits as grey of 8 bits; None for any other, and one that cannot be read."""
    try:
        if path.suffix.lower() != DICOM:
            with Image.open(path, formats=READABLE) as image:
                if image.mode[0] not in "IF":
                    return None
        share = (read_numbers(path).astype(np.float64) - window[0]) / (window[1] - window[0])
    except (OSError, UserError):  # the check names its row
        return None
    return Image.fromarray((np.nan_to_num(share).clip(0, 1) * 255).round().astype(np.uint8))


def _copied(
    name: str,
    source: Source,
    folder: Path,
    config: ImportConfig,
    window: tuple[float, float] | None,
    palette: Palette | None,
    log: Callable[[str], None],
) -> list[Placed]:
    """Every file as images/000000.EXT, or images/00/000000.EXT of more than 10,000 rows; deep images are scaled."""
    progress = Progress(f"{name or 'rows'} {'linked' if config.files == 'symlink' else 'copied'}", source.count, log)
    placed = []
    for k, row in enumerate(source.rows()):
        stem = f"{k // MANY:02d}/{k:06d}" if source.count > MANY else f"{k:06d}"
        names = []
        for kind, content in (("images", row.image), ("masks", row.mask)):
            scaled = _scaled(content, window) if window and kind == "images" and isinstance(content, Path) else None
            names.append(f"{kind}/{stem}{'.png' if scaled or isinstance(content, tuple) else _extension(content)}")
            target = folder / names[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, tuple):
                assert palette is not None
                write_mask(target, _merged(config, content, palette), palette)
                continue
            if scaled:
                scaled.save(target)
                continue
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
        if not isinstance(row.image, Path) or not isinstance(row.mask, Path):
            raise UserError(f"{row.where}: its image or mask is no file that a path leads to: use --files copy")
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
    own_palettes = [source.palette for source in sources.values() if source.palette is not None]
    if own_palettes:
        classes = [(label.id, label.name) for label in own_palettes[0].labels]
        if given is not None and [(label.id, label.name) for label in given.labels] != classes:
            raise UserError(f"--palette: expected the classes of these annotations with their ids, {classes}")
        return given or own_palettes[0]
    if given:
        return given
    for source in sources.values():
        with suppress(UserError):  # none there
            paths.append(find_palette(source.folder))
        if (dictionary := source.folder / "class_dict.csv").is_file() and not paths:
            log(f"palette: {dictionary}")
            return class_dict(dictionary)
    found = {Palette.load(path): path for path in reversed(paths)}
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found.values()))} differ: choose one by --palette FILE")
    for palette, path in found.items():
        above = all(path.parent.resolve() != source.folder.resolve() for source in sources.values())
        log(f"palette: {path}" + (" (Warning: it lies in the folder above; another one: --palette)" if above else ""))
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
    seen = survey(masks, log, config.threshold)
    found, reading, said = choose_reading(seen, palette, config.unlabelled, config.threshold)
    for line in said:
        log(line)
    if palette is None:
        log(f"No palette.json and no --palette: proposed from {len(masks)} masks; look through its names and colors.")
        palette = propose(found)
    elif config.palette in READY:
        try:
            for warning in check_fit(found, palette):
                log(f"Warning: {warning}")
        except UserError as error:
            raise UserError(str(error).replace("--ready", "--palette")) from None
    if reading:
        _write_ids(folder, rows, reading, palette, config)
    if config.tile:
        _cut(folder, rows, palette, config.tile, config.overlap, log)
    captioned = {name: [_captioned(folder / name, row, palette, config.caption or "") for row in placed]
                 for name, placed in rows.items()}  # fmt: skip
    if not (folder / "palette.json").exists():
        palette.save(folder / "palette.json")
    for name in sorted(rows, key=lambda name: name == "train"):
        (folder / name).mkdir(exist_ok=True)
        more = [dict(row.source.more) for row in rows[name]]
        write_metadata(folder / name, captioned[name], more if any(more) else ())
        if config.files != "rewrite":
            write_csv(folder / name / ORIGINS, ("file_name", "image", "mask"), map(_origin, rows[name]))
    return palette


def _origin(row: Placed) -> tuple[str, str, str]:
    """The name of a row's image here, and what image and mask are in the source."""
    image, mask = (str(each) if isinstance(each, Path) else row.source.where
                   for each in (row.source.image, row.source.mask))  # fmt: skip
    return row.image, image, mask


def _write_ids(
    folder: Path, rows: dict[str, list[Placed]], reading: Reading, palette: Palette, config: ImportConfig
) -> None:
    """Replace the copies of the masks by their class ids, as PNG."""
    if config.files != "copy":
        raise UserError(f"--files {config.files}: the masks do not hold class ids as they are: use --files copy")
    for name, placed in rows.items():
        for number, row in enumerate(placed):
            old = folder / name / row.mask
            ids = reading.read(old)
            old.unlink()
            placed[number] = row._replace(mask=str(Path(row.mask).with_suffix(".png")))
            write_mask(folder / name / placed[number].mask, ids, palette)


def _cut(folder: Path, rows: dict[str, list[Placed]], palette: Palette, tile: int, overlap: int, log: Callable) -> None:
    """Replace the copies by their tiles, images/000000_r0_c1.png and its mask: row and column of tiles from 0.

    All are full squares that cover every pixel; the last of a row or column is shifted inwards. UserError for an image
    that is smaller than a tile (padding would be drawn by what is trained on it), and one without a mask of its size.
    """

    def tiles_of(name: str, row: Placed) -> list[Placed] | str:
        try:
            image, mask = read_image(folder / name / row.image), read_mask(folder / name / row.mask, palette)
        except UserError as error:
            return str(error)
        (height, width), where = mask.shape, folder / name / row.image
        if image.shape[:2] != mask.shape:
            sizes = f"{image.shape[1]} x {image.shape[0]} and {width} x {height}"
            return f"{where}: expected an image and a mask of one size, found {sizes}"
        if min(height, width) < tile:
            return f"{where}: expected {tile} x {tile} pixels at least, found {width} x {height}: use a smaller --tile"
        found = []
        for r, top in enumerate(window_starts(height, tile, overlap)):
            for c, left in enumerate(window_starts(width, tile, overlap)):
                ending, box = f"_r{r}_c{c}.png", Box(top, left, tile, tile)
                names = [f"{each.rpartition('.')[0]}{ending}" for each in row[1:]]
                Image.fromarray(box.of(image)).save(folder / name / names[0])
                write_mask(folder / name / names[1], box.cut(mask), palette)
                found.append(Placed(row.source, *names))
        for each in row[1:]:
            (folder / name / each).unlink()
        return found

    for name, placed in rows.items():
        progress = Progress(f"{name or 'rows'} cut into tiles", len(placed), log)
        tiles, problems = list[Placed](), list[str]()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, found in enumerate(pool.map(tiles_of, [name] * len(placed), placed), start=1):
                problems += [found] if isinstance(found, str) else []
                tiles += [] if isinstance(found, str) else found
                progress(done)
        refuse_failed(problems, len(placed), "images")
        rows[name] = tiles
    if list(rows) == [""]:
        log("--tile: rows that are held out later may be tiles of images to train on; --test 8 holds out whole images.")


def _naming_sources(message: str, folder: Path, rows: dict[str, list[Placed]]) -> str:
    """A message about copies in a folder that is removed, with the user's own files or rows in their place."""
    for name, placed in rows.items() if str(folder) in message else ():
        for row in placed:
            _, image, mask = _origin(row)
            message = message.replace(str(folder / name / row.mask), mask).replace(
                str(folder / name / row.image), image
            )
    return message


def _with_origin(message: str, rows: dict[str, list[Placed]]) -> str:
    """A message about a written file, with the user's own file that it comes from."""
    for row in (row for placed in rows.values() for row in placed):
        _, image, mask = _origin(row)
        for here, there in ((row.image, image), (row.mask, mask)):
            if f"/{here}" in message or f"'{here}'" in message:
                return f"{message} (in the source: {there})"
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


def _check_written(config: ImportConfig, rows: dict[str, list[Placed]], out: Path, log: Callable) -> None:
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
            f"{out} is written, but not all of it can be trained on. {_with_origin(str(error), rows)}\n"
            f"`segcn validate {out}` lists every fault; with `--quarantine {out}/good.csv` it parts the good rows from"
            " the bad ones"
        ) from None
    finally:
        os.environ.pop(SYMLINKS)
        os.environ.update({SYMLINKS: before} if before is not None else {})
