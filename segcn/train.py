"""Train a ControlNet on a frozen base: `accelerate launch -m segcn.train`, with the flags of diffusers' script."""

import sys
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader

from segcn.arguments import main_guard, parse
from segcn.examples import Plan
from segcn.export import finish
from segcn.objective import step_losses
from segcn.preflight import preflight
from segcn.prepare import Run, prepare
from segcn.saving import catch_signals, ignore_signals, resume, save, stop_if_asked, stoppable
from segcn.train_config import TrainConfig
from segcn.validation import begin_validation, validate


@stoppable()
def train(config: TrainConfig) -> Path | None:
    """Train as configured and return the run folder, a ControlNet that plain diffusers opens. Resumes by itself."""
    if config.preflight:
        preflight(config, learn)
        return None
    run = prepare(config)
    resume(run)
    catch_signals(run)
    begin_validation(run)
    stop_if_asked(run)
    for stepped in learn(run):
        if stepped:
            look_and_save(run)
        stop_if_asked(run)
    return finish(run)


def learn(run: Run) -> Iterator[bool]:
    """Learn from each micro-batch that is left, and yield whether that completed an optimizer step."""
    config, controlnet, accelerator = run.config, run.controlnet, run.accelerator
    controlnet.train()
    for batch in batches(run):
        run.bad_rows.seen(batch)
        with accelerator.accumulate(controlnet):
            losses = step_losses(run, batch)
            accelerator.backward(losses.mean())
            run.finite.seen(batch["row"], losses)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(controlnet.parameters(), config.max_grad_norm)
                run.finite.check(norm, run.step + 1)
                run.log.gradient(norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.log.loss(losses.mean())
        if accelerator.sync_gradients:
            count_step(run)
        yield accelerator.sync_gradients


def batches(run: Run) -> DataLoader:
    """The micro-batches of this process from the current step to the last."""
    config, accelerator = run.config, run.accelerator
    plan = Plan(
        len(run.split),
        config.seed,
        run.step,
        run.total_steps,
        config.gradient_accumulation_steps,
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        run.repeats,
    )
    left = f"steps {run.step + 1} to {run.total_steps} on {accelerator.num_processes} process(es)"
    run.log.say(
        f"Training {left}." if run.step < run.total_steps else f"Nothing left to do: all {run.step} steps stand."
    )
    run.log.began(run.step)
    return DataLoader(
        run.examples, batch_sampler=plan, num_workers=config.dataloader_num_workers, worker_init_fn=ignore_signals
    )


def count_step(run: Run) -> None:
    """An optimizer step is done: its average, its learning rate, its line in the log."""
    if run.ema is not None:
        run.ema.step(run.accelerator.unwrap_model(run.controlnet).parameters())
    run.schedule.step()
    run.step += 1
    run.log.step(run.step, run.total_steps, float(run.schedule.get_last_lr()[0]))


def look_and_save(run: Run) -> None:
    """Validation pictures and checkpoints when their step has come."""
    config, last = run.config, run.step == run.total_steps
    best, due = validate(run), last or run.step % config.checkpointing_steps == 0
    if best or due:
        save(run, only_best=not due)


def main() -> None:
    """Command line: `accelerate launch -m segcn.train --help`."""
    main_guard(lambda: train(parse(TrainConfig, sys.argv[1:], "accelerate launch -m segcn.train")))


if __name__ == "__main__":
    main()
