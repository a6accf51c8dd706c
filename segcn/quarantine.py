"""The rows without errors apart from the others: a metadata file to train on, and one with the reasons."""

from collections.abc import Iterable, Sequence
from itertools import chain
from os.path import relpath
from pathlib import Path

from segcn.doctor import Checkup
from segcn.errors import UserError
from segcn.findings import Case, Finding
from segcn.metadata import COLUMNS, write_csv


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
