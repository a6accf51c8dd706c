"""A data set, or a folder of masks, to a data set of new images: batches, sharding, the manifest, and resuming.

An image depends on the seed, its row and its replicate; the batch around it, which can change its last bit, on the job
alone. So any number of processes writes the same bytes, and after a kill the same command completes the set."""

import json
import os
import shutil
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import distributed

from segcn.data.captions import classes_of, listed
from segcn.data.dataset import PairedDataset, in_batches, to_uint8
from segcn.data.masks import read_mask
from segcn.data.metadata import Split, finish_dataset, read_named_split, write_pair
from segcn.data.palette import Palette, palette_table
from segcn.data.transforms import AUGMENTS, boxes, check_buckets
from segcn.generate.conditions import Condition, Conditions, check_masks, check_tiled, read_conditions
from segcn.generate.config import MODELS, GenerateConfig, SampleConfig
from segcn.generate.filtering import (
    Filter,
    Generated,
    draw_filtering,
    generate_filtered,
    images_of_rows,
    likely_cause,
    mostly_dropped,
    open_filter,
)
from segcn.generate.pipeline import Pipeline, Start, check_sampling, generate, load_pipeline, noise_of
from segcn.models.base import Base, load_base, pick_device, reconstruct, weights_digest
from segcn.models.segmenter import reward_record
from segcn.utils import io
from segcn.utils.errors import UserError
from segcn.utils.html import render
from segcn.utils.io import Process, write_whole
from segcn.utils.paths import public_name
from segcn.utils.progress import Progress

SETTINGS_FILE = "generation.json"
RECORDS = "manifest.jsonl"
WORK = ".work"  # in the folder: records and half-written files; gone when the data set is finished
FIGURE = "filtering.png"
FLAT = 1000  # images of a job that are put into one folder; of a larger job, each folder holds so many
WRITERS = 4  # threads that write images while the next ones are generated
CHANGE_NO_IMAGE = (
    "allow_symlinks", "batch_size", "controlnet_model_name_or_path", "limit", "output_dir", "reconstruct", "segmenter",
    "segmenter_architecture", "torch_compile",
)  # fmt: skip
COMPARED_BY_CONTENT = frozenset(
    {"pretrained_model_name_or_path", "lora", "controlnet", "controls", "reward_segmenter_weights"}
)  # recorded; their content is compared instead, that of the ControlNet's reward by the ControlNet's weights


@dataclass(frozen=True)
class Job:
    """`replicates` images of each of `rows` rows; without --limit it would have `all_rows`.

    ends: under --hard_first the number of images of the rows up to each, itself included.
    """

    rows: int
    all_rows: int
    replicates: int
    batch_size: int
    ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        """The number of images."""
        return self.rows * self.replicates

    def place(self, image: int) -> tuple[int, int]:
        """The row and the replicate of an image."""
        if not self.ends:
            return divmod(image, self.replicates)
        row = bisect_right(self.ends, image)
        return row, image - (self.ends[row - 1] if row else 0)

    def batches(self, process: Process) -> Iterator[range]:
        """The batches of a process, each the numbers of its images, whether they exist already or not."""
        for batch in process.share(-(-len(self) // self.batch_size)):
            yield range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self)))

    def names(self, image: int, kept: bool = True) -> tuple[str, str]:
        """The files of an image and its mask, such as images/000123.png, or images/004/004321.png in a large job.

        The best image of a row that was dropped is in rejected/.
        """
        above = "" if kept else "rejected/"
        below = f"{image // FLAT:03d}/" if self.all_rows * self.replicates > FLAT else ""
        return f"{above}images/{below}{image:06d}.png", f"{above}masks/{below}{image:06d}.png"


class Manifest:
    """Which images of a job exist, by the records of all processes; each appends to a file of its own.

    A record is {"image", "row", "replicate", "attempt", "kept", "file_name", ...}, without any time. The records of a
    finished set are in manifest.jsonl, in the order of the images.
    """

    def __init__(self, out: Path, job: Job, rank: int):
        self.out, self.work = out, out / WORK
        self.file: FileIO | None = None
        self.part = self.work / f"part-{rank:05d}.jsonl"
        self.done = bytearray(len(job))
        listed = lru_cache(16)(lambda folder: frozenset(os.listdir(folder)) if folder.is_dir() else frozenset())
        for record, _ in self.lines():
            if record["image"] < len(job):
                paths = [out / record[name] for name in ("file_name", "conditioning_image_file_name")]
                exist = all(path.name in listed(path.parent) for path in paths)
                self.done[record["image"]] = exist or not record["kept"]

    def lines(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """(record, line) of everything that was recorded; of an image that was generated again, the last one counts."""
        for path in (self.out / RECORDS, *sorted(self.work.glob("part-*.jsonl"))):
            yield from _whole_lines(path)

    def missing(self, images: Sequence[int]) -> list[int]:
        """Those of these images that neither exist nor were dropped."""
        return [image for image in images if not self.done[image]]

    def add(self, record: dict[str, Any]) -> None:
        """Append the record of an image whose files exist; a kill leaves it whole, or cut and not counted."""
        if self.file is None:
            self.work.mkdir(parents=True, exist_ok=True)
            self.file = self.part.open("ab", buffering=0)
        self.file.write(b"\n" + json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.done[record["image"]] = True

    def finished(self) -> bool:
        """Whether nothing is left to do."""
        files = [self.out / name for name in ("metadata.csv", "palette.json", RECORDS)]
        return all(self.done) and all(path.is_file() for path in files) and not list(self.work.glob("part-*.jsonl"))

    def merge(self) -> None:
        """Write manifest.jsonl; images beyond this job, of one with a higher --limit, are kept where they exist."""
        lines: dict[int, bytes] = {}
        for record, line in self.lines():
            inside = record["image"] < len(self.done)
            if inside or not record["kept"] or (self.out / record["file_name"]).is_file():
                lines[record["image"]] = line
        text = b"".join(lines[image] for image in sorted(lines))
        write_whole(self.out / RECORDS, lambda path: path.write_bytes(text), self.work)

    def clear(self) -> None:
        """Remove what a finished set does not need, also what was half written when a process was killed."""
        for name in ("metadata.csv", SETTINGS_FILE):
            for path in self.out.glob(f".*-{name}"):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)


def records_of(out: Path) -> Iterator[dict[str, Any]]:
    """The records of a finished data set, in the order of its images."""
    return (record for record, _ in _whole_lines(out / RECORDS))


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and line.strip():
                    try:
                        yield json.loads(line), line
                    except ValueError:  # cut by a kill; a later run appended behind it
                        continue


@dataclass
class Task:
    """All that generating a batch needs."""

    config: GenerateConfig
    out: Path
    pipeline: Pipeline
    conditions: Conditions
    job: Job
    manifest: Manifest
    criterion: Filter | None


def generate_dataset(
    config: GenerateConfig, pipeline: Pipeline | None = None, log: Callable = print, process: Process | None = None
) -> Path:
    """Generate from every row of a data set or folder of masks, and write a data set; rerun to resume.

    Of several processes each generates its share, and the first one then finishes the data set. UserError for settings
    out of range, a mask that cannot be used, and a folder that holds images made with other settings.
    """
    process = process or io.this_process()
    log = log if process.rank == 0 else lambda line: None
    check_sampling(config)
    conditions = read_conditions(config)
    with _locked(config, process, log) as out:
        pipeline = pipeline or load_pipeline(config, conditions.palette)
        check_buckets(config, pipeline.base.side_factor)
        job = Job(len(conditions), len(conditions.files), config.replicates, 1 if config.tiled else config.batch_size)
        criterion = open_filter(config, conditions, log) if config.hard_first else None
        if criterion:
            job = replace(job, ends=tuple(accumulate(images_of_rows(config, conditions, criterion))))
        log(f"Generating with {pipeline}, seed {config.seed}.")
        manifest = Manifest(out, job, process.rank)
        batches = [batch for batch in job.batches(process) if manifest.missing(batch)]
        rows = (job.place(image)[0] for batch in batches for image in manifest.missing(batch))
        check_masks(conditions, rows, pipeline.base.side_factor, log)
        criterion = criterion or open_filter(config, conditions, log)
        settings = settings_of(config, pipeline, conditions, criterion)
        settings |= {"images_up_to_row": job.ends} if job.ends else {}
        _compare_settings(out, settings, allow=not any((out / "images").rglob("*.png")))
        task = Task(config, out, pipeline, conditions, job, manifest, criterion)
        finished = manifest.finished()
        if any(manifest.done):
            log(f"{out}: {sum(manifest.done)} of {len(job)} images exist already and are kept.")
        generate_batches(task, batches, log)
        _wait_for_all(process)
        if process.rank == 0 and not finished:
            finish_set(task, process, settings, log)
    return out


@contextmanager
def _locked(config: GenerateConfig, process: Process, log: Callable) -> Iterator[Path]:
    """The output folder, which no other command may use meanwhile; a folder of another kind is not touched."""
    if not config.output_dir:
        raise UserError("--output_dir: expected a folder to write to, found nothing")
    out = Path(config.output_dir)
    try:
        found = [path for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
        if found and not (out / SETTINGS_FILE).is_file():
            raise UserError(f"--output_dir {out} is not empty and was not written by segcn generate: choose another.")
        out.mkdir(parents=True, exist_ok=True)
        if process.rank == 0:
            io.lock(out, log, "generates", "what it generated is kept, and rerunning the same command resumes")
    except OSError as error:
        raise UserError(f"--output_dir {out}: cannot be written: {error.strerror or error}") from None
    try:
        yield out
    finally:
        if process.rank == 0:
            io.release()


def settings_of(
    config: GenerateConfig, pipeline: Pipeline, conditions: Conditions, criterion: Filter | None
) -> dict[str, Any]:
    """All that the images depend on, by value and by the content of what is named."""
    settings = asdict(config) | {"base_fingerprint": pipeline.base.fingerprint, "rows": conditions.fingerprint}
    for name in CHANGE_NO_IMAGE:
        if name != "limit" or not config.hard_first:  # which then shares out other images
            settings.pop(name)
    if not config.without_control:
        settings |= {"controlnet": pipeline.controlnet_folder, "controlnet_weights": pipeline.controlnet_digest}
        if rewarded := reward_record(pipeline.controlnet_folder):
            settings["reward_segmenter_weights"] = rewarded[1]["weights"]
    return settings | ({"segmenter_weights": weights_digest(criterion.segmenter)} if criterion else {})


def differences(folder: str | Path, config: GenerateConfig, pipeline: Pipeline) -> list[str]:
    """How the settings of the images in a folder differ from a config: "name: was X, is Y" of each.

    Empty: there are none, or `generate_dataset` will resume and reuse them. Otherwise it refuses the folder.
    """
    conditions = read_conditions(config)
    settings = settings_of(config, pipeline, conditions, open_filter(config, conditions, print))
    return _compare_settings(Path(folder), settings, allow=True, write=False)


def _compare_settings(out: Path, settings: dict[str, Any], allow: bool, write: bool = True) -> list[str]:
    return io.same_settings(
        out / SETTINGS_FILE,
        settings,
        free=COMPARED_BY_CONTENT,
        allow=allow,
        log=lambda line: None,
        what="set of images",
        write=write,
    )


def generate_batches(task: Task, batches: Sequence[range], log: Callable) -> None:
    """Generate whole batches, and write what is missing of each while the next one is generated."""
    progress = Progress("generated", sum(len(task.manifest.missing(batch)) for batch in batches), log)
    writing: list[Future] = []
    done = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in batches:
            generated = generate_batch(task, batch)
            for future in writing:
                future.result()  # raises what a writer raised
            writing = [
                pool.submit(write_image, task, image, *generated[image]) for image in task.manifest.missing(batch)
            ]
            done += len(writing)
            progress(done)
        for future in writing:
            future.result()
    if task.manifest.file is not None:
        task.manifest.file.close()


def generate_batch(task: Task, batch: Sequence[int]) -> dict[int, tuple[Condition, Generated]]:
    """Every image of a batch, whether it exists already or not, with what it was generated from."""
    sizes: dict[tuple, dict[int, Condition]] = {}
    for image in batch:
        condition = task.conditions.read(*task.job.place(image))
        sizes.setdefault(condition.mask.shape, {})[image] = condition
    results: dict[int, Any] = {}
    for group in sizes.values():  # one call of `generate` has masks of one size
        conditions = list(group.values())

        def attempt(which: list[int], number: int, conditions=conditions) -> list[np.ndarray]:
            some = [conditions[one] for one in which]
            masks = np.stack([condition.mask for condition in some])
            shown = None if task.config.without_control else masks
            prompts = [condition.prompt for condition in some]
            noise = [noise_of(condition.row, condition.replicate, number) for condition in some]
            size, start = masks.shape[1:], start_of(some, task.config)
            images = generate(task.pipeline, shown, prompts, noise, task.config, size, start=start)
            return [condition.frame.of(image) for condition, image in zip(some, images, strict=True)]

        masks = [condition.frame.cut(condition.mask) for condition in conditions]
        generated = generate_filtered(attempt, masks, task.criterion)
        results |= dict(zip(group, zip(conditions, generated, strict=True), strict=True))
    return results


def start_of(conditions: Sequence[Condition], config: GenerateConfig) -> Start | None:
    """What --from_images and --inpaint start from; None without them."""
    images = [condition.image for condition in conditions if condition.image is not None]
    regions = [condition.region for condition in conditions if condition.region is not None]
    strength = 1.0 if config.from_images is None else config.from_images
    return Start(np.stack(images), strength, np.stack(regions) if regions else None) if images else None


def write_image(task: Task, image: int, condition: Condition, generated: Generated) -> None:
    """Write mask, then image, then the record: what is recorded exists."""
    names = task.job.names(image, generated.kept)
    mask = condition.frame.cut(condition.mask)
    write_pair(task.out, names, generated.image, mask, task.conditions.palette, work=task.out / WORK)
    record: dict[str, Any] = {"image": image, "row": condition.row, "replicate": condition.replicate}
    record |= {"attempt": generated.attempt, "kept": generated.kept}
    record |= {"file_name": names[0], "conditioning_image_file_name": names[1]}
    if generated.scores:
        record |= {"miou": max(generated.scores), "scores": generated.scores}
    record["text"] = condition.prompt
    if not condition.prompt.strip():  # every row of a data set has a caption
        record["caption"] = classes_of(mask, task.conditions.palette)
    task.manifest.add(record)


def _wait_for_all(process: Process) -> None:
    """Under torchrun and accelerate, which end all processes when one fails: wait until all have done their share."""
    if process.world == 1 or "MASTER_ADDR" not in os.environ:
        return
    if distributed.is_initialized():
        distributed.barrier()
        return
    week = timedelta(days=7)
    distributed.init_process_group("gloo", rank=process.rank, world_size=process.world, timeout=week)
    distributed.barrier()
    distributed.destroy_process_group()


def finish_set(task: Task, process: Process, settings: dict[str, Any], log: Callable) -> None:
    """Manifest, palette, figure, card and, last, the metadata that makes the folder a data set."""
    out, config, palette, work = task.out, task.config, task.conditions.palette, task.out / WORK
    manifest = Manifest(out, task.job, process.rank)  # with what other processes recorded
    missing = manifest.missing(range(len(task.job)))
    if missing:
        others = sorted({image // task.job.batch_size % process.world for image in missing})
        raise UserError(
            f"{out}: {len(missing)} of {len(task.job)} images are still missing, from process"
            f" {', '.join(map(str, others))} of {process.world}. When no process is running any more, rerun the same"
            " command, with one process or several, to generate what is missing and finish the data set."
        )
    manifest.merge()
    scored = [record for record in records_of(out) if "miou" in record]
    kept = sum(record["kept"] for record in records_of(out))
    if scored:
        figure = draw_filtering(out, scored, palette)
        write_whole(out / FIGURE, lambda path: figure.savefig(path, format="png", bbox_inches="tight"), work)
        log(f"{kept} images kept, {len(scored) - kept} dropped: see {out / FIGURE}")
        if lost := mostly_dropped(out, scored, palette):
            log(f"Of {listed(lost)} more images were dropped than kept; where the segmenter learned from few rows with"
                " them, it may be what fails: a lower --min_miou keeps them.")  # fmt: skip
    if not kept:
        assert task.criterion is not None
        raise UserError(
            f"{out}: no image reached --min_miou {config.min_miou}; the best has"
            f" {max(record['miou'] for record in scored)}, see {out / FIGURE}."
            f" {likely_cause(config, task.pipeline.base, task.criterion, scored)} Use another --output_dir then."
        )
    write_data_card(out, config, settings, kept, scored, palette, work)
    rows = ((record["file_name"], record["conditioning_image_file_name"], record.get("caption", record["text"]))
            for record in records_of(out) if record["kept"])  # fmt: skip
    finish_dataset(out, rows, palette, work)
    manifest.clear()


def reconstruct_controls(config: GenerateConfig) -> Path:
    """`segcn generate --reconstruct`: the real images of --controls through the autoencoder of the base."""
    check_tiled(config)
    check_buckets(config)
    out = Path(config.output_dir)
    if not config.output_dir or (out.exists() and any(out.iterdir())):
        raise UserError(f"--output_dir {out}: expected a folder that is empty or not there yet")
    split = read_named_split(config.controls, config.split).first(config.limit)
    resolution = config.resolution or min(read_mask(split[0].mask, split.palette).shape)
    base = load_base(config.pretrained_model_name_or_path, pick_device(), lora=config.lora)
    return reconstruct_dataset(split, base, out, resolution, config.batch_size, config.framing)


def reconstruct_dataset(
    split: Split, base: Base, out: Path, resolution: int, batch_size: int = 16, fit: str = "crop"
) -> Path:
    """The real images through the autoencoder and back, as a data set: the ceiling of a latent model."""
    pairs = PairedDataset(split, resolution, AUGMENTS["none"], 0, fit)
    names: list[tuple[str, str]] = []
    for first in range(0, len(pairs), batch_size):
        samples = [pairs.sample(row, 0) for row in range(first, min(first + batch_size, len(pairs)))]
        images = reconstructed(base.vae, [sample.image for sample in samples])
        for sample, image in zip(samples, images, strict=True):
            frame = boxes(sample.draw, sample.original.shape[1:], resolution)[1]
            names.append((f"images/{len(names):06d}.png", f"masks/{len(names):06d}.png"))
            write_pair(out, names[-1], frame.of(image), frame.cut(sample.mask.numpy()), split.palette)
    captions = (record.caption for record in split.records)
    rows = ((*pair, caption) for pair, caption in zip(names, captions, strict=True))
    return finish_dataset(out, rows, split.palette)


def reconstructed(vae: AutoencoderKL, images: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """What the autoencoder leaves of images [3, H, W] in [-1, 1], uint8 [H, W, 3] each; those of one shape together."""
    return in_batches(
        images, lambda places: to_uint8(reconstruct(vae, torch.stack([images[place] for place in places])))
    )


# The card of the set, README.md in its folder

MADE_HERE = "<!-- segcn generate writes this file; it leaves one without this line alone. -->"


def write_data_card(
    out: Path,
    config: GenerateConfig,
    settings: dict[str, Any],
    kept: int,
    scored: Sequence[dict[str, Any]],
    palette: Palette,
    work: Path,
) -> bool:
    """Write README.md to a finished set; False where there is one of the user's own.

    kept: the images in the set. scored: the records of the manifest that have a score. Of paths only the last folder's
    name is written, and no value is read as Markdown or HTML.
    """
    path = out / "README.md"
    if path.exists() and MADE_HERE not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    scores = [record["miou"] for record in scored if record["kept"]]
    text = render(
        "generate/templates/card.md",
        mark=MADE_HERE,
        config=config,
        settings=settings,
        sampling=[one.name for one in fields(SampleConfig) if one.name not in MODELS | {"seed"}],
        classes=palette_table(palette),
        kept=kept,
        dropped=len(scored) - len(scores),
        attempts=statistics.fmean(len(record["scores"]) for record in scored) if scored else 0,
        miou=[min(scores), statistics.median(scores), max(scores)] if scores else [],
        plain=_plain,
        name=lambda place: _plain(public_name(place)),
    )
    write_whole(path, lambda staged: staged.write_text(text, encoding="utf-8"), work)
    return True


def _plain(value: Any) -> str:
    """A value in one line, in which no character has a meaning in Markdown or HTML."""
    line = " ".join(str(value).split())
    return "".join(sign if sign.isalnum() or sign in " ,.-/" else f"&#{ord(sign)};" for sign in line)
