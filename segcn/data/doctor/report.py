"""`segcn validate`: what the doctor found, in the terminal, as doctor.json and doctor.html, and the good rows apart."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from os.path import relpath
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.data.config import DoctorConfig
from segcn.data.doctor.findings import FAULTS, Checkup, Finding, examine
from segcn.data.doctor.scan import Case
from segcn.data.files import open_image, read_image
from segcn.data.masks import read_stored_mask
from segcn.data.metadata import COLUMNS, Split, write_csv
from segcn.data.palette import Palette
from segcn.utils.args import to_json
from segcn.utils.errors import UserError
from segcn.utils.html import img, render
from segcn.utils.io import write_text
from segcn.utils.paths import OUTPUTS

LINES = 20  # of the summary at most
THUMBNAIL = 160  # pixels of an image on the page


def validate(config: DoctorConfig, log: Callable[[str], None] = print) -> Checkup:
    """The whole of `segcn validate`: examine, say what was found, write the report and, where asked, the good rows."""
    if config.output_dir:
        _refuse_inside(Path(config.output_dir), Path(config.dataset_name))
    if config.quarantine:  # before any work
        if Path(config.quarantine).suffix != ".csv":
            raise UserError(f"--quarantine: expected a name that ends in .csv, found {config.quarantine!r}")
        _quarantine_files(Path(config.quarantine), [""])
    checkup = examine(config, log)
    page = write_doctor_report(checkup, config)
    for line in summary_lines(checkup):
        log(line)
    if config.quarantine:
        log(quarantine(checkup, config.quarantine))
    elif checkup.bad_rows:
        folder = Path(config.dataset_name)
        folder = folder.parent if folder.is_file() else folder
        log(f"the good rows alone: segcn validate {config.dataset_name} --quarantine {folder / 'good.csv'}")
    log(f"report: {page}")
    return checkup


def write_doctor_report(checkup: Checkup, config: DoctorConfig) -> Path:
    """Write doctor.html and, last, doctor.json; the path of the former."""
    dataset = checkup.facts.dataset
    folder = OUTPUTS / "doctor" / f"{dataset.absolute().name}-{checkup.fingerprint}"
    folder = Path(config.output_dir) if config.output_dir else folder
    _refuse_inside(folder, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "doctor.html", doctor_page(checkup, config))
    write_text(folder / "doctor.json", json.dumps(as_json(checkup, config), indent=1, ensure_ascii=False) + "\n")
    return folder / "doctor.html"


def find_report(split: Split) -> tuple[Path, int] | None:
    """The newest doctor.html below outputs/ on these very rows and files, and how many errors it has in them."""
    found = []
    for path in (OUTPUTS / "doctor").glob("*/doctor.json"):
        try:
            splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError):  # damaged: the files are decoded again
            continue
        found += [(path.stat().st_mtime, path.with_suffix(".html"), entry["errors"])
                  for entry in splits.values() if entry["fingerprint"] == split.fingerprint]  # fmt: skip
    return max(found)[1:] if found else None


def _refuse_inside(folder: Path, dataset: Path) -> None:
    data = dataset.resolve()
    if folder.resolve().is_relative_to(data.parent if data.is_file() else data):
        raise UserError(f"{folder} is inside the data set; name a folder elsewhere with --output_dir")


def summary_lines(checkup: Checkup) -> list[str]:
    """The check-up in at most 20 lines: what was read, the kinds of fault with their first row, the classes."""
    facts, kinds = checkup.facts, list(checkup.by_kind.items())
    rows = ", ".join(f"{len(split)} {name}" for name, split in facts.splits.items())
    lines = [f"{facts.dataset}: {rows} rows, {checkup.files} files in {facts.seconds:.1f} s"]
    room = LINES - 8 - (len(kinds) > LINES - 8)
    for kind, found in kinds[:room]:
        severity, title, _ = FAULTS[kind]
        place = found[0].message if found[0].row is None else where(found[0])
        lines.append(f"  {severity:8}{len(found):6}  {title:40} {place}")
    if len(kinds) > room:
        lines.append(f"  and {len(kinds) - room} more kinds, in doctor.html")
    splits = list(facts.splits)[:2]
    for name in splits:
        sizes = checkup.sizes[name]
        most = ", ".join(f"{width} x {height} ({count})" for (width, height), count in sizes.most_common(3))
        lines.append(f"  sizes in {name}: {most}" + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""))
    for name in splits:
        shown = sorted((entry for entry in checkup.classes[name] if entry["masks"]), key=lambda entry: -entry["share"])
        lines.append(f"  classes in {name}: " + ", ".join(f"{entry['name']} {entry['share']:.1%}" for entry in shown))
    lines += [f"  captions in {name}: {_lengths(checkup.captions[name])}" for name in splits]
    fitting = [line if len(line) <= 150 else line[:147] + "..." for line in (line.replace("\n", " ") for line in lines)]
    return [*fitting, checkup_verdict(checkup)]


def where(finding: Finding) -> str:
    """Split, line and file of a finding."""
    row = "" if finding.row is None else f" line {finding.line} (row {finding.row})"
    return f"{finding.split}{row}" + (f": {finding.file}" if finding.file else "")


def checkup_verdict(checkup: Checkup) -> str:
    """One sentence: fit for training, or not."""
    errors, warned = len(checkup.errors), len(checkup.findings) - len(checkup.errors)
    warned_of = f"{warned} warning{'' if warned == 1 else 's'}"
    if not errors:
        return f"No errors, {warned_of}: fit for training."
    return f"{errors} errors ({len(checkup.bad_rows)} rows), {warned_of}: training would fail or go wrong."


def _lengths(captions: dict) -> str:
    if not captions["captions"]:
        return "none"
    spans = ", ".join(f"{captions[what]['least']} to {captions[what]['most']} {what}" for what in ("words", "tokens"))
    seen = f"the text encoder sees {captions['token_limit']}"
    return f"{captions['captions']}, {captions['different']} different, {spans} ({seen})"


def as_json(checkup: Checkup, config: DoctorConfig) -> dict:
    """Everything that was found."""
    splits = {}
    for name, split in checkup.facts.splits.items():
        errors = sum(finding.split in (name, "") for finding in checkup.errors)
        splits[name] = {"rows": len(split), "fingerprint": checkup.fingerprints[name], "errors": errors}
    return {
        "dataset": str(checkup.facts.dataset),
        "fingerprint": checkup.fingerprint,
        "splits": splits,
        "files": checkup.files,
        "seconds": round(checkup.facts.seconds, 3),
        "errors": len(checkup.errors),
        "warnings": len(checkup.findings) - len(checkup.errors),
        "settings": json.loads(to_json(config)),
        "findings": [{"severity": finding.severity} | asdict(finding) for finding in checkup.findings],
        "classes": checkup.classes,
        "captions": checkup.captions,
        "sizes": {k: {"{} x {}".format(*size): n for size, n in each.items()} for k, each in checkup.sizes.items()},
    }


def doctor_page(checkup: Checkup, config: DoctorConfig) -> str:
    """One page that needs no other file; whatever comes from the data set is escaped."""
    cases: dict[tuple, Case] = {case.key: case for case in checkup.facts.cases}

    def images(finding: Finding) -> Iterator[str]:
        """Those of the row, and of the row that it is a copy of."""
        for case in (cases[key] for key in ((finding.split, finding.row), finding.other) if key in cases):
            shown = _images_of(case, checkup.facts.splits[case.split].palette, config.max_pixels)
            for image, what in zip(shown, ("", ", its mask over it"), strict=False):
                yield img(_thumbnail(image), f"row {case.record.row}{what}")

    def caption(finding: Finding) -> str:
        case = cases.get((finding.split, finding.row))
        return case.record.caption if case else ""

    values = {
        "title": f"Data set report: {checkup.facts.dataset.absolute().name}", "checkup": checkup, "kinds": FAULTS,
        "read": summary_lines(checkup)[0], "verdict": checkup_verdict(checkup), "lengths": _lengths, "where": where,
        "images": images, "caption": caption, "examples": config.examples,
    }  # fmt: skip
    return render("data/doctor/templates/doctor.html", **values)


def _images_of(case: Case, palette: Palette, max_pixels: int) -> list[np.ndarray]:
    """Of a row the image and the mask over it, as far as they can be read, uint8 [H, W, 3]; undeclared ids: magenta."""
    colors = palette.table.copy()
    colors[palette.class_of_id < 0] = (255, 0, 255)

    def read(path: Path, how: Callable[[Path], np.ndarray]) -> np.ndarray | None:
        try:
            with warnings.catch_warnings(action="ignore"), open_image(path, max_pixels=max_pixels):
                return how(path)
        except Exception:  # decoders of broken files raise anything; a finding says it already
            return None

    def mask_in_colors(path: Path) -> np.ndarray:
        stored = read_stored_mask(path)
        return read_image(path) if stored.colored or stored.values.dtype != np.uint8 else colors[stored.values]

    if not case.readable:
        return []
    image, mask = read(case.record.image, read_image), read(case.record.mask, mask_in_colors)
    if image is not None and mask is not None and image.shape == mask.shape:
        mask = (0.4 * image + 0.6 * mask).round().astype(np.uint8)
    return [each for each in (image, mask) if each is not None]


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    if (factor := THUMBNAIL // max(image.size)) > 1:
        return pixels.repeat(factor, 0).repeat(factor, 1)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def quarantine(checkup: Checkup, target: str | Path) -> str:
    """Write the rows without errors to OUT.csv, the others with the reason to OUT.bad.csv; says what was written.

    Of a data set with several splits each is written on its own, to OUT.<split>.csv. UserError if a file is there
    already, or if the data set is not below OUT's folder, since paths in a metadata file stay inside its folder.
    """
    splits, bad_rows = checkup.facts.splits, checkup.bad_rows
    files = _quarantine_files(Path(target), list(splits))
    folder = Path(target).absolute().parent
    for split in splits.values():
        if not split.folder.absolute().is_relative_to(folder):
            example = f"--quarantine {split.folder}/good.csv, as paths in a metadata file stay inside its folder"
            raise UserError(f"--quarantine: {target} must lie in {split.folder} or above it: {example}")
    for name, (good_file, bad_file) in zip(splits, files, strict=True):
        good, bad = [], []
        for case in checkup.facts.of_split(name):
            faults = bad_rows.get(case.key, [])
            image, mask = case.record.image_name, case.record.mask_name
            if case.readable:  # other names lead nowhere and stay as they were
                paths = (case.record.image, case.record.mask)
                image, mask = (relpath(path.absolute(), folder).replace("\\", "/") for path in paths)
            rows = [(image, mask, " ".join(caption.split())) for caption in case.record.captions or ("",)]
            reason = "; ".join(f"{fault.kind}: {fault.message}" for fault in faults)
            bad += [(*row, reason) for row in rows] if faults else []
            good += [] if faults else rows
        write_csv(good_file, COLUMNS, good)
        write_csv(bad_file, (*COLUMNS, "reason"), bad)
    written = ", ".join(str(path) for pair in files for path in pair)
    return f"quarantine: {len(checkup.facts.cases) - len(bad_rows)} good rows, {len(bad_rows)} bad ones: {written}"


def _quarantine_files(target: Path, splits: list[str]) -> list[tuple[Path, Path]]:
    """Of each split the file of the good rows and that of the bad ones; UserError if one of them exists."""
    stems = [f"{target.stem}.{split}" if len(splits) > 1 else target.stem for split in splits]
    files = [(target.with_name(f"{stem}.csv"), target.with_name(f"{stem}.bad.csv")) for stem in stems]
    for path in (path for pair in files for path in pair):
        if path.exists():
            raise UserError(f"--quarantine: {path} is there already; remove it, or give another name")
    return files
