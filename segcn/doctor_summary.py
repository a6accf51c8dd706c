"""What the doctor found, in at most 20 lines."""

from collections import Counter
from collections.abc import Iterable

from segcn.doctor import Checkup
from segcn.findings import KINDS, Finding

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
