"""The data set doctor: decodes every file once and collects every fault."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from os.path import isfile, relpath
from pathlib import Path

from segcn.data.config import DoctorConfig
from segcn.data.doctor import findings
from segcn.data.doctor.findings import Case, Finding
from segcn.data.doctor.scan import ImageFacts, MaskFacts, scan_files
from segcn.data.metadata import COLUMNS, Split, find_splits, scan_split, write_csv
from segcn.data.palette import Palette
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS

# --- doctor: The data set doctor: decodes every file once and collects every fault.


@dataclass(frozen=True)
class Checkup:
    """All that was found out about a data set."""

    dataset: Path
    splits: dict[str, Split]
    cases: tuple[Case, ...]
    findings: tuple[Finding, ...]
    classes: dict[str, list[dict]]  # of each split
    captions: dict[str, dict]  # of each split
    sizes: dict[str, Counter]  # of each split, images by (width, height)
    files: int
    seconds: float  # of decoding

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """That of each split; rows whose files are not looked at count by their line alone."""
        return {
            name: replace(
                split, records=tuple(case.record for case in _of_split(name, self.cases) if case.readable)
            ).fingerprint
            for name, split in self.splits.items()
        }

    @property
    def fingerprint(self) -> str:
        """That of the only split, or of all together."""
        each = list(self.fingerprints.values())
        return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()[:16]

    @property
    def bad_rows(self) -> dict[tuple[str, int], list[Finding]]:
        """The errors of every row that has one, by (split, row)."""
        rows: dict[tuple[str, int], list[Finding]] = {}
        for finding in self.errors:
            if finding.row is not None:
                rows.setdefault((finding.split, finding.row), []).append(finding)
        return rows


def examine(config: DoctorConfig, log: Callable[[str], None] = print) -> Checkup:
    """Check a whole data set, all its splits; UserError only where there is nothing to check."""
    if not config.dataset_name:
        raise UserError("segcn validate needs a data set: segcn validate DATASET")
    tokenizer = _load_tokenizer(config.pretrained_model_name_or_path)
    scanned = {name: scan_split(metadata) for name, metadata in find_splits(config.dataset_name).items()}
    splits = {name: split for name, (split, _) in scanned.items()}
    cases = [case for name, pair in scanned.items() for case in findings.cases_of(name, *pair)]
    if not cases:
        raise UserError(f"{config.dataset_name}: expected at least one row, found none")
    began = time.monotonic()
    images, masks = _scan_files(cases, splits, config.max_pixels, log)
    seconds = time.monotonic() - began
    classes = {
        name: findings.class_table(split.palette, _masks_of(name, cases, masks)) for name, split in splits.items()
    }
    found = [*_findings(cases, images, masks), *_palette_findings(splits), *findings.absent_findings(classes)]
    long, captions = _captions(cases, splits, tokenizer)
    order = list(findings.KINDS)
    found = sorted([*found, *long], key=lambda finding: order.index(finding.kind))
    return Checkup(
        Path(config.dataset_name),
        splits,
        tuple(cases),
        tuple(found),
        classes,
        captions,
        {name: _sizes(_of_split(name, cases), images) for name in splits},
        len(images) + len(masks),
        seconds,
    )


def find_report(split: Split) -> tuple[Path, int] | None:
    """The newest doctor.html below outputs/ on these very rows and files, and how many errors it has in them."""
    found = []
    for path in (OUTPUTS / "doctor").glob("*/doctor.json"):
        try:
            splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError):  # damaged: the files are decoded again
            continue
        for told in splits.values():
            if told["fingerprint"] == split.fingerprint:
                found.append((path.stat().st_mtime, path.with_suffix(".html"), told["errors"]))
    return max(found)[1:] if found else None


def default_folder(checkup: Checkup) -> Path:
    """Where the report goes unless told."""
    return OUTPUTS / "doctor" / f"{checkup.dataset.absolute().name}-{checkup.fingerprint}"


def refuse_inside(folder: str | Path, dataset: str | Path) -> None:
    """UserError if a folder to write is in the data set's own."""
    data = Path(dataset).resolve()
    if Path(folder).resolve().is_relative_to(data.parent if data.is_file() else data):
        raise UserError(f"{folder} is inside the data set; name a folder elsewhere with --output_dir")


def _of_split(name: str, cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if case.split == name]


def _scan_files(
    cases: Sequence[Case], splits: dict[str, Split], max_pixels: int, log: Callable[[str], None]
) -> tuple[dict[Path, ImageFacts], dict[Path, MaskFacts]]:
    """The facts of every file that is there, each decoded once however many rows name it."""
    there = [case for case in cases if case.readable]
    images = [path for path in (case.record.image for case in there) if isfile(path)]
    masks: dict[Path, Palette] = {}
    for case in there:
        if isfile(case.record.mask):
            masks.setdefault(case.record.mask, splits[case.split].palette)
    return scan_files(images, masks, max_pixels, log)


def _masks_of(name: str, cases: Iterable[Case], masks: dict[Path, MaskFacts]) -> list[MaskFacts]:
    found = (masks.get(case.record.mask) for case in _of_split(name, cases) if case.readable)
    return [facts for facts in found if facts is not None]


def _sizes(cases: Iterable[Case], images: dict[Path, ImageFacts]) -> Counter:
    sizes = (images[case.record.image].size for case in cases if case.record.image in images)
    return Counter(size for size in sizes if size is not None)


def _findings(cases: Sequence[Case], images: dict[Path, ImageFacts], masks: dict[Path, MaskFacts]) -> Iterator[Finding]:
    """All that is wrong with rows and their files."""
    for case in cases:
        yield from findings.written_findings(case)
        if case.readable:
            yield from findings.file_findings(case, images.get(case.record.image), masks.get(case.record.mask))
    decoded = [case for case in cases if case.readable and _decoded(images.get(case.record.image))]
    yield from findings.copy_findings(decoded, images)
    yield from findings.near_findings(decoded, images)


def _decoded(image: ImageFacts | None) -> bool:
    return image is not None and image.fault is None


def _palette_findings(splits: dict[str, Split]) -> Iterator[Finding]:
    first = next(iter(splits))
    for name, split in splits.items():
        if split.palette.fingerprint != splits[first].palette.fingerprint:
            yield Finding("palette", f"{name} has another palette.json than {first}", name)


def _captions(cases: Sequence[Case], splits: Iterable[str], tokenizer) -> tuple[list[Finding], dict[str, dict]]:
    """Captions that are too long, and the statistics of each split's captions."""
    told = [(case, caption) for case in cases for caption in case.record.captions if caption.strip()]
    limit = tokenizer.model_max_length
    tokens = [len(ids) for ids in tokenizer([caption for _, caption in told]).input_ids] if told else []
    long = findings.long_findings(told, tokens, lambda caption: _cut_off(tokenizer, caption), limit)
    of_split = {
        name: [(caption, count) for (case, caption), count in zip(told, tokens, strict=True) if case.split == name]
        for name in splits
    }
    return list(long), {
        name: findings.caption_statistics([caption for caption, _ in pairs], [count for _, count in pairs], limit)
        for name, pairs in of_split.items()
    }


def _cut_off(tokenizer, caption: str) -> str:
    """The end of a caption that the text encoder never sees; the last token it sees is the end mark."""
    return tokenizer.decode(tokenizer(caption).input_ids[tokenizer.model_max_length - 1 : -1]).strip()


def _load_tokenizer(folder: str):
    """The base's tokenizer alone; without the imports of its networks, which take longer than small data sets."""
    from transformers import CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--pretrained_model_name_or_path: no tokenizer in {folder}: {error}") from None
    if len(tokenizer) < 256:  # a folder without one gives an empty tokenizer
        raise UserError(f"--pretrained_model_name_or_path: no tokenizer in {folder}")
    return tokenizer


# --- quarantine: The rows without errors apart from the others: a metadata file to train on, and one with the reasons.


def check_target(target: str) -> None:
    """Refuse, before any work, a name that is no CSV file or that stands already."""
    if Path(target).suffix != ".csv":
        raise UserError(f"--quarantine: expected a name that ends in .csv, found {target!r}")
    _refuse_existing(_halves(Path(target), "", 1))


def quarantine(checkup: Checkup, target: str | Path) -> str:
    """Write the rows without errors to OUT.csv, the others with the reason to OUT.bad.csv; says what was written.

    Of a data set with several splits each is written on its own, to OUT.<split>.csv. UserError if a file is there
    already, or if the data set is not below OUT's folder, since paths in a metadata file stay inside its folder.
    """
    plan = {name: _halves(Path(target), name, len(checkup.splits)) for name in checkup.splits}
    folder = Path(target).absolute().parent
    _refuse_existing(chain.from_iterable(plan.values()))
    for split in checkup.splits.values():
        if not split.folder.absolute().is_relative_to(folder):
            raise UserError(f"--quarantine: {target} must lie in {split.folder} or above it, where its paths lead")
    bad, counts = checkup.bad_rows, [0, 0]
    for name, (good_path, bad_path) in plan.items():
        rows = [
            (_rows(case, folder), bad.get(case.key)) for case in (case for case in checkup.cases if case.split == name)
        ]
        write_csv(good_path, COLUMNS, chain.from_iterable(each for each, faults in rows if not faults))
        rest = [(*row, _reason(faults)) for each, faults in rows if faults for row in each]
        write_csv(bad_path, (*COLUMNS, "reason"), rest)
        number = sum(not faults for _, faults in rows)
        counts = [counts[0] + number, counts[1] + len(rows) - number]
    written = ", ".join(str(path) for halves in plan.values() for path in halves)
    return f"quarantine: {counts[0]} good rows, {counts[1]} bad ones: {written}"


def _halves(target: Path, split: str, splits: int) -> tuple[Path, Path]:
    stem = f"{target.stem}.{split}" if splits > 1 else target.stem
    return target.with_name(f"{stem}.csv"), target.with_name(f"{stem}.bad.csv")


def _refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"--quarantine: {path} is there already; remove it, or give another name")


def _rows(case: Case, folder: Path) -> list[tuple[str, str, str]]:
    """The row as it is written in a metadata file in `folder`, once for each of its captions.

    Names that lead nowhere stay as they were.
    """
    record = case.record
    image, mask = record.image_name, record.mask_name
    if case.readable:
        paths = (record.image, record.mask)
        image, mask = (relpath(path.absolute(), folder).replace("\\", "/") for path in paths)
    return [(image, mask, " ".join(caption.split())) for caption in record.captions or ("",)]


def _reason(faults: Sequence[Finding]) -> str:
    return "; ".join(f"{fault.kind}: {fault.message}" for fault in faults)
