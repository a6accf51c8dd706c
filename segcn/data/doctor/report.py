"""What the doctor found, in at most 20 lines."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.data.config import DoctorConfig
from segcn.data.doctor.checkup import Checkup, check_target, default_folder, examine, quarantine, refuse_inside
from segcn.data.doctor.findings import KINDS, Case, Finding
from segcn.data.doctor.scan import Fault, read_header
from segcn.data.masks import colorize, read_mask
from segcn.data.metadata import read_image
from segcn.data.palette import IGNORE, Label, Palette
from segcn.data.visualize import overlay
from segcn.utils.args import to_json
from segcn.utils.html import as_table, head, img
from segcn.utils.io import write_text

# --- doctor_summary: What the doctor found, in at most 20 lines.

LINES = 20  # of the summary at most


def summary(checkup: Checkup) -> list[str]:
    """The check-up in at most 20 lines: what was read, the kinds of fault with their first row, the classes."""
    rows = ", ".join(f"{len(split)} {name}" for name, split in checkup.splits.items())
    lines = [f"{checkup.dataset}: {rows} rows, {checkup.files} files in {checkup.seconds:.1f} s"]
    kinds = list(by_kind(checkup.findings).items())
    room = LINES - 8 - (len(kinds) > LINES - 8)
    for kind, found in kinds[:room]:
        severity, title, _ = KINDS[kind]
        lines.append(_fit(f"  {severity:8}{len(found):6}  {title:40} {where(found[0])}"))
    if len(kinds) > room:
        lines.append(f"  and {len(kinds) - room} more kinds, in doctor.html")
    lines += [_fit(f"  sizes in {name}: {_sizes(sizes)}") for name, sizes in list(checkup.sizes.items())[:2]]
    lines += [_fit(f"  classes in {name}: {_shares(table)}") for name, table in list(checkup.classes.items())[:2]]
    lines += [_fit(f"  captions in {name}: {lengths(told)}") for name, told in list(checkup.captions.items())[:2]]
    return [*lines, verdict(checkup)]


def _sizes(sizes: Counter) -> str:
    each = [f"{width} x {height} ({count})" for (width, height), count in sizes.most_common(3)]
    return ", ".join(each) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """In the order of KINDS, errors first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds


def where(finding: Finding) -> str:
    """Split, line and file of a finding."""
    row = "" if finding.row is None else f" line {finding.line} (row {finding.row})"
    return f"{finding.split}{row}" + (f": {finding.file}" if finding.file else "")


def _shares(table: list[dict]) -> str:
    seen = sorted((entry for entry in table if entry["masks"]), key=lambda entry: -entry["share"])
    return ", ".join(f"{entry['name']} {entry['share']:.1%}" for entry in seen)


def lengths(told: dict) -> str:
    """How many captions there are, and how long."""
    if not told["captions"]:
        return "none"
    spans = (f"{told[what]['least']} to {told[what]['most']} {what}" for what in ("words", "tokens"))
    counts = f"{told['captions']}, {told['different']} different"
    return f"{counts}, {', '.join(spans)} (the text encoder sees {told['token_limit']})"


def verdict(checkup: Checkup) -> str:
    """One sentence: fit for training, or not."""
    errors, warnings = len(checkup.errors), len(checkup.findings) - len(checkup.errors)
    if not errors:
        return f"No errors, {warnings} warnings: fit for training."
    return f"{errors} errors ({len(checkup.bad_rows)} rows), {warnings} warnings: training would fail or go wrong."


def _fit(line: str, width: int = 150) -> str:
    line = line.replace("\n", " ")
    return line if len(line) <= width else line[: width - 3] + "..."


# --- doctor_page: What the doctor found as one HTML page, with images of each kind of fault.

SIDE = 160  # pixels of an image in the report


def as_html(checkup: Checkup, config: DoctorConfig) -> str:
    """One page that needs no other file; whatever comes from the data set is escaped."""
    title = f"Check-up of {checkup.dataset.absolute().name}"
    return "\n".join(
        [
            *head(title),
            f'<p class="{"error" if checkup.errors else "fine"}">{escape(verdict(checkup))}</p>',
            f'<p class="grey">{escape(summary(checkup)[0])}; fingerprint {checkup.fingerprint}</p>',
            *_kinds_html(checkup),
            *_classes_html(checkup),
            *_sizes_html(checkup),
            *_captions_html(checkup),
            *_examples_html(checkup, config),
            "</html>\n",
        ]
    )


def _kinds_html(checkup: Checkup) -> Iterator[str]:
    rows = (
        (
            f'<span class="{KINDS[kind][0]}">{KINDS[kind][0]}</span>',
            len(found),
            f'<a href="#{kind}">{KINDS[kind][1]}</a>',
        )
        for kind, found in by_kind(checkup.findings).items()
    )
    yield as_table(["", "found", "fault"], rows) if checkup.findings else ""


def _classes_html(checkup: Checkup) -> Iterator[str]:
    for name, table in checkup.classes.items():
        colors = checkup.splits[name].palette.table
        yield f"<h2>Classes in {escape(name)}</h2>"
        yield as_table(
            ["id", "class", "pixels", "share", "masks", ""],
            (
                (entry["id"], escape(entry["name"]), entry["pixels"], f"{entry['share']:.2%}", entry["masks"], bar)
                for entry in table
                for bar in [_bar(entry["share"], colors[entry["id"]])]
            ),
        )


def _bar(share: float, color: Iterable[int]) -> str:
    red, green, blue = map(int, color)
    return f'<span class="bar" style="width:{300 * share:.0f}px;background:rgb({red},{green},{blue})"></span>'


def _sizes_html(checkup: Checkup) -> Iterator[str]:
    for name, sizes in checkup.sizes.items():
        yield f"<h2>Sizes in {escape(name)}</h2>"
        yield as_table(
            ["images", "width x height"], ((n, "{} x {}".format(*size)) for size, n in sizes.most_common(20))
        )


def _captions_html(checkup: Checkup) -> Iterator[str]:
    for name, told in checkup.captions.items():
        words = ", ".join(f"{word} {count}" for word, count in told["in_captions"].items())
        yield f"<h2>Captions in {escape(name)}</h2><p>{escape(lengths(told))}</p>"
        yield f'<p class="grey">{escape(words)}</p>'


def _examples_html(checkup: Checkup, config: DoctorConfig) -> Iterator[str]:
    cases = {case.key: case for case in checkup.cases}
    palettes = {name: split.palette for name, split in checkup.splits.items()}
    for kind, found in by_kind(checkup.findings).items():
        severity, title, mend = KINDS[kind]
        yield f'<h2 id="{kind}" class="{severity}">{len(found)} x {title}</h2><p class="grey">To do: {mend}.</p>'
        for finding in found[: config.examples]:
            shown = [cases[key] for key in ((finding.split, finding.row), finding.other) if key in cases]
            pictures = [p for case in shown for p in _image_files(case, palettes[case.split], config.max_pixels)]
            yield f'<div class="row">{"".join(map(img, pictures))}{_text(finding, *shown[:1])}</div>'
        if len(found) > config.examples:
            rest = ((escape(where(finding)), escape(finding.message)) for finding in found[config.examples : 200])
            more = f", {len(found) - 200} more in doctor.json" if len(found) > 200 else ""
            yield f"<details><summary>the others{more}</summary>{as_table(['where', 'what'], rest)}</details>"


def _text(finding: Finding, case: Case | None = None) -> str:
    caption = f'<p class="grey">{escape(case.record.caption[:300])}</p>' if case else ""
    return f'<p class="file"><b>{escape(where(finding))}</b></p><p>{escape(finding.message)}</p>{caption}'


def _image_files(case: Case, palette: Palette, max_pixels: int) -> list[np.ndarray]:
    """Of a row the image and the mask over it, as far as they can be read, uint8 [h, w, 3]."""
    if not case.readable:
        return []
    image = _read(case.record.image, max_pixels, read_image)
    mask = _read(case.record.mask, max_pixels, lambda path: read_mask(path, _lenient(palette)))
    if mask is None:
        shown = _read(case.record.mask, max_pixels, read_image)
    elif image is not None and image.shape[:2] == mask.shape:
        shown = overlay(image, mask, _lenient(palette), 0.6)
    else:
        shown = colorize(mask, _lenient(palette))
    return [_small(picture) for picture in (image, shown) if picture is not None]


def _read(path: Path, max_pixels: int, read) -> np.ndarray | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # a finding says it already
            return None if isinstance(read_header(path, max_pixels), Fault) else read(path)
    except Exception:  # decoders of broken files raise anything
        return None


def _lenient(palette: Palette) -> Palette:
    """The palette with every other id declared too, in magenta, so that a mask with undeclared ids can be shown."""
    taken = {label.color for label in palette.labels}
    spare = (color for blue in range(255, -1, -1) for g in (0, 1) if (color := (255, g, blue)) not in taken)
    missing = sorted(set(range(IGNORE)) - set(palette.ids))
    extra = tuple(Label(id, f"undeclared {id}", color) for id, color in zip(missing, spare, strict=False))
    return replace(palette, labels=palette.labels + extra)


def _small(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    if max(image.size) < SIDE // 2:
        factor = SIDE // max(image.size)
        return np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


# --- doctor_report: `segcn validate`: the check-up, its lines for the terminal, doctor.json and doctor.html.


def validate(config: DoctorConfig, log: Callable[[str], None] = print) -> Checkup:
    """The whole of `segcn validate`: examine, say what was found, write the report and, where asked, the good rows."""
    if config.output_dir:
        refuse_inside(config.output_dir, config.dataset_name)
    if config.quarantine:
        check_target(config.quarantine)
    checkup = examine(config, log)
    page = write_report(checkup, config)
    for line in summary(checkup):
        log(line)
    if config.quarantine:
        log(quarantine(checkup, config.quarantine))
    log(f"report: {page}")
    return checkup


def write_report(checkup: Checkup, config: DoctorConfig) -> Path:
    """Write doctor.json and doctor.html; the path of the latter."""
    folder = Path(config.output_dir) if config.output_dir else default_folder(checkup)
    refuse_inside(folder, checkup.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(checkup, config), indent=1, ensure_ascii=False)
    write_text(folder / "doctor.html", as_html(checkup, config))
    write_text(folder / "doctor.json", text + "\n")  # the last: where it stands, the report is whole
    return folder / "doctor.html"


def as_json(checkup: Checkup, config: DoctorConfig) -> dict:
    """Everything that was found."""
    return {
        "dataset": str(checkup.dataset),
        "fingerprint": checkup.fingerprint,
        "splits": {
            name: {
                "rows": len(split),
                "fingerprint": checkup.fingerprints[name],
                "errors": sum(finding.split in (name, "") for finding in checkup.errors),
            }
            for name, split in checkup.splits.items()
        },
        "files": checkup.files,
        "seconds": round(checkup.seconds, 3),
        "errors": len(checkup.errors),
        "warnings": len(checkup.findings) - len(checkup.errors),
        "settings": json.loads(to_json(config)),
        "findings": [{"severity": finding.severity} | asdict(finding) for finding in checkup.findings],
        "classes": checkup.classes,
        "captions": checkup.captions,
        "sizes": {
            name: {"{} x {}".format(*size): n for size, n in each.items()} for name, each in checkup.sizes.items()
        },
    }
