"""The label contract: every class of a data set with its id, name and color."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from segcn.utils.errors import UserError

# --- labels: The label contract: every class of a data set with its id, name and color.

IGNORE = 255


@dataclass(frozen=True)
class Label:
    """One class: its id in the masks, its name, its color in the control image; `ignore`: unlabelled."""

    id: int
    name: str
    color: tuple[int, int, int]
    ignore: bool = False


@dataclass(frozen=True)
class Palette:
    """Every label of a data set; UserError unless ids, names and colors are each in range and unique."""

    labels: tuple[Label, ...]

    def __post_init__(self):
        if not any(not label.ignore for label in self.labels):
            raise UserError("the palette has no class: expected 1 to 255 labels without ignore")
        for label in self.labels:
            _check_label(label)
        for key in ("id", "name"):
            _check_unique([getattr(label, key) for label in self.labels], key)
        ignored = {label.color for label in self.labels if label.ignore}  # these may share one
        _check_unique([*(label.color for label in self.labels if not label.ignore), *ignored], "color")

    @classmethod
    def load(cls, path: str | Path) -> "Palette":
        """Read palette.json: {"labels": [{"id": 0, "name": "sky", "color": [135, 206, 235]}, ...]}."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))["labels"]
            return cls(tuple(_label(entry) for entry in entries))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            form = '{"labels": [{"id": 0, "name": "sky", "color": [135, 206, 235]}, ...]}'
            raise UserError(f"{path}: expected {form}, found {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write palette.json, one label a line."""
        Path(path).write_text(self._json() + "\n", encoding="utf-8")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels that are not ignored."""
        return tuple(label.name for label in self.labels if not label.ignore)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(label.id for label in self.labels)

    @property
    def num_classes(self) -> int:
        """How many logits a segmenter needs: the highest id that is not ignored, plus one."""
        return max(label.id for label in self.labels if not label.ignore) + 1

    @cached_property
    def table(self) -> np.ndarray:
        """The color of every id, uint8 [256, 3]; undeclared ids, 255 among them, are black."""
        table = np.zeros((256, 3), np.uint8)
        for label in self.labels:
            table[label.id] = label.color
        table.setflags(write=False)
        return table

    @cached_property
    def class_of_id(self) -> np.ndarray:
        """What a stored value is read as, int16 [256]: itself, 255 where ignored, -1 where undeclared."""
        classes = np.full(256, -1, np.int16)
        classes[IGNORE] = IGNORE
        for label in self.labels:
            classes[label.id] = IGNORE if label.ignore else label.id
        return classes

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any id, name, color or ignore."""
        return hashlib.sha256(self._json().encode()).hexdigest()[:16]

    def _json(self) -> str:
        lines = [json.dumps(_entry(label), ensure_ascii=False) for label in self.labels]
        return '{"labels": [\n  ' + ",\n  ".join(lines) + "\n]}"


def find_palette(folder: str | Path) -> Path:
    """The palette.json of a data set folder: its own, else its parent's; UserError where neither has one."""
    folder = Path(folder)
    for candidate in (folder / "palette.json", folder.absolute().parent / "palette.json"):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{folder}: no palette.json here or in the folder above, which gives each class of the masks an id, a name"
        f" and a color; segcn palette {folder} proposes one from the masks"
    )


def _label(entry: dict) -> Label:
    entry = {"color" if key == "colour" else key: value for key, value in dict(entry).items()}
    unknown = set(entry) - {"id", "name", "color", "ignore"}
    if unknown:
        raise UserError(f"label {entry}: expected the keys id, name, color and ignore, found also {sorted(unknown)}")
    color = entry["color"]
    return Label(
        entry["id"],
        entry["name"],
        tuple(color) if isinstance(color, list) else color,
        entry.get("ignore", False),
    )


def _entry(label: Label) -> dict:
    entry = {"id": label.id, "name": label.name, "color": list(label.color)}
    return entry | ({"ignore": True} if label.ignore else {})


def _check_label(label: Label) -> None:
    if not isinstance(label.ignore, bool):
        raise UserError(f"label {label.name!r}: expected ignore true or false, found {label.ignore!r}")
    highest = IGNORE if label.ignore else IGNORE - 1
    if not _is_byte(label.id) or label.id > highest:
        raise UserError(
            f"label {label.name!r}: expected an id from 0 to 254 (at most 255 classes; 255 is unlabelled"
            f' and needs "ignore": true), found {label.id!r}'
        )
    if not isinstance(label.name, str) or not label.name.strip():
        raise UserError(f"label {label.id}: expected a name, found {label.name!r}")
    if not isinstance(label.color, tuple) or len(label.color) != 3 or not all(map(_is_byte, label.color)):
        raise UserError(f"label {label.name!r}: expected a color of three numbers from 0 to 255, found {label.color!r}")


def _is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255


def _check_unique(values: list, key: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"expected a different {key} for every label, found {value!r} {values.count(value)} times")


# --- modelcard: The model card of a run, README.md in its folder: what it paints from, the data, the training and how good it is.


def palette_table(palette: Palette) -> str:
    """Id, name and color of every label."""
    rows = ["| id | name | color |", "|---|---|---|"]
    for label in palette.labels:
        name = label.name.replace("|", "\\|") + (" (ignored)" if label.ignore else "")
        rows.append(f"| {label.id} | {name} | `#{''.join(f'{value:02x}' for value in label.color)}` |")
    return "\n".join(rows)
