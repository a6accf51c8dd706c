"""Training and generation on a GPU beside diffusers, at the sizes of Stable Diffusion 1.5 and XL, weights random.

Trainings are those of `bench.train`, a process each. Images of random weights have nothing to score, so generation is
timed alone."""

import dataclasses
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segcn.bench.config import VARIANTS, BenchGpuConfig, BenchTrainConfig
from segcn.bench.generate import Side, read_masks
from segcn.bench.train import Results, bench_train, by_round, check_script, count_tflop
from segcn.data.metadata import read_split
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline
from segcn.models.base import DTYPES, keep_freed_memory, load_base, pick_device
from segcn.models.controlnet import make_controlnet
from segcn.samples.base_model.recipe import build_sd15
from segcn.samples.base_model.sdxl import build_sdxl
from segcn.samples.landscapes.scene import sample_landscapes
from segcn.utils.args import check_values
from segcn.utils.io import write_text
from segcn.utils.paths import BASE

TITLES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}
PRESETS = ("preset-24", "preset-16", "preset-12", "preset-8")
TRAININGS = {  # at the first resolution
    "sd15": ("ours", "bf16", "bf16-8bit", "bf16-light", *PRESETS),
    "sdxl": ("bf16", "bf16-light", *PRESETS),
}
LARGER = ("bf16", "bf16-light", "preset-8")  # at the others
TRAINED_ROWS = 8  # images to train on
LEAST = 4  # images that are generated for a time
GUIDANCE = 7.5
Log = Callable[[str], None]


def bench_gpu(config: BenchGpuConfig, log: Log = print) -> list[str]:
    """Run what is missing in output_dir, and write gpu.md there; returns its lines."""
    check_values(config)
    trained, generated = [], []
    for name in config.bases:
        base = base_of(config, name, log)
        script = config.baseline if name == "sd15" else config.baseline_sdxl
        check_script(script, str(base))
        for number, resolution in enumerate(config.resolutions):
            training = BenchTrainConfig(
                baseline=script, pretrained_model_name_or_path=str(base), dataset_name=str(sample_landscapes()),
                output_dir=str(config.folder / f"{name}-{resolution}{'-toy' if config.toy else ''}"), rounds=1,
                variants=config.variants or ",".join(LARGER if number else TRAININGS[name]),
                warmup_steps=config.warmup_steps, measured_steps=config.measured_steps, resolution=resolution,
                train_batch_size=1, max_train_samples=TRAINED_ROWS,
            )  # fmt: skip
            entries = bench_train(training, log)
            trained += training_rows(TITLES[name], training, entries)
            timed = generation_entries(config, training, log)
            generated.append(generation_row(config, TITLES[name], training, timed))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    note = (f"On {device}. A share is that of what matrix products alone reach on it in the same precision, counted by"
            " the operations of the networks.")  # fmt: skip
    lines = [*markdown_table(trained), "", *markdown_table(generated), "", note]
    write_text(config.folder / "gpu.md", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote gpu.md to {config.folder}."]))
    return lines


def base_of(config: BenchGpuConfig, name: str, log: Log) -> Path:
    """The folder of a base with random weights, written if it is not there."""
    if config.toy and name == "sd15":
        return BASE
    folder = config.folder / (f"{name}-toy" if config.toy else name)
    if not folder.is_dir():
        log(f"Writing a base of the size of {TITLES[name]} to {folder}.")
        if name == "sd15":
            build_sd15(folder, log=log)
        else:
            build_sdxl(folder, toy=config.toy, log=log)
    return folder


def training_rows(title: str, training: BenchTrainConfig, entries: list[dict]) -> list[dict[str, str]]:
    """A line for each variant of the table of trainings."""
    lines, work = [], count_tflop(training.pretrained_model_name_or_path, training.resolution)["train"]
    baseline = training.names["baseline"]
    for name in training.chosen:
        pace, memory = (by_round(entries, name, measure).median() for measure in ("samples_per_second", "peak_gib"))
        share = pace.ours * work / matmul_tflops("no" if name == "ours" else "bf16")
        lines.append({
            "architecture": title, "pixels": str(training.resolution), "training, batch 1": VARIANTS[name].text,
            "segcn, samples/s": f"{pace.ours:.3g}", baseline: f"{pace.baseline:.3g}", "ratio": f"{pace.ratio:.2f}",
            "segcn, GiB": f"{memory.ours:.2f}", f"{baseline}, GiB": f"{memory.baseline:.2f}",
            "share": "" if "light" in name else f"{share:.0%}",
        })  # fmt: skip
    return lines


def generation_entries(config: BenchGpuConfig, training: BenchTrainConfig, log: Log) -> list[dict]:
    """An entry for each way to generate: with segcn and with diffusers' pipeline, as many images at once."""
    results, steps = Results(training, log), config.num_inference_steps
    settings = SampleConfig(
        num_inference_steps=steps, guidance_scale=GUIDANCE, scheduler="unipc", resolution=training.resolution,
        mixed_precision=precision(),
    )  # fmt: skip
    split = read_split(training.dataset, "train").first(max(LEAST, *config.batch_sizes))
    captions = [row.caption for row in split.records]

    masks = read_masks(split, settings)

    @cache
    def opened(compiled: bool) -> Pipeline:
        device = pick_device()
        keep_freed_memory(device)
        base = load_base(training.pretrained_model_name_or_path, device, DTYPES[settings.mixed_precision])
        controlnet = make_controlnet(base.unet).eval()
        nn.Module.to(controlnet, base.dtype)  # diffusers' own warns
        if compiled:
            for network in (base.unet, controlnet):
                network.compile()
        return Pipeline(base, controlnet, split.palette, "")

    entries = []
    for plain, compiled in ((True, False), (False, config.torch_compile)):
        for size in config.batch_sizes:
            words = ["generate", "diffusers" if plain else "segcn", str(size), str(steps), f"compiled: {compiled}"]
            entry = results.find(words)
            if entry is None:
                side = Side(words[1], settings, plain, size, opened(compiled), training.folder, "")
                entry = results.circumstances | {"command": words, "plain": plain, "batch_size": size}
                entry |= time_side(side, masks, captions)
                results.add(entry)
                log(f"{training.folder.name}, {words[1]}, {size} at once: {entry['images_per_second']:.3g} images/s")
            entries.append(entry)
    return entries


def time_side(side: Side, masks: np.ndarray, captions: list[str]) -> dict[str, float | None]:
    """Images a second, and the most memory on the GPU in GiB, after a call that warms up."""
    rows = list(range(max(side.batch_size, LEAST)))
    first = rows[: side.batch_size]
    few = dataclasses.replace(side, settings=dataclasses.replace(side.settings, num_inference_steps=2))
    few.generate(masks[first], captions[: len(first)], first)
    if gpu := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    side.generate(masks[rows], captions[: len(rows)], rows)  # ends when the images are in the CPU's memory
    seconds = time.monotonic() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return {"images_per_second": len(rows) / seconds, "peak_gib": peak}


def generation_row(config: BenchGpuConfig, title: str, training: BenchTrainConfig, entries: list[dict]) -> dict:
    """A line of the table of generation: the best number at once of both sides, and diffusers' smallest."""
    ours, plain = (
        {entry["batch_size"]: entry["images_per_second"] for entry in entries if entry["plain"] is side}
        for side in (False, True)
    )
    held = {entry["batch_size"]: entry["peak_gib"] for entry in entries if not entry["plain"]}
    most = max(ours, key=ours.__getitem__)
    best = max(plain, key=plain.__getitem__)
    parts = ("denoise", "decode")
    work = count_tflop(training.pretrained_model_name_or_path, training.resolution, parts=parts)
    share = ours[most] * (config.num_inference_steps * work["denoise"] + work["decode"]) / matmul_tflops(precision())
    return {
        "architecture": title, "pixels": str(training.resolution),
        "segcn, images/s": f"{ours[most]:.3g} ({most} at once)", "diffusers": f"{plain[best]:.3g} ({best} at once)",
        "ratio": f"{ours[most] / plain[best]:.2f}", f"diffusers, {min(plain)} at once": f"{plain[min(plain)]:.3g}",
        "share": f"{share:.0%}", "segcn, GiB": f"{memory:.2f}" if (memory := held[most]) else "",
    }  # fmt: skip


def precision() -> str:
    """In which images are generated."""
    return "bf16" if torch.cuda.is_available() else "no"


@cache
def matmul_tflops(precision: str) -> float:
    """What products of large matrices reach on this device, in TFLOP a second."""
    device, dtype = pick_device(), DTYPES[precision]
    size, repeats = (8192, 20) if device != "cpu" else (512, 3)
    matrix = torch.rand(size, size, device=device, dtype=dtype)
    for number in range(repeats + 2):
        if number == 2:  # after two that warm up
            torch.cuda.synchronize() if device != "cpu" else None
            start = time.monotonic()
        matrix @ matrix
    torch.cuda.synchronize() if device != "cpu" else None
    return 2 * size**3 * repeats / (time.monotonic() - start) / 1e12


def markdown_table(rows: list[dict[str, str]]) -> list[str]:
    """Rows with the same columns as a table in Markdown."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
