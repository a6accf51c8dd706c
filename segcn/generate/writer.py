"""The batches of a job: painted whole, scored, and written while the next one is painted."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from segcn.data.dataset import PairedDataset, to_uint8
from segcn.data.metadata import Split, finish_dataset, write_pair
from segcn.data.transforms import AUGMENTS, Box, boxes
from segcn.generate import manifest
from segcn.generate.card import figure_rows, write_card
from segcn.generate.conditions import Controls, Prompts, check_masks, read_controls, read_prompts
from segcn.generate.config import GenerateConfig
from segcn.generate.filtering import Filter, Generated, draw_filtering, generate_filtered, open_filter, verdicts_of
from segcn.generate.manifest import WORK, Job, Manifest, left_by_others, records_of
from segcn.generate.pipeline import Pipeline, generate, load_pipeline
from segcn.models.base import Base, reconstruct, weights_digest
from segcn.utils import io
from segcn.utils.errors import UserError
from segcn.utils.io import Process, write_whole
from segcn.utils.progress import Progress

# --- batches: The batches of a job: painted whole, scored, and written while the next one is painted.

WRITERS = 4  # threads that write images while the next are painted


class Layout(NamedTuple):
    """What image k is painted from."""

    image: int
    row: int
    replicate: int
    mask: np.ndarray  # uint8 [H, W], class ids
    frame: Box  # the part of it that holds image
    caption: str


@dataclass
class Task:
    """What stays the same from batch to batch."""

    config: GenerateConfig
    out: Path
    painter: Pipeline
    controls: Controls
    prompts: Prompts
    job: Job
    manifest: Manifest
    vetter: Filter | None
    settings: dict[str, Any]


def generate_batches(task: Task, batches: Iterable[int], log: Callable) -> float:
    """Paint whole batches and write what is missing of each while the next is painted; the slowest's seconds."""
    batches, slowest, done = list(batches), 0.0, 0
    owed = sum(len(task.manifest.missing(batch)) for batch in batches)
    told = Progress("painted", owed, log)
    writing: list[Future] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in batches:
            began = time.monotonic()
            missing = set(task.manifest.missing(batch))
            made = [pair for pair in generate_batch(task, batch) if pair[0].image in missing]
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


def generate_batch(task: Task, batch: int) -> list[tuple[Layout, Generated]]:
    """Every image of a batch, whether it stands already or not, those of one size together."""
    sizes: dict[tuple, list[Layout]] = {}
    for image in task.job.images(batch):
        layout = read_layout(task, image)
        sizes.setdefault(layout.mask.shape, []).append(layout)
    return [pair for group in sizes.values() for pair in generate_group(task, group)]


def read_layout(task: Task, image: int) -> Layout:
    """Mask, frame and caption of image k."""
    row, replicate = task.job.place(image)
    asked = task.prompts.asked(row, replicate)
    mask, frame, drawn = task.controls.read(row, replicate, asked)
    return Layout(image, row, replicate, mask, frame, task.prompts.told(asked, frame.cut(mask), drawn))


def generate_group(task: Task, group: list[Layout]) -> list[tuple[Layout, Generated]]:
    """Layouts of one size, painted together, those that the vetter refuses again."""
    config = task.config

    def paint(which: list[int], attempt: int) -> list[np.ndarray]:
        some = [group[one] for one in which]
        masks = np.stack([layout.mask for layout in some])
        shown = None if config.without_control else masks
        noise = [manifest.noise_of(layout.row, layout.replicate, attempt) for layout in some]
        images = generate(task.painter, shown, [layout.caption for layout in some], noise, config, masks.shape[1:])
        return [layout.frame.of(image) for layout, image in zip(some, images, strict=True)]

    masks = [layout.frame.cut(layout.mask) for layout in group]
    return list(zip(group, generate_filtered(paint, masks, task.vetter), strict=True))


def write_image(task: Task, layout: Layout, painted: Generated) -> None:
    """Write mask, then image, then the record: what the manifest tells of stands."""
    names = task.job.pair(layout.image, painted.kept)
    write_pair(task.out, names, painted.image, painted.mask, task.controls.palette, work=task.out / WORK)
    record: dict[str, Any]
    record = {"image": layout.image, "row": layout.row, "replicate": layout.replicate, "attempt": painted.attempt}
    record |= {"kept": painted.kept, "file_name": names[0], "conditioning_image_file_name": names[1]}
    if painted.scores:
        record |= {"miou": max(painted.scores), "scores": painted.scores, "ignored": painted.ignored}
    task.manifest.add(record | {"text": layout.caption})


# --- generate: A data set, or a folder of masks, to a data set of new images, by any number of processes.

SETTINGS_FILE = "generation.json"
CHANGE_NO_IMAGE = (
    "allow_symlinks", "batch_size", "controlnet_model_name_or_path", "limit", "output_dir", "segmenter",
    "torch_compile",
)  # fmt: skip
PATIENCE = 600.0  # seconds without an image of another process, after which its batches are painted here
COUNTS = ("limit", "replicates", "batch_size", "max_attempts")


def generate_dataset(
    config: GenerateConfig, painter: Pipeline | None = None, log: Callable = print, process: Process | None = None
) -> Path:
    """Paint every row of a data set or folder of masks and write the result as a data set; the same command goes on.

    Of several processes each paints its share and the first finishes the data set. Image k depends on the seed, its row
    and its replicate alone; the batch around it, which may change its last bit, on the whole job.
    """
    process = process or io.this_process()
    log = log if process.rank == 0 else lambda line: None
    check_numbers(config)
    prompts = read_prompts(config, read_controls(config))
    with claimed(config, process, log) as out:
        task = open_task(config, out, painter, process, prompts, log)
        if task.manifest.finished():
            log(f"{out}: {sum(record['kept'] for record in records_of(out))} images stand already.")
        else:
            generate_share(task, process, log)
    return out


def check_numbers(config: GenerateConfig) -> None:
    """UserError for a count below 1, or an mIoU outside of 0 to 1."""
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected 1 or more, found {value}")
    if config.min_miou is not None and not 0 <= config.min_miou <= 1:
        raise UserError(f"--min_miou: expected 0 to 1, found {config.min_miou}")
    if not config.output_dir:
        raise UserError("--output_dir: expected a folder to write to, found nothing")


@contextmanager
def claimed(config: GenerateConfig, process: Process, log: Callable) -> Iterator[Path]:
    """The output folder, in which no other command may paint meanwhile; nothing is done to a folder of another kind."""
    out = Path(config.output_dir)
    try:
        held = {path.name for path in out.iterdir()} if out.exists() else set()
        if held - {io.LOCK, WORK} and not (out / SETTINGS_FILE).is_file():
            raise UserError(f"--output_dir {out} is not empty and was not written by segcn generate: choose another.")
        out.mkdir(parents=True, exist_ok=True)
        if process.rank == 0:
            io.lock(out, log, "paints", "what it painted is kept, and the same command goes on")
    except OSError as error:
        raise UserError(f"--output_dir {out}: cannot be written: {error.strerror or error}") from None
    try:
        yield out
    finally:
        if process.rank == 0:
            io.release()


def open_task(
    config: GenerateConfig, out: Path, painter: Pipeline | None, process: Process, prompts: Prompts, log: Callable
) -> Task:
    """Load the networks, check the masks that are left to paint, and hold the settings against those that stand."""
    controls = prompts.controls
    painter = painter or load_pipeline(config, controls.palette)
    job = Job(len(controls), len(controls.files), config.replicates, config.batch_size)
    manifest = Manifest(out, job, process.rank)
    places = (job.place(image) for batch in job.share(process) for image in manifest.missing(batch))
    check_masks(controls, places, painter.base.latent_factor, log)
    vetter = open_filter(config, controls, log)
    settings = settings_of(config, painter, controls, vetter)
    hold_settings(out, settings)
    return Task(config, out, painter, controls, prompts, job, manifest, vetter, settings)


def settings_of(config: GenerateConfig, painter: Pipeline, controls: Controls, vetter: Filter | None) -> dict[str, Any]:
    """All that the images depend on, by value and by the content of what is named."""
    settings = asdict(config) | {"base_fingerprint": painter.base.fingerprint, "rows": controls.fingerprint}
    for name in CHANGE_NO_IMAGE:
        settings.pop(name)
    if not config.without_control:
        settings |= {"controlnet": painter.controlnet_folder, "controlnet_weights": painter.controlnet_digest}
    return settings | ({"segmenter_weights": weights_digest(vetter.segmenter)} if vetter else {})


def hold_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings to the folder; UserError where images stand there that were painted with other ones."""
    path = out / SETTINGS_FILE
    if path.is_file():
        old = asdict(GenerateConfig()) | {"rows": settings["rows"]} | json.loads(path.read_text())
        changed = [f"{name}: was {old.get(name)!r}, is {value!r}" for name, value in settings.items()
                   if old.get(name) != value]  # fmt: skip
        if changed and any((out / "images").rglob("*.png")):
            raise UserError(
                f"{out} holds images made with other settings:\n  "
                + "\n  ".join(changed)
                + "\nMove it away, or choose another --output_dir."
            )
        if not changed:
            return
    write_whole(path, lambda aside: aside.write_text(json.dumps(settings, indent=1) + "\n"), out / WORK)


def generate_share(task: Task, process: Process, log: Callable) -> None:
    """Paint what is missing of a process's batches; the first waits for the others and finishes the data set."""
    manifest, job = task.manifest, task.job
    todo = [batch for batch in job.share(process) if manifest.missing(batch)]
    standing = sum(map(bool, manifest.state))
    if standing:
        log(f"{task.out}: {standing} of {len(job)} images stand already and are kept.")
    slowest = generate_batches(task, todo, log)
    if process.rank == 0:
        for batch in left_by_others(manifest, max(PATIENCE, 3 * slowest)):
            log(f"Another process has brought nothing for long: its batch {batch} is painted here.")
            generate_batches(task, [batch], log)
        finish(task, log)
    manifest.close()


def finish(task: Task, log: Callable) -> None:
    """Manifest, palette, image, card and, last, the metadata that makes the folder a data set."""
    out, palette, work = task.out, task.controls.palette, task.out / WORK
    task.manifest.merge()
    kept = sum(record["kept"] for record in records_of(out))
    verdicts = verdicts_of(out)
    if verdicts:
        figure = draw_filtering(out, task.job, verdicts, palette)
        write_whole(out / "vetting.png", lambda path: figure.savefig(path, format="png", bbox_inches="tight"), work)
        log(f"{kept} images kept, {len(verdicts) - sum(one.kept for one in verdicts)} dropped: see {out}/vetting.png")
    if not kept:
        raise UserError(
            f"{out}: no image reached --min_miou {task.config.min_miou}; the best has"
            f" {max(verdict.miou for verdict in verdicts)}, see {out}/vetting.png. Paint into another --output_dir with"
            " a lower one, or with a ControlNet that obeys better."
        )
    write_card(out, task.config, task.settings, figure_rows(task.config, kept, verdicts), palette)
    rows = ((one["file_name"], one["conditioning_image_file_name"], one["text"]) for one in records_of(out)
            if one["kept"])  # fmt: skip
    finish_dataset(out, rows, palette, work)
    task.manifest.clear()


def reconstruct_dataset(
    split: Split, base: Base, out: Path, resolution: int, batch_size: int = 16, fit: str = "crop"
) -> Path:
    """The real images through the autoencoder and back, as a data set: the ceiling of a latent model."""
    pairs = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit)
    names: list[tuple[str, str]] = []
    for first in range(0, len(pairs), batch_size):
        samples = [pairs.sample(row, 0) for row in range(first, min(first + batch_size, len(pairs)))]
        images = to_uint8(reconstruct(base.vae, torch.stack([sample.image for sample in samples])))
        for sample, image in zip(samples, images, strict=True):
            frame = boxes(sample.draw, sample.original.shape[1:], resolution)[1]
            names.append((f"images/{len(names):06d}.png", f"masks/{len(names):06d}.png"))
            write_pair(out, names[-1], frame.of(image), frame.cut(sample.mask.numpy()), split.palette)
    captions = (record.caption for record in split.records)
    rows = ((*pair, caption) for pair, caption in zip(names, captions, strict=True))
    return finish_dataset(out, rows, split.palette)
