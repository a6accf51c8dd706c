"""Everything before step 0: settings, checked data, frozen base, latent cache, ControlNet, optimizer, schedule."""

import dataclasses
import json
import logging
import os
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.training_utils import EMAModel

from segcn import balance, frozen, memory, models
from segcn.arguments import to_json
from segcn.augment import AugmentConfig
from segcn.bad_samples import BadRows, parse_limit
from segcn.claim import RUN_FILE, claim
from segcn.devices import keep_freed_memory
from segcn.doctor import find_report
from segcn.ema import averaged, make_ema
from segcn.errors import UserError
from segcn.examples import Examples
from segcn.feed import cache_root, make_bad_rows, make_dataset, make_examples, overlook_bad_rows, settle_draws
from segcn.finite import FiniteCheck
from segcn.judge import Judge, held_out_rows
from segcn.records import Split, check_split, read_split
from segcn.schedule import make_schedule
from segcn.stamps import remember_stamps
from segcn.train_config import OBSOLETE, TrainConfig, total_steps
from segcn.trainable import check_trainable, make_optimizer, make_trainable
from segcn.watch import Log

WAIT = timedelta(hours=3)  # of the other processes, while one validates
COUNTS = (
    "max_train_samples", "cache_draws", "resolution", "max_train_steps", "num_train_epochs", "train_batch_size",
    "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
    "validation_steps", "num_validation_images",
)  # fmt: skip
SHARES = ("class_balance", "proportion_empty_prompts", "proportion_empty_controls")


@dataclass
class Run:
    """Everything a training step touches."""

    config: TrainConfig
    accelerator: Accelerator
    output_dir: Path
    split: Split
    base: models.Base
    controlnet: torch.nn.Module
    optimizer: AcceleratedOptimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    examples: Examples
    bad_rows: BadRows
    log: Log
    repeats: np.ndarray | None  # how often each row stands in an epoch; None: once
    ema: EMAModel | None  # the average of the weights, where --use_ema asks for it
    cache_seconds: float  # spent on the latent cache
    held_out: Split | None  # rows that are painted and scored while training
    judge: Judge | None = None  # on the main process, once it is needed
    step: int = 0
    saved: int = 0  # the step of the newest checkpoint
    stop_signal: list[int] = field(default_factory=list)
    finite: FiniteCheck = field(init=False)

    def __post_init__(self):
        self.finite = FiniteCheck(self.accelerator, self.output_dir)

    def to_paint(self) -> AbstractContextManager[ControlNetModel]:
        """The ControlNet as it is painted with and written: with its averaged weights, where there are any."""
        return averaged(self.accelerator.unwrap_model(self.controlnet), self.ema)

    @property
    def total_steps(self) -> int:
        assert self.config.max_train_steps is not None
        return self.config.max_train_steps


def prepare(config: TrainConfig) -> Run:
    """Check data and settings, load the models, build the cache."""
    quieten()
    config, fitted = memory.fit(resolve(config), *memory.half_precision())
    output_dir = Path(config.output_dir)
    accelerator = make_accelerator(config, output_dir)
    log = Log(accelerator, output_dir, config.logging_steps)
    explain_obsolete(config, log)
    for line in fitted:
        log.say(line)
    split = read_rows(config)
    held_out = held_out_rows(config, split)
    overlook_bad_rows(config, split)
    if accelerator.is_main_process:
        check_rows(config, split, output_dir, log)
    base = load_frozen(config, accelerator)
    check_trainable(config, base)
    repeats = make_repeats(config, split, accelerator, log)
    shown = balance.Stream(len(split), config.seed, repeats).start(config.num_train_epochs)
    config = dataclasses.replace(config, max_train_steps=total_steps(config, shown, accelerator.num_processes))
    dataset = make_dataset(config, split, base)
    config = settle_draws(config, dataset, base, accelerator, log)
    claim(output_dir, config, split, base, accelerator, log)
    if accelerator.is_main_process:
        remember_stamps(split, cache_root(config))
    start_trackers(config, accelerator)
    began = time.monotonic()
    examples = make_examples(config, dataset, base, accelerator, log)
    cache_seconds = time.monotonic() - began
    bad_rows = make_bad_rows(examples, output_dir, accelerator, log)
    controlnet = make_trainable(config, base)
    optimizer = make_optimizer(config, controlnet, accelerator)
    schedule = make_schedule(config, optimizer)
    controlnet, optimizer = accelerator.prepare(controlnet, optimizer)
    ema = make_ema(accelerator.unwrap_model(controlnet), config.ema_decay) if config.use_ema else None
    made = (controlnet, optimizer, schedule, examples, bad_rows)
    return Run(config, accelerator, output_dir, split, base, *made, log, repeats, ema, cache_seconds, held_out)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill what one flag says for another; UserError for a number that cannot be."""
    dataset = config.dataset
    AugmentConfig.parse(config.augment)
    parse_limit(config.on_bad_sample)
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected 1 or more, found {value}")
    for name in SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name}: expected a share, 0 to 1, found {getattr(config, name)}")
    prompts, images = config.validation_prompt or [], config.validation_image or []
    if bool(images) != bool(prompts):
        raise UserError("--validation_image and --validation_prompt go together")
    if len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        raise UserError(
            f"--validation_prompt: expected one, or one for each of {len(images)} masks, found {len(prompts)}"
        )
    return dataclasses.replace(config, dataset_name=dataset)


def make_accelerator(config: TrainConfig, output_dir: Path) -> Accelerator:
    """One process or many, as launched; UserError if accelerate sees another number than the launcher started."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    world = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        cpu=world > 1 and not torch.cuda.is_available(),  # several processes on a CPU must be asked for
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / config.logging_dir)),
    )
    if accelerator.num_processes != world:
        raise UserError(f"the launcher started {world} processes, accelerate sees {accelerator.num_processes}")
    return accelerator


def quieten() -> None:
    """Only our own lines in the log."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def explain_obsolete(config: TrainConfig, log: Log) -> None:
    """One line for each flag of the old script that means nothing here."""
    defaults = TrainConfig()
    for name, instead in OBSOLETE.items():
        if getattr(config, name) != getattr(defaults, name):
            log.say(f"--{name} has no effect: {instead}.")


def read_rows(config: TrainConfig) -> Split:
    """The training rows, cut at --max_train_samples."""
    return read_split(config.dataset, "train").first(config.max_train_samples)


def check_rows(config: TrainConfig, split: Split, output_dir: Path, log: Log) -> None:
    """Decode every file before step 0, unless the doctor did, or this run when it began; nothing has changed since."""
    run, rows = output_dir / RUN_FILE, f"{len(split)} rows, {len(split.palette.class_names)} classes"
    if run.is_file() and json.loads(run.read_text()).get("data_fingerprint") == split.fingerprint:
        return log.say(f"{rows}: checked when this run began.")
    report = find_report(read_split(config.dataset, "train"))
    if report is None:
        check_split(split, log.say)
        return log.say(f"{rows}: every image and mask decodes, to declared labels only.")
    page, errors = report
    if errors:
        raise UserError(
            f"{split.metadata}: segcn validate found {errors} errors in these rows, see {page}; mend them, or train on"
            f" the good rows: segcn validate {config.dataset_name} --quarantine {split.folder}/good.csv"
        )
    log.say(f"{rows}: sound, says {page}.")


def load_frozen(config: TrainConfig, accelerator: Accelerator) -> models.Base:
    """The base on this process's device, its U-Net held in --frozen_precision."""
    held, computed = frozen.precisions(config.frozen_precision, accelerator.mixed_precision, accelerator.device)
    base = models.load_base(
        config.pretrained_model_name_or_path,
        accelerator.device,
        computed,
        config.tokenizer_name,
        held,
        revision=config.revision,
        variant=config.variant,
    )
    if config.memory_preset is None:
        keep_freed_memory(accelerator.device)  # not sooner: the encoders' memory shall be given back
    base.scheduler = make_scheduler(config, base)
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    return base


def make_scheduler(config: TrainConfig, base: models.Base) -> DDPMScheduler:
    """The base's noise schedule, changed as --prediction_type and --rescale_betas_zero_snr say."""
    changes = {"prediction_type": config.prediction_type or base.scheduler.config.prediction_type}
    if config.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if changes["prediction_type"] != "v_prediction":
            raise UserError(
                "--rescale_betas_zero_snr: expected a base that predicts v, found epsilon, which pure noise cannot tell"
            )
    return DDPMScheduler.from_config(base.scheduler.config, **changes)


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """TensorBoard and the like, with every setting that they can show."""
    if config.report_to != "none":
        shown = {
            key: value for key, value in json.loads(to_json(config)).items() if isinstance(value, int | float | str)
        }
        accelerator.init_trackers(config.tracker_project_name, shown)


def make_repeats(config: TrainConfig, split: Split, accelerator, log: Log) -> np.ndarray | None:
    """How often each row stands in an epoch, for --class_balance."""
    if not config.class_balance:
        return None
    return balance.balanced(split, config.class_balance, cache_root(config), accelerator, log.say)
