"""`segcn palette`: ready palettes of benchmarks, the values that masks hold, and a palette that fits them."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from segcn.data.colors import said_alike
from segcn.data.config import READY, PaletteConfig
from segcn.data.files import READABLE, Boundary, open_image
from segcn.data.masks import Color, code_of, color_of, lossy_error, read_stored_mask
from segcn.data.metadata import METADATA, find_splits, read_lines
from segcn.data.palette import IGNORE, Label, Palette
from segcn.utils.errors import UserError
from segcn.utils.progress import Progress

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in READABLE}
FOLDER = Path(__file__).parents[1] / "palettes"
TWINS = {"ade20k": "ade20k-from-0", "cityscapes": "cityscapes-labelids", "coco-stuff": "coco-stuff-from-0"}
TWINS |= {second: first for first, second in TWINS.items()}  # two ways to number the same classes
TELL_APART = 4  # of 255: colors closer than this in every channel look the same
MOST_UNLABELLED = 0.5  # of the pixels, that may be 255 without anybody saying what it means
LEAST_MASKS, MANY_COLORS, SMOOTHED = 3, 6, 16  # masks, colors, values in a mask: from there on they may be no classes
TABLE_LINES = 30  # labels in the table


@cache
def ready(name: str) -> Palette:
    """A ready palette; UserError for an unknown name lists all of them."""
    if name not in READY:
        raise UserError(f"no ready palette {name!r}; there are {', '.join(READY)}")
    return Palette.load(FOLDER / f"{name}.json")


def make_palette(config: PaletteConfig, log: Callable[[str], None] = print) -> Path:
    """`segcn palette`: survey the masks, log the table and any warnings, and write the palette where none is."""
    palette = ready(config.ready) if config.ready else None
    if config.ready and config.names:
        raise UserError("--names: the classes of a ready palette have their names; give one of --ready and --names")
    if not config.dataset_name and not (config.ready and config.output):
        raise UserError(
            "segcn palette needs masks: segcn palette DATASET; or --ready NAME --output PALETTE.json to write a ready"
            f" palette, of {', '.join(READY)}"
        )
    dataset = Path(config.dataset_name)
    target = Path(config.output or (dataset.parent if dataset.is_file() else dataset) / "palette.json")
    if os.path.lexists(target):
        raise UserError(f"{target} is there and is never overwritten: remove it, or name another file with --output")
    if config.dataset_name:
        found, _, said = choose_reading(survey(mask_files(dataset, log), log), palette)
        for line in said:
            log(f"{line}, by segcn import")
        if palette is None:
            palette = propose(found, [name.strip() for name in config.names.split(",")] if config.names else None)
            warnings = _smoothing_warnings(found)
        else:
            warnings = check_fit(found, palette)
        for line in palette_table_text(palette, found, swatches=sys.stdout.isatty()):
            log(line)
        shown = [label.id for label in palette.labels if found.value_of(label) in found.pixels]
        for warning in [*warnings, *(said_alike(palette, shown) if shown else [])]:
            log(f"Warning: {warning}")
    assert palette is not None
    try:
        palette.save(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error}") from None
    return target


# --- Which files are masks, and which values they hold


def is_dataset(folder: Path) -> bool:
    """Whether it is a data set, or the metadata file of one, rather than a folder of masks."""
    return folder.is_file() or any(any(folder.glob(f"{below}{name}")) for below in ("", "*/") for name in METADATA)


def mask_files(dataset: str | Path, log: Callable[[str], None] = print) -> list[Path]:
    """The masks of a data set by its metadata, of its folders masks/ or SPLIT/masks/, or of a folder of mask files.

    Only regular files inside the folder count. UserError where there is none.
    """
    folder, masks = Path(dataset), []
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; expected a folder of masks, or a data set")
    if not is_dataset(folder):
        own = [folder / "masks"] if (folder / "masks").is_dir() else sorted(folder.glob("*/masks/"))
        boundary = Boundary(folder)
        for path in (path for place in own or [folder] for path in sorted(place.iterdir())):
            inside = not boundary.problem(path.relative_to(folder).as_posix())
            masks += [path] if path.suffix.lower() in SUFFIXES and path.name[0] != "." and inside else []
        if not masks:
            raise UserError(f"{folder}: expected mask files here, in masks/ or in SPLIT/masks/, found none")
        return masks
    left_out, splits = 0, find_splits(folder)
    for metadata in splits.values():
        boundary = Boundary(metadata.parent)
        for line in read_lines(metadata):
            readable = bool(line.mask) and not boundary.problem(line.mask)
            masks += [metadata.parent / line.mask] if readable else []
            left_out += not readable
    if not masks:
        raise UserError(f"{next(iter(splits.values()))}: no row names a mask that is there; segcn validate {folder}")
    if left_out:
        log(f"Left out: {left_out} rows whose mask is not to be found; segcn validate names them")
    return masks


@dataclass(frozen=True)
class Survey:
    """The values of many mask files together."""

    colored: bool  # values are colors as 0xRRGGBB, else ids
    pixels: Counter[int] = field(default_factory=Counter)  # of each value
    files: Counter[int] = field(default_factory=Counter)  # that hold it
    example: dict[int, Path] = field(default_factory=dict)  # one of them
    own: dict[tuple[int, Color], Path] = field(default_factory=dict)  # value and color in the files' own palettes

    def value_of(self, label: Label) -> int:
        """What a label is in the masks: its id, or its color as 0xRRGGBB."""
        return code_of(label.color) if self.colored else label.id

    def listed(self, values: Iterable[int]) -> str:
        """The most frequent of these values, with their pixels, files and one of the files."""
        ranked = sorted(values, key=lambda value: (-self.pixels[value], value))
        shown = []
        for value in ranked[:5]:
            name = f"color #{value:06x}" if self.colored else f"value {value}"
            counts = f"{self.pixels[value]:,} pixels in {self.files[value]:,} files"
            shown.append(f"{name} ({counts}, e.g. {self.example[value]})")
        return ", ".join(shown) + (f" and {len(ranked) - 5} more" if len(ranked) > 5 else "")


def light_pixels(path: Path, threshold: int) -> np.ndarray:
    """Which pixels of a mask, in grey, are `threshold` or lighter, bool [H, W]."""
    with open_image(path, "mask") as image:
        return np.asarray(image if image.mode[0] in "IF" else image.convert("L")) >= threshold


def survey(paths: Iterable[Path], log: Callable[[str], None] = print, threshold: int | None = None) -> Survey:
    """Count every mask; UserError names a file that is no mask, or two of different kinds.

    threshold: masks are read as 1 where they are so light, else 0. Masks whose colors are all grey hold ids.
    """
    unique = list(dict.fromkeys(paths))
    if not unique:
        raise UserError("expected masks, found none")
    progress = Progress("masks read", len(unique), log)
    found: dict[bool, Survey] = {}  # by whether they are colored
    first: dict[bool, Path] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (path, (colored, pixels, own)) in enumerate(
            zip(unique, pool.map(_values_of, unique, repeat(threshold)), strict=True)
        ):
            counted = found.setdefault(colored, Survey(colored))
            first.setdefault(colored, path)
            counted.pixels.update(pixels)
            counted.files.update(pixels.keys())
            for value in pixels:
                counted.example.setdefault(value, path)
            for pair in own.items():
                counted.own.setdefault(pair, path)
            progress(done + 1)
    if len(found) > 1:
        kinds = f"found colors in {first[True]} and class ids in {first[False]}"
        raise UserError(f"expected masks of one kind, {kinds}: name the folder of the masks alone, or save all one way")
    return next(iter(found.values()))


def is_grey(found: Survey) -> bool:
    """Whether all colors are grey: then they are class ids in three channels, unless a palette has these colors."""
    return found.colored and all(len(set(color_of(value))) == 1 for value in found.pixels)


def in_one_channel(found: Survey) -> Survey:
    """A survey of grey colors as one of the values in each channel."""
    pixels, files = ({color_of(value)[0]: n for value, n in each.items()} for each in (found.pixels, found.files))
    return Survey(False, Counter(pixels), Counter(files), {color_of(key)[0]: at for key, at in found.example.items()})


class Reading(NamedTuple):
    """How masks become class ids where they do not hold them: stored value -> id, or light pixels 1 and dark ones 0."""

    ids: dict[int, int]
    threshold: int | None = None

    def read(self, path: Path) -> np.ndarray:
        """A mask file as class ids, uint8 [H, W]."""
        if self.threshold is not None:
            return light_pixels(path, self.threshold).astype(np.uint8)
        stored = read_stored_mask(path)
        table = np.full(max(IGNORE, *self.ids) + 1, IGNORE, np.uint8)
        table[list(self.ids)] = list(self.ids.values())
        return table[stored.values & 255 if stored.colored else stored.values]


def choose_reading(
    found: Survey, palette: Palette | None, unlabelled: Sequence[int] = (), threshold: int | None = None
) -> tuple[Survey, Reading | None, list[str]]:
    """How to read these masks: the survey as read, the reading (None: as stored), and what to say about it.

    A value of `unlabelled` is read as 255. 255 itself is unlabelled where a palette or `unlabelled` says so, or where
    it is at most half of the pixels beside two classes or more; masks of 255 and one other value are binary. UserError
    where the values are no labels, or somebody must say what 255 means.
    """
    if threshold is not None:
        return found, Reading({}, threshold), [f"masks: {threshold} and lighter is class 1, darker is class 0"]
    if (
        found.colored
        and palette is not None
        and {found.value_of(label) for label in palette.labels} >= set(found.pixels)
    ):
        return found, None, []
    grey = is_grey(found)
    found, said = (in_one_channel(found) if grey else found), []
    if found.colored:
        _refuse_segments(found)
        return found, None, []
    if palette is None or not set(found.pixels) <= {*palette.ids, IGNORE}:
        _refuse_smoothed(found)
    ids = {value: IGNORE if value in unlabelled else value for value in found.pixels}
    _refuse_beyond(found, [value for value, id in ids.items() if not 0 <= id <= IGNORE])
    declared = palette is not None and IGNORE in palette.ids
    classes = [value for value, id in ids.items() if id != IGNORE]
    if IGNORE in found.pixels and not declared and IGNORE not in unlabelled:
        two = palette is None or set(palette.ids) <= {0, 1}
        share = found.pixels[IGNORE] / found.pixels.total()
        if len(classes) == 1 and two:
            ids |= {classes[0]: 0, IGNORE: 1}
            said.append(f"masks: {classes[0]} and 255 alone, read as binary: {classes[0]} is class 0, 255 is class 1")
        elif share > MOST_UNLABELLED:
            raise UserError(
                f"255 covers {share:.0%} of the pixels of the masks: does it mean unlabelled, or is it a class? Say"
                " --unlabelled 255, or give each class an id below 255"
            )
    if grey and not said:
        said.append("masks: grey in three channels, read as class ids")
    said += [
        f"masks: {value} is read as unlabelled" for value in unlabelled if value in found.pixels and value != IGNORE
    ]
    if all(value == id for value, id in ids.items()) and not grey:
        return found, None, []
    read = Survey(False)
    for value, id in ids.items():
        read.pixels[id] += found.pixels[value]
        read.files[id] += found.files[value]
        read.example.setdefault(id, found.example[value])
    return read, Reading(ids), said


def _refuse_segments(found: Survey) -> None:
    """UserError where every color but one is in one file alone: segments of panoptic masks, not classes."""
    alone, masks = sum(count == 1 for count in found.files.values()), len(set(found.example.values()))
    if masks >= LEAST_MASKS and len(found.files) >= MANY_COLORS and alone >= len(found.files) - 1:  # black is shared
        raise UserError(
            f"{alone} of {len(found.files)} colors are in one mask alone: these are segments (panoptic masks or"
            f" instances), not classes: {found.listed(found.pixels)}. Give each pixel the id of its segment's category"
        )


def _refuse_smoothed(found: Survey) -> None:
    """UserError where masks hold many values, and nearly all pixels have one of two that lie far apart.

    Masks of many classes hold few of them each.
    """
    low, high = min(found.pixels), max(found.pixels)
    near = sum(n for value, n in found.pixels.items() if min(value - low, high - value) <= (high - low) / 16)
    a_file = found.files.total() / max(found.files.values())  # values that a mask holds, about
    if high - low > IGNORE // 2 and a_file > SMOOTHED and near > 0.8 * found.pixels.total():
        raise UserError(
            f"{len(found.pixels)} grey values, {near / found.pixels.total():.0%} of the pixels near {low} and {high},"
            " as of a mask of two classes that was resized by another filter than NEAREST: segcn import --threshold"
            f" {(low + high + 1) // 2} reads it as dark and light"
        )


def _values_of(path: Path, threshold: int | None) -> tuple[bool, dict[int, int], dict[int, Color]]:
    """Of a mask whether it is colored, the pixels of each value, and their colors by its own palette; UserError."""
    if threshold is not None:
        light = int(light_pixels(path, threshold).sum())
        stored = read_stored_mask(path)
        return False, {value: n for value, n in ((0, stored.values.size - light), (1, light)) if n}, {}
    stored = read_stored_mask(path)
    if stored.lossy:
        raise lossy_error(path)
    pixels = stored.pixels
    if len(pixels) > IGNORE + 1 - stored.colored:
        top = sorted(pixels.items(), key=lambda item: (-item[1], item[0]))[:5]
        shown = ", ".join(f"{f'#{value:06x}' if stored.colored else value} ({count:,} pixels)" for value, count in top)
        kind, cause = "values", f"from {min(pixels)} to {max(pixels)}: is it a depth map, or does it number instances?"
        if stored.colored:
            kind, cause = "colors", "was it smoothed, resized with another filter than NEAREST, or once a JPEG?"
        raise UserError(
            f"{path}: expected at most 255 classes, found {len(pixels):,} {kind}; {cause} The most frequent: {shown}"
        )
    return stored.colored, pixels, stored.own_colors


def _refuse_beyond(found: Survey, values: list[int]) -> None:
    """UserError where there are values that cannot be class ids."""
    if values:
        expected = "expected class ids from 0 to 254, and 255 for unlabelled"
        raise UserError(f"{expected}, found {found.listed(values)}: renumber the classes, or merge rare ones")


def _refuse_no_ids(found: Survey) -> None:
    """UserError where the values cannot be class ids, whatever the palette."""
    _refuse_beyond(found, [value for value in found.pixels if not 0 <= value <= IGNORE])
    if set(found.pixels) <= {0, IGNORE} and IGNORE in found.pixels:
        raise UserError(
            f"expected class ids, found no values but {' and '.join(map(str, sorted(found.pixels)))}, and 255 means"
            " unlabelled; if these are black and white masks, save each as 1-bit, which is read as 0 and 1:"
            ' Image.open(mask).convert("1").save(mask)'
        )


# --- Does a palette fit?


def check_fit(found: Survey, palette: Palette) -> list[str]:
    """Warnings of what the values alone cannot tell; UserError where masks do not fit the palette."""
    if misfit := _misfit(found, palette):
        fitting = [name for name in READY if not _misfit(found, ready(name))]
        fix = f"these ready palettes fit: {', '.join(fitting)}" if fitting else "no ready palette fits"
        raise UserError(f"the masks do not fit this palette: {misfit}; {fix}; without --ready one is proposed")
    if not found.colored:
        _refuse_no_ids(found)
    return list(_twin_warnings(found, palette))


def _misfit(found: Survey, palette: Palette) -> str:
    """Values that the palette lacks, or whose colors in the masks' own palettes are those of other ids; else ""."""
    declared = {found.value_of(label) for label in palette.labels} | (set() if found.colored else {IGNORE})
    undeclared = [value for value in found.pixels if value not in declared]
    if undeclared:
        return f"found {found.listed(undeclared)}"
    ids_of: dict[Color, set[int]] = {}
    for label in palette.labels:
        ids_of.setdefault(label.color, set()).add(label.id)
    moved = [(value, color) for value, color in found.own if value not in ids_of.get(color, {value})]
    if not moved or len(found.own) == 1 or any(color not in ids_of for _, color in found.own):
        return ""
    value, color = moved[0]
    return f"value {value} has the color of id {min(ids_of[color])} in {found.own[moved[0]]}"


def _twin_warnings(found: Survey, palette: Palette) -> Iterator[str]:
    """Masks whose values fit both ways to number the classes: only a look at one of them shows which it is."""
    name = next((name for name in READY if ready(name) == palette), None)
    if found.colored or name not in TWINS or _misfit(found, ready(TWINS[name])):
        return
    here, there = ({label.id: label.name for label in ready(each).labels} for each in (name, TWINS[name]))
    if found.own and all(color == tuple(palette.table[value]) for value, color in found.own):
        return  # the masks' own colors are this palette's
    if IGNORE in found.pixels and IGNORE in here and IGNORE not in there:
        return
    differing = [value for value in found.pixels if value != IGNORE and here[value] != there[value]]
    for value in sorted(differing, key=lambda value: (-found.pixels[value], value))[:1]:
        hint = "; 255 occurs, which is more usual there" if IGNORE in {*found.pixels} & {*there} - {*here} else ""
        yield (
            f"the values fit {TWINS[name]} as well{hint}. Here value {value} ({found.pixels[value]:,} pixels) is"
            f" {here[value]!r}, there it is {there[value]!r}: look at {found.example[value]} before you train"
        )


def _smoothing_warnings(found: Survey) -> list[str]:
    rare = [value for value, pixels in found.pixels.items() if pixels < found.pixels.total() / 1000]
    few = f"{len(rare)} of {len(found.pixels)} colors cover less than 0.1% of the pixels each"
    smoothed = found.colored and len(rare) >= 10 and 2 * len(rare) >= len(found.pixels)
    return [f"{few}: are the edges of the masks smoothed?"] if smoothed else []


# --- Proposing a palette


def propose(found: Survey, names: Sequence[str] | None = None) -> Palette:
    """A palette that reads these masks; UserError where they cannot be masks of class ids or of colors.

    Ids are the values of the masks, in their own colors where all files agree on them; 255 is unlabelled. The colors
    of RGB masks are numbered by their pixels, most first. `names`: those of the classes in the order of their ids.
    """
    unlabelled = []
    if found.colored:
        if len(found.pixels) > IGNORE:
            raise UserError(
                f"expected at most 255 classes, found {len(found.pixels)} colors in all masks: were they smoothed, or"
                f" resized with another filter than NEAREST? The most frequent: {found.listed(found.pixels)}"
            )
        codes = sorted(found.pixels, key=lambda code: (-found.pixels[code], code))
        classes = [(k, color_of(code)) for k, code in enumerate(codes)]
    else:
        _refuse_no_ids(found)
        colors = _own_colors(found)
        if colors is None:  # spread ones, none of them in the files' own palettes, where it would be another value
            taken = {color for _, color in found.own}
            free = (color for color in spread_colors() if color not in taken)
            colors = {value: (0, 0, 0) if value == IGNORE else next(free) for value in sorted(found.pixels)}
        classes = [(value, colors[value]) for value in sorted(found.pixels) if value != IGNORE]
        unlabelled = [Label(IGNORE, "unlabelled", colors[IGNORE], ignore=True)] if IGNORE in colors else []
    if names is not None and len(names) != len(classes):
        ids = ", ".join(f"{id} #{code_of(color):06x}" for id, color in classes[:10])
        more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
        raise UserError(f"--names: expected {len(classes)} names for the classes {ids}{more}, found {len(names)}")
    names = names or [f"class_{id}" for id, _ in classes]
    return Palette((*(Label(id, name, color) for (id, color), name in zip(classes, names, strict=True)), *unlabelled))


def _own_colors(found: Survey) -> dict[int, Color] | None:
    """The colors of the files' own palettes, where these agree on all values and tell them apart."""
    values_of: dict[Color, set[int]] = {}
    colors_of: dict[int, set[Color]] = {}
    for value, color in found.own:
        values_of.setdefault(color, set()).add(value)
        colors_of.setdefault(value, set()).add(color)
    moved = [(color, sorted(values)[:2]) for color, values in values_of.items() if len(values) > 1]
    if moved and any(len(colors) > 1 for colors in colors_of.values()):
        color, (first, second) = moved[0]
        raise UserError(
            f"{found.own[first, color]}: its palette gives the color #{code_of(color):06x} to value {first}, that of"
            f" {found.own[second, color]} to value {second}: an image editor seems to have renumbered each file."
            " Save the masks as RGB, which are read by their colors; or, if their values are right, as grey (mode L)"
        )
    if len(found.own) != len(found.pixels) or len(values_of) != len(colors_of):
        return None
    table = np.array(list(values_of))
    apart = np.abs(table[:, None] - table).max(-1) + 255 * np.eye(len(table), dtype=int)  # [N, N]
    return dict(found.own.keys()) if apart.min() >= TELL_APART else None


@cache
def spread_colors() -> tuple[Color, ...]:
    """Twice 255 colors that lie far apart, black not among them: each is the farthest from all before it.

    Far apart for the eye, by OKLab (https://bottosson.github.io/posts/oklab/), and in the numbers that a network sees.
    """
    levels = np.linspace(0, 255, 9).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)  # [729, 3], black first
    linear = (rgb / 255) ** 2.2
    cones = np.cbrt(linear @ [[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
    lab = cones @ [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
    points = np.hstack([lab, rgb / 255])
    chosen, nearest = [0], np.full(len(rgb), np.inf)
    for _ in range(2 * IGNORE):  # some may be taken
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1)).round(6)
        chosen.append(int(nearest.argmax()))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in rgb[chosen[1:]])


def palette_table_text(palette: Palette, found: Survey, swatches: bool = False) -> list[str]:
    """Id, name, color, share of pixels and number of files of the labels that occur."""
    labels = [label for label in palette.labels if found.pixels[found.value_of(label)]]
    absent = len(palette.labels) - len(labels)
    if not found.colored and IGNORE in found.pixels and IGNORE not in palette.ids:
        labels.append(Label(IGNORE, "(unlabelled)", (0, 0, 0), ignore=True))
    width = max(len(label.name) for label in labels)
    lines = [f"{'id':>4}  {'name':{width}}  {'color':{10 if swatches else 7}}  {'pixels':>7}  {'files':>7}"]
    for label in labels[:TABLE_LINES]:
        swatch = "\x1b[48;2;{};{};{}m  \x1b[0m ".format(*label.color) if swatches else ""
        share = found.pixels[found.value_of(label)] / found.pixels.total()
        name = f"{label.id:4}  {label.name:{width}}  {swatch}#{code_of(label.color):06x}"
        lines.append(f"{name}  {share:7.2%}  {found.files[found.value_of(label)]:7,}{'  ignored' * label.ignore}")
    lines += [f"      and {len(labels) - TABLE_LINES} more"] if len(labels) > TABLE_LINES else []
    return lines + ([f"      and {absent} that occur in no mask"] if absent else [])
