"""A palette.json for masks that have none: a ready one that they are checked against, or one proposed from them."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from segcn.config import PaletteConfig
from segcn.errors import UserError
from segcn.labels import IGNORE, Label, Palette
from segcn.masks import code_of, colour_of
from segcn.ready_palettes import READY, check, check_survey, ready, refuse_no_ids, value_of
from segcn.survey import Colour, Survey, mask_files, survey

__all__ = ["READY", "check", "make_palette", "propose", "ready", "spread_colours", "table"]
TELL_APART = 4  # of 255: colours closer than this in every channel look the same
LINES = 30


def propose(paths: Sequence[Path], names: Sequence[str] | None = None) -> Palette:
    """A palette that reads these masks; UserError where they cannot be masks of class ids or of colours.

    Ids are the values of the masks, in their own colours where all files agree on them; 255 is unlabelled. The colours
    of RGB masks are numbered by their pixels, most first. `names`: those of the classes in the order of their ids.
    """
    return _proposal(survey(paths), names)


def make_palette(config: PaletteConfig, log: Callable[[str], None] = print) -> Path:
    """`segcn palette`: survey the masks, log the table and any warnings, and write the palette where none is."""
    palette = ready(config.ready) if config.ready else None
    target = _target(config)
    if config.dataset_name:
        found = survey(mask_files(config.dataset_name, log), log)
        if palette is None:
            warnings, palette = _doubts(found), _proposal(found, _split_names(config.names))
        else:
            warnings = check_survey(found, palette)
        for line in table(palette, found, swatches=sys.stdout.isatty()):
            log(line)
        for warning in warnings:
            log(f"Warning: {warning}")
    assert palette is not None  # without masks `_target` asks for a ready one
    try:
        palette.save(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error}") from None
    return target


def table(palette: Palette, found: Survey, swatches: bool = False) -> list[str]:
    """Id, name, colour, share of pixels and number of files of the labels that occur."""
    labels = [label for label in palette.labels if found.pixels[value_of(label, found)]]
    if not found.coloured and IGNORE in found.pixels and IGNORE not in palette.ids:
        labels.append(Label(IGNORE, "(unlabelled)", (0, 0, 0), ignore=True))
    width = max(len(label.name) for label in labels)
    lines = [f"{'id':>4}  {'name':{width}}  {'colour':{10 if swatches else 7}}  {'pixels':>7}  {'files':>7}"]
    for label in labels[:LINES]:
        red, green, blue = label.colour
        swatch = f"\x1b[48;2;{red};{green};{blue}m  \x1b[0m " if swatches else ""
        share = found.pixels[value_of(label, found)] / found.pixels.total()
        name = f"{label.id:4}  {label.name:{width}}  {swatch}#{code_of(label.colour):06x}"
        ignored = "  ignored" if label.ignore else ""
        lines.append(f"{name}  {share:7.2%}  {found.files[value_of(label, found)]:7,}{ignored}")
    absent = len(palette.labels) - sum(label in palette.labels for label in labels)
    lines += [f"      and {len(labels) - LINES} more"] if len(labels) > LINES else []
    lines += [f"      and {absent} that occur in no mask"] if absent else []
    return lines


@cache
def spread_colours() -> tuple[Colour, ...]:
    """Twice 255 colours that lie far apart, black not among them: each is the farthest from all before it.

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


def _proposal(found: Survey, names: Sequence[str] | None) -> Palette:
    if found.coloured:
        if len(found.pixels) > IGNORE:
            raise UserError(
                f"expected at most 255 classes, found {len(found.pixels)} colours in all masks: were they smoothed, or"
                f" resized with another filter than NEAREST? The most frequent: {found.told(found.pixels)}"
            )
        codes = sorted(found.pixels, key=lambda code: (-found.pixels[code], code))
        classes = [(k, colour_of(code)) for k, code in enumerate(codes)]
        unlabelled = []
    else:
        refuse_no_ids(found)
        colours = _own_colours(found) or _new_colours(found)
        classes = [(value, colours[value]) for value in sorted(found.pixels) if value != IGNORE]
        unlabelled = [Label(IGNORE, "unlabelled", colours[IGNORE], ignore=True)] if IGNORE in colours else []
    if names is not None and len(names) != len(classes):
        ids = ", ".join(f"{id} #{code_of(colour):06x}" for id, colour in classes[:10])
        more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
        raise UserError(f"--names: expected {len(classes)} names for the classes {ids}{more}, found {len(names)}")
    named = names or [f"class_{id}" for id, _ in classes]
    return Palette((*(Label(id, name, colour) for (id, colour), name in zip(classes, named, strict=True)), *unlabelled))


def _own_colours(found: Survey) -> dict[int, Colour] | None:
    """The colours of the files' own palettes, where these agree on all values and tell them apart."""
    values_of: dict[Colour, set[int]] = {}
    colours_of: dict[int, set[Colour]] = {}
    for value, colour in found.own:
        values_of.setdefault(colour, set()).add(value)
        colours_of.setdefault(value, set()).add(colour)
    moved = [(colour, sorted(values)[:2]) for colour, values in values_of.items() if len(values) > 1]
    if moved and any(len(colours) > 1 for colours in colours_of.values()):
        colour, (first, second) = moved[0]
        raise UserError(
            f"{found.own[first, colour]}: its palette gives the colour #{code_of(colour):06x} to value {first}, that of"
            f" {found.own[second, colour]} to value {second}: an image editor seems to have numbered each file anew."
            " Save the masks as RGB, which are read by their colours; or, if their values are right, as grey (mode L)"
        )
    if len(found.own) != len(found.pixels) or len(values_of) != len(colours_of):
        return None
    table = np.array(list(values_of))
    apart = np.abs(table[:, None] - table).max(-1) + 255 * np.eye(len(table), dtype=int)  # [N, N]
    return dict(found.own.keys()) if apart.min() >= TELL_APART else None


def _new_colours(found: Survey) -> dict[int, Colour]:
    """Spread colours, none of them in the files' own palettes, where it would stand for another value."""
    taken = {colour for _, colour in found.own}
    colours = (colour for colour in spread_colours() if colour not in taken)
    return {value: (0, 0, 0) if value == IGNORE else next(colours) for value in sorted(found.pixels)}


def _doubts(found: Survey) -> list[str]:
    rare = [value for value, pixels in found.pixels.items() if pixels < found.pixels.total() / 1000]
    if not found.coloured or len(rare) < 10 or 2 * len(rare) < len(found.pixels):
        return []
    return [
        f"{len(rare)} of {len(found.pixels)} colours cover less than 0.1% of the pixels each:"
        " are the edges of the masks smoothed?"
    ]


def _target(config: PaletteConfig) -> Path:
    """Where the palette goes; UserError for settings that do not go together, or where a file is."""
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
        raise UserError(
            f"{target} is there already and is never overwritten: remove it, or name another file with --output"
        )
    return target


def _split_names(names: str | None) -> list[str] | None:
    return [name.strip() for name in names.split(",")] if names else None
