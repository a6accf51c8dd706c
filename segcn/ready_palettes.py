"""The ready palettes of known benchmarks, and whether masks fit them."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from segcn.errors import UserError
from segcn.labels import IGNORE, Label, Palette
from segcn.masks import code_of
from segcn.survey import Colour, Survey, survey

# The colours are those of the benchmarks. Where two classes share one, the later class has the nearest free colour that
# is as far from all others as they usually are: 1 in ADE20K, 9 in COCO-Stuff, 1 ignored label in Cityscapes.
READY = (
    "ade20k",
    "ade20k-from-0",
    "cityscapes",
    "cityscapes-labelids",
    "voc",
    "coco-stuff",
    "coco-stuff-from-0",
    "binary",
)
FOLDER = Path(__file__).parent / "palettes"
TWINS = {"ade20k": "ade20k-from-0", "cityscapes": "cityscapes-labelids", "coco-stuff": "coco-stuff-from-0"}
TWINS |= {second: first for first, second in TWINS.items()}  # two ways to number the same classes


@cache
def ready(name: str) -> Palette:
    """A ready palette; UserError for an unknown name lists all of them."""
    if name not in READY:
        raise UserError(f"no ready palette {name!r}; there are {', '.join(READY)}")
    return Palette.load(FOLDER / f"{name}.json")


def check(paths: Sequence[Path], palette: Palette) -> list[str]:
    """Warnings of what the values alone cannot tell; UserError where masks do not fit the palette."""
    return check_survey(survey(paths), palette)


def value_of(label: Label, found: Survey) -> int:
    """What stands for a label in the masks: its id, or its colour as 0xRRGGBB."""
    return code_of(label.colour) if found.coloured else label.id


def refuse_no_ids(found: Survey) -> None:
    """UserError where the values cannot be class ids, whatever the palette."""
    beyond = [value for value in found.pixels if not 0 <= value <= IGNORE]
    if beyond:
        raise UserError(
            f"expected class ids from 0 to 254, and 255 for unlabelled, found {found.told(beyond)}:"
            " renumber the classes, or merge rare ones"
        )
    if set(found.pixels) <= {0, IGNORE} and IGNORE in found.pixels:
        raise UserError(
            f"expected class ids, found no values but {' and '.join(map(str, sorted(found.pixels)))}, and 255 means"
            " unlabelled; if these are black and white masks, save each as 1-bit, which is read as 0 and 1:"
            ' Image.open(mask).convert("1").save(mask)'
        )


def check_survey(found: Survey, palette: Palette) -> list[str]:
    """As `check`, of masks that are counted already."""
    undeclared = _undeclared(found, palette)
    if undeclared or _renumbered(found, palette):
        fitting = [name for name in READY if _fits(found, ready(name))]
        told = f"found {found.told(undeclared)}" if undeclared else _renumbered(found, palette)
        mend = f"these ready palettes fit: {', '.join(fitting)}" if fitting else "no ready palette fits"
        raise UserError(f"the masks do not fit this palette: {told}; {mend}; without --ready one is proposed")
    if not found.coloured:
        refuse_no_ids(found)
    return list(_twin_warnings(found, palette))


def _undeclared(found: Survey, palette: Palette) -> list[int]:
    declared = {value_of(label, found) for label in palette.labels} | (set() if found.coloured else {IGNORE})
    return [value for value in found.pixels if value not in declared]


def _renumbered(found: Survey, palette: Palette) -> str:
    """Why the masks' own palettes say that their values are numbered in another way; "" where they do not."""
    ids_of: dict[Colour, set[int]] = {}
    for label in palette.labels:
        ids_of.setdefault(label.colour, set()).add(label.id)
    moved = [(value, colour) for value, colour in found.own if value not in ids_of.get(colour, {value})]
    if not moved or len(found.own) == 1 or any(colour not in ids_of for _, colour in found.own):
        return ""
    value, colour = moved[0]
    return f"value {value} has the colour of id {min(ids_of[colour])} in {found.own[moved[0]]}"


def _fits(found: Survey, palette: Palette) -> bool:
    return not _undeclared(found, palette) and not _renumbered(found, palette)


def _twin_warnings(found: Survey, palette: Palette) -> Iterator[str]:
    """Masks whose values fit both ways to number the classes: only a look at one of them tells which it is."""
    name = next((name for name in READY if ready(name) == palette), None)
    if found.coloured or name not in TWINS or not _fits(found, ready(TWINS[name])):
        return
    here, there = ({label.id: label.name for label in ready(each).labels} for each in (name, TWINS[name]))
    if found.own and all(colour == tuple(palette.table[value]) for value, colour in found.own):
        return  # the masks' own colours are this palette's
    if IGNORE in found.pixels and IGNORE in here and IGNORE not in there:
        return
    differing = [value for value in found.pixels if value != IGNORE and here[value] != there[value]]
    for value in sorted(differing, key=lambda value: (-found.pixels[value], value))[:1]:
        hint = "; 255 occurs, which is more usual there" if IGNORE in {*found.pixels} & {*there} - {*here} else ""
        yield (
            f"the values fit {TWINS[name]} as well{hint}. Here value {value} ({found.pixels[value]:,} pixels) is"
            f" {here[value]!r}, there it is {there[value]!r}: look at {found.example[value]} before you train"
        )
