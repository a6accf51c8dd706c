"""Where the memory of a training goes, and --preflight: two real steps that measure it before a run.

GB (10^9 bytes) of a training of Stable Diffusion 1.5, whose parameters are: U-Net 860 M, ControlNet 361 M, text encoder
123 M, VAE 84 M. The encoders leave memory once the cache is complete. The activations are those kept for the backward
pass, counted on the architecture at 512 px; CUDA itself takes about 0.5 besides.

| --memory_preset        | none (float32, batch 4) |   24 |   16 |   12 |    8 |
|------------------------|-------------------------|------|------|------|------|
| frozen U-Net           |                    3.44 | 1.72 | 1.72 | 1.72 | 1.72 |
| ControlNet             |                    1.45 | 1.45 | 1.45 | 1.45 | 1.45 |
| its gradients          |                    1.45 | 1.45 | 1.45 | 1.45 | 1.45 |
| its half copies        |                       - | 0.72 | 0.72 | 0.72 | 0.72 |
| optimizer state        |                    2.89 | 2.89 | 2.89 | 2.89 | 0.74 |
| activations            |                    7.24 | 3.64 | 1.82 | 0.24 | 0.24 |
| together               |                   16.47 |11.87 |10.05 | 8.47 | 6.32 |

--use_ema adds 1.45. An image of half the side has a quarter of the activations."""

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from segcn.data.dataset import PairedDataset
from segcn.data.transforms import AUGMENTS
from segcn.models.base import give_freed_memory_back
from segcn.train import latent_cache
from segcn.train.batches import rows_of_epochs
from segcn.train.config import MEMORY_PRESETS, TrainConfig, total_steps
from segcn.train.latent_cache import cache_root
from segcn.train.setup import Run, fit_memory, make_accelerator, make_repeats, prepare, resolve, training_split
from segcn.utils.errors import UserError

GB = 10**9
PLANNED_SHARE = 0.9  # of the memory may be planned with: images and fragmentation differ from step to step
LEAST_ROWS = 16  # encoded for the pace of the cache
Learn = Callable[[Run], Iterator[bool]]  # trains on each micro-batch; whether that completed a step


def accounting(unet: nn.Module, controlnet: nn.Module, encoders: Iterable[nn.Module] = (), *, half_copies=False,
               use_8bit_adam=False, use_ema=False) -> dict[str, int]:  # fmt: skip
    """Bytes of a training by component, activations aside, from the networks themselves (on "meta" devices too).

    half_copies: autocast keeps a half-precision copy of the trained weights during a step.
    """

    def size_of(network: nn.Module) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())

    def adam_bytes(numbers: int) -> int:  # both moments; bitsandbytes leaves less than 4096 numbers in 32 bits
        if not use_8bit_adam or numbers < 4096:
            return 8 * numbers
        return 2 * numbers + 2 * 4 * -(-numbers // 256)  # and a float32 scale for each 256 of them

    trained = size_of(controlnet)
    return {
        "frozen U-Net": size_of(unet),
        "encoders": sum(map(size_of, encoders)),
        "ControlNet": trained,
        "its gradients": trained,
        "its half copies": trained // 2 if half_copies else 0,
        "optimizer state": sum(adam_bytes(parameter.numel()) for parameter in controlnet.parameters()),
        "EMA": trained if use_ema else 0,
    }


def peak_bytes(device: torch.device) -> int:
    """The most memory held since `reset_peak`: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # psutil knows no peak on Linux


def reset_peak(device: torch.device) -> None:
    """Start a new `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        give_freed_memory_back()
        with contextlib.suppress(OSError):  # a sandbox may forbid it: then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def total_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this machine that is free or already this process's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


@dataclass(frozen=True)
class Trial:
    """Two steps at a micro-batch size; peak in bytes, the most of any process, None where memory ran out."""

    batch: int
    peak: int | None
    seconds: float = math.nan  # of the second step


def preflight(config: TrainConfig, learn: Learn, check: bool = True) -> None:
    """Take two steps on the config's own data, models and machine, aside, and print what was measured.

    check: whether to say how well the base fits the data set, too.
    """
    fitted = fit_memory(resolve(config))[0]
    accelerator = make_accelerator(fitted, Path(config.output_dir))
    sizes = (1, max(2, fitted.train_batch_size))
    name = broadcast_object_list([f"preflight-{os.getpid()}-{time.time_ns()}"])[0]
    folder = cache_root(config) / name  # where all processes see it
    rows = max(4 * sizes[1] * fitted.gradient_accumulation_steps * accelerator.num_processes, LEAST_ROWS)
    trial = dataclasses.replace(
        config,
        output_dir=str(folder / "run"),
        cache_dir=str(folder),
        cache_draws=1,
        max_train_samples=min(rows, config.max_train_samples or rows),
        max_train_steps=4,
        faithfulness_rows=0,
        report_to="none",
    )
    try:
        reset_peak(accelerator.device)
        before = peak_bytes(accelerator.device)  # of Python and its libraries
        run = prepare(trial, check=check)
        for line in preflight_report(run, fitted, measure_steps(run, learn, sizes, before), before):
            run.log.say(line)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        device = accelerator.device
        raise UserError(
            f"memory ran out: expected what a micro-batch of 1 row takes, found {total_bytes(device) / GB:.1f} GB on"
            f" this {device.type}. {smaller(fitted)}"
        ) from error
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    accelerator.end_training()


def measure_steps(run: Run, learn: Learn, sizes: tuple[int, int], before: int) -> list[Trial]:
    """Two steps at each size that memory seems to allow, the smaller first, so that its peak is its own."""
    first = two_steps(run, learn, sizes[0])
    assert first.peak is not None
    device, activations = run.accelerator.device, first.peak - before - sum(parts(run).values())
    if device.type == "cpu" and first.peak + (sizes[1] - sizes[0]) * activations > total_bytes(device):
        return [first, Trial(sizes[1], None)]  # running out would end the process
    try:
        return [first, two_steps(run, learn, sizes[1])]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or run.accelerator.num_processes > 1:
            raise
    return [first, Trial(sizes[1], None)]


def two_steps(run: Run, learn: Learn, size: int) -> Trial:
    """Two optimizer steps with micro-batches of `size`."""
    run.config = dataclasses.replace(run.config, train_batch_size=size, max_train_steps=run.step + 2)
    device, ends = run.accelerator.device, []
    reset_peak(device)
    for stepped in learn(run):
        if stepped:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ends.append(time.monotonic())
    peaks = run.accelerator.gather(torch.tensor([peak_bytes(device)], device=device))
    return Trial(size, int(peaks.max()), ends[1] - ends[0])


def parts(run: Run) -> dict[str, int]:
    """Bytes of the run's components by the accounting."""
    encoders = [part for part in (run.base.vae, run.base.text_encoder) if part is not None]
    frozen = nn.ParameterList([weight for weight in run.base.unet.parameters() if not weight.requires_grad])
    counted = accounting(
        frozen,
        nn.ParameterList(run.weights),
        encoders,
        half_copies=run.accelerator.native_amp,
        use_8bit_adam=run.config.use_8bit_adam,
        use_ema=run.config.use_ema,
    )
    alone = set(run.networks) == {"controlnet"}
    return {name if alone or name != "ControlNet" else "trained weights": size for name, size in counted.items()}


def preflight_report(run: Run, config: TrainConfig, trials: list[Trial], before: int) -> list[str]:
    """The lines to print: memory by component, pace and time of the whole run, and the proposed batch."""
    small, large = trials
    wanted = small if config.train_batch_size == small.batch else large
    shown = wanted if wanted.peak is not None else small
    assert shown.peak is not None
    device, total = run.accelerator.device, memory_budget(config, run.accelerator.device)
    counted = {name: size for name, size in (parts(run) | {"Python and libraries": before}).items() if size}
    counted["activations and the rest"] = max(0, shown.peak - sum(counted.values()))
    lines = [f"Preflight: 2 steps of {shown.batch} x {config.gradient_accumulation_steps} rows, {config.resolution} px,"
             f" on {run.accelerator.num_processes} process(es), {device.type}"]  # fmt: skip
    if wanted.peak is None:
        lines.append(f"  Memory runs out at --train_batch_size {wanted.batch}: what follows is for {shown.batch}.")
    lines += [f"  {name:26} {size / GB:6.2f} GB" for name, size in counted.items()]
    lines.append(f"  {'peak':26} {shown.peak / GB:6.2f} GB of {total / GB:.1f}")
    lines += whole_run(run, config, shown)
    size, slope = best_batch(config, trials, total, counted["its gradients"])
    if size is None:
        return [*lines, f"  Does not fit: {smaller(config)}"]
    effective = config.train_batch_size * config.gradient_accumulation_steps
    per = f"  Each image of a micro-batch takes {slope / GB:.2f} GB. " if slope is not None else "  "
    return [*lines, f"{per}Proposed: --train_batch_size {size} --gradient_accumulation_steps {effective // size}"]


def memory_budget(config: TrainConfig, device: torch.device) -> float:
    """Bytes that a process may take: the device's, or those of --memory_preset where that is less."""
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return min(total_bytes(device) // sharers, (config.memory_preset or math.inf) * GB)


def whole_run(run: Run, config: TrainConfig, shown: Trial) -> list[str]:
    """Pace, and the time of the whole run: its steps, and its cache as if none existed yet."""
    split = training_split(config)
    processes = run.accelerator.num_processes
    repeats = None if config.max_train_steps else make_repeats(run.config, split, run.accelerator, run.log)
    pairs = PairedDataset(split, config.resolution, AUGMENTS["none"], 0, config.framing)
    steps = total_steps(config, rows_of_epochs(config, pairs, repeats, processes), processes)
    seconds = steps * shown.seconds * config.train_batch_size / shown.batch
    lines = [f"  {shown.seconds:.2f} s a step: {steps} steps take {spell(seconds)}"]
    if run.examples.cache is not None:
        visits = steps * config.train_batch_size * config.gradient_accumulation_steps * processes / len(split)
        draw_bytes = dataclasses.replace(run.examples.cache.layout, rows=len(split)).draw_bytes
        requested = 1 if run.examples.dataset.still else config.cache_draws
        free, limit = latent_cache.free_bytes(cache_root(config)), config.cache_budget_gb * 1e9
        images = len(split) * latent_cache.resolve_draws(requested, visits, draw_bytes, 0, limit, free)
        assert run.cache_seconds
        pace = len(run.split) / run.cache_seconds
        lines.append(f"  {pace:.1f} images a second into the cache: {images} take {spell(images / pace)}")
        seconds += images / pace
    return [*lines, f"  the whole run, if no cache exists yet: {spell(seconds)}"]


def best_batch(
    config: TrainConfig, trials: list[Trial], total: float, gradients: int
) -> tuple[int | None, float | None]:
    """(micro-batch, bytes of an image) of the largest micro-batch that fits, with the same effective batch.

    None for the first where not even 1 fits, for the second where unknown. gradients: their bytes; they wait through
    the forward passes only where micro-batches are accumulated.
    """
    small, large = trials
    assert small.peak is not None
    slope = None if large.peak is None else max(0.0, (large.peak - small.peak) / (large.batch - small.batch))
    effective, waiting = config.train_batch_size * config.gradient_accumulation_steps, 0
    for size in (n for n in range(effective, 0, -1) if effective % n == 0):
        if config.gradient_accumulation_steps == 1 and size < effective:
            waiting = gradients
        known = size == small.batch or slope is not None
        if known and small.peak + waiting + (slope or 0) * (size - small.batch) <= PLANNED_SHARE * total:
            return size, slope
    return None, slope


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what a full GPU, or a full machine, raises."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def smaller(config: TrainConfig) -> str:
    """What to try where a training does not fit."""
    less = [gb for gb in MEMORY_PRESETS if gb < (config.memory_preset or math.inf)]
    if less:
        return f"Try --memory_preset {max(less)}, which saves memory, and --train_batch_size 1."
    return "Try a smaller --resolution: --memory_preset 8 saves what can be saved."


def spell(seconds: float) -> str:
    """ "40 s", "12 min" or "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
