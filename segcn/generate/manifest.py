"""How a job is dealt: which image is image k, where it is written, in which batch it is painted, and by whom.

All of it depends on the job alone, so that any number of processes paints the same bytes."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segcn.utils import rng
from segcn.utils.io import Process, write_whole

# --- dealing: How a job is dealt: which image is image k, where it is written, in which batch it is painted, and by whom.
#
# All of it depends on the job alone, so that any number of processes paints the same bytes.

FLAT = 1000  # images of a job that lie in one folder; of more, each folder holds so many


@dataclass(frozen=True)
class Job:
    """`replicates` images of each of `rows` rows; --limit apart it would have `all_rows`."""

    rows: int
    all_rows: int
    replicates: int
    batch_size: int

    def __len__(self) -> int:
        """The images."""
        return self.rows * self.replicates

    @property
    def batches(self) -> int:
        return -(-len(self) // self.batch_size)

    def images(self, batch: int) -> range:
        """The images of a batch: neighbours, whether they stand already or not."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self)))

    def share(self, process: Process) -> range:
        """The batches of a process."""
        return process.share(self.batches)

    def place(self, image: int) -> tuple[int, int]:
        """Its row and replicate."""
        return divmod(image, self.replicates)

    def name(self, kind: str, image: int) -> str:
        """images/000123.png, or images/004/004321.png where the whole job has more than a thousand."""
        below = f"{image // FLAT:03d}/" if self.all_rows * self.replicates > FLAT else ""
        return f"{kind}/{below}{image:06d}.png"

    def pair(self, image: int, kept: bool = True) -> tuple[str, str]:
        """The names of its image and mask; the best that was made of a row that was dropped lies in rejected/."""
        below = "" if kept else "rejected/"
        return self.name(f"{below}images", image), self.name(f"{below}masks", image)


def noise_of(row: int, replicate: int, attempt: int) -> int:
    """What the noise of an image depends on besides the seed: the row itself for its first image."""
    return rng.seed_of("picture", row, replicate, attempt) if replicate or attempt else row


# --- manifest: Which images of a job stand: each process appends lines to a part of its own, which become manifest.jsonl.

FILE = "manifest.jsonl"
WORK = ".work"  # parts and half-written files; gone when the data set is finished
MISSING, KEPT, DROPPED = range(3)
PAUSE = 0.2  # seconds between looks at what other processes have brought


class Manifest:
    """The state of every image of a job in its folder, with what other processes write there.

    A record is {"image", "row", "replicate", "attempt", "kept", "file_name", ...}, and no part of it tells a time.
    """

    def __init__(self, out: Path, job: Job, rank: int):
        self.out, self.job, self.work = out, job, out / WORK
        self.state = bytearray(len(job))
        self.part = self.work / f"part-{rank:05d}.jsonl"
        self._read: dict[Path, int] = {}  # bytes of each file that were read
        self._file: Any = None
        self.refresh()
        self._forget_deleted()

    def refresh(self) -> None:
        """Read what was appended since the last look."""
        for path in (self.out / FILE, *self._parts()):
            for record, _, end in lines_of(path, self._read.get(path, 0)):
                self._read[path] = end
                self._note(record)

    def add(self, record: dict[str, Any]) -> None:
        """Append the record of an image whose files stand; one write, so that a kill leaves it whole or unread."""
        if self._file is None:
            self.work.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("ab", buffering=0)
        self._file.write(b"\n" + json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._note(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def missing(self, batch: int) -> list[int]:
        """The images of a batch that do not stand and were not dropped."""
        return [image for image in self.job.images(batch) if self.state[image] == MISSING]

    def unfinished(self) -> list[int]:
        """The batches of the whole job that lack an image, as far as this process knows."""
        if MISSING not in self.state:
            return []
        return [batch for batch in range(self.job.batches) if self.missing(batch)]

    def merge(self) -> None:
        """Write manifest.jsonl: a line an image in their order; images beyond this job's, which stand, are kept."""
        lines: dict[int, bytes] = {}
        for path in (self.out / FILE, *self._parts()):
            for record, line, _ in lines_of(path):
                if record["image"] < len(self.job) or (path.name == FILE and self._stands(record)):
                    lines[record["image"]] = line
        text = b"".join(lines[image] for image in sorted(lines))
        write_whole(self.out / FILE, lambda path: path.write_bytes(text), self.work)

    def finished(self) -> bool:
        """Whether nothing is left to do: every image in manifest.jsonl, and a data set around it."""
        merged = {record["image"] for record in records_of(self.out)} if not self.unfinished() else set()
        stands = all((self.out / name).is_file() for name in ("metadata.csv", "palette.json"))
        return stands and merged.issuperset(range(len(self.job)))

    def clear(self) -> None:
        """Remove what was only needed on the way."""
        self.close()
        for left in self.out.glob(".metadata.csv.*"):  # half written when it was killed
            left.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def _note(self, record: dict[str, Any]) -> None:
        if record["image"] < len(self.job):
            self.state[record["image"]] = KEPT if record["kept"] else DROPPED

    def _parts(self) -> list[Path]:
        return sorted(self.work.glob("part-*.jsonl"))

    def _stands(self, record: dict[str, Any]) -> bool:
        return not record["kept"] or (self.out / record["file_name"]).is_file()

    def _forget_deleted(self) -> None:
        """Images that the manifest holds and the folder does not are missing; folders are listed one by one."""
        for kind in ("images", "masks"):
            listed = ""
            names: frozenset[str] = frozenset()
            for image in range(len(self.job)):
                folder, _, name = self.job.name(kind, image).rpartition("/")
                if folder != listed:
                    listed, names = folder, names_in(self.out / folder)
                if self.state[image] == KEPT and name not in names:
                    self.state[image] = MISSING


def records_of(out: Path) -> Iterator[dict[str, Any]]:
    """The records of a finished data set, in the order of its images."""
    return (record for record, _, _ in lines_of(out / FILE))


def lines_of(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """(record, line, where it ends) of each whole line of a file from byte `start`; what a kill cut is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if line.endswith(b"\n") and line.strip():
                try:
                    yield json.loads(line), line, start
                except ValueError:  # cut, and gone on behind
                    continue


def names_in(folder: Path) -> frozenset[str]:
    """What a folder holds, nothing where there is none."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def left_by_others(manifest: Manifest, patience: float) -> Iterator[int]:
    """Wait for the images of other processes; once none has come for `patience` seconds, the batches that they owe."""
    before, since = -1, time.monotonic()
    while owed := manifest.state.count(MISSING):
        if owed != before:
            before, since = owed, time.monotonic()
        if time.monotonic() - since > patience:
            break
        time.sleep(PAUSE)
        manifest.refresh()
    while batches := manifest.unfinished():
        yield batches[0]
        manifest.refresh()
