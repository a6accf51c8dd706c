"""The learning rate by optimizer steps: diffusers' schedules, by the names of its training scripts."""

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from segcn.errors import UserError
from segcn.train_config import TrainConfig

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
