"""Settings of `segcn bench train`, `segcn bench generate` and `segcn bench gpu`."""

from dataclasses import dataclass
from pathlib import Path

from segcn.generate.config import SampleConfig
from segcn.train.config import MEMORY_PRESETS
from segcn.utils.args import flag
from segcn.utils.paths import BASE, OUTPUTS


@dataclass(frozen=True)
class Variant:
    """A row of the table of `segcn bench train`: the flags added to the baseline's command line and to segcn's."""

    text: str
    baseline: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()


BF16 = ("--mixed_precision", "bf16")
VARIANTS = {
    "same": Variant("same optimizer (plain AdamW)", (), ("--no_fused_adam",)),
    "ours": Variant("segcn's defaults (fused AdamW)"),
    "8bit": Variant("8-bit AdamW on both", ("--use_8bit_adam",), ("--use_8bit_adam",)),
    "memory": Variant("segcn with --memory_preset 8", (), ("--memory_preset", "8")),
    "light": Variant("segcn with --controlnet lora", (), ("--controlnet", "lora")),
    "bf16": Variant("bf16 on both", BF16, BF16),
    "bf16-8bit": Variant("bf16 and 8-bit AdamW on both", (*BF16, "--use_8bit_adam"), (*BF16, "--use_8bit_adam")),
    "bf16-light": Variant("bf16, segcn with --controlnet lora", BF16, (*BF16, "--controlnet", "lora")),
    **{
        f"preset-{gb}": Variant(f"bf16, segcn with --memory_preset {gb}", BF16, ("--memory_preset", str(gb)))
        for gb in sorted(MEMORY_PRESETS, reverse=True)
    },
}


@dataclass(frozen=True)
class BenchTrainConfig:
    """Time diffusers' train_controlnet.py (the baseline) and segcn train in turns: same base, data and settings.

    Of a base of Stable Diffusion XL or 3 the baseline is diffusers' script for that one.
    """

    baseline: str = flag("", "your copy of diffusers' train_controlnet.py; none: segcn train --cache none")
    pretrained_model_name_or_path: str = flag(str(BASE), "base model folder (segcn samples sd15 OUT makes a large one)")
    dataset_name: str | None = flag(None, "data set folder; none: the sample landscapes")
    output_dir: str = flag(str(OUTPUTS / "bench"), "folder of train.json, train.txt and the runs; rerun to resume")
    variants: str = flag("same,ours", f"rows of the table, of {', '.join(VARIANTS)}")
    rounds: int = flag(3, "pairs of runs of each variant", low=1)
    warmup_steps: int = flag(3, "steps before the timed ones", low=1)
    measured_steps: int = flag(20, "timed steps; one more step saves a checkpoint", low=1)
    resolution: int = flag(128, "image size in pixels", low=1)
    train_batch_size: int = flag(8, "rows in each step", low=1)
    max_train_samples: int | None = flag(None, "use only the first rows: less to cache before a short run", low=1)
    seed: int = flag(0, "seed of both")
    until_faithful: bool = flag(False, "also measure the time until images reach half of the possible mIoU")
    baseline_learning_rates: list[float] = flag([1e-5, 2e-4, 2e-3], "the baseline's, for --until_faithful", above=0)
    preset: str = flag("tiny", "preset of our learning rate and sampler for --until_faithful", ("tiny", "sd15"))
    faithful_steps: int = flag(400, "steps of each run of --until_faithful", low=1)
    checkpointing_steps: int = flag(50, "steps between its checkpoints, which are scored", low=1)
    faithfulness_rows: int = flag(32, "held-out masks that each checkpoint generates from", low=1)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).absolute()

    @property
    def dataset(self) -> Path:
        """The data set: `bench_train` names the sample landscapes where none is given."""
        assert self.dataset_name is not None
        return Path(self.dataset_name).absolute()

    @property
    def chosen(self) -> list[str]:
        """Names of the variants."""
        return [name.strip() for name in self.variants.split(",") if name.strip()]

    @property
    def names(self) -> dict[str, str]:
        """What each side is called in the table."""
        return {"baseline": "diffusers" if self.baseline else "segcn --cache none", "ours": "segcn"}


@dataclass(frozen=True)
class BenchGenerateConfig(SampleConfig):
    """Generate from the same masks with segcn and by one pipeline call for each image (the baseline), in turns."""

    dataset_name: str | None = flag(None, "data set: train rows train the segmenter; none: landscapes")
    split: str = flag("test", "rows to generate from; train[:64]: to choose settings, since no result uses these")
    output_dir: str = flag(str(OUTPUTS / "bench_generate"), "folder of bench_generate.json and images; rerun to resume")
    limit: int = flag(500, "rows to generate from, at most", low=2)
    batch_size: int = flag(16, "images that segcn generates at once", low=1)
    rows_a_turn: int = flag(32, "rows of one side before the other side's turn", low=1)
    plain_guidance_scales: list[float] = flag([1.5, 2.5, 7.5], "of the baseline; its best one is compared", above=1)
    plain_steps: int = flag(20, "steps of the baseline, with UniPC", low=1)
    variants: list[str] = flag([], "several settings of segcn: guidance_scale=1 guidance_end=0.6,scheduler=ddim ...")
    without_plain: bool = flag(False, "compare only the variants")
    segmenter: str | None = flag(None, "trained segmenter folder; none: trained on the train rows")
    inception_weights: str | None = flag(None, "weights-inception-2015-12-05-6726825d.pth, for KID as published")

    @property
    def out(self) -> Path:
        return Path(self.output_dir).absolute()


@dataclass(frozen=True)
class BenchGpuConfig:
    """Measure training and generation on a GPU beside diffusers: pace, memory, and the share of the arithmetic it can.

    The bases have the architectures of Stable Diffusion 1.5 and XL and random weights; they are written where missing.
    """

    baseline: str = flag("", "your copy of diffusers' train_controlnet.py; none: segcn train --cache none")
    baseline_sdxl: str = flag("", "your copy of diffusers' train_controlnet_sdxl.py")
    output_dir: str = flag(str(OUTPUTS / "bench_gpu"), "folder of the bases (18 GB), runs and tables; rerun to resume")
    bases: list[str] = flag(["sd15", "sdxl"], "architectures", ("sd15", "sdxl"))
    resolutions: list[int] = flag([512, 1024], "image sizes in pixels", low=1)
    variants: str = flag("", "trainings, as in segcn bench train; none: what fits each base and size")
    warmup_steps: int = flag(4, "steps before the timed ones", low=1)
    measured_steps: int = flag(16, "timed training steps", low=1)
    batch_sizes: list[int] = flag([1, 4, 16], "images that are generated at once; the best is compared", low=1)
    num_inference_steps: int = flag(20, "denoising steps, UniPC", low=1)
    torch_compile: bool = flag(False, "compile segcn's networks for generation: minutes at the start")
    toy: bool = flag(False, "small networks: to try the command, on a CPU as well")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).absolute()
