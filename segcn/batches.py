"""The batches of a job: painted whole, scored, and written while the next one is painted."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segcn import dealing
from segcn.config import GenerateConfig
from segcn.controls import Controls
from segcn.dealing import Job
from segcn.geometry import Box
from segcn.manifest import WORK, Manifest
from segcn.pipeline import Painter, generate
from segcn.progress import Progress
from segcn.prompts import Prompts
from segcn.rows import write_pair
from segcn.vetting import Painted, Vetter, paint_vetted

WRITERS = 4  # threads that write pictures while the next are painted


class Layout(NamedTuple):
    """What image k is painted from."""

    image: int
    row: int
    replicate: int
    mask: np.ndarray  # uint8 [H, W], class ids
    frame: Box  # the part of it that holds picture
    caption: str


@dataclass
class Task:
    """What stays the same from batch to batch."""

    config: GenerateConfig
    out: Path
    painter: Painter
    controls: Controls
    prompts: Prompts
    job: Job
    manifest: Manifest
    vetter: Vetter | None
    settings: dict[str, Any]


def paint_batches(task: Task, batches: Iterable[int], log: Callable) -> float:
    """Paint whole batches and write what is missing of each while the next is painted; the slowest's seconds."""
    batches, slowest, done = list(batches), 0.0, 0
    owed = sum(len(task.manifest.missing(batch)) for batch in batches)
    told = Progress("painted", owed, log)
    writing: list[Future] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in batches:
            began = time.monotonic()
            missing = set(task.manifest.missing(batch))
            made = [pair for pair in paint_batch(task, batch) if pair[0].image in missing]
            wait(writing)
            writing, done = [pool.submit(write_image, task, *pair) for pair in made], done + len(made)
            told(done)
            slowest = max(slowest, time.monotonic() - began)
        wait(writing)
    return slowest


def wait(writing: list[Future]) -> None:
    """Wait for the writers; what stopped one of them is raised."""
    for future in writing:
        future.result()


def paint_batch(task: Task, batch: int) -> list[tuple[Layout, Painted]]:
    """Every image of a batch, whether it stands already or not, those of one size together."""
    sizes: dict[tuple, list[Layout]] = {}
    for image in task.job.images(batch):
        layout = read_layout(task, image)
        sizes.setdefault(layout.mask.shape, []).append(layout)
    return [pair for group in sizes.values() for pair in paint_group(task, group)]


def read_layout(task: Task, image: int) -> Layout:
    """Mask, frame and caption of image k."""
    row, replicate = task.job.place(image)
    asked = task.prompts.asked(row, replicate)
    mask, frame, drawn = task.controls.read(row, replicate, asked)
    return Layout(image, row, replicate, mask, frame, task.prompts.told(asked, frame.cut(mask), drawn))


def paint_group(task: Task, group: list[Layout]) -> list[tuple[Layout, Painted]]:
    """Layouts of one size, painted together, those that the vetter refuses again."""
    config = task.config

    def paint(which: list[int], attempt: int) -> list[np.ndarray]:
        some = [group[one] for one in which]
        masks = np.stack([layout.mask for layout in some])
        shown = None if config.without_control else masks
        noise = [dealing.noise_of(layout.row, layout.replicate, attempt) for layout in some]
        images = generate(task.painter, shown, [layout.caption for layout in some], noise, config, masks.shape[1:])
        return [layout.frame.of(image) for layout, image in zip(some, images, strict=True)]

    masks = [layout.frame.cut(layout.mask) for layout in group]
    return list(zip(group, paint_vetted(paint, masks, task.vetter), strict=True))


def write_image(task: Task, layout: Layout, painted: Painted) -> None:
    """Write mask, then image, then the record: what the manifest tells of stands."""
    names = task.job.pair(layout.image, painted.kept)
    write_pair(task.out, names, painted.image, painted.mask, task.controls.palette, work=task.out / WORK)
    record: dict[str, Any]
    record = {"image": layout.image, "row": layout.row, "replicate": layout.replicate, "attempt": painted.attempt}
    record |= {"kept": painted.kept, "file_name": names[0], "conditioning_image_file_name": names[1]}
    if painted.scores:
        record |= {"miou": max(painted.scores), "scores": painted.scores, "ignored": painted.ignored}
    task.manifest.add(record | {"text": layout.caption})
