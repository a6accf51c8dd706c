"""Validation: the ControlNet in training generates the same masks with the same noise each time, and is scored.

A segmenter says how well the images of held-out rows obey their masks; the mIoU it reaches on the real images is the
ceiling."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from segcn.data.dataset import PairedDataset, by_shape, read_framed_mask, to_image, to_uint8
from segcn.data.metadata import Split, find_splits, hold_out, read_split
from segcn.data.transforms import AUGMENTS
from segcn.data.visualize import write_sheet
from segcn.evaluate.evaluator import PARTED, check_classes, measure
from segcn.generate.config import SampleConfig
from segcn.generate.pipeline import Pipeline, generate, generate_shapes
from segcn.generate.writer import reconstructed
from segcn.models.controlnet import ControlNet, share_layers
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, load_segmenter, segmenter_of
from segcn.train.checkpoint import record_best
from segcn.train.config import TrainConfig
from segcn.train.latent_cache import cache_root
from segcn.train.log import STOPPED, fractions, read_log, validation_scores
from segcn.utils.args import make
from segcn.utils.errors import UserError

if TYPE_CHECKING:
    from segcn.train.setup import Run

LEAST_RISE = 0.15  # share of the ceiling
GENERATED_AT_ONCE = 16  # images generated or scored together, at most
SHEET_ROWS = 4  # held-out rows in the sheet of a run without --validation_image
LARGEST_SHARE = 0.2  # of the time of training, that validation should take


def convergence_step(steps: Sequence[int], fractions: Sequence[float]) -> int | None:
    """The first validation past half of the rise from the first value to the best, None where there is no such rise.

    fractions: faithfulness as a share of the ceiling, at the steps. A ControlNet does not learn to obey bit by bit but
    within a few hundred steps ("sudden convergence", Zhang et al. 2023, arXiv:2302.05543, section 3.3): half-way is in
    the middle of that jump wherever the curve begins and ends, and of a gradual rise in its middle. The rise must be at
    least 0.15, far above the 0.01 by which scores of six rows differed before it, and the value after the step must be
    past half-way too: a single lucky value is not a convergence.
    """
    if not fractions or max(fractions) - fractions[0] < LEAST_RISE:
        return None
    half_way = (fractions[0] + max(fractions)) / 2
    past = [fraction > half_way for fraction in fractions]
    stays = [here and after for here, after in zip(past, [*past[1:], True], strict=True)]
    return steps[stays.index(True)] if any(stays) else None


@dataclass
class HeldOutScorer:
    """What stays the same from validation to validation."""

    segmenter: AnySegmenter
    rows: Split  # held out
    masks: Sequence[np.ndarray]  # uint8 [R, R] each, or the shape of its bucket, class ids
    ceiling: dict  # what `measure` finds on the real images
    reward: AnySegmenter | None = None  # the segmenter that rewards the training, for a figure beside the score
    reward_ceiling: dict | None = None  # what `measure` finds with it


def held_out_rows(config: TrainConfig, split: Split) -> Split | None:
    """The rows that --faithfulness_rows asks for: the first of the test split, or else those after --max_train_samples.

    split: the rows to train on. UserError where there are none, or where --segmenter cannot score them.
    """
    if not config.faithfulness_rows:
        return None
    if "test" in find_splits(config.dataset):
        found = read_split(config.dataset, "test")
    else:
        found = read_split(config.dataset, "train")
        found = dataclasses.replace(found, records=found.records[len(split) :])
    if not found.records:
        kept = hold_out(config.dataset)[0].partition(":")[2].strip("]") or "N"
        raise UserError(
            f"--faithfulness_rows {config.faithfulness_rows}: expected held-out rows, found no test split in "
            f"{config.dataset_name} and none after the {len(split)} rows to train on. Move rows to a folder test/ with "
            f"its own metadata.csv (data/README.md), hold some out by --max_train_samples {kept}, or measure nothing "
            "while training by --faithfulness_rows 0."
        )
    if config.segmenter:
        segmenter = load_segmenter(config.segmenter)
        check_classes(found, split.palette, segmenter)
        trained = segmenter.settings["resolution"]
        if trained != config.resolution:
            raise UserError(
                f"--segmenter {config.segmenter}: expected one trained at {config.resolution} px, as --resolution says,"
                f" found {trained} px; without --segmenter one is trained"
            )
    return found.first(config.faithfulness_rows)


def open_scorer(
    config: TrainConfig,
    held_out: Split,
    split: Split,
    cache: Path,
    device,
    log: Callable,
    reward: AnySegmenter | None = None,
) -> HeldOutScorer:
    """Load the segmenter, or train it on the rows of `split` and leave it in the cache; score the real images.

    reward: the segmenter that rewards the training, which scores nothing; its own figure is logged, too.
    """
    if config.segmenter:
        segmenter = load_segmenter(config.segmenter, device)
    else:
        settings = SegmenterConfig(resolution=config.resolution, seed=config.seed, fit=config.fit)
        segmenter = segmenter_of(split, settings, cache, log, device)
    pairs = PairedDataset(held_out, config.resolution, AUGMENTS["none"], 0, config.framing)
    masks = [sample.mask.numpy() for sample in pairs]

    def ceiling(by: AnySegmenter) -> dict:
        return measure(((sample.image[None], sample.mask[None]) for sample in pairs), by, held_out.palette)

    by_reward = None if reward is None else ceiling(reward)
    return HeldOutScorer(segmenter, held_out, masks, ceiling(segmenter), reward, by_reward)


def generate_rows(
    scorer: HeldOutScorer, pipeline: Pipeline, settings: SampleConfig, at_once: int, on_step: Callable
) -> list[np.ndarray]:
    """An image of every held-out row, uint8 [R, R, 3]: its noise depends on (settings.seed, row) alone.

    at_once: images, 16 at most. `on_step` is called before each group and after each denoising step; True ends it.
    """
    size, captions = min(at_once, GENERATED_AT_ONCE), [record.caption for record in scorer.rows.records]
    images: list[np.ndarray] = []
    for first in range(0, len(captions), size):
        if on_step(0):
            break
        rows = list(range(first, min(first + size, len(captions))))
        some = [captions[row] for row in rows]
        images += generate_shapes(pipeline, [scorer.masks[row] for row in rows], some, rows, settings, on_step)
    return images


def score_rows(scorer: HeldOutScorer, generated: Sequence[np.ndarray]) -> dict:
    """miou, of_ceiling (its share of the real images' mIoU) and the IoU of each class, of generated rows.

    With a reward also of_ceiling_by_reward, by the segmenter that rewards: of_ceiling alone is a score.
    """
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for places in by_shape(generated):
        images = torch.from_numpy(np.stack([generated[place] for place in places])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([scorer.masks[place] for place in places]))
        images, masks = to_image(images).split(GENERATED_AT_ONCE), masks.split(GENERATED_AT_ONCE)
        batches += zip(images, masks, strict=True)
    found = measure(batches, scorer.segmenter, scorer.rows.palette)

    def share(scores: dict, ceiling: dict) -> float:
        return round((scores["miou"] or 0.0) / ceiling["miou"], 4) if ceiling["miou"] else 0.0

    score = {
        "miou": round(found["miou"] or 0.0, 4),
        "of_ceiling": share(found, scorer.ceiling),
        "per_class": {name: value and round(value, 4) for name, value in found["per_class"].items()},
    }
    if scorer.reward is not None and scorer.reward_ceiling is not None:
        by_reward = measure(batches, scorer.reward, scorer.rows.palette)
        score["of_ceiling_by_reward"] = share(by_reward, scorer.reward_ceiling)
    return score


def begin_validation(run: Run) -> None:
    """Score the real images, then the ControlNet as it is, where the log does not hold it already; print the cost."""
    if not validates(run):
        return
    scored = run.held_out is None or run.step in validation_scores(read_log(run.log.path))
    missing = agreed(run, lambda: not (scored and sheet_path(run).is_file()))
    if run.step == run.total_steps and not missing:
        return
    run.log.start_clock(run.step)
    if run.accelerator.is_main_process and run.held_out is not None:
        cache, device = cache_root(run.config), run.accelerator.device
        say = partial(say_or_stop, run)
        run.scorer = open_scorer(run.config, run.held_out, run.split, cache, device, say, run.reward_segmenter)
        real, requested = run.scorer.ceiling, run.config.faithfulness_rows
        if not any("ceiling" in entry for entry in read_log(run.log.path)):
            run.log.write({"step": 0, "ceiling": real})
        fewer = f" ({requested} were requested, no more are held out)" if real["images"] < requested else ""
        run.log.say(f"The ceiling: mIoU {real['miou'] or 0:.3f} on the {real['images']} held-out real images{fewer}.")
    if missing:
        validate_if_due(run)
    if run.scorer is not None and not run.stop_signal:
        record_best(run.output_dir)
        every, found = run.config.validation_steps, list(validation_scores(read_log(run.log.path)).values())
        if found:
            rows, seconds = len(run.scorer.rows), found[-1]["seconds"]
            times = math.ceil(run.total_steps / every) - run.step // every
            run.log.say(f"Faithfulness on {rows} rows every {every} steps: about {seconds:.0f} s each, {times} times.")


def say_or_stop(run: Run, line: str) -> None:
    """A line of the segmenter's training, which a signal ends: what is saved of the ControlNet is the newest step."""
    run.log.say(line)
    if run.stop_signal:
        run.log.say("Stopped while the segmenter was trained; rerun the same command to resume.")
        sys.exit(STOPPED)


def validate_if_due(run: Run) -> bool:
    """Generate and score where this step asks for it; whether the ControlNet was never better, on every process."""
    if not validates(run) or (run.step % run.config.validation_steps and run.step != run.total_steps):
        return False
    return agreed(run, lambda: validate_now(run))


def agreed(run: Run, answer: Callable[[], bool]) -> bool:
    """The main process's answer, on every process; the others wait as long as the Accelerator's timeout allows."""
    return broadcast_object_list([run.accelerator.is_main_process and answer()])[0]


def validates(run: Run) -> bool:
    """Whether anything is generated while training."""
    drawn = run.config.validation_image or run.config.validation_prompt or "vae" in run.networks
    return bool(drawn) or run.held_out is not None


def validate_now(run: Run) -> bool:
    """Generate the sheet and the held-out rows, write them and their score; whether they were never better.

    Interrupted meanwhile, it writes nothing: the resumed run begins with this validation.
    """
    config, began = run.config, time.monotonic()
    settings = make(SampleConfig, config.preset, pretrained_model_name_or_path=run.base.folder, seed=config.seed)
    with run.averaged() as networks:
        controlnet = networks.get("controlnet")
        twin = frozen_twin(controlnet, run.base.dtype) if isinstance(controlnet, ControlNet) else None
        pipeline = Pipeline(run.base, twin, run.split.palette, "")
        lines, generated = generate_sheet(run, pipeline, settings, lambda step: bool(run.stop_signal))
    if run.stop_signal:
        return False
    sheet = write_sheet(sheet_path(run), lines)
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", sheet, run.step, dataformats="HWC")
    score = None if generated is None or run.scorer is None else score_rows(run.scorer, generated)
    seconds = time.monotonic() - began
    warn_if_slow(run, seconds)
    run.log.aside += seconds
    return score is not None and write_score(run, score | {"seconds": round(seconds, 2)})


def frozen_twin(controlnet: ControlNet, dtype: torch.dtype) -> ControlNet:
    """The same weights in another model, for evaluation in the U-Net's precision: the one in training is not touched.

    Where the precision is the same, both share their memory.
    """
    with torch.device("meta"):  # neither memory nor random numbers are spent on weights that are replaced
        twin = type(controlnet).from_config(controlnet.config)
    share_layers(twin, controlnet, dtype)
    return twin.eval()


def generate_sheet(
    run: Run, pipeline: Pipeline, settings: SampleConfig, on_step: Callable
) -> tuple[list, list[np.ndarray] | None]:
    """The lines of the sheet, masks first, each N of uint8 [R, R, 3]; and the images of the held-out rows, if any."""
    config, palette, generated = run.config, run.split.palette, None
    if run.controlnet is None:
        return base_sheet(run, pipeline, settings, on_step), None
    if run.scorer is not None:
        generated = generate_rows(run.scorer, pipeline, settings, config.train_batch_size, on_step)
    if run.stop_signal:
        return [], None
    if not config.validation_image:
        assert run.scorer is not None and generated is not None
        return [[palette.table[mask] for mask in run.scorer.masks[:SHEET_ROWS]], generated[:SHEET_ROWS]], generated
    prompts = config.validation_prompt or []
    count = max(len(config.validation_image), len(prompts))  # a single mask or prompt is repeated
    fit = config.resolution, config.framing
    read = [read_framed_mask(path, palette, *fit)[0] for path in config.validation_image]
    masks, prompts = (read * count)[:count], (prompts * count)[:count]
    lines = [[palette.table[mask] for mask in masks]]
    for number in range(config.num_validation_images):
        seeded = dataclasses.replace(settings, seed=config.seed + number)
        lines.append(generate_shapes(pipeline, masks, prompts, range(count), seeded, on_step))
    return lines, generated


def base_sheet(run: Run, pipeline: Pipeline, settings: SampleConfig, on_step: Callable) -> list[Sequence[np.ndarray]]:
    """The lines of a sheet without masks: an image of each prompt; or images above what the autoencoder leaves."""
    config = run.config
    if "vae" in run.networks:
        pairs = PairedDataset(run.split, config.resolution, AUGMENTS["none"], 0, config.framing)
        images = [pairs.sample(row, 0).image for row in range(min(SHEET_ROWS, len(pairs)))]
        return [list(map(to_uint8, images)), reconstructed(run.base.vae, images)]
    prompts: list[str] = config.validation_prompt or []
    lines: list[Sequence[np.ndarray]] = []
    for number in range(config.num_validation_images):
        seeded = dataclasses.replace(settings, seed=config.seed + number)
        size = config.resolution, config.resolution
        lines.append([*generate(pipeline, None, prompts, list(range(len(prompts))), seeded, size, on_step)])
    return lines


def sheet_path(run: Run) -> Path:
    """Where this step's sheet goes."""
    return run.output_dir / "validation" / f"step-{run.step:06d}.png"


def write_score(run: Run, score: dict) -> bool:
    """A line of its own in log.jsonl, scalars in the trackers, a line on the terminal; whether it was never better."""
    steps, shares = fractions(read_log(run.log.path))
    run.log.write({"step": run.step, "faithfulness": score})
    per_class = {f"faithfulness/{name}": iou for name, iou in score["per_class"].items() if iou is not None}
    shown = ("miou", "of_ceiling", "of_ceiling_by_reward")
    named = {f"faithfulness/{name}": score[name] for name in shown if name in score}
    run.accelerator.log(named | per_class, step=run.step)
    better = score["of_ceiling"] > max(shares, default=-1.0)
    best = ", the best so far" if better and run.step else ""
    run.log.say(
        f"Faithfulness at step {run.step}: mIoU {score['miou']:.3f}, {score['of_ceiling']:.0%} of the ceiling{best}."
    )
    late = run.config.reward_start * run.total_steps
    scored = {step: one for step, one in validation_scores(read_log(run.log.path)).items() if late < step <= run.step}
    if [step for step, one in scored.items() if parted(one)] == [run.step]:  # said once
        run.log.say(
            f"By the segmenter that rewards it is {score['of_ceiling_by_reward']:.1%} of its ceiling, by the one that "
            f"scores {score['of_ceiling']:.1%}: they part by more than {PARTED}. Believe the one that scores."
        )
    began, before = convergence_step(*fractions(read_log(run.log.path))), convergence_step(steps, shares)
    if began is not None and began != before:
        corrected = "" if before is None else f", not {before} as it seemed"
        run.log.say(f"The ControlNet began to obey the masks at step {began}{corrected}.")
    return better


def parted(score: dict) -> bool:
    """Whether the segmenter that rewards and the one that scores see another share of their ceilings."""
    return abs(score.get("of_ceiling_by_reward", score["of_ceiling"]) - score["of_ceiling"]) > PARTED


def warn_if_slow(run: Run, seconds: float) -> None:
    """At the first validation after the start: whether they take more than a fifth of the time of training."""
    every, pace = run.config.validation_steps, run.log.pace(run.step)
    if not run.log.aside and seconds > LARGEST_SHARE * pace * every:
        run.log.say(
            f"Validation takes {seconds:.1f} s, more than a fifth of the {pace * every:.1f} s of training before each:"
            f" a larger --validation_steps ({math.ceil(seconds / pace / LARGEST_SHARE)} or more) or fewer"
            f" {'--faithfulness_rows' if run.held_out else '--num_validation_images'} lowers it."
        )
