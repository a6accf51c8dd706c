"""Two real steps before a run: what memory and time it will take, and which batch fits. No run is written."""

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from segcn.data import sampler
from segcn.train import latent_cache, memory
from segcn.train.config import TrainConfig, total_steps
from segcn.train.latent_cache import Layout, cache_root
from segcn.train.memory import GB
from segcn.train.setup import Run, make_accelerator, make_repeats, prepare, read_rows, resolve
from segcn.utils.errors import UserError

SHARE = 0.9  # of the memory may be planned with: images and fragmentation differ from step to step
LEAST_ROWS = 16  # encoded for the pace of the cache
Learn = Callable[[Run], Iterator[bool]]  # learns from each micro-batch; whether that completed a step


@dataclass(frozen=True)
class Seen:
    """Two steps at a micro-batch size; peak in bytes, the most of any process, None where memory ran out."""

    batch: int
    peak: int | None
    seconds: float  # of the second step

    @property
    def measured(self) -> int:
        """The peak of steps that memory was enough for."""
        assert self.peak is not None
        return self.peak


def preflight(config: TrainConfig, learn: Learn) -> None:
    """Take two steps on the config's own data, models and machine, aside, and print what was measured."""
    fitted = memory.fit(resolve(config), *memory.half_precision())[0]
    accelerator = make_accelerator(fitted, Path(config.output_dir))
    sizes = (1, max(2, fitted.train_batch_size))
    with folder_aside(config, accelerator) as folder:
        before = resident(accelerator.device)
        try:
            run = prepare(trial(config, folder, sizes[1] * fitted.gradient_accumulation_steps, accelerator))
            seen = measure(run, learn, sizes, before)
        except (RuntimeError, MemoryError) as error:
            raise_from(error, fitted, accelerator.device)
        for line in report(run, fitted, seen, before):
            run.log.say(line)
    accelerator.end_training()


@contextmanager
def folder_aside(config: TrainConfig, accelerator: Accelerator) -> Iterator[Path]:
    """A folder beside the caches, where all processes see it, for as long as it is needed."""
    name = broadcast_object_list([f"preflight-{os.getpid()}-{time.time_ns()}"])[0]
    folder = cache_root(config) / name
    try:
        yield folder
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def trial(config: TrainConfig, folder: Path, rows: int, accelerator: Accelerator) -> TrainConfig:
    """The config with a run folder and caches of its own, of as many rows as four steps see."""
    rows = max(4 * rows * accelerator.num_processes, LEAST_ROWS)
    return dataclasses.replace(
        config,
        output_dir=str(folder / "run"),
        cache_dir=str(folder),
        cache_draws=1,
        max_train_samples=min(rows, config.max_train_samples or rows),
        max_train_steps=4,
        faithfulness_rows=0,
        report_to="none",
    )


def measure(run: Run, learn: Learn, sizes: tuple[int, int], before: int) -> list[Seen]:
    """Two steps at each size that memory seems to allow, the smaller first, so that its peak is its own."""
    first = two_steps(run, learn, sizes[0])
    device, activations = run.accelerator.device, first.measured - before - sum(parts(run).values())
    more = first.measured + (sizes[1] - sizes[0]) * activations
    if device.type == "cpu" and more > memory.total_bytes(device):  # running out would end the process
        return [first, Seen(sizes[1], None, math.nan)]
    try:
        return [first, two_steps(run, learn, sizes[1])]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or run.accelerator.num_processes > 1:
            raise
    return [first, Seen(sizes[1], None, math.nan)]


def two_steps(run: Run, learn: Learn, size: int) -> Seen:
    """Two optimizer steps with micro-batches of `size`."""
    run.config = dataclasses.replace(run.config, train_batch_size=size, max_train_steps=run.step + 2)
    device, ends = run.accelerator.device, []
    memory.reset_peak(device)
    for stepped in learn(run):
        if stepped:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ends.append(time.monotonic())
    peaks = run.accelerator.gather(torch.tensor([memory.peak_bytes(device)], device=device))
    return Seen(size, int(peaks.max()), ends[1] - ends[0])


def parts(run: Run) -> dict[str, int]:
    """Bytes of the run's components by the accounting."""
    encoders = [part for part in (run.base.vae, run.base.text_encoder) if part is not None]
    return memory.accounting(
        run.base.unet,
        run.accelerator.unwrap_model(run.controlnet),
        encoders,
        half_copies=run.accelerator.native_amp,
        use_8bit_adam=run.config.use_8bit_adam,
        use_ema=run.config.use_ema,
    )


def resident(device: torch.device) -> int:
    """Bytes that are held now: by Python and its libraries, before anything is loaded."""
    memory.reset_peak(device)
    return memory.peak_bytes(device)


def report(run: Run, config: TrainConfig, seen: list[Seen], before: int) -> list[str]:
    """The lines to print: memory by component, pace and time of the whole run, and the proposed batch."""
    small, large = seen
    asked = small if config.train_batch_size == small.batch else large
    shown = asked if asked.peak is not None else small
    total = budget(config, run.accelerator.device)
    counted = {name: size for name, size in (parts(run) | {"Python and libraries": before}).items() if size}
    counted["activations and the rest"] = max(0, shown.measured - sum(counted.values()))
    lines = [f"Preflight: 2 steps of {shown.batch} x {config.gradient_accumulation_steps} rows, {config.resolution} px,"
             f" on {run.accelerator.num_processes} process(es), {run.accelerator.device.type}"]  # fmt: skip
    if asked.peak is None:
        lines.append(f"  Memory runs out at --train_batch_size {asked.batch}: what follows is for {shown.batch}.")
    lines += [f"  {name:26} {size / GB:6.2f} GB" for name, size in counted.items()]
    lines.append(f"  {'peak':26} {shown.measured / GB:6.2f} GB of {total / GB:.1f}")
    return lines + times(run, config, shown) + proposal(config, seen, total, counted["its gradients"])


def budget(config: TrainConfig, device: torch.device) -> float:
    """Bytes that a process may take: the device's, or those of --memory_preset where that is less."""
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return min(memory.total_bytes(device) // sharers, (config.memory_preset or math.inf) * GB)


def times(run: Run, config: TrainConfig, shown: Seen) -> list[str]:
    """Pace, and the time of the whole run: its cache, unless that stands already, and its steps."""
    whole, processes = read_rows(config), run.accelerator.num_processes
    repeats = None if config.max_train_steps else make_repeats(run.config, whole, run.accelerator, run.log)
    rows_shown = sampler.Stream(len(whole), config.seed, repeats).start(config.num_train_epochs)
    steps = total_steps(config, rows_shown, processes)
    rows = config.train_batch_size * config.gradient_accumulation_steps  # of a step and process
    seconds = steps * shown.seconds * config.train_batch_size / shown.batch
    lines = [f"  {shown.seconds:.2f} s a step: {steps} steps take {spell(seconds)}"]
    if run.examples.cache is not None:
        layout = dataclasses.replace(run.examples.cache.layout, rows=len(whole))
        pace = len(run.split) / run.cache_seconds
        images = len(whole) * draws_of(run, config, layout, steps * rows * processes / len(whole))
        lines.append(f"  {pace:.1f} images a second into the cache: {images} take {spell(images / pace)}")
        seconds += images / pace
    return [*lines, f"  the whole run, if no cache stands yet: {spell(seconds)}"]


def draws_of(run: Run, config: TrainConfig, layout: Layout, visits: float) -> int:
    """How many draws of each row the whole run will cache."""
    still = run.examples.dataset.augment.still
    free, limit = latent_cache.free_bytes(cache_root(config)), config.cache_budget_gb * 1e9
    return latent_cache.resolve_draws(1 if still else config.cache_draws, visits, layout.draw_bytes, 0, limit, free)


def proposal(config: TrainConfig, seen: list[Seen], total: float, gradients: int) -> list[str]:
    """The largest micro-batch that fits, by the measured bytes of an image, with the same effective batch."""
    size, slope = best_batch(config, seen, total, gradients)
    if size is None:
        return [f"  Does not fit: {smaller(config)}"]
    effective = config.train_batch_size * config.gradient_accumulation_steps
    per = f"  Each image of a micro-batch takes {slope / GB:.2f} GB. " if slope is not None else "  "
    return [f"{per}Proposed: --train_batch_size {size} --gradient_accumulation_steps {effective // size}"]


def best_batch(config: TrainConfig, seen: list[Seen], total: float, gradients: int) -> tuple[int | None, float | None]:
    """(micro-batch, bytes of an image); None for the first where not even 1 fits, for the second where unknown.

    gradients: their bytes; they wait through the forward passes only where micro-batches are accumulated.
    """
    small, large = seen
    slope = None if large.peak is None else max(0.0, (large.peak - small.measured) / (large.batch - small.batch))
    effective, waiting = config.train_batch_size * config.gradient_accumulation_steps, 0
    for size in (n for n in range(effective, 0, -1) if effective % n == 0):
        if config.gradient_accumulation_steps == 1 and size < effective:
            waiting = gradients
        known = size == small.batch or (slope is not None)
        if known and small.measured + waiting + (slope or 0) * (size - small.batch) <= SHARE * total:
            return size, slope
    return None, slope


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what a full GPU, or a full machine, raises."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def raise_from(error: BaseException, config: TrainConfig, device: torch.device) -> None:
    """UserError for memory that ran out; anything else is raised as it is."""
    if not out_of_memory(error):
        raise error
    raise UserError(
        f"memory ran out: expected what a micro-batch of 1 row takes, found {memory.total_bytes(device) / GB:.1f} GB"
        f" on this {device.type}. {smaller(config)}"
    ) from error


def smaller(config: TrainConfig) -> str:
    """What to try where a training does not fit."""
    less = [gb for gb in memory.PRESETS if gb < (config.memory_preset or math.inf)]
    if less:
        return f"Try --memory_preset {max(less)}, which saves memory, and --train_batch_size 1."
    return "Try a smaller --resolution: --memory_preset 8 saves what can be saved."


def spell(seconds: float) -> str:
    """ "40 s", "12 min" or "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
