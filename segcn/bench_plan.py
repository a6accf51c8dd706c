"""What a benchmark of training runs: the settings, the command lines of both sides, and the book of finished runs."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from segcn.atomic import write_text
from segcn.config import BASE, OUTPUTS, flag
from segcn.devices import WIDE
from segcn.errors import UserError
from segcn.models import base_fingerprint, latent_factor
from segcn.timed import Timed, run_timed

OURS = [sys.executable, "-m", "segcn.train"]
PACKAGES = ("segcn", "torch", "diffusers", "transformers", "accelerate", "datasets", "bitsandbytes")
SIDES = ("peer", "ours")
MEASURED_ON = ("peer", "pretrained_model_name_or_path", "dataset_name", "warmup_steps", "measured_steps", "resolution",
               "train_batch_size", "max_train_samples", "seed")  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A row of the table: what is added to both command lines."""

    text: str
    peer: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()


VARIANTS = {
    "same": Variant("same optimizer (plain AdamW)", (), ("--no_fused_adam",)),
    "ours": Variant("segcn's defaults (fused AdamW)"),
    "8bit": Variant("8-bit AdamW on both", ("--use_8bit_adam",), ("--use_8bit_adam",)),
    "memory": Variant("segcn with --memory_preset 8", (), ("--memory_preset", "8")),
    "bf16": Variant("bf16 on both", ("--mixed_precision", "bf16"), ("--mixed_precision", "bf16")),
}


@dataclass(frozen=True)
class BenchTrainConfig:
    """Time diffusers' train_controlnet.py and segcn's training in turns, on the same base, data and settings."""

    peer: str = flag("", "your copy of diffusers' train_controlnet.py; none: segcn with --cache none stands in")
    pretrained_model_name_or_path: str = flag(str(BASE), "base model folder (segcn samples sd15 OUT makes a large one)")
    dataset_name: str | None = flag(None, "data set folder; none: the sample landscapes")
    output_dir: str = flag(str(OUTPUTS / "bench"), "train.json, train.txt and the runs; the same command goes on there")
    variants: str = flag("same,ours", f"rows of the table, of {', '.join(VARIANTS)}")
    rounds: int = flag(3, "pairs of runs of each variant")
    warmup_steps: int = flag(3, "steps before the clock counts")
    measured_steps: int = flag(20, "steps that are timed; one more is run, which saves a checkpoint")
    resolution: int = flag(128, "pixels a side")
    train_batch_size: int = flag(8, "rows a step")
    max_train_samples: int | None = flag(None, "use only so many rows: less to cache before a short run")
    seed: int = flag(0, "of both")
    until_faithful: bool = flag(False, "also time until painted images reach half the ceiling of mask faithfulness")
    peer_learning_rates: list[float] = field(
        default_factory=lambda: [1e-5, 2e-4, 2e-3], metadata={"help": "of the peer, for --until_faithful"}
    )
    preset: str = flag("tiny", "whose learning rate and sampler --until_faithful takes for segcn", ("tiny", "sd15"))
    faithful_steps: int = flag(400, "steps of each run of --until_faithful")
    checkpointing_steps: int = flag(50, "steps between the checkpoints that are scored after it")
    faithfulness_rows: int = flag(32, "held-out masks that each checkpoint paints")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).absolute()

    @property
    def dataset(self) -> Path:
        """The data set: `bench_train` names the sample landscapes where none is given."""
        assert self.dataset_name is not None
        return Path(self.dataset_name)

    @property
    def chosen(self) -> list[str]:
        """Names of the variants."""
        return [name.strip() for name in self.variants.split(",") if name.strip()]

    @property
    def settings(self) -> dict[str, Any]:
        """What all runs of a table share."""
        return {name: getattr(self, name) for name in MEASURED_ON}

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.measured_steps + 1

    @property
    def names(self) -> dict[str, str]:
        """What each side is called."""
        return {"peer": "diffusers" if self.peer else "segcn --cache none", "ours": "segcn"}


def check(config: BenchTrainConfig) -> None:
    """UserError for what would fail only after hours."""
    unknown = [name for name in config.chosen if name not in VARIANTS]
    if unknown or not (config.chosen or config.until_faithful):
        raise UserError(f"--variants {config.variants}: expected some of {', '.join(VARIANTS)}")
    if config.peer and not Path(config.peer).is_file():
        raise UserError(
            f"--peer {config.peer}: no such file; it is examples/controlnet/train_controlnet.py of diffusers"
        )
    for name in ("rounds", "warmup_steps", "measured_steps", "checkpointing_steps", "faithfulness_rows"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}: expected at least 1, found {getattr(config, name)}")
    if config.until_faithful and config.faithful_steps < config.checkpointing_steps:
        raise UserError(
            f"--faithful_steps {config.faithful_steps}: expected at least --checkpointing_steps,"
            f" {config.checkpointing_steps}: checkpoints are what is scored"
        )
    latent_factor(config.pretrained_model_name_or_path)


def command(config: BenchTrainConfig, side: str, where: Path, steps: int, save_every: int, more: tuple) -> list[str]:
    """The command line of one side, writing below the folder `where`: the same flags by the same names, and `more`."""
    data = config.dataset.absolute()
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": Path(config.pretrained_model_name_or_path).absolute(),
        "dataset_name": data.parent if data.is_file() else data,
        "output_dir": where / "out",
        "cache_dir": where / "cache",  # of this run alone: what is cached is paid for in each
        "resolution": config.resolution,
        "train_batch_size": config.train_batch_size,
        "max_train_steps": steps,
        "checkpointing_steps": save_every,
        "seed": config.seed,
        "report_to": "tensorboard",
    }
    if config.max_train_samples:
        shared["max_train_samples"] = config.max_train_samples
    words = [str(word) for name, value in shared.items() for word in (f"--{name}", value)]
    if side == "peer" and config.peer:
        return [sys.executable, str(Path(config.peer).absolute()), *words, *more]
    alone = ("--cache", "none") if side == "peer" else ()
    return [*OURS, *words, "--logging_steps", "1", "--augment", "none", *alone, *more]


def variant_words(config: BenchTrainConfig, name: str, side: str) -> tuple[str, ...]:
    """What a variant adds for a side; without a peer, both differ in the cache alone."""
    variant = VARIANTS[name]
    own = variant.peer if side == "peer" and config.peer else variant.ours
    start = shared_start(config)
    return (*own, *(("--controlnet_model_name_or_path", str(start)) if start else ()))


def shared_start(config: BenchTrainConfig) -> Path | None:
    """A ControlNet as diffusers starts it, where segcn would start a lighter one: both sides must train the same."""
    base = config.pretrained_model_name_or_path
    if UNet2DConditionModel.load_config(base, subfolder="unet")["block_out_channels"][0] >= WIDE:
        return None
    folder = config.folder / f"start-{base_fingerprint(base)}-{config.seed}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(config.seed)
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
        ControlNetModel.from_unet(unet).save_pretrained(folder)
    return folder


class Book:
    """output_dir/train.json: every finished run; one of the same command, versions and machine is not run again."""

    def __init__(self, config: BenchTrainConfig, log: Callable[[str], None]):
        self.config, self.log = config, log
        self.path = config.folder / "train.json"
        self.entries = json.loads(self.path.read_text()) if self.path.is_file() else []

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        """What a number depends on besides the command."""
        script = Path(self.config.peer).read_bytes() if self.config.peer else b""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        peer = hashlib.sha256(script).hexdigest()[:16] if script else None
        return {"versions": versions | {"python": platform.python_version(), "peer": peer}, "machine": machine()}

    def find(self, words: list[str]) -> dict | None:
        """The finished run of this command."""
        wanted = self.circumstances | {"command": words}
        return next((entry for entry in self.entries if wanted.items() <= entry.items()), None)

    def run(self, words: list[str], where: Path, steps: int, title: str) -> tuple[dict, Timed]:
        """Run a command now; returns a new entry, which `add` keeps."""
        shutil.rmtree(where, ignore_errors=True)  # of a run that was interrupted
        where.mkdir(parents=True)
        self.log(f"{title}: {steps} steps, see {where}.log")
        timed = run_timed(words, where.with_name(f"{where.name}.log"), where / "out", steps)
        entry = self.circumstances | {"command": words, "other_load": timed.other_load, "began": timed.began}
        return entry | {"seconds": timed.seconds, "step_ends": list(timed.step_ends.values())}, timed

    def add(self, entry: dict) -> None:
        """Keep an entry, in place of an earlier one of the same command."""
        self.entries = [old for old in self.entries if old is not self.find(entry["command"])] + [entry]
        write_text(self.path, json.dumps(self.entries, indent=1) + "\n")


def machine() -> str:
    """The processor, its cores, and the GPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    name = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name
