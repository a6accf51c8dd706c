"""What `segcn validate` finds wrong: pure functions from the facts about rows and files to findings."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np

from segcn.data.captions import common_words
from segcn.data.colors import said_alike
from segcn.data.config import DoctorConfig
from segcn.data.doctor.scan import Case, Facts, ImageFacts, MaskFacts, dhash, scan_dataset
from segcn.data.files import DEEP
from segcn.data.palette import IGNORE, Palette

LEAST_LEVELS = 4  # between the darkest and the brightest value of an image that shows something
NEAR = 4  # bits of 64 in which the hashes of near-duplicates differ at most
BLOCK = 1 << 18  # pairs of hashes compared at once: they fit a cache
FAULTS = {  # kind: (severity, title, what to do)
    "metadata": ("error", "line that cannot be read", "fix the line: the three columns, quotes, UTF-8"),
    "repeated": ("error", "row that occurs twice", "remove one of them"),
    "path": ("error", "path that leaves the folder", "move the file below the folder of its metadata.csv; write /"),
    "missing": ("error", "file that is missing", "fix the path, or remove the row"),
    "truncated": ("error", "file that is cut short", "copy the file again, or remove the row"),
    "undecodable": ("error", "file that cannot be decoded", "replace the file, or remove the row"),
    "too_large": ("error", "image above the pixel limit", "make image and mask smaller, the mask with NEAREST"),
    "size": ("error", "mask of another size than its image", "resize the mask with NEAREST"),
    "rotation": ("error", "mask not turned as its image is", "turn the mask, or remove the image's EXIF orientation"),
    "lossy_mask": ("error", "mask in a lossy format", "save it as PNG again, from the original labels"),
    "flat": (
        "error",
        "image without content",
        "one color, or nearly: convert it again; segcn import --window for scans",
    ),
    "dark": ("error", "image that comes out dark", "few of 16 bits are used: segcn import --window, or save 8 bits"),
    "white_masks": ("error", "masks of 0 and 255 alone", "255 is unlabelled: segcn import reads such masks as 0 and 1"),
    "labels": ("error", "label that palette.json lacks", "add the class, or turn those pixels to 255"),
    "caption": ("error", "caption that is empty or no text", "write one, or remove the row"),
    "leak": ("error", "same image in two splits", "keep it in one split, else the test measures memory"),
    "palette": ("error", "split with another palette", "keep one palette.json above the splits"),
    "near_duplicate": ("warning", "nearly the same image in two splits", "look at both; keep one where they match"),
    "duplicate": ("warning", "same image in two rows", "keep one, unless the captions differ on purpose"),
    "exif": ("warning", "EXIF orientation", "store it upright: segcn turns images, not masks; others turn neither"),
    "alpha": ("warning", "image with transparent pixels", "alpha is left out: their hidden color is used"),
    "unlabelled": (
        "warning",
        "most pixels are unlabelled",
        "is 255 a class? say so in palette.json: id 255, ignore true",
    ),
    "caption_words": ("warning", "caption without a word", "datasets reads a number as int, and diffusers stops"),
    "caption_long": ("warning", "caption too long for the tokenizer", "put what matters first; the rest is cut off"),
    "colors": ("warning", "classes that look alike", "change colors in palette.json, before the training"),
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
        return FAULTS[self.kind][0]


@dataclass(frozen=True)
class Checkup:
    """All that was found out about a data set."""

    facts: Facts
    findings: tuple[Finding, ...]  # in the order of FAULTS, errors first
    classes: dict[str, list[dict]]  # of each split
    captions: dict[str, dict]  # of each split
    sizes: dict[str, Counter]  # of each split, images by (width, height)

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def files(self) -> int:
        """How many were decoded."""
        return len(self.facts.images) + len(self.facts.masks)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """That of each split; rows whose files are not looked at count by their line alone."""
        readable = {name: tuple(case.record for case in self.facts.of_split(name) if case.readable)
                    for name in self.facts.splits}  # fmt: skip
        return {k: replace(split, records=readable[k]).fingerprint for k, split in self.facts.splits.items()}

    @property
    def fingerprint(self) -> str:
        """That of the only split, or of all together."""
        each = list(self.fingerprints.values())
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()[:16]

    @property
    def bad_rows(self) -> dict[tuple[str, int], list[Finding]]:
        """The errors of every row that has one, by (split, row)."""
        rows = defaultdict(list)
        for finding in self.errors:
            if finding.row is not None:
                rows[finding.split, finding.row].append(finding)
        return dict(rows)

    @property
    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings in the order of FAULTS."""
        return {kind: list(found) for kind, found in groupby(self.findings, lambda finding: finding.kind)}


def examine(config: DoctorConfig, log: Callable[[str], None] = print) -> Checkup:
    """Check a whole data set, all its splits; UserError only where there is nothing to check."""
    facts = scan_dataset(config, log)
    classes, captions, sizes = {}, {}, {}
    for name, split in facts.splits.items():
        cases = [case for case in facts.of_split(name) if case.readable]
        masks = (facts.masks[case.record.mask] for case in cases if case.record.mask in facts.masks)
        classes[name] = class_table(split.palette, masks)
        captions[name] = caption_statistics(facts, name)
        known = (facts.images[case.record.image].size for case in cases if case.record.image in facts.images)
        sizes[name] = Counter(size for size in known if size is not None)
    found = [*row_findings(facts), *copy_findings(facts), *near_findings(facts), *split_findings(facts, classes)]
    order = list(FAULTS)
    found.sort(key=lambda finding: order.index(finding.kind))
    return Checkup(facts, tuple(found), classes, captions, sizes)


def row_findings(facts: Facts) -> Iterator[Finding]:
    """Faults of each row as it is written, of its captions and of its files."""
    for case in facts.cases:
        for problem in case.problems:
            yield _of(case, problem.kind, problem.message, problem.file)
        for caption in case.record.captions:
            if case.readable and caption.strip() and not any(letter.isalpha() for letter in caption):
                yield _of(case, "caption_words", f"expected words, found {caption.strip()[:80]!r}")
            tokens, cut_off = facts.tokens.get(caption, (0, ""))
            if tokens > facts.token_limit:
                yield _of(case, "caption_long", f"{tokens} of {facts.token_limit} tokens; cut off: {cut_off!r}")
        if case.readable:
            yield from _file_findings(case, facts.images.get(case.record.image), facts.masks.get(case.record.mask))


def _of(case: Case, kind: str, message: str, file: str = "", other: Case | None = None) -> Finding:
    return Finding(kind, message, case.split, case.record.row, case.record.line, file, other and other.key)


def _file_findings(case: Case, image: ImageFacts | None, mask: MaskFacts | None) -> Iterator[Finding]:
    """Faults of the row's files; None where a file is missing, which the row as written says."""
    record = case.record
    for name, facts in ((record.image_name, image), (record.mask_name, mask)):
        if facts is not None and facts.fault is not None and not (facts is mask and mask.lossy):
            yield _of(case, facts.fault.kind, facts.fault.message, name)
        if facts is not None and facts.orientation != 1:
            yield _of(case, "exif", f"stored with EXIF orientation {facts.orientation}", name)
    if image is not None and image.fault is None:
        if image.deepest is not None and image.deepest < DEEP:
            yield _of(case, "dark", f"its largest number is {image.deepest} of 65535", record.image_name)
        elif image.levels < LEAST_LEVELS:
            message = f"its darkest and brightest value are {image.levels} of 255 apart"
            yield _of(case, "flat", message, record.image_name)
        if image.transparent:
            yield _of(case, "alpha", "some pixels are transparent", record.image_name)
    if mask is not None and mask.lossy:
        seen = f"; {mask.fault.message}" if mask.fault is not None else ""
        yield _of(case, "lossy_mask", f"{mask.lossy} compression changes labels{seen}", record.mask_name)
    if image is not None and mask is not None and image.size and mask.size and image.size != mask.size:
        expected, found = "{} x {}".format(*image.size), "{} x {}".format(*mask.size)
        kind, message = "size", f"expected its image's size, {expected}, found {found}"
        if image.orientation >= 5 and image.size == mask.size[::-1]:
            kind = "rotation"
            message += f": EXIF orientation {image.orientation} turns the image, the mask is not turned"
        yield _of(case, kind, message, record.mask_name)


def _decoded(facts: Facts) -> list[tuple[Case, ImageFacts]]:
    """The rows whose images could be decoded, and show something."""
    found = ((case, facts.images.get(case.record.image)) for case in facts.cases if case.readable)
    return [(case, image) for case, image in found
            if image is not None and image.fault is None and image.levels >= LEAST_LEVELS]  # fmt: skip


def copy_findings(facts: Facts) -> Iterator[Finding]:
    """Rows whose image has the pixels of an earlier row's: in another split, else in the same one."""
    earlier: dict[tuple, list[Case]] = defaultdict(list)
    for case, image in _decoded(facts):
        same = earlier[image.identity]
        elsewhere = [other for other in same if other.split != case.split]
        if same:
            kind, other = ("leak", elsewhere[0]) if elsewhere else ("duplicate", same[0])
            yield _of(case, kind, f"the pixels are those of {other}", case.record.image_name, other)
        same.append(case)


def near_findings(facts: Facts) -> Iterator[Finding]:
    """Rows whose image nearly is one of an earlier split, but not exactly: the nearest one is named."""
    decoded = _decoded(facts)
    hashes = dhash(np.array([image.thumb for _, image in decoded]).reshape(-1, 8, 9))
    splits = list(dict.fromkeys(case.split for case, _ in decoded))
    order = np.array([splits.index(case.split) for case, _ in decoded])
    for number in range(1, len(splits)):
        before, here = np.flatnonzero(order < number), np.flatnonzero(order == number)
        for at, found, bits in zip(here, *nearest_hashes(hashes[here], hashes[before]), strict=True):
            (case, image), (other, other_image) = decoded[int(at)], decoded[int(before[found])]
            if bits <= NEAR and image.identity != other_image.identity:
                message = f"{bits} of 64 hash bits differ from {other}"
                yield _of(case, "near_duplicate", message, case.record.image_name, other)


def nearest_hashes(hashes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of uint64 [N] the index of the nearest of uint64 [M], and the bits that differ; O(N + M) memory."""
    best, bits = np.zeros(len(hashes), np.int64), np.full(len(hashes), 65)
    step = max(1, BLOCK // max(1, len(others)))
    for at in range(0, len(hashes) if len(others) else 0, step):
        block = slice(at, at + step)
        differing = np.bitwise_count(hashes[block, None] ^ others)
        best[block], bits[block] = differing.argmin(1), differing.min(1)
    return best, bits


def split_findings(facts: Facts, classes: dict[str, list[dict]]) -> Iterator[Finding]:
    """Splits with another palette than the first one, and classes of the palette that no mask of a split shows."""
    first, *_ = facts.splits
    ids = {entry["id"] for entry in classes[first] if entry["masks"]} & set(facts.splits[first].palette.ids)
    lines = said_alike(facts.splits[first].palette, ids) if ids - {IGNORE} else []
    yield from (Finding("colors", line, first) for line in lines)
    for name, split in facts.splits.items():
        shown = {entry["id"]: entry["share"] for entry in classes[name] if entry["masks"]}
        if IGNORE in shown and IGNORE not in split.palette.ids:
            if len(shown) == 2 and len(split.palette.class_names) > 1:
                message = f"the masks of {name} hold {min(shown)} and 255 alone, and 255 means unlabelled"
                yield Finding("white_masks", message, name)
            elif shown[IGNORE] > 0.5:
                yield Finding("unlabelled", f"{shown[IGNORE]:.0%} of the pixels of {name} are 255", name)
        if split.palette.fingerprint != facts.splits[first].palette.fingerprint:
            yield Finding("palette", f"{name} has another palette.json than {first}", name)
        for entry in classes[name]:
            if not entry["masks"] and entry["id"] != IGNORE:
                yield Finding("class_absent", f"{entry['name']} (id {entry['id']}) is in no mask of {name}", name)


def class_table(palette: Palette, masks: Iterable[MaskFacts]) -> list[dict]:
    """Of each class its pixels, share of all pixels, and number of masks that show it."""
    pixels, shown = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for mask in masks:
        if mask.counts is not None:
            pixels += mask.counts
            shown += mask.counts > 0
    total, table = max(1, int(pixels.sum())), []
    for id, name in [(x.id, x.name) for x in palette.labels if not x.ignore] + [(IGNORE, "unlabelled")]:
        share = round(int(pixels[id]) / total, 6)
        table.append({"id": id, "name": name, "pixels": int(pixels[id]), "share": share, "masks": int(shown[id])})
    return table


def caption_statistics(facts: Facts, name: str) -> dict:
    """Of a split's captions how many, how many different, their length in words and tokens, and frequent words."""
    captions = [caption for case in facts.of_split(name) for caption in case.record.captions if caption.strip()]
    return {
        "captions": len(captions),
        "different": len(set(captions)),
        "words": _spread([len(caption.split()) for caption in captions]),
        "tokens": _spread([facts.tokens[caption][0] for caption in captions]),
        "token_limit": facts.token_limit,
        "in_captions": dict(common_words(captions, 30)),
    }


def _spread(values: Sequence[int]) -> dict:
    return {"least": min(values), "median": float(np.median(values)), "most": max(values)} if values else {}
