"""What is wrong with a data set, as findings: pure functions from rows and the facts of their files."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segcn.data.doctor.scan import ImageFacts, MaskFacts, dhash
from segcn.data.metadata import Problem, Record, Split
from segcn.data.palette import IGNORE, Palette

NEAR = 4  # bits of 64 in which the hashes of near-duplicates differ at most
BLOCK = 1 << 18  # pairs of hashes compared at once: they fit a cache
KINDS = {  # kind: (severity, title, what to do)
    "metadata": ("error", "line that cannot be read", "mend the line: the three columns, quotes, UTF-8"),
    "repeated": ("error", "row that stands twice", "remove one of them"),
    "path": ("error", "path that leaves the folder", "move the file below the folder of its metadata.csv; write /"),
    "missing": ("error", "file that is missing", "mend the path, or remove the row"),
    "truncated": ("error", "file that is cut short", "copy the file again, or remove the row"),
    "undecodable": ("error", "file that cannot be decoded", "replace the file, or remove the row"),
    "too_large": ("error", "image above the pixel limit", "make image and mask smaller, the mask with NEAREST"),
    "size": ("error", "mask of another size than its image", "resize the mask with NEAREST"),
    "rotation": ("error", "mask not turned as its image is", "turn the mask, or remove the image's EXIF orientation"),
    "lossy_mask": ("error", "mask in a lossy format", "save it as PNG again, from the original labels"),
    "labels": ("error", "label that palette.json lacks", "add the class, or turn those pixels to 255"),
    "caption": ("error", "caption that is empty or no text", "write one, or remove the row"),
    "leak": ("error", "same image in two splits", "keep it in one split, else the test measures memory"),
    "palette": ("error", "split with another palette", "keep one palette.json above the splits"),
    "near_duplicate": ("warning", "nearly the same image in two splits", "look at both; keep one where they match"),
    "duplicate": ("warning", "same image in two rows", "keep one, unless the captions differ on purpose"),
    "exif": ("warning", "EXIF orientation", "store it upright: segcn turns images, not masks; others turn neither"),
    "caption_words": ("warning", "caption without a word", "datasets reads a number as int, and diffusers stops"),
    "caption_long": ("warning", "caption too long for the tokenizer", "put what matters first; the rest is cut off"),
    "class_absent": ("warning", "class that never occurs", "remove it from palette.json, or add rows that show it"),
}


@dataclass(frozen=True)
class Finding:
    """One fault; `row` and `line` are None where it is about the whole data set."""

    kind: str
    message: str
    split: str = ""
    row: int | None = None
    line: int | None = None
    file: str = ""  # relative to the split's folder
    other: tuple[str, int] | None = None  # (split, row) of which this is a copy

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]


class Case(NamedTuple):
    """A row of a split with what is wrong with it as written."""

    split: str
    folder: Path
    record: Record
    problems: Sequence[Problem]

    @property
    def key(self) -> tuple[str, int]:
        return self.split, self.record.row

    @property
    def readable(self) -> bool:
        """Whether its files are looked at: the line is whole, not a repeated one, and its paths stay in the folder."""
        return not any(problem.kind in ("metadata", "repeated", "path") for problem in self.problems)

    def finding(self, kind: str, message: str, file: Path | str = "", other: "Case | None" = None) -> Finding:
        name = str(file.relative_to(self.folder)) if isinstance(file, Path) else file
        return Finding(kind, message, self.split, self.record.row, self.record.line, name, other and other.key)

    def __str__(self) -> str:
        return f"{self.split} line {self.record.line}: {self.record.image_name}"


def cases_of(name: str, split: Split, problems: Iterable[Sequence[Problem]]) -> list[Case]:
    """The rows of a split."""
    return [Case(name, split.folder, *pair) for pair in zip(split.records, problems, strict=True)]


def written_findings(case: Case) -> Iterator[Finding]:
    """Faults of the row as written, and captions without a letter."""
    for problem in case.problems:
        yield case.finding(problem.kind, problem.message, problem.file)
    for caption in case.record.captions if case.readable else ():
        if caption.strip() and not any(letter.isalpha() for letter in caption):
            yield case.finding("caption_words", f"expected words, found {caption.strip()[:80]!r}")


def file_findings(case: Case, image: ImageFacts | None, mask: MaskFacts | None) -> Iterator[Finding]:
    """Faults of the row's files; None where a file is missing, which the row as written says."""
    record = case.record
    for path, facts in ((record.image, image), (record.mask, mask)):
        if facts is not None and facts.fault is not None and not (facts is mask and mask.lossy):
            yield case.finding(*facts.fault, path)
        if facts is not None and facts.orientation != 1:
            yield case.finding("exif", f"stored with EXIF orientation {facts.orientation}", path)
    if mask is not None and mask.lossy:
        seen = f"; {mask.fault.message}" if mask.fault is not None else ""
        yield case.finding("lossy_mask", f"{mask.lossy} compression changes labels{seen}", record.mask)
    if image is not None and mask is not None and image.size and mask.size and image.size != mask.size:
        yield case.finding(*_size_fault(image.size, mask.size, image.orientation), record.mask)


def _size_fault(image: tuple[int, int], mask: tuple[int, int], orientation: int) -> tuple[str, str]:
    expected, found = "{} x {}".format(*image), "{} x {}".format(*mask)
    message = f"expected its image's size, {expected}, found {found}"
    if orientation >= 5 and image == mask[::-1]:
        return "rotation", f"{message}: EXIF orientation {orientation} turns the image, the mask is not turned"
    return "size", message


def long_findings(
    told: Sequence[tuple[Case, str]], tokens: Sequence[int], cut: Callable[[str], str], limit: int
) -> Iterator[Finding]:
    """Captions of more tokens than the text encoder sees, with what it does not see."""
    for (case, caption), count in zip(told, tokens, strict=True):
        if count > limit:
            yield case.finding("caption_long", f"{count} of {limit} tokens; cut off: {cut(caption)!r}")


def copy_findings(cases: Sequence[Case], images: dict[Path, ImageFacts]) -> Iterator[Finding]:
    """Rows whose image has the pixels of an earlier row's: in another split, else in the same one."""
    earlier: dict[tuple, list[Case]] = defaultdict(list)
    for case in cases:
        same = earlier[images[case.record.image].identity]
        elsewhere = [other for other in same if other.split != case.split]
        if same:
            kind, other = ("leak", elsewhere[0]) if elsewhere else ("duplicate", same[0])
            yield case.finding(kind, f"the pixels are those of {other}", case.record.image, other)
        same.append(case)


def near_findings(cases: Sequence[Case], images: dict[Path, ImageFacts]) -> Iterator[Finding]:
    """Rows whose image nearly is one of an earlier split, but not exactly: the nearest one is named."""
    hashes = dhash(np.array([images[case.record.image].thumb for case in cases]).reshape(-1, 8, 9))
    splits = list(dict.fromkeys(case.split for case in cases))
    order = np.array([splits.index(case.split) for case in cases])
    for number in range(1, len(splits)):
        before, here = np.flatnonzero(order < number), np.flatnonzero(order == number)
        for at, found, bits in zip(here, *nearest(hashes[here], hashes[before]), strict=True):
            case, other = cases[int(at)], cases[int(before[found])]
            same = images[case.record.image].identity == images[other.record.image].identity
            if bits <= NEAR and not same:
                message = f"{bits} of 64 hash bits differ from {other}"
                yield case.finding("near_duplicate", message, case.record.image, other)


def nearest(hashes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of uint64 [N] the index of the nearest of uint64 [M], and the bits that differ; O(N + M) memory."""
    best, bits = np.zeros(len(hashes), np.int64), np.full(len(hashes), 65)
    step = max(1, BLOCK // max(1, len(others)))
    for at in range(0, len(hashes) if len(others) else 0, step):
        block = slice(at, at + step)
        differing = np.bitwise_count(hashes[block, None] ^ others)
        best[block] = differing.argmin(1)
        bits[block] = differing.min(1)
    return best, bits


def class_table(palette: Palette, masks: Iterable[MaskFacts]) -> list[dict]:
    """Of each class its pixels, share of all pixels, and number of masks that show it."""
    pixels, shown = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for mask in masks:
        if mask.counts is not None:
            pixels += mask.counts
            shown += mask.counts > 0
    total = max(1, int(pixels.sum()))
    kept = [(label.id, label.name) for label in palette.labels if not label.ignore] + [(IGNORE, "unlabelled")]
    return [
        {
            "id": id,
            "name": name,
            "pixels": int(pixels[id]),
            "share": round(int(pixels[id]) / total, 6),
            "masks": int(shown[id]),
        }
        for id, name in kept
    ]


def absent_findings(tables: dict[str, list[dict]]) -> Iterator[Finding]:
    """Classes of the palette that no mask of a split shows, but for the unlabelled."""
    for split, table in tables.items():
        for entry in table:
            if not entry["masks"] and entry["id"] != IGNORE:
                yield Finding("class_absent", f"{entry['name']} (id {entry['id']}) is in no mask of {split}", split)


def caption_statistics(captions: Sequence[str], tokens: Sequence[int], limit: int) -> dict:
    """How many, how many different, their length in words and tokens, and their most frequent words."""
    words = [caption.lower().split() for caption in captions]
    frequent = Counter(word.strip(".,;:!?\"'()") for line in words for word in set(line))
    return {
        "captions": len(captions),
        "different": len(set(captions)),
        "words": _spread([len(line) for line in words]),
        "tokens": _spread(tokens),
        "token_limit": limit,
        "in_captions": dict(frequent.most_common(30)),
    }


def _spread(values: Sequence[int]) -> dict:
    if not len(values):
        return {}
    return {"least": int(min(values)), "median": float(np.median(values)), "most": int(max(values))}
