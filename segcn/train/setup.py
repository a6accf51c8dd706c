"""The learning rate by optimizer steps: diffusers' schedules, by the names of its training scripts."""

import dataclasses
import json
import logging
import os
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel

from segcn.data import sampler
from segcn.data.doctor.checkup import find_report
from segcn.data.metadata import Split, check_split, read_split
from segcn.data.transforms import AugmentConfig
from segcn.models.base import Base, keep_freed_memory, load_base, precisions
from segcn.models.controlnet import load_controlnet, make_controlnet
from segcn.train import memory
from segcn.train.batches import Examples, make_bad_rows, make_dataset, make_examples, overlook_bad_rows, settle_draws
from segcn.train.checkpoint import WAIT, averaged, claim, make_ema
from segcn.train.config import OBSOLETE, TrainConfig, total_steps
from segcn.train.latent_cache import BadRows, cache_root, parse_limit, remember_stamps
from segcn.train.log import Log
from segcn.train.loss import FiniteCheck
from segcn.train.validation import HeldOutScorer, held_out_rows
from segcn.utils.args import to_json
from segcn.utils.errors import UserError
from segcn.utils.paths import RUN_FILE

# --- schedule: The learning rate by optimizer steps: diffusers' schedules, by the names of its training scripts.

STEPPED = SchedulerType.PIECEWISE_CONSTANT.value


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of --lr_scheduler, stepped once for each optimizer step whatever the number of processes."""
    name, rules = check_schedule(config.lr_scheduler)
    return get_scheduler(
        name,
        optimizer=optimizer,
        step_rules=rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def check_schedule(text: str) -> tuple[str, str | None]:
    """Name and rules of --lr_scheduler, as in piecewise_constant:1:10,0.1:20,0.01; UserError where it is unknown.

    These rules multiply the rate by 1 before step 10, by 0.1 before step 20 and by 0.01 from there on.
    """
    name, _, rules = text.partition(":")
    names = [kind.value for kind in SchedulerType]
    if name not in names or (rules and name != STEPPED):
        raise UserError(f"--lr_scheduler: expected one of {', '.join(names)}, found {text!r}")
    if name == STEPPED and not _are_rules(rules):
        form = f"{STEPPED}:1:1000,0.1:2000,0.01 (1x before step 1000, 0.1x before step 2000, 0.01x from there on)"
        raise UserError(f"--lr_scheduler: expected factors and steps in rising order, as in {form}, found {text!r}")
    return name, rules or None


def _are_rules(rules: str) -> bool:
    """Whether each rule is FACTOR:STEP, the steps rising, and the last is FACTOR."""
    *stepped, last = rules.split(",")
    try:
        float(last)
        pairs = [(float(factor), int(step)) for factor, step in (rule.split(":") for rule in stepped)]
    except ValueError:
        return False
    steps = [step for _, step in pairs]
    return bool(steps) and steps == sorted(set(steps))


# --- trainable: What is trained, and how: the ControlNet and its optimizer.

SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block")  # of ControlNet and U-Net


def check_trainable(config: TrainConfig, base: Base) -> None:
    """UserError for an unknown schedule, or a ControlNet to go on from that is none or does not fit the base."""
    check_schedule(config.lr_scheduler)
    name = config.controlnet_model_name_or_path
    if name is None:
        return
    try:
        found = ControlNetModel.load_config(name)
    except OSError:
        raise UserError(
            f"--controlnet_model_name_or_path {name}: expected a ControlNet (config.json and "
            "diffusion_pytorch_model.safetensors), found none in such a folder, nor on the hub"
        ) from None
    expected = {"_class_name": "ControlNetModel", "conditioning_channels": 3}
    expected |= {key: base.unet.config[key] for key in SHARED}
    for key, value in expected.items():
        if _plain(found.get(key, value)) != _plain(value):
            raise UserError(
                f"--controlnet_model_name_or_path {name}: its {key} is {_plain(found[key])}, and {_plain(value)} fits"
                f" the base {base.folder}; leave the flag out to begin with a copy of the base's encoder"
            )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def make_trainable(config: TrainConfig, base: Base) -> ControlNetModel:
    """The ControlNet to train, in float32."""
    if config.controlnet_model_name_or_path:
        controlnet = load_controlnet(config.controlnet_model_name_or_path, base.unet.device)
    else:
        torch.manual_seed(config.seed)
        controlnet = make_controlnet(base.unet, base.latent_factor).float()
    controlnet.requires_grad_(True)
    if config.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
    return controlnet


def make_optimizer(config: TrainConfig, controlnet: ControlNetModel, accelerator: Accelerator):
    """AdamW, fused, or in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""
    effective = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    settings: dict[str, Any] = {
        "lr": config.learning_rate * (effective if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(controlnet.parameters(), **settings)
    return torch.optim.AdamW(controlnet.parameters(), fused=config.fused_adam or None, **settings)


# --- prepare: Everything before step 0: settings, checked data, frozen base, latent cache, ControlNet, optimizer, schedule.

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
    base: Base
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
    judge: HeldOutScorer | None = None  # on the main process, once it is needed
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
    shown = sampler.Stream(len(split), config.seed, repeats).start(config.num_train_epochs)
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


def load_frozen(config: TrainConfig, accelerator: Accelerator) -> Base:
    """The base on this process's device, its U-Net held in --frozen_precision."""
    held, computed = precisions(config.frozen_precision, accelerator.mixed_precision, accelerator.device)
    base = load_base(
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


def make_scheduler(config: TrainConfig, base: Base) -> DDPMScheduler:
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
    return sampler.balanced(split, config.class_balance, cache_root(config), accelerator, log.say)
