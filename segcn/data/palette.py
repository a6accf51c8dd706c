"""The label contract: every class of a data set with its id, name and color."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from segcn.utils.errors import UserError

IGNORE = 255
FORM = '{"labels": [{"id": 0, "name": "sky", "color": [135, 206, 235]}, ...]}'


@dataclass(frozen=True)
class Label:
    """One class: its id in the masks, its name, its color in the control image; `ignore`: unlabelled.

    mirror: the id that the class has in a mirrored image, of the right lung that of the left one; none: by its name.
    words: what captions call the class besides its name: lake and river for water.
    UserError for what is out of range.
    """

    id: int
    name: str
    color: tuple[int, int, int]
    ignore: bool = False
    mirror: int | None = None
    words: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.ignore, bool):
            raise UserError(f"label {self.name!r}: expected ignore true or false, found {self.ignore!r}")
        if not _is_byte(self.id) or self.id > IGNORE - (not self.ignore):
            raise UserError(
                f"label {self.name!r}: expected an id from 0 to 254 (at most 255 classes; 255 is unlabelled"
                f' and needs "ignore": true), found {self.id!r}'
            )
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"label {self.id}: expected a name, found {self.name!r}")
        if not isinstance(self.color, tuple) or len(self.color) != 3 or not all(map(_is_byte, self.color)):
            raise UserError(f"label {self.name!r}: expected a color, three numbers from 0 to 255, found {self.color!r}")
        if not isinstance(self.words, tuple) or not all(isinstance(word, str) and word.strip() for word in self.words):
            raise UserError(f"label {self.name!r}: expected words, a list of texts, found {self.words!r}")


@dataclass(frozen=True)
class Palette:
    """Every label of a data set; UserError unless ids, names and colors are unique and there is a class."""

    labels: tuple[Label, ...]

    def __post_init__(self):
        if not self.class_names:
            raise UserError("the palette has no class: expected 1 to 255 labels without ignore")
        ignored = {label.color for label in self.labels if label.ignore}  # these may share one
        colors = [*(label.color for label in self.labels if not label.ignore), *ignored]
        for key, values in (("id", self.ids), ("name", self.names), ("color", colors)):
            for value in values:
                if (count := values.count(value)) > 1:
                    raise UserError(f"expected a different {key} for every label, found {value!r} {count} times")
        mirrors = {label.id: label.mirror for label in self.labels if label.mirror is not None}
        for id, other in mirrors.items():
            if other not in self.ids or mirrors.get(other, id) != id:
                raise UserError(f"label {id}: expected as mirror the id of a label whose mirror is {id}, found {other}")

    @classmethod
    def load(cls, path: str | Path) -> "Palette":
        """Read palette.json: {"labels": [{"id": 0, "name": "sky", "color": [135, 206, 235]}, ...]}.

        "colour" is read as "color". UserError for another form, and for what a label or a palette refuses.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))["labels"]
            return cls(tuple(map(_label_of, entries)))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected {FORM}, found {type(error).__name__}: {error}") from None

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
        """16 hexadecimal digits that change with any id, name, color, ignore or mirror; words are only for captions."""
        return hashlib.sha256(self._json(words=False).encode()).hexdigest()[:16]

    def _json(self, words: bool = True) -> str:
        lines = []
        for label in self.labels:
            entry = {"id": label.id, "name": label.name, "color": list(label.color)}
            entry |= {"ignore": True} if label.ignore else {}
            entry |= {} if label.mirror is None else {"mirror": label.mirror}
            entry |= {"words": list(label.words)} if words and label.words else {}
            lines.append(json.dumps(entry, ensure_ascii=False))
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


def palette_table(palette: Palette) -> str:
    """Id, name and color of every label, as a Markdown table."""
    rows = ["| id | name | color |", "|---|---|---|"]
    for label in palette.labels:
        name = label.name.replace("|", "\\|") + (" (ignored)" if label.ignore else "")
        rows.append(f"| {label.id} | {name} | `#{bytes(label.color).hex()}` |")
    return "\n".join(rows)


def _label_of(entry: dict) -> Label:
    entry = {"color" if key == "colour" else key: value for key, value in dict(entry).items()}
    unknown = set(entry) - {"id", "name", "color", "ignore", "mirror", "words"}
    if unknown:
        expected = "expected the keys id, name, color, ignore, mirror and words"
        raise UserError(f"label {entry}: {expected}, found also {sorted(unknown)}")
    color = entry["color"]
    color = tuple(color) if isinstance(color, list) else color
    words = entry.get("words", ())
    words = tuple(words) if isinstance(words, list) else words
    return Label(entry["id"], entry["name"], color, entry.get("ignore", False), entry.get("mirror"), words)


def _is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255
