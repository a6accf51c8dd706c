"""What a benchmark of training runs: the settings, the command lines of both sides, and the book of finished runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segcn.generate.config import SampleConfig
from segcn.utils.args import flag
from segcn.utils.paths import BASE, OUTPUTS

# --- bench_plan: What a benchmark of training runs: the settings, the command lines of both sides, and the book of finished runs.

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


# --- bench_generate: Our painting against one call of diffusers' pipeline an image: pace, faithfulness, distance, color and memory.


@dataclass(frozen=True)
class BenchGenerateConfig(SampleConfig):
    """Paint the same masks with segcn and by one call of diffusers' pipeline an image, in turns, and score both."""

    dataset_name: str | None = flag(
        None, "data set: its train rows teach the judge, the rows of --split are painted; none: landscapes"
    )
    split: str = flag("test", "rows to paint; train[:64]: to choose settings on, since nothing is reported of these")
    output_dir: str = flag(
        str(OUTPUTS / "bench_generate"), "bench_generate.json and .txt, and what is painted; goes on there"
    )
    limit: int = flag(500, "rows to paint, at most")
    batch_size: int = flag(16, "images that segcn paints at once")
    rows_a_turn: int = flag(32, "rows that a side paints before the other one does")
    plain_guidance_scales: list[float] = field(
        default_factory=lambda: [1.5, 2.5, 7.5], metadata={"help": "guidance of the plain way; its best is compared"}
    )
    plain_steps: int = flag(20, "steps of the plain way, with UniPC")
    variants: list[str] = field(
        default_factory=list,
        metadata={"help": "several settings of segcn: num_inference_steps=8,guidance_end=0.6 guidance_scale=1 ..."},
    )
    without_plain: bool = flag(False, "compare only the variants")
    memory_masks: int = flag(
        1000, "masks that segcn generate paints to show its memory, a tenth of them first; 0: none"
    )
    segmenter: str | None = flag(None, "trained segmenter folder, the judge; none: trained on the train rows")
    inception_weights: str | None = flag(None, "weights-inception-2015-12-05-6726825d.pth, for a KID as published")

    @property
    def out(self) -> Path:
        return Path(self.output_dir).absolute()
