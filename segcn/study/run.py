"""`segcn evaluate utility`: train segmenters on real and synthetic images, and test them all on held-out real ones."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

from segcn.data.metadata import METADATA, check_split, read_split
from segcn.generate.conditions import read_conditions
from segcn.generate.config import GenerateConfig
from segcn.generate.writer import generate_dataset
from segcn.models.base import one_core, pick_device
from segcn.models.segmenter import write_segmenter
from segcn.study.config import UtilityConfig
from segcn.study.plan import Arm, StudyPlan, arms, check_study, drawn_rows, stage_rows
from segcn.study.report import metrics_of, write_report
from segcn.study.training import Mixture, count_pixels, train_mixed
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


def evaluate_utility(config: UtilityConfig, log: Log = print) -> dict:
    """The whole study; writes rows.json, metrics.json, utility.md and utility.png, and returns the metrics.

    Every ControlNet, set of images and segmenter has a folder of its own and is made once: rerun the same command to
    resume, with the same metrics in the end. UserError for impossible settings, before anything is trained.
    """
    plan = open_plan(config, log)
    todo = StudyProgress(plan, log)
    log(f"{todo.total} stages, about {clock(todo.left)} on two slow cores; {config.folder}")
    train_segmenters(plan, todo, [(Arm(fraction, 0.0), range(1)) for fraction in config.some])  # the images' filters
    for fraction in config.some:
        controlnet, synthetic = plan.controlnet(fraction), plan.synthetic(fraction)
        if not is_finished(controlnet):
            train(controlnet)
            todo.finished(plan.seconds("controlnet", fraction), f"ControlNet {Path(controlnet.output_dir).name}")
        if not is_finished(synthetic):
            generate_dataset(synthetic, log=log)
            todo.finished(plan.seconds("synthetic"), f"images {Path(synthetic.output_dir).name}")
    train_segmenters(plan, todo, [(arm, range(config.seeds)) for arm in arms(config)])
    counts, falls = {}, []
    for arm in arms(config):
        folders = [plan.segmenter(arm, seed)[1] for seed in range(config.seeds)]
        counts[arm] = np.stack([np.load(folder / COUNTS) for folder in folders])
        falls.append(np.mean([json.loads((folder / "config.json").read_text())["last_fall"] for folder in folders]))
    metrics = metrics_of(config, plan.rows, synthetic_figures(plan), counts)
    metrics["last_fall"] = round(float(max(falls)), 4)
    write_report(metrics, config.folder)
    return metrics


def open_plan(config: UtilityConfig, log: Log) -> StudyPlan:
    """Check the settings and both splits, and set the rows of each fraction apart."""
    check_study(config)
    train_rows, test = read_split(config.dataset_name, "train"), read_split(config.dataset_name, "test")
    if test.palette.fingerprint != train_rows.palette.fingerprint:
        raise UserError(f"{config.dataset_name}: expected one palette, found another one in {test.folder}")
    for split in (train_rows, test):
        check_split(split, log)
    chosen = {fraction: drawn_rows(train_rows, fraction, config.seed) for fraction in config.some}
    named = {f"{fraction:g}": [train_rows[row].image_name for row in rows] for fraction, rows in chosen.items()}
    config.folder.mkdir(parents=True, exist_ok=True)
    write_text(config.folder / "rows.json", json.dumps(named, indent=1) + "\n")
    write_text(config.folder / "utility_config.json", to_json(config))
    staged = {}
    for fraction, rows in chosen.items():
        folder = config.folder / "rows" / f"{fraction:g}-{train_rows.fingerprint[:6]}-{config.seed}"
        staged[fraction] = stage_rows(train_rows, rows, folder)
    plan = StudyPlan(config, staged, test)
    for fraction in config.some:  # what generation refuses is refused before anything is trained
        read_conditions(plan.synthetic(fraction))
    return plan


class StudyProgress:
    """How far a study is, and how long the rest may take at the pace so far."""

    def __init__(self, plan: StudyPlan, log: Log):
        self.log, self.began, self.done, self.expected = log, time.monotonic(), 0, 0.0
        stages = []
        for fraction in plan.config.some:
            if not is_finished(plan.controlnet(fraction)):
                stages.append(plan.seconds("controlnet", fraction))
            if not is_finished(plan.synthetic(fraction)):
                stages.append(plan.seconds("synthetic"))
        for arm in arms(plan.config):
            missing = [seed for seed in range(plan.config.seeds) if io.problem(plan.segmenter(arm, seed)[1])]
            stages += [plan.seconds("segmenter")] * len(missing)
        self.total, self.left = len(stages), sum(stages)

    def finished(self, seconds: float, what: str) -> None:
        """Log what was done; seconds: what it was expected to take."""
        self.done, self.expected, self.left = self.done + 1, self.expected + seconds, self.left - seconds
        gone = time.monotonic() - self.began
        left = clock(self.left * gone / self.expected)
        self.log(f"[{self.done}/{self.total}] {what}; {clock(gone)} gone, about {left} left")


def is_finished(stage: TrainConfig | GenerateConfig) -> bool:
    """Whether a ControlNet, or a set of images, has the file that is written last."""
    last = (WEIGHTS,) if isinstance(stage, TrainConfig) else METADATA
    return any((Path(stage.output_dir) / name).is_file() for name in last)


def train_segmenters(plan: StudyPlan, todo: StudyProgress, wanted: list[tuple[Arm, range]]) -> None:
    """Train the missing segmenters of arms and seeds, on a CPU one on each core, to the same bytes.

    Those of an arm share a mixture, whose images leave the memory with the last of them.
    """
    stop = threading.Event()

    def check_stop(line: str) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    def train_one(mixture: Mixture, arm: Arm, seed: int) -> str:
        settings, folder = plan.segmenter(arm, seed)
        segmenter = train_mixed(mixture, settings, check_stop)
        counts = count_pixels(segmenter, plan.test)

        def write(staged: Path) -> None:
            write_segmenter(segmenter, plan.test.palette, staged)
            np.save(staged / COUNTS, counts)

        io.commit(folder.parent, folder.name, write)
        return folder.name

    with one_core() as cores, ThreadPoolExecutor(
        cores if pick_device() == "cpu" else 1, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:  # fmt: skip
        begun = set()
        for arm, seeds in wanted:
            missing = [seed for seed in seeds if io.problem(plan.segmenter(arm, seed)[1])]
            if missing:
                real = None if arm.ratio is None else plan.rows[arm.fraction]
                synthetic = None if arm.ratio == 0 else read_split(plan.synthetic(arm.fraction).output_dir)
                mixture = Mixture(real, synthetic, arm.share, *plan.config.mixing)
                begun |= {pool.submit(train_one, mixture, arm, seed) for seed in missing}
        try:
            for future in as_completed(begun):
                begun.discard(future)
                todo.finished(plan.seconds("segmenter"), f"segmenter {future.result()}")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def synthetic_figures(plan: StudyPlan) -> dict[float, dict]:
    """Of each fraction how many images were generated and kept, and which share of their pixels does not count."""
    found = {}
    for fraction in plan.config.some:
        manifest = Path(plan.synthetic(fraction).output_dir) / "manifest.jsonl"
        records = [json.loads(line) for line in manifest.read_text().splitlines()]
        kept = [record for record in records if record["kept"]]
        means = {name: round(float(np.mean([record[name] for record in kept])), 4) for name in ("miou", "ignored")}
        found[fraction] = {"generated": len(records), "kept": len(kept)} | means
    return found
