"""What the doctor found as one HTML page, with pictures of each kind of fault."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from segcn.config import DoctorConfig
from segcn.doctor import Checkup
from segcn.doctor_summary import by_kind, lengths, summary, verdict, where
from segcn.findings import KINDS, Case, Finding
from segcn.html_parts import as_table, head, img
from segcn.labels import IGNORE, Label, Palette
from segcn.masks import colourise, read_mask
from segcn.records import read_image
from segcn.scan import Fault, read_header
from segcn.show import overlay

SIDE = 160  # pixels of a picture in the report


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
        colours = checkup.splits[name].palette.table
        yield f"<h2>Classes in {escape(name)}</h2>"
        yield as_table(
            ["id", "class", "pixels", "share", "masks", ""],
            (
                (entry["id"], escape(entry["name"]), entry["pixels"], f"{entry['share']:.2%}", entry["masks"], bar)
                for entry in table
                for bar in [_bar(entry["share"], colours[entry["id"]])]
            ),
        )


def _bar(share: float, colour: Iterable[int]) -> str:
    red, green, blue = map(int, colour)
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
            pictures = [p for case in shown for p in _pictures(case, palettes[case.split], config.max_pixels)]
            yield f'<div class="row">{"".join(map(img, pictures))}{_text(finding, *shown[:1])}</div>'
        if len(found) > config.examples:
            rest = ((escape(where(finding)), escape(finding.message)) for finding in found[config.examples : 200])
            more = f", {len(found) - 200} more in doctor.json" if len(found) > 200 else ""
            yield f"<details><summary>the others{more}</summary>{as_table(['where', 'what'], rest)}</details>"


def _text(finding: Finding, case: Case | None = None) -> str:
    caption = f'<p class="grey">{escape(case.record.caption[:300])}</p>' if case else ""
    return f'<p class="file"><b>{escape(where(finding))}</b></p><p>{escape(finding.message)}</p>{caption}'


def _pictures(case: Case, palette: Palette, max_pixels: int) -> list[np.ndarray]:
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
        shown = colourise(mask, _lenient(palette))
    return [_small(picture) for picture in (image, shown) if picture is not None]


def _read(path: Path, max_pixels: int, read) -> np.ndarray | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # a finding says it already
            return None if isinstance(read_header(path, max_pixels), Fault) else read(path)
    except Exception:  # decoders of broken files raise anything
        return None


def _lenient(palette: Palette) -> Palette:
    """The palette with every other id declared too, in magenta, so that a mask with undeclared ids can be shown."""
    taken = {label.colour for label in palette.labels}
    spare = (colour for blue in range(255, -1, -1) for g in (0, 1) if (colour := (255, g, blue)) not in taken)
    missing = sorted(set(range(IGNORE)) - set(palette.ids))
    extra = tuple(Label(id, f"undeclared {id}", colour) for id, colour in zip(missing, spare, strict=False))
    return replace(palette, labels=palette.labels + extra)


def _small(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    if max(image.size) < SIDE // 2:
        factor = SIDE // max(image.size)
        return np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)
