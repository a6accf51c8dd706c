"""`segcn validate`: the check-up, its lines for the terminal, doctor.json and doctor.html."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from segcn.arguments import to_json
from segcn.atomic import write_text
from segcn.config import DoctorConfig
from segcn.doctor import Checkup, default_folder, examine, refuse_inside
from segcn.doctor_page import as_html
from segcn.doctor_summary import summary
from segcn.quarantine import check_target, quarantine


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
