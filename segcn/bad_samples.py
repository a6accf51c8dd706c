"""Rows whose files go bad after the check: the run ends, or goes on with the next good row, as --on_bad_sample says."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from segcn.atomic import write_text
from segcn.errors import UserError

REPORT = "bad_rows.json"
SKIP = "--on_bad_sample skip:N goes on with the next good row instead, for N rows at most"
Read = TypeVar("Read")


class BadSample(UserError):
    """A row that cannot be read; its message stays as it is where a worker's traceback is put around it."""

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


def parse_limit(text: str) -> int:
    """How many bad rows a run may meet: fail -> 0, skip:N -> N; UserError for another text."""
    kind, _, number = text.partition(":")
    if text == "fail":
        return 0
    if kind != "skip" or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise UserError(f"--on_bad_sample: expected fail, or skip:N with a whole number N from 1, found {text!r}")
    return int(number)


def first_good(read: Callable[[int], Read], row: int, rows: int, limit: int) -> tuple[Read, int]:
    """What `read` gives for the first row from `row` on that it can read, and that row.

    BadSample where more than `limit` rows one after another are bad.
    """
    errors = []
    for place in range(row, row + min(limit + 1, rows)):
        try:
            return read(place % rows), place % rows
        except UserError as error:
            errors.append(str(error))
    raise BadSample(too_many(errors, limit))


def too_many(errors: Iterable[str], limit: int) -> str:
    """The message for more bad rows than the limit."""
    errors = list(errors)
    if not limit:
        return f"{errors[0]}\nThe file was good when it was checked. Mend it; or {SKIP}."
    listed = "\n  ".join(errors)
    return f"--on_bad_sample skip:{limit}: expected at most {limit} bad rows, found {len(errors)}:\n  {listed}"


class BadRows:
    """The bad rows of a run, the same in every process: each is named once, and more than the limit end the run."""

    def __init__(self, output_dir: Path, limit: int, dataset, accelerator, log: Callable[[str], None]):
        self.path, self.limit, self.dataset = output_dir / REPORT, limit, dataset
        self.accelerator, self.log = accelerator, log
        told = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.known = {int(row): why for row, why in told.items()}  # also those from before the run was resumed
        accelerator.wait_for_everyone()

    def seen(self, batch: dict) -> None:
        """Take note of the rows that a micro-batch replaced, in all processes together; under `fail` it does nothing.

        bad_row, row: int [B], the row whose turn it was, -1 if it was good, and the one that was used.
        """
        if not self.limit:
            return
        pairs = torch.stack([batch["bad_row"], batch["row"]], 1).to(self.accelerator.device)
        skipped = [self._between(bad, used) for bad, used in self.accelerator.gather(pairs).tolist() if bad >= 0]
        self.add({row: None for rows in skipped for row in rows})

    def add(self, rows: Mapping[int, str | None]) -> None:
        """Take note of bad rows and why, the same ones in every process; UserError if there are more than the limit."""
        new = sorted(rows.keys() - self.known.keys())
        for row in new:
            self.known[row] = rows[row] or self._why(row)
        if len(self.known) > self.limit:
            raise UserError(too_many(self.known.values(), self.limit))
        if new and self.accelerator.is_main_process:
            write_text(self.path, json.dumps(self.known, indent=1) + "\n")
        for row in new:
            self.log(f"Bad row {row}, the next good one is used instead: {self.known[row]}")

    def _between(self, bad: int, used: int) -> list[int]:
        """The bad rows from the first one to the one that was used instead."""
        rows = len(self.dataset)
        return [(bad + ahead) % rows for ahead in range((used - bad) % rows)]

    def _why(self, row: int) -> str:
        try:
            self.dataset.sample(row, 0)
        except UserError as error:
            return str(error)
        return f"row {row}: it could not be read, and now it can"
