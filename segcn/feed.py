"""What feeds a training: its data set, the latent cache and how many draws it holds, the examples, the bad rows."""

import dataclasses
import json
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from segcn import balance, draws, latents
from segcn.augment import AugmentConfig
from segcn.bad_samples import BadRows, parse_limit
from segcn.claim import RUN_FILE
from segcn.class_weights import class_weights
from segcn.config import OUTPUTS
from segcn.dataset import PairedDataset
from segcn.errors import UserError
from segcn.examples import Examples
from segcn.models import Base
from segcn.records import Split
from segcn.stamps import overlook_bad
from segcn.train_config import TrainConfig
from segcn.watch import Log


def make_dataset(config: TrainConfig, split: Split, base: Base) -> PairedDataset:
    """The rows, augmented, at a resolution that the base can encode."""
    if config.resolution % base.latent_factor:
        raise UserError(f"--resolution: expected a multiple of {base.latent_factor}, found {config.resolution}")
    return PairedDataset(split, config.resolution, AugmentConfig.parse(config.augment), config.seed, config.fit)


def overlook_bad_rows(config: TrainConfig, split: Split) -> None:
    """Under --on_bad_sample skip:N a run goes on although files of some rows went bad since it began."""
    run = Path(config.output_dir) / RUN_FILE
    recorded = json.loads(run.read_text()).get("data_fingerprint") if run.is_file() else None
    if recorded:
        overlook_bad(split, recorded, cache_root(config), parse_limit(config.on_bad_sample))


def settle_draws(config: TrainConfig, dataset: PairedDataset, base: Base, accelerator, log: Log) -> TrainConfig:
    """The config with the number of draws resolved; a run that goes on keeps the number that it began with."""
    if config.cache == "none":
        return config
    folder, layout = cache_folder(config, dataset, base), latents.layout_of(dataset, base)
    run, asked = Path(config.output_dir) / RUN_FILE, config.cache_draws
    if run.is_file() and asked is None:
        asked = json.loads(run.read_text()).get("cache_draws")
    assert config.max_train_steps is not None
    seen = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
    visits, captions = seen * accelerator.num_processes / len(dataset), len(latents.captions_of(dataset))
    found = [0]
    if accelerator.is_main_process:
        found[0] = draws.resolve_draws(
            1 if dataset.augment.still else asked,
            visits,
            layout.draw_bytes,
            layout.text_bytes(captions),
            config.cache_budget_gb * 1e9,
            draws.free_bytes(folder),
            draws.standing_bytes(folder),
        )
    count = broadcast_object_list(found)[0]
    log.say(draws.announce(layout, captions, count, visits, config.max_train_steps, folder))
    return dataclasses.replace(config, cache_draws=count)


def make_examples(config: TrainConfig, dataset: PairedDataset, base: Base, accelerator, log: Log) -> Examples:
    """The source of training examples; with the cache, both encoders leave memory, unless the run paints with them."""
    cache, limit = None, parse_limit(config.on_bad_sample)
    if config.cache == "latents":
        assert config.cache_draws is not None
        folder = cache_folder(config, dataset, base)
        cache = latents.build(folder, dataset, base, config.cache_draws, accelerator, log.say, limit)
    paints = config.validation_image or config.faithfulness_rows
    if cache is not None and not paints:
        base.vae = base.text_encoder = None
    settings = {
        "seed": config.seed,
        "empty_prompts": config.proportion_empty_prompts,
        "empty_controls": config.proportion_empty_controls,
        "timesteps": base.scheduler.config.num_train_timesteps,
        "class_weights": make_class_weights(config, dataset.split, accelerator),
        "bad_limit": limit,
    }
    side = config.resolution // base.latent_factor
    return Examples(dataset, cache, base.latent_factor, (base.unet.config.in_channels, side, side), settings)


def make_bad_rows(examples: Examples, output_dir: Path, accelerator, log: Log) -> BadRows:
    """The bad rows of this run, those of its cache among them."""
    bad = BadRows(output_dir, examples.settings["bad_limit"], examples.dataset, accelerator, log.say)
    bad.add(examples.cache.bad if examples.cache is not None else {})
    return bad


def make_class_weights(config: TrainConfig, split: Split, accelerator) -> torch.Tensor | None:
    """The weight of each class in the loss, for --class_weighting."""
    if not config.class_weighting:
        return None
    return class_weights(balance.read_class_pixels(split, cache_root(config), accelerator), config.class_weighting)


def cache_folder(config: TrainConfig, dataset: PairedDataset, base: Base) -> Path:
    """The folder of this data set's latent cache."""
    return cache_root(config) / latents.cache_key(dataset, latents.encoders_fingerprint(base))


def cache_root(config: TrainConfig) -> Path:
    """The folder of what is computed once for all runs."""
    return Path(config.cache_dir) if config.cache_dir else OUTPUTS / "cache"
