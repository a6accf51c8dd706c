"""`segcn study`: train segmenters on real and synthetic images, and test them all on held-out real ones."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from segcn.data.metadata import METADATA, Split, check_split, read_split
from segcn.data.transforms import AugmentConfig
from segcn.generate.conditions import read_conditions
from segcn.generate.config import GenerateConfig
from segcn.generate.filtering import mostly_dropped
from segcn.generate.layouts import make_layouts
from segcn.generate.writer import generate_dataset, records_of
from segcn.models.base import one_core, pick_device
from segcn.models.segmenter import AnySegmenter, load_segmenter, write_segmenter
from segcn.study.config import StudyConfig
from segcn.study.plan import REAL, Arm, Choice, Portion, Rows, StudyPlan, check_study, drawn_rows, stage_rows
from segcn.study.report import metrics_of, write_report
from segcn.study.training import Draws, Mixture, count_pixels, train_arm
from segcn.train.config import TrainConfig
from segcn.train.loop import train
from segcn.utils import io
from segcn.utils.args import to_json
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import WEIGHTS
from segcn.utils.progress import clock

COUNTS = "class_counts.npy"  # of a finished segmenter
Log = Callable[[str], None]


class Training(NamedTuple):
    """A segmenter to train; choice: none: the one of its case."""

    case: Portion
    arm: Arm
    seed: int
    choice: Choice | None = None


def study(config: StudyConfig, log: Log = print) -> dict:
    """The whole study; writes rows.json, metrics.json, study.md and study.png, and returns the metrics.

    Every ControlNet, set of images and segmenter has a folder of its own and is made once: rerun the same command to
    resume, with the same metrics in the end. UserError for impossible settings, before anything is trained.
    """
    config = config.filled
    plan = open_plan(config, log)
    todo = StudyProgress(plan, log)
    log(f"{todo.total} stages, about {clock(todo.left)} on two slow cores; {config.folder}")
    train_segmenters(plan, todo, choosing_jobs(plan))
    for case in plan.rows:
        plan.choose(case)
        log(f"{case.name}: learning rate {plan.chosen[case].learning_rate:g}, {plan.chosen[case].augment}")
    for case in plan.rows:
        controlnet, synthetic = plan.controlnet(case), plan.synthetic(case)
        if not is_finished(controlnet):
            train(controlnet)
            todo.finished(plan.seconds("controlnet", case), f"ControlNet {Path(controlnet.output_dir).name}")
        if not is_finished(synthetic):
            generate_dataset(synthetic, log=log)
            todo.finished(plan.seconds("synthetic", case), f"images {Path(synthetic.output_dir).name}")
    for to_plateau in (True, False):  # the lengths of the others follow from these
        train_segmenters(plan, todo, [job for job in arm_jobs(plan) if job.arm.to_plateau == to_plateau])
    metrics = metrics_of(plan, read_counts(plan), {case: synthetic_figures(plan, case) for case in plan.rows})
    write_report(metrics, config.folder)
    return metrics


def open_plan(config: StudyConfig, log: Log) -> StudyPlan:
    """Check the settings and both splits, and set the rows of each case apart."""
    check_study(config)
    train_rows, test = read_split(config.dataset_name, "train"), read_split(config.dataset_name, "test")
    if test.palette.fingerprint != train_rows.palette.fingerprint:
        raise UserError(f"{config.dataset_name}: expected one palette, found another one in {test.folder}")
    if len(train_rows) < 3:
        raise UserError(f"{train_rows.metadata}: expected 3 rows or more, some to validate on, found {len(train_rows)}")
    for split in (train_rows, test):
        check_split(split, log)
    config.folder.mkdir(parents=True, exist_ok=True)
    write_text(config.folder / "study_config.json", to_json(config))
    named, staged = {}, {}
    for case in (Portion(draw, fraction) for draw in range(config.draws or 1) for fraction in config.some):
        parts = drawn_rows(len(train_rows), case.fraction, config.seed + case.draw, config.amounts[-1])
        kinds = dict(zip(Rows._fields, parts, strict=True))
        named[case.name] = {kind: [train_rows[row].image_name for row in rows] for kind, rows in kinds.items()}
        folder = config.folder / "rows" / f"{case.name}-{train_rows.fingerprint[:6]}-{config.seed}"
        learned, validation, other = (stage_rows(train_rows, rows, folder / kind) if rows else None
                                      for kind, rows in kinds.items())  # fmt: skip
        assert learned and validation
        staged[case] = Rows(learned, validation, other)
    write_text(config.folder / "rows.json", json.dumps(named, indent=1) + "\n")
    plan = StudyPlan(config, staged, test)
    for case in plan.rows:  # what generation refuses is refused before anything is trained
        layouts = plan.layouts(case)
        if layouts and not Path(layouts.output_dir, "layouts.json").is_file():
            make_layouts(layouts, log)
        read_conditions(plan.synthetic(case))
        if not any(io.problem(plan.segmenter(case, REAL, 0, choice)[1]) for choice in plan.candidates):
            plan.choose(case)
    return plan


def choosing_jobs(plan: StudyPlan) -> list[Training]:
    """Real alone with every learning rate and augmentation, once in each case."""
    return [Training(case, REAL, 0, choice) for case in plan.rows for choice in plan.candidates]


def arm_jobs(plan: StudyPlan) -> list[Training]:
    """Every arm with every seed in each case."""
    return [Training(case, arm, seed) for case in plan.rows for arm in plan.arms(case)
            for seed in range(plan.config.seeds or 1)]  # fmt: skip


class StudyProgress:
    """How far a study is, and how long the rest may take at the pace so far."""

    def __init__(self, plan: StudyPlan, log: Log):
        self.log, self.began, self.done, self.expected = log, time.monotonic(), 0, 0.0
        jobs = [*choosing_jobs(plan), *(job for job in arm_jobs(plan) if job.arm != REAL or job.seed)]
        missing = [job for job in jobs if not plan.segmenter(*job)[1].is_dir()]
        stages = [plan.seconds("segmenter", job.case, job.arm) / 2 for job in missing]  # two at once
        for case in plan.rows:
            stages += [plan.seconds("controlnet", case)] * (not is_finished(plan.controlnet(case)))
            stages += [plan.seconds("synthetic", case)] * (not is_finished(plan.synthetic(case)))
        self.total, self.left = len(stages), sum(stages)

    def finished(self, seconds: float, what: str) -> None:
        """Log what was done; seconds: what it was expected to take."""
        self.done, self.expected, self.left = self.done + 1, self.expected + seconds, max(0, self.left - seconds)
        gone = time.monotonic() - self.began
        left = clock(self.left * gone / self.expected)
        self.log(f"[{self.done}/{max(self.done, self.total)}] {what}; {clock(gone)} gone, about {left} left")


def is_finished(stage: TrainConfig | GenerateConfig) -> bool:
    """Whether a ControlNet, or a set of images, has the file that is written last."""
    last = (WEIGHTS,) if isinstance(stage, TrainConfig) else METADATA
    return any((Path(stage.output_dir) / name).is_file() for name in last)


def train_segmenters(plan: StudyPlan, todo: StudyProgress, wanted: list[Training]) -> None:
    """Train the missing ones of some segmenters, on a CPU one on each core, to the same bytes.

    Those of an arm share a mixture, and those that differ in length alone are one training.
    """
    stop, test = threading.Event(), Draws(plan.test)
    validation = {case: Draws(rows.validation) for case, rows in plan.rows.items()}
    kept = WeakValueDictionary[tuple, Draws]()  # images leave the memory with the last training that needs them

    def draws_of(source: Split | None, augment: str) -> Draws | None:
        if source is None:
            return None
        return kept.setdefault((source, augment), Draws(source, AugmentConfig.parse(augment)))

    def check_stop(line: str) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    def train_some(mixture: Mixture, jobs: list[Training]) -> list[tuple[float, str]]:
        settings, said = plan.segmenter(*jobs[0])[0], []
        case, arm, seed, _ = jobs[0]
        start = load_segmenter(plan.segmenter(case, arm.after, seed)[1]) if arm.after else None
        lengths = [plan.steps(job.case, job.arm, job.seed) for job in jobs]
        order = sorted(range(len(jobs)), key=lambda place: lengths[place] or 0)
        found = train_arm(mixture, settings, validation[case], plan.rule, [lengths[place] for place in order], start,
                          check_stop)  # fmt: skip
        for place, segmenter in zip(order, found, strict=True):
            folder, counts = plan.segmenter(*jobs[place])[1], count_pixels(segmenter, test, settings)
            io.commit(folder.parent, folder.name, partial(write, segmenter, counts))
            score = segmenter.settings["validation_miou"]
            words = f"{folder.name}: {segmenter.settings['steps_taken']} steps, validation mIoU {score:.3f}"
            said.append((plan.seconds("segmenter", case, jobs[place].arm) / 2, words))
        return said

    def write(segmenter: AnySegmenter, counts: np.ndarray, staged: Path) -> None:
        write_segmenter(segmenter, plan.test.palette, staged)
        np.save(staged / COUNTS, counts)

    with one_core() as cores, ThreadPoolExecutor(
        cores if pick_device() == "cpu" else 1, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:  # fmt: skip
        together = defaultdict[Any, list[Training]](list)
        for job in wanted:
            if io.problem(plan.segmenter(*job)[1]):
                together[(job.case, job.seed) if job.arm.like else job].append(job)
        begun, mixtures = set(), {}
        for jobs in together.values():
            case, arm, _, choice = jobs[0]
            augment = (choice or plan.chosen[case]).augment
            key = case, arm.learns, arm.images, augment
            if key not in mixtures:
                real, synthetic = (draws_of(source, augment) for source in plan.learned_from(case, arm))
                mixtures[key] = Mixture(real, synthetic, plan.config.ratio)
            begun.add(pool.submit(train_some, mixtures[key], jobs))
        mixtures.clear()
        try:
            for future in as_completed(begun):
                begun.discard(future)
                for each in future.result():
                    todo.finished(*each)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def read_counts(plan: StudyPlan) -> dict[tuple[float, Arm], np.ndarray]:
    """Of each fraction and arm `class_counts` of each test image, int [draws, seeds, images, K, 3]."""
    found = {}
    for fraction in plan.config.some:
        cases = [case for case in plan.rows if case.fraction == fraction]
        for arm in plan.arms(cases[0]):
            found[fraction, arm] = np.stack([
                [np.load(plan.segmenter(case, arm, seed)[1] / COUNTS) for seed in range(plan.config.seeds or 1)]
                for case in cases
            ])  # fmt: skip
    return found


def synthetic_figures(plan: StudyPlan, case: Portion) -> dict:
    """Of a case how many images were generated and kept, by the filter's segmenter the mean mIoU of the latter, and
    the classes of which it dropped most."""
    out = Path(plan.synthetic(case).output_dir)
    records = list(records_of(out))
    kept = [record for record in records if record["kept"]]
    miou = round(float(np.mean([record["miou"] for record in kept])), 4)
    lost = mostly_dropped(out, records, plan.test.palette)
    return {"generated": len(records), "kept": len(kept), "miou": miou, "mostly_dropped": lost}
