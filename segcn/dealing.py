"""How a job is dealt: which picture is image k, where it is written, in which batch it is painted, and by whom.

All of it depends on the job alone, so that any number of processes paints the same bytes.
"""

import os
from dataclasses import dataclass

import torch

from segcn import seeds

FLAT = 1000  # images of a job that lie in one folder; of more, each folder holds so many


@dataclass(frozen=True)
class Process:
    """One of `world` processes that share a job without talking to each other."""

    rank: int = 0
    world: int = 1


def this_process() -> Process:
    """RANK of WORLD_SIZE, as torchrun and accelerate set them; on GPUs this process computes on that of LOCAL_RANK."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


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
        return range(process.rank, self.batches, process.world)

    def place(self, image: int) -> tuple[int, int]:
        """Its row and replicate."""
        return divmod(image, self.replicates)

    def name(self, kind: str, image: int) -> str:
        """images/000123.png, or images/004/004321.png where the whole job has more than a thousand."""
        below = f"{image // FLAT:03d}/" if self.all_rows * self.replicates > FLAT else ""
        return f"{kind}/{below}{image:06d}.png"

    def pair(self, image: int, kept: bool = True) -> tuple[str, str]:
        """The names of its picture and mask; the best that was made of a row that was dropped lies in rejected/."""
        below = "" if kept else "rejected/"
        return self.name(f"{below}images", image), self.name(f"{below}masks", image)


def noise_of(row: int, replicate: int, attempt: int) -> int:
    """What the noise of a picture depends on besides the seed: the row itself for its first picture."""
    return seeds.seed_of("picture", row, replicate, attempt) if replicate or attempt else row
