"""What people have, found in a folder: pairs of files by name, a metadata file, parquet files, a saved `datasets`."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import Any

from segcn.data.config import ImportConfig
from segcn.data.importers.palettes import SUFFIXES
from segcn.data.importers.tables import Row, arrow_rows, captions_of, file_rows
from segcn.data.metadata import METADATA
from segcn.utils import rng
from segcn.utils.errors import UserError, refuse_failed

IMAGES = ("images", "image", "imgs", "img", "photos", "leftImg8bit")
MASKS = ("masks", "mask", "labels", "label", "annotations", "conditioning_images", "conditioning_image", "gtFine")
SPLITS = {name: name for name in ("train", "test", "validation", "val")} | {"training": "train", "testing": "test"}
SHARD = re.compile(r"(?P<split>\w[\w.]*?)-\d+-of-\d+(?:-\w+)?")  # as the hub names parquet files
TABLES = (".csv", ".jsonl", ".json")
EXPECTED = ("images/ and masks/, metadata.csv or metadata.jsonl, parquet files, what save_to_disk wrote, or folders"
            " train/, test/, validation/ of these")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One split as it is found: `rows()` gives its rows from the first on."""

    folder: Path  # its palette.json is looked for here and in the folder above
    count: int
    rows: Callable[[], Iterable[Row]]


def find_sources(config: ImportConfig) -> dict[str, Source]:
    """Every split by name, or "" for one that has none; UserError where nothing is found, or what is wrong with it."""
    path = Path(config.source)
    if not path.is_dir() and not isfile(path):
        raise UserError(f"{path}: no such folder or file; expected {EXPECTED}")
    found = _of_folder(path, config, nested=False) if path.is_dir() else {"": _of_file(path, config)}
    for name, source in found.items():
        if not re.fullmatch(r"(\w[\w.-]*)?", name):
            raise UserError(f"{path}: expected a split's name of letters and digits, found {name!r}")
        if not source.count:
            raise UserError(f"{path}: expected at least one row{' in ' + name if name else ''}, found none")
    found = held_out(found, config.test) if config.test else found
    return dict(sorted(found.items(), key=lambda item: item[0] != "train"))


def held_out(found: dict[str, Source], count: int) -> dict[str, Source]:
    """train and test of a source without splits: so many rows, the same at each call, go to test; UserError."""
    if list(found) != [""]:
        raise UserError(f"--test {count}: expected a source without splits, found {', '.join(found)}: leave it out")
    whole = found[""]
    if not 0 < count < whole.count:
        raise UserError(f"--test {count}: expected fewer than the {whole.count} rows that there are, and 1 at least")
    chosen = set(rng.permutation(whole.count, "held out", 0)[:count])

    def part(size: int, test: bool) -> Source:
        return Source(whole.folder, size, lambda: (row for k, row in enumerate(whole.rows()) if (k in chosen) == test))

    return {"train": part(whole.count - count, False), "test": part(count, True)}


def _of_file(path: Path, config: ImportConfig) -> Source:
    if path.suffix.lower() in TABLES:
        rows = file_rows(path, config)
        return Source(path.parent, len(rows), lambda: rows)
    if path.suffix.lower() == ".parquet":
        return _of_parquet(path.parent, [path], config)
    raise UserError(f"{path}: expected a folder, or a .csv, .jsonl, .json or .parquet file, found {path.suffix!r}")


def _of_folder(folder: Path, config: ImportConfig, nested: bool) -> dict[str, Source]:
    """The splits in a folder by what is in it; nested: it is a split itself."""
    if isfile(folder / "dataset_dict.json") or isfile(folder / "state.json"):
        return _of_saved(folder, config)
    tables = [folder / name for name in METADATA if isfile(folder / name)]
    if len(tables) > 1:
        raise UserError(f"{folder}: expected one metadata file, found {' and '.join(METADATA)}; name the one you mean")
    if tables:
        return {"": _of_file(tables[0], config)}
    images, masks = _only_folder(folder, IMAGES), _only_folder(folder, MASKS)
    if images and masks:
        return _of_pairs(folder, images, masks, config)
    if not nested and (splits := _split_folders(folder)):
        found = {name: _of_folder(below, config, nested=True) for name, below in splits.items()}
        for name, sources in found.items():
            if len(sources) > 1:
                raise UserError(f"{splits[name]}: expected one split, found {', '.join(sources)}")
        return {name: next(iter(sources.values())) for name, sources in found.items()}
    shards = sorted(path for part in (folder, folder / "data") for path in part.glob("*.parquet") if isfile(path))
    if shards:
        return _of_shards(folder, shards, config)
    raise UserError(f"{folder}: expected {EXPECTED}; found {_some(sorted(os.listdir(folder))) or 'nothing'}")


def _split_folders(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for below in sorted(folder.iterdir()):
        name = SPLITS.get(below.name.lower())
        if name and below.is_dir():
            if name in found:
                raise UserError(f"{folder}: {found[name].name} and {below.name} are both the split {name!r}")
            found[name] = below
    return found


def _only_folder(folder: Path, names: Sequence[str]) -> Path | None:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"{folder}: expected one of these folders, found {' and '.join(path.name for path in found)}")
    return found[0] if found else None


def _of_pairs(folder: Path, images: Path, masks: Path, config: ImportConfig) -> dict[str, Source]:
    """Pairs below images/ and masks/; where both hold folders of splits (images/train, masks/train), by split."""
    splits, others = _split_folders(images), _split_folders(masks)
    if splits and set(splits) != set(others):
        raise UserError(f"{folder}: the splits in {images.name} are {_some(splits)}, in {masks.name} {_some(others)}")
    places = {name: (below, others[name], folder / "captions" / below.name) for name, below in splits.items()}
    places = places or {"": (images, masks, folder / "captions")}
    return {name: _pairs(folder, *place, config) for name, place in places.items()}


def _pairs(folder: Path, images: Path, masks: Path, captions: Path, config: ImportConfig) -> Source:
    """Rows of the images with the same name, folders below included; each line of a text file is a caption."""
    photos, labels = _by_stem(images, config.image_suffix), _by_stem(masks, config.mask_suffix)
    _refuse_unpaired(images, masks, sorted(set(photos) - set(labels)), sorted(set(labels) - set(photos)))
    rows, problems = [], []
    for stem in sorted(photos):
        photo, lines = photos[stem], None
        notes = (captions / photo.relative_to(images).with_suffix(".txt"), photo.with_suffix(".txt"))
        note = next((note for note in notes if isfile(note)), None)
        try:
            lines = note.read_text(encoding="utf-8-sig").splitlines() if note else None
            rows.append(Row(str(photo), photo.absolute(), labels[stem].absolute(), captions_of(lines, config)))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{note}: expected UTF-8 text: {error}")
        except UserError as error:
            problems.append(f"{photo}: {error} (looked for {notes[0]} and {notes[1]})")
    refuse_failed(problems, len(photos), "pairs")
    return Source(folder, len(rows), lambda: rows)


def _by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """The images below a folder by their path without `suffix` and extension; UserError where two share it."""
    found: dict[str, list[Path]] = {}
    for place, _, names in os.walk(folder, followlinks=False):
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES and path.stem.endswith(suffix) and isfile(path):
                stem = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
                found.setdefault(stem, []).append(path)
    if not found:
        ending = f" whose names end in {suffix}" if suffix else ""
        raise UserError(f"{folder}: expected images{ending} ({' '.join(sorted(SUFFIXES))}), found none")
    twins = sorted(stem for stem, paths in found.items() if len(paths) > 1)
    if twins:
        first = " and ".join(sorted(path.name for path in found[twins[0]]))
        more = f"; {len(twins) - 1} more names occur twice" if len(twins) > 1 else ""
        raise UserError(f"{folder}: expected one file of each name, found {first}{more}")
    return {stem: paths[0] for stem, paths in found.items()}


def _refuse_unpaired(images: Path, masks: Path, photos: list[str], labels: list[str]) -> None:
    """UserError for images without a mask and masks without an image; guesses the ending of the masks' names."""
    parts = [f"{len(photos)} images in {images} have no mask: {_some(photos)}"] if photos else []
    parts += [f"{len(labels)} masks in {masks} have no image: {_some(labels)}"] if labels else []
    endings = {name.removeprefix(stem) for stem in photos[:1] for name in labels if name.startswith(stem)}
    guess = f" (here --mask_suffix={min(endings, key=len)}?)" if endings else ""
    if parts:
        raise UserError(
            f"{'; '.join(parts)}. An image and its mask have the same name but for the extension; where masks, or"
            f" images, have an ending of their own, name it by --mask_suffix or --image_suffix{guess}"
        )


def _of_shards(folder: Path, shards: Iterable[Path], config: ImportConfig) -> dict[str, Source]:
    """Parquet files by the split in their names: train-00000-of-00001.parquet, test.parquet."""
    found: dict[str, list[Path]] = {}
    for path in shards:
        shard = SHARD.fullmatch(path.stem)
        name = shard["split"] if shard else path.stem if path.stem in SPLITS else ""
        found.setdefault(SPLITS.get(name, name), []).append(path)
    if "" in found and len(found) > 1:
        raise UserError(f"{folder}: expected a split in the name of every parquet file, found none in {found[''][0]}")
    return {name: _of_parquet(folder, paths, config) for name, paths in found.items()}


def _of_parquet(folder: Path, paths: list[Path], config: ImportConfig) -> Source:
    """Parquet files read in a stream, since images may be inside: larger than memory."""
    import pyarrow
    from datasets import load_dataset
    from pyarrow.parquet import read_metadata

    try:
        count = sum(read_metadata(path).num_rows for path in paths)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{paths[0] if len(paths) == 1 else folder}: parquet cannot be read: {error}") from None
    dataset = load_dataset("parquet", data_files=[str(path) for path in paths], split="train", streaming=True)
    name = str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return Source(folder, count, partial(arrow_rows, dataset, name, paths[0].parent, config))


def _of_saved(folder: Path, config: ImportConfig) -> dict[str, Source]:
    """What Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    from datasets import load_from_disk

    try:
        saved: Any = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: expected what save_to_disk wrote, found {type(error).__name__}: {error}") from None
    splits = saved if isinstance(saved, dict) else {"": saved}
    return {
        name: Source(folder, len(rows), partial(arrow_rows, rows, f"{folder}{name and '/'}{name}", folder, config))
        for name, rows in splits.items()
    }


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
