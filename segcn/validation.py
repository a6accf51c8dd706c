"""Validation: the ControlNet in training paints the same masks with the same noise again and again, and is scored."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers import ControlNetModel

from segcn import judge
from segcn.arguments import make
from segcn.best import fractions, is_best, record_best, scores
from segcn.config import SampleConfig
from segcn.convergence import convergence_step
from segcn.dataset import read_control_mask
from segcn.pipeline import Painter, generate
from segcn.prepare import Run, cache_root
from segcn.sheets import write_sheet
from segcn.watch import read_log

SHOWN = 4  # held-out rows in the sheet of a run without --validation_image
MOST = 0.2  # of the time of training, that validation should take


def begin_validation(run: Run) -> None:
    """Score the real images, then the ControlNet as it is, where the log does not tell already; say what it costs."""
    missing = wanted(run) and agreed(run, lambda: not told(run))
    if not wanted(run) or (run.step == run.total_steps and not missing):
        return
    run.log.began(run.step)
    if run.accelerator.is_main_process and run.held_out is not None:
        cache, device = cache_root(run.config), run.accelerator.device
        run.judge = judge.open_judge(run.config, run.held_out, run.split, cache, device, run.log.say)
        say_ceiling(run, run.judge.ceiling)
    if missing:
        validate(run)
    if run.judge is not None and not run.stop_signal:
        record_best(run.output_dir)
        say_cost(run, len(run.judge.rows))


def validate(run: Run) -> bool:
    """Paint and score where this step asks for it; whether the ControlNet was never better, on every process."""
    if not wanted(run) or (run.step % run.config.validation_steps and run.step != run.total_steps):
        return False
    return agreed(run, lambda: look(run))


def agreed(run: Run, answer: Callable[[], bool]) -> bool:
    """The main process's answer, on every process; the others wait as long as the Accelerator's timeout allows."""
    return broadcast_object_list([run.accelerator.is_main_process and answer()])[0]


def wanted(run: Run) -> bool:
    """Whether anything is painted while training."""
    return bool(run.config.validation_image) or run.held_out is not None


def told(run: Run) -> bool:
    """Whether this step's validation stands in the run folder."""
    scored = run.held_out is None or run.step in scores(read_log(run.log.path))
    return scored and sheet_path(run).is_file()


def look(run: Run) -> bool:
    """Paint the sheet and the held-out rows, write what they show; whether they were never better.

    Asked to stop meanwhile, it leaves off and writes nothing: the resumed run begins with this validation.
    """
    config, began = run.config, time.monotonic()
    settings = make(SampleConfig, config.preset, pretrained_model_name_or_path=run.base.folder, seed=config.seed)
    with run.to_paint() as controlnet:
        painter = Painter(run.base, frozen_twin(controlnet, run.base.dtype), run.split.palette, "")
        lines, painted = paint(run, painter, settings, lambda step: bool(run.stop_signal))
    if run.stop_signal:
        return False
    show_sheet(run, lines)
    score = None if painted is None or run.judge is None else judge.score(run.judge, painted)
    seconds = time.monotonic() - began
    say_if_too_slow(run, seconds)
    run.log.validated(seconds)
    return score is not None and write_score(run, score | {"seconds": round(seconds, 2)})


def frozen_twin(controlnet: ControlNetModel, dtype: torch.dtype) -> ControlNetModel:
    """The same weights in another model, for evaluation in the U-Net's precision: the one in training is not touched.

    Where the precision is the same, both share their memory.
    """
    with torch.device("meta"):  # neither memory nor random numbers are spent on weights that are replaced
        twin = ControlNetModel.from_config(controlnet.config)
    weights = {name: weight.to(dtype) for name, weight in controlnet.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    return twin.requires_grad_(False).eval()


def paint(run: Run, painter: Painter, settings: SampleConfig, on_step: Callable) -> tuple[list, np.ndarray | None]:
    """The lines of the sheet, masks first, each uint8 [N, R, R, 3]; and the held-out rows painted, where they are."""
    config, colours, painted = run.config, run.split.palette.table, None
    if run.judge is not None:
        painted = judge.paint(run.judge, painter, settings, config.train_batch_size, on_step)
    if run.stop_signal:
        return [], None
    if not config.validation_image:
        assert run.judge is not None and painted is not None
        return [colours[run.judge.masks[:SHOWN]], painted[:SHOWN]], painted
    masks, prompts = validation_pairs(run)
    lines = [colours[masks]]
    for number in range(config.num_validation_images):
        seeded = dataclasses.replace(settings, seed=config.seed + number)
        lines.append(generate(painter, masks, prompts, list(range(len(masks))), seeded, None, on_step))
    return lines, painted


def validation_pairs(run: Run) -> tuple[np.ndarray, list[str]]:
    """Masks uint8 [N,R,R] and a prompt for each; a single mask or prompt is repeated."""
    images, prompts = run.config.validation_image or [], run.config.validation_prompt or []
    count = max(len(images), len(prompts))
    masks = [read_control_mask(path, run.split.palette, run.config.resolution, run.config.fit) for path in images]
    return np.stack((masks * count)[:count]), (list(prompts) * count)[:count]


def sheet_path(run: Run) -> Path:
    """Where this step's sheet goes."""
    return run.output_dir / "validation" / f"step-{run.step:06d}.png"


def show_sheet(run: Run, lines: list[np.ndarray]) -> None:
    """output_dir/validation/step-N.png, and the same in TensorBoard."""
    sheet = write_sheet(sheet_path(run), lines)
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", sheet, run.step, dataformats="HWC")


def write_score(run: Run, score: dict) -> bool:
    """A line of its own in log.jsonl, scalars in the trackers, a line on the terminal; whether it was never better."""
    began_before = convergence_step(*fractions(read_log(run.log.path)))
    run.log.write({"step": run.step, "faithfulness": score})
    entries = read_log(run.log.path)
    per_class = {f"faithfulness/{name}": iou for name, iou in score["per_class"].items() if iou is not None}
    named = {f"faithfulness/{name}": score[name] for name in ("miou", "of_ceiling")}
    run.accelerator.log(named | per_class, step=run.step)
    better, began = is_best(entries), convergence_step(*fractions(entries))
    best = ", the best so far" if better and run.step else ""
    run.log.say(
        f"Faithfulness at step {run.step}: mIoU {score['miou']:.3f}, {score['of_ceiling']:.0%} of the ceiling{best}."
    )
    if began is not None and began != began_before:
        run.log.say(f"The ControlNet began to obey the masks at step {began}.")
    return better


def say_ceiling(run: Run, real: dict) -> None:
    """What the segmenter makes of the real images: the ceiling, a line of the log that is written once."""
    asked = run.config.faithfulness_rows
    if not any("ceiling" in entry for entry in read_log(run.log.path)):
        run.log.write({"step": 0, "ceiling": real})
    fewer = f" ({asked} were asked for, no more are held out)" if real["images"] < asked else ""
    run.log.say(f"The ceiling: mIoU {real['miou'] or 0:.3f} on the {real['images']} held-out real images{fewer}.")


def say_cost(run: Run, rows: int) -> None:
    """How long a validation takes, as measured by the newest one, and how many come."""
    every, scored = run.config.validation_steps, list(scores(read_log(run.log.path)).values())
    if not scored:
        return
    seconds = scored[-1]["seconds"]
    times = math.ceil(run.total_steps / every) - run.step // every
    run.log.say(f"Faithfulness on {rows} rows every {every} steps: about {seconds:.0f} s each, {times} times.")


def say_if_too_slow(run: Run, seconds: float) -> None:
    """At the first validation after the start: whether they take more than a fifth of the time of training."""
    every, pace = run.config.validation_steps, run.log.pace(run.step)
    if not run.log.aside and seconds > MOST * pace * every:
        run.log.say(
            f"Validation takes {seconds:.1f} s, more than a fifth of the {pace * every:.1f} s of training before each: "
            f"a larger --validation_steps ({math.ceil(seconds / pace / MOST)} or more) or fewer --faithfulness_rows "
            "lowers it."
        )
