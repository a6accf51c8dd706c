"""`segcn import`: what people have becomes a data set of the contract, in one step and without touching the source."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from segcn.captions import classes_of
from segcn.config import ImportConfig
from segcn.errors import UserError
from segcn.files import SYMLINKS
from segcn.labels import Palette, find_palette
from segcn.masks import read_mask
from segcn.palette import READY, check, propose, ready
from segcn.placing import Placed, claim, copied, refuse_metadata, rewritten, staged
from segcn.records import check_split, read_split, write_metadata
from segcn.sources import Source, find_sources


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
        log(f"No palette.json and no --palette: proposed from {len(masks)} masks; look through its names and colours.")
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
