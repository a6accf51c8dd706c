"""From settings to everything before step 0: checked data, frozen base, latent cache, ControlNet and its optimizer."""

import dataclasses
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel

from segcn.data import sampler
from segcn.data.dataset import PairedDataset
from segcn.data.doctor.report import find_report
from segcn.data.metadata import Split, check_split, find_splits, hold_out, read_split
from segcn.data.transforms import AugmentConfig, check_buckets
from segcn.data.unlabelled import check_images, unlabelled_split
from segcn.evaluate.base_check import BASE_CHECK, check_base
from segcn.models.base import Base, computes_fast, keep_freed_memory, load_base, pick_device, precisions
from segcn.models.controlnet import (
    ControlNet,
    check_controlnet,
    check_light,
    load_controlnet,
    make_all_trainable,
    make_controlnet,
    make_light,
)
from segcn.models.segmenter import AnySegmenter
from segcn.train import latent_cache
from segcn.train.batches import Examples, make_examples, rows_of_epochs
from segcn.train.checkpoint import WAIT, averaged, lock_run_folder
from segcn.train.config import (
    LIGHT_RATES,
    LORA_TARGETS,
    MEMORY_PRESETS,
    OBSOLETE,
    TrainConfig,
    reward_timesteps,
    total_steps,
)
from segcn.train.latent_cache import cache_root, parse_limit, source_digest
from segcn.train.log import Log
from segcn.train.loss import FiniteCheck, Loss, diffusion_loss
from segcn.train.networks import Networks, check_trained, in_full, trained_parts
from segcn.train.reward import open_reward_segmenter
from segcn.train.validation import HeldOutScorer, held_out_rows
from segcn.utils.args import check_values, preset_defaults, to_json
from segcn.utils.errors import UserError
from segcn.utils.paths import RUN_FILE

AugmentFunction = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]  # image, mask, seed


@dataclass
class Run:
    """Everything a training step touches."""

    config: TrainConfig
    accelerator: Accelerator
    output_dir: Path
    split: Split
    base: Base
    networks: dict[str, torch.nn.Module]  # that are trained: controlnet, and parts of the base
    optimizer: AcceleratedOptimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    examples: Examples
    loss: Loss
    finite: FiniteCheck
    log: Log
    repeats: np.ndarray | None  # how often each row occurs in an epoch; None: once
    ema: EMAModel | None  # the average of the weights, with --use_ema
    cache_seconds: float  # spent on the latent cache
    held_out: Split | None  # rows that images are generated from and scored while training
    reward_segmenter: AnySegmenter | None  # frozen, with --reward_weight
    scorer: HeldOutScorer | None = None  # on the main process, once it is needed
    step: int = 0
    saved: int = 0  # the step of the newest checkpoint
    stop_signal: list[int] = field(default_factory=list)

    @property
    def controlnet(self) -> torch.nn.Module | None:
        """The ControlNet; None where the base alone is trained."""
        return self.networks.get("controlnet")

    @property
    def unet(self) -> torch.nn.Module:
        """The network that denoises, which is trained or frozen."""
        return self.networks.get(self.base.family.part, self.base.unet)

    @cached_property
    def own_networks(self) -> dict[str, torch.nn.Module]:
        """The trained networks without what lets several processes train them."""
        return {name: self.accelerator.unwrap_model(network) for name, network in self.networks.items()}

    @cached_property
    def weights(self) -> list[torch.nn.Parameter]:
        """Every weight that is trained."""
        return trained_weights(self.own_networks)

    @contextmanager
    def averaged(self) -> Iterator[dict[str, torch.nn.Module]]:
        """The networks as they generate and are written: with their averaged weights, where there are any."""
        with averaged(self.weights, self.ema):
            yield self.own_networks

    @property
    def total_steps(self) -> int:
        assert self.config.max_train_steps is not None
        return self.config.max_train_steps


def prepare(
    config: TrainConfig,
    loss: Loss | None = None,
    augment: AugmentFunction | None = None,
    new_controlnet: Callable | None = None,
    check: bool = True,
) -> Run:
    """Check data and settings, load the models, build the cache; the functions are those of `train`.

    check: whether a new run says how well the base fits the data set.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # only our own lines in the log
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config, fitted = fit_memory(resolve(config))
    output_dir = Path(config.output_dir)
    accelerator = make_accelerator(config, output_dir)
    log = Log(accelerator, output_dir, config.logging_steps)
    for known in dataclasses.fields(config):
        if known.name in OBSOLETE and getattr(config, known.name) != known.default:
            log.say(f"--{known.name} has no effect: {known.metadata['help']}.")
    for line in fitted:
        log.say(line)
    split = training_split(config)
    held_out = held_out_rows(config, split)
    if (
        "controlnet" in config.trains
        and config.max_train_samples is None
        and "test" not in find_splits(config.dataset)
        and len(split) > 2
    ):
        kept = hold_out(config.dataset)[0].partition(":")[2].strip("]")
        log.say(
            f"No test/: all {len(split)} rows are trained on. segcn evaluate calls those from {kept} on held out:"
            f" --max_train_samples {kept} leaves them out."
        )
    if accelerator.is_main_process:
        check_rows(config, split, output_dir, log)
    base = load_frozen(config, accelerator)
    if base.family.lora_targets and config.lora_targets == LORA_TARGETS:
        config = dataclasses.replace(config, lora_targets=list(base.family.lora_targets))
    if config.controlnet_model_name_or_path:
        check_controlnet(config.controlnet_model_name_or_path, base)
        check_light(config.controlnet_model_name_or_path, light_settings(config))
    repeats = make_repeats(config, split, accelerator, log)
    if config.resolution % base.side_factor:
        raise UserError(f"--resolution: expected a multiple of {base.side_factor}, found {config.resolution}")
    check_buckets(config, base.side_factor)
    augmentation = AugmentConfig.parse(config.augment)
    dataset = PairedDataset(split, config.resolution, augmentation, config.seed, config.framing, function=augment)
    shown = rows_of_epochs(config, dataset, repeats, accelerator.num_processes)
    config = dataclasses.replace(config, max_train_steps=total_steps(config, shown, accelerator.num_processes))
    config = latent_cache.settle_draws(config, dataset, base, accelerator, log)
    functions = {"loss": loss, "augment_function": augment, "make_controlnet": new_controlnet}
    digests = {name: function and source_digest(function) for name, function in functions.items()}
    lock_run_folder(output_dir, config, split, base, accelerator, log, digests)
    if check and accelerator.is_main_process and not (output_dir / BASE_CHECK).exists():
        checked = check_base(split, base, config.resolution, config.fit)
        checked.write(None if config.preflight else output_dir / BASE_CHECK, log.say)
    if config.report_to != "none":
        values = json.loads(to_json(config)).items()
        shown_values = {key: value for key, value in values if isinstance(value, int | float | str)}
        accelerator.init_trackers(config.tracker_project_name, shown_values)
    began = time.monotonic()
    examples = make_examples(config, dataset, base, accelerator, log)
    cache_seconds = time.monotonic() - began
    reward_segmenter = open_reward_segmenter(config, base, examples, output_dir, accelerator, log)
    networks = {"controlnet": make_trainable(config, base, new_controlnet)} if "controlnet" in config.trains else {}
    networks |= trained_parts(config, base)  # after the ControlNet, which begins as a copy of the base
    weights = trained_weights(networks)
    if config.controlnet == "lora":
        counts = [sum(one.numel() for one in some) for some in (weights, networks["controlnet"].parameters())]
        log.say(
            f"A light ControlNet: {counts[0] / 1e6:.2f} of {counts[1] / 1e6:.2f} million weights are trained, at"
            f" --learning_rate {config.learning_rate:g}."
        )
    optimizer = make_optimizer(config, weights, accelerator)
    schedule = make_schedule(config, optimizer)
    *prepared, optimizer = accelerator.prepare(*networks.values(), optimizer)
    networks = dict(zip(networks, prepared, strict=True))
    ema = EMAModel(weights, decay=config.ema_decay, foreach=True) if config.use_ema else None
    finite = FiniteCheck(accelerator, output_dir)
    made = (networks, optimizer, schedule, examples, loss or diffusion_loss, finite)
    counted = (log, repeats, ema, cache_seconds, held_out, reward_segmenter)
    return Run(config, accelerator, output_dir, split, base, *made, *counted)


def training_split(config: TrainConfig) -> Split:
    """The rows to train on; without masks where no ControlNet is trained."""
    paired = "controlnet" in config.trains
    split = read_split(config.dataset, "train") if paired else unlabelled_split(config.dataset)
    return split.first(config.max_train_samples)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill what one flag says for another; UserError for a number that cannot be."""
    check_values(config)
    check_buckets(config)
    AugmentConfig.parse(config.augment)
    parse_limit(config.on_bad_sample)
    check_trained(config)
    check_schedule(config.lr_scheduler)
    reward_timesteps(config)
    usual = (dataclasses.asdict(type(config)()) | preset_defaults(type(config), config.preset))["learning_rate"]
    if config.controlnet == "lora" and config.learning_rate == usual:
        config = dataclasses.replace(config, learning_rate=LIGHT_RATES[config.preset])
    prompts, images = config.validation_prompt or [], config.validation_image or []
    if "controlnet" not in config.trains:
        return dataclasses.replace(config, dataset_name=config.dataset)
    if bool(images) != bool(prompts):
        raise UserError("--validation_image and --validation_prompt go together")
    if len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        raise UserError(
            f"--validation_prompt: expected one, or one for each of {len(images)} masks, found {len(prompts)}"
        )
    return dataclasses.replace(config, dataset_name=config.dataset)


def fit_memory(config: TrainConfig, half: str | None = None, fast: bool = True) -> tuple[TrainConfig, list[str]]:
    """The config as --memory_preset sets it, and what to say about that.

    half: bf16, or fp16 where the GPU lacks bf16 (V100); fast: whether it computes in it by itself, else only the
    frozen weights are held in it; None: as the device is. A flag that differs from the default of --preset was given,
    and stays.
    """
    if config.memory_preset is None:
        return config, []
    if half is None:
        device = torch.device(pick_device())
        bf16, gpu = computes_fast(torch.bfloat16, device), device.type == "cuda"
        half, fast = "fp16" if gpu and not bf16 else "bf16", gpu or bf16
    images, flags = MEMORY_PRESETS[config.memory_preset]
    defaults = dataclasses.asdict(type(config)()) | preset_defaults(type(config), config.preset)
    given = {name for name, default in defaults.items() if getattr(config, name) != default}
    wanted: dict[str, Any] = flags | ({"mixed_precision": half} if fast else {})
    if not given & {"train_batch_size", "gradient_accumulation_steps"}:
        effective = config.train_batch_size * config.gradient_accumulation_steps
        most = max(1, images * (512 / config.resolution) ** 2)
        size = max(n for n in range(1, effective + 1) if effective % n == 0 and n <= most)
        wanted |= {"train_batch_size": size, "gradient_accumulation_steps": effective // size}
    given_half = config.mixed_precision if config.mixed_precision in ("fp16", "bf16") else half
    wanted |= {"frozen_precision": given_half, "cache": "latents"}
    wanted = {name: value for name, value in wanted.items() if getattr(config, name) != value}
    fitted = {name: value for name, value in wanted.items() if name not in given}
    kept = {name: getattr(config, name) for name in wanted if name in given}

    def flags_of(settings: dict) -> str:
        return ", ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in settings.items())

    lines = [f"--memory_preset {config.memory_preset}: {flags_of(fitted) or 'nothing to set'}."]
    lines += [f"  As given instead: {flags_of(kept)}."] if kept else []
    return dataclasses.replace(config, **fitted), lines


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


def check_rows(config: TrainConfig, split: Split, output_dir: Path, log: Log) -> None:
    """Decode every file before step 0, unless the doctor did, or this run when it began; nothing has changed since."""
    paired = "controlnet" in config.trains
    run, rows = output_dir / RUN_FILE, f"{len(split)} rows, {len(split.palette.class_names)} classes"
    rows = rows if paired else f"{len(split)} images"
    if run.is_file() and json.loads(run.read_text()).get("data_fingerprint") == split.fingerprint:
        return log.say(f"{rows}: checked when this run began.")
    if not paired:
        check_images(split, log.say)
        return log.say(f"{rows}: every one decodes.")
    report = find_report(read_split(config.dataset, "train"))
    if report is None:
        check_split(split, log.say)
        return log.say(f"{rows}: every image and mask decodes, to declared labels only.")
    page, errors = report
    if errors:
        raise UserError(
            f"{split.metadata}: segcn validate found {errors} errors in these rows, see {page}; fix them, or train on"
            f" the good rows: segcn validate {config.dataset_name} --quarantine {split.folder}/good.csv"
        )
    log.say(f"{rows}: no errors in {page}.")


def make_repeats(config: TrainConfig, split: Split, accelerator, log: Log) -> np.ndarray | None:
    """How often each row occurs in an epoch, for --class_balance."""
    if not config.class_balance:
        return None
    return sampler.balanced(split, config.class_balance, cache_root(config), accelerator, log.say)


def load_frozen(config: TrainConfig, accelerator: Accelerator) -> Base:
    """The base on this process's device, its U-Net held in --frozen_precision."""
    held, computed = precisions(config.frozen_precision, accelerator.mixed_precision, accelerator.device)
    if in_full(config):
        held = computed = torch.float32
    hub = {"revision": config.revision, "variant": config.variant}
    name, tokenizer = config.pretrained_model_name_or_path, config.tokenizer_name
    vae = config.pretrained_vae_model_name_or_path
    base = load_base(name, accelerator.device, computed, tokenizer, held, config.lora, vae, **hub)
    if "text_encoder" in config.trains:
        base.one_text_encoder("--lora_text_encoder")
    if config.memory_preset is None:
        keep_freed_memory(accelerator.device)  # not sooner: the encoders' memory shall be given back
    base.scheduler = make_noise_schedule(config, base)
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    return base


def make_noise_schedule(config: TrainConfig, base: Base) -> Any:
    """The base's noise schedule, changed as --prediction_type and --rescale_betas_zero_snr say."""
    for name in base.process.refused:
        if getattr(config, name):
            raise UserError(
                f"--{name}: expected a base that predicts noise or v, found {base.family.title}, which predicts"
                f" {base.process.predicts} and draws its timesteps by their weight; leave the flag out"
            )
    if not hasattr(base.scheduler.config, "prediction_type"):
        return base.scheduler
    changes = {"prediction_type": config.prediction_type or base.scheduler.config.prediction_type}
    if config.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if changes["prediction_type"] != "v_prediction":
            raise UserError(
                "--rescale_betas_zero_snr: expected a base that predicts v, found epsilon: from pure noise the noise"
                " says nothing about the image"
            )
    return base.process.kind.from_config(base.scheduler.config, **changes)


def make_trainable(config: TrainConfig, base: Base, new_controlnet: Callable | None = None) -> ControlNet:
    """The ControlNet to train: what is trained of it is in float32."""
    light = light_settings(config)
    if light and new_controlnet:
        raise UserError("make_controlnet: expected --controlnet full; a light ControlNet begins as the base's encoder")
    if light and base.family.part != "unet":
        raise UserError(f"--controlnet lora: expected a base with a U-Net, found {base.family.title}; use full")
    if config.controlnet_model_name_or_path:
        controlnet = load_controlnet(config.controlnet_model_name_or_path, base.unet.device, unet=base.unet)
    else:
        torch.manual_seed(config.seed)
        make = new_controlnet or (lambda unet: make_controlnet(unet, base.latent_factor))
        controlnet = make_light(base.unet, *light, base.latent_factor) if light else make(base.unet).float()
    if not light:
        make_all_trainable(controlnet)
    if config.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
    return controlnet


def light_settings(config: TrainConfig) -> tuple[int, int, tuple[str, ...]] | None:
    """Rank, alpha and targets of a light ControlNet's LoRA; None: a full ControlNet."""
    if config.controlnet != "lora":
        return None
    return config.lora_rank, config.lora_alpha or config.lora_rank, tuple(config.lora_targets)


def trained_weights(networks: Networks) -> list[torch.nn.Parameter]:
    """The weights of networks that are trained."""
    return [weight for network in networks.values() for weight in network.parameters() if weight.requires_grad]


def make_optimizer(config: TrainConfig, weights: list[torch.nn.Parameter], accelerator: Accelerator):
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

        return AdamW8bit(weights, **settings)
    return torch.optim.AdamW(weights, fused=config.fused_adam or None, **settings)


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
    names, stepped = [kind.value for kind in SchedulerType], SchedulerType.PIECEWISE_CONSTANT.value
    steps = [int(step) for step in re.findall(r":(\d+)", rules)]
    formed = re.fullmatch(r"([\d.e-]+:\d+,)+[\d.e-]+", rules) and steps == sorted(set(steps))
    if name not in names or (bool(rules) and name != stepped) or (name == stepped and not formed):
        raise UserError(
            f"--lr_scheduler: expected one of {', '.join(names)}, the last with factors and steps in rising order, as"
            f" in {stepped}:1:1000,0.1:2000,0.01 (1x before step 1000, 0.1x before step 2000, 0.01x from there on);"
            f" found {text!r}"
        )
    return name, rules or None
