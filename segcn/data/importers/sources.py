"""What people have, found in a folder: pairs of files by name, a metadata file, parquet files, a saved `datasets`."""

import glob
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import Any

from segcn.data.config import ImportConfig
from segcn.data.importers.formats import (
    DICOM,
    annotated_rows,
    coco,
    cvat,
    has_texts,
    label_studio,
    labelme,
    read_volume,
    sliced_rows,
    tool_of,
    volumes_below,
    window_of,
    yolo,
)
from segcn.data.importers.palettes import SUFFIXES
from segcn.data.importers.tables import Row, arrow_rows, captions_of, file_rows
from segcn.data.metadata import METADATA
from segcn.data.palette import Palette
from segcn.utils import rng
from segcn.utils.errors import UserError, refuse_failed

IMAGES = ("images", "image", "imagesTr", "imgs", "img", "photos", "leftImg8bit")
MASKS = (
    "masks",
    "mask",
    "labels",
    "label",
    "labelsTr",
    "annotations",
    "conditioning_images",
    "conditioning_image",
    "gtFine",
)
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
    palette: Palette | None = None  # of annotations that name their classes
    grouped: bool = False  # its rows have groups


def find_sources(config: ImportConfig) -> dict[str, Source]:
    """Every split by name, or "" for one that has none; UserError where nothing is found, or what is wrong with it."""
    path = Path(config.source)
    if not path.is_dir() and not isfile(path):
        raise UserError(f"{path}: no such folder or file; expected {EXPECTED}")
    found = _of_folder(path, config, nested=False) if path.is_dir() else _of_file(path, config)
    for name, source in found.items():
        if not re.fullmatch(r"(\w[\w.-]*)?", name):
            raise UserError(f"{path}: expected a split's name of letters and digits, found {name!r}")
        if not source.count:
            raise UserError(f"{path}: expected at least one row{' in ' + name if name else ''}, found none")
    found = held_out(found, config.test) if config.test else found
    return dict(sorted(found.items(), key=lambda item: item[0] != "train"))


def held_out(found: dict[str, Source], count: int) -> dict[str, Source]:
    """train and test of a source without splits: so many rows, the same at each call, go to test; UserError.

    Of rows in groups, such as slices of patients, whole groups go there until so many rows are reached.
    """
    if list(found) != [""]:
        raise UserError(f"--test {count}: expected a source without splits, found {', '.join(found)}: leave it out")
    whole = found[""]
    if not 0 < count < whole.count:
        raise UserError(f"--test {count}: expected fewer than the {whole.count} rows that there are, and 1 at least")
    if whole.grouped:
        groups = [row.group for row in whole.rows()]
        names = sorted(set(groups))
        order, chosen = [names[k] for k in rng.permutation(len(names), "held out", 0)], set[int]()
        while len(chosen) < count:
            group = order.pop()
            chosen |= {k for k, own in enumerate(groups) if own == group}
        if not order:
            raise UserError(
                f"--test {count}: expected rows of several groups, some of them to train on, found {_some(names)}"
            )
    else:
        chosen = set(rng.permutation(whole.count, "held out", 0)[:count])

    def part(size: int, test: bool) -> Source:
        rows = lambda: (row for k, row in enumerate(whole.rows()) if (k in chosen) == test)  # noqa: E731
        return Source(whole.folder, size, rows, whole.palette)

    return {"train": part(whole.count - len(chosen), False), "test": part(len(chosen), True)}


def _of_file(path: Path, config: ImportConfig) -> dict[str, Source]:
    """The rows of a table, by its column of splits where it has one; or of a parquet file."""
    if path.suffix.lower() == ".json" and tool_of(path) == "coco":
        return {"": _annotated(path.parent, coco(path), config)}
    if path.suffix.lower() == ".xml":
        return {"": _annotated(path.parent, cvat(path), config)}
    if path.suffix.lower() in TABLES:
        splits: dict[str, list[Row]] = {}
        for row in file_rows(path, config):
            splits.setdefault(SPLITS.get(row.split.lower(), row.split), []).append(row)
        grouped = config.group_column is not None
        found = {name: Source(path.parent, len(each), each.__iter__, None, grouped) for name, each in splits.items()}
        return found or {"": Source(path.parent, 0, list)}
    if path.suffix.lower() == ".parquet":
        return {"": _of_parquet(path.parent, [path], config)}
    raise UserError(f"{path}: expected a folder, or a .csv, .jsonl, .json or .parquet file, found {path.suffix!r}")


def _of_folder(folder: Path, config: ImportConfig, nested: bool) -> dict[str, Source]:
    """The splits in a folder by what is in it; nested: it is a split itself."""
    if isfile(folder / "dataset_dict.json") or isfile(folder / "state.json"):
        return _of_saved(folder, config)
    tables = [folder / name for name in METADATA if isfile(folder / name)]
    if len(tables) > 1:
        raise UserError(f"{folder}: expected one metadata file, found {' and '.join(METADATA)}; name the one you mean")
    if tables:
        return _of_file(tables[0], config)
    pair = _pair_folders(folder)
    masks = pair is not None and any(path.suffix.lower() in SUFFIXES for path in pair[1].rglob("*"))
    if not masks and (annotated := _annotations_in(folder, config)):
        return annotated
    if pair:
        return _of_pairs(folder, *pair, config)
    if not nested and (splits := _split_folders(folder)):
        found = {name: _of_folder(below, config, nested=True) for name, below in splits.items()}
        for name, sources in found.items():
            if len(sources) > 1:
                raise UserError(f"{splits[name]}: expected one split, found {', '.join(sources)}")
        return {name: next(iter(sources.values())) for name, sources in found.items()}
    shards = sorted(path for part in (folder, folder / "data") for path in part.glob("*.parquet") if isfile(path))
    if shards:
        return _of_shards(folder, shards, config)
    below = sorted(place for place in folder.iterdir() if place.is_dir() and place.name[0] != ".")
    if below and all(map(_pair_folders, below)):
        return {"": _areas(folder, below, config)}
    if len(below) == 1:
        return _of_folder(below[0], config, nested)
    raise UserError(f"{folder}: expected {EXPECTED}; found {_some(sorted(os.listdir(folder))) or 'nothing'}")


def _annotated(folder: Path, found: tuple[Palette, Callable, int], config: ImportConfig) -> Source:
    palette, images, count = found
    return Source(folder, count, lambda: annotated_rows(images(), palette, config), palette)


def _annotations_in(folder: Path, config: ImportConfig) -> dict[str, Source] | None:
    """COCO's files by split (annotations/instances_train.json), CVAT's annotations.xml, LabelMe's files; or none."""
    files = sorted(path for place in (folder, folder / "annotations") for path in place.glob("*.json") if isfile(path))
    tools = {path: tool_of(path) for path in files if path.name[0] != "."}
    if found := [path for path, tool in tools.items() if tool == "labelme" and path.parent == folder]:
        return {"": _annotated(folder, labelme(found), config)}
    if found := [path for path, tool in tools.items() if tool == "label studio"]:
        return {"": _annotated(folder, label_studio(found[0]), config)}
    sources: dict[str, Source] = {}
    for path in (path for path, tool in tools.items() if tool == "coco"):
        word = re.split(r"[_.\d-]", path.stem.lower())
        name = next((SPLITS[part] for part in word if part in SPLITS), "")
        if name in sources:
            raise UserError(f"{folder}: {path.name} and another file hold the same images: name the one you mean")
        sources[name] = _annotated(folder, coco(path), config)
    if not sources and isfile(folder / "annotations.xml"):
        sources = {"": _annotated(folder, cvat(folder / "annotations.xml"), config)}
    if len({source.palette for source in sources.values()}) > 1:
        raise UserError(f"{folder}: the splits have different categories")
    return sources or None


def _areas(folder: Path, below: list[Path], config: ImportConfig) -> Source:
    """The rows of several folders of images/ and masks/ one after the other, such as Rural and Urban."""
    sources = [_of_pairs(place, *pair, config) for place in below if (pair := _pair_folders(place))]
    rows = [row for found in sources for source in found.values() for row in source.rows()]
    print(f"{folder}: {len(rows)} rows of {', '.join(place.name for place in below)}")
    return Source(folder, len(rows), lambda: rows)


def _pair_folders(folder: Path) -> tuple[Path, Path] | None:
    images, masks = _only_folder(folder, IMAGES), _only_folder(folder, MASKS)
    return (images, masks) if images and masks else None


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
    endings = ("", "_png", "_jpg", "_jpeg", "_tif")  # Rural/images_png
    found = [folder / f"{name}{ending}" for name in names for ending in endings]
    found = [path for path in found if path.is_dir()]
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
    volumes, volume_masks = volumes_below(images), volumes_below(masks)
    files = [path for path in images.iterdir() if path.is_file() and path.name[0] != "."]
    if volumes and len(volumes) == len(files):
        _refuse_unpaired(
            images, masks, sorted(set(volumes) - set(volume_masks)), sorted(set(volume_masks) - set(volumes))
        )
        return _volumes(folder, [(name, volumes[name], volume_masks[name]) for name in volumes], config)
    photos = _by_stem(images, config.image_prefix, config.image_suffix)
    if has_texts(masks):
        texts = {path.relative_to(masks).with_suffix("").as_posix(): path for path in sorted(masks.rglob("*.txt"))}
        if not config.skip_unpaired:
            _refuse_unpaired(images, masks, sorted(set(photos) - set(texts)), sorted(set(texts) - set(photos)))
        return _annotated(folder, yolo(folder, photos, texts), config)
    labels: dict[str, Any] = _by_stem(masks, config.mask_prefix, config.mask_suffix, config.merge_masks is not None)
    photos, labels = _in_one_case(photos, labels)
    unpaired = sorted(set(photos) - set(labels)), sorted(set(labels) - set(photos))
    if config.skip_unpaired and set(photos) & set(labels):
        left = [name for names in unpaired for name in names]
        if left:
            print(f"left out: {len(left)} files without a partner: {_some(left)}")
    else:
        _refuse_unpaired(images, masks, *unpaired)
    rows, problems = [], []
    for stem in sorted(set(photos) & set(labels)):
        photo, lines = photos[stem], None
        notes = (captions / photo.relative_to(images).with_suffix(".txt"), photo.with_suffix(".txt"))
        note = next((note for note in notes if isfile(note)), None)
        try:
            lines = note.read_text(encoding="utf-8-sig").splitlines() if note else None
            mask = labels[stem]
            mask = tuple(mask) if isinstance(mask, list) else mask.absolute()
            series = photo.parent.relative_to(images).as_posix() if photo.suffix.lower() == DICOM else ""
            rows.append(Row(str(photo), photo.absolute(), mask, captions_of(lines, config), group=series))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{note}: expected UTF-8 text: {error}")
        except UserError as error:
            problems.append(f"{photo}: {error} (looked for {notes[0]} and {notes[1]})")
    refuse_failed(problems, len(photos), "pairs")
    return Source(folder, len(rows), lambda: rows, grouped=len({row.group for row in rows}) > 1)


def _volumes(folder: Path, pairs: list[tuple[str, Path, Path]], config: ImportConfig) -> Source:
    """The slices of volumes in which the mask holds a class; those without are left out, and counted."""
    masks = [read_volume(mask, config.slice_axis) for _, _, mask in pairs]
    shown, every = (sum(int(each) for each in counts) for counts in
                    ([one.any((1, 2)).sum() for one in masks], [len(one) for one in masks]))  # fmt: skip
    print(f"{folder}: {every} slices of {len(pairs)} volumes; left out: {every - shown} whose mask is empty")
    return Source(folder, shown, lambda: sliced_rows(pairs, config, window_of(config.window)), None, True)


def _by_stem(folder: Path, prefix: str, suffix: str, several: bool = False) -> dict[str, Any]:
    """The images below a folder by their path without prefix, suffix and extension, its letters composed (NFC).

    several: of each folder a list of its files. Hidden files and folders are left out. UserError where two share one.
    """
    found: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            fits = path.stem.startswith(prefix) and path.stem.endswith(suffix)
            if path.suffix.lower() in (*SUFFIXES, DICOM) and fits and isfile(path):
                own = path.stem.removeprefix(prefix).removesuffix(suffix)
                stem = path.parent if several else path.with_name(own)
                name = unicodedata.normalize("NFC", stem.relative_to(folder).as_posix())
                found.setdefault(name, []).append(path)
    if several and found and "." not in found:
        return found
    if several:
        raise UserError(
            f"{folder}: --merge_masks expects a folder of masks for each image, such as {folder}/NAME/0.png"
        )
    if not found:
        ending = f" whose names are {prefix}...{suffix}" if prefix or suffix else ""
        raise UserError(f"{folder}: expected images{ending} ({' '.join(sorted(SUFFIXES))}), found none")
    twins = sorted(stem for stem, paths in found.items() if len(paths) > 1)
    if twins:
        first = " and ".join(sorted(path.name for path in found[twins[0]]))
        more = f"; {len(twins) - 1} more names occur twice" if len(twins) > 1 else ""
        raise UserError(f"{folder}: expected one file of each name, found {first}{more}")
    return {stem: paths[0] for stem, paths in found.items()}


def _in_one_case(photos: dict, labels: dict) -> tuple[dict, dict]:
    """Both with small letters where names differ in these alone, and no two files of a kind then share one."""
    small = [{name.casefold(): path for name, path in each.items()} for each in (photos, labels)]
    alone = set(photos) ^ set(labels)
    same = len(small[0]) == len(photos) and len(small[1]) == len(labels)
    if not same or len(set(small[0]) ^ set(small[1])) >= len(alone):
        return photos, labels
    print("names of images and masks differ in capital letters alone: paired nevertheless")
    return small[0], small[1]


def _refuse_unpaired(images: Path, masks: Path, photos: list[str], labels: list[str]) -> None:
    """UserError for images without a mask and masks without an image; guesses the ending of the masks' names."""
    parts = [f"{len(photos)} images in {images} have no mask: {_some(photos)}"] if photos else []
    parts += [f"{len(labels)} masks in {masks} have no image: {_some(labels)}"] if labels else []
    if parts:
        folders = {Path(name).parent.as_posix() for name in labels}
        if photos and set(photos) <= folders:
            raise UserError(
                f"{masks} has a folder of masks for each image, such as {labels[0]}: is each the mask of one object?"
                " --merge_masks one makes all of them one class, --merge_masks name takes the class from a file's name"
            )
        raise UserError(
            f"{'; '.join(parts)}. An image and its mask have the same name but for the extension."
            f" {_guess(photos, labels)} --skip_unpaired leaves out what has no partner"
        )


def _guess(photos: list[str], labels: list[str]) -> str:
    """The flags that would pair these names: what is before and after the part that the first two share."""
    if photos and labels:
        one, other = photos[0], labels[0]
        same = SequenceMatcher(None, one, other, autojunk=False).find_longest_match()
        ends = {"image_prefix": one[: same.a], "image_suffix": one[same.a + same.size :],
                "mask_prefix": other[: same.b], "mask_suffix": other[same.b + same.size :]}  # fmt: skip
        cores = [{name.removeprefix(ends[f"{kind}_prefix"]).removesuffix(ends[f"{kind}_suffix"]) for name in names}
                 for kind, names in (("image", photos), ("mask", labels))]  # fmt: skip
        if cores[0] & cores[1]:
            return f"Here {' '.join(f'--{flag}={text}' for flag, text in ends.items() if text)}?"
    return "Where one kind has a beginning or an ending of its own: --mask_prefix, --mask_suffix, --image_prefix."


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
    files = [glob.escape(str(path)) for path in paths]
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
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


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
