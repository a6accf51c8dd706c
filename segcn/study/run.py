"""`segcn evaluate utility`: train segmenters on real and synthetic images, and test them all on held-out real ones."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from segcn.data.metadata import METADATA, Split, check_split, read_split
from segcn.generate.conditions import read_controls, read_prompts
from segcn.generate.writer import generate_dataset
from segcn.models.base import one_core, pick_device
from segcn.models.segmenter import write_segmenter
from segcn.study.config import UtilityConfig
from segcn.study.plan import (
    Arm,
    arms,
    check,
    controlnet_config,
    drawn_rows,
    estimate,
    generation_config,
    key_of,
    segmenter_config,
    stage_rows,
)
from segcn.study.report import metrics_of, write_report
from segcn.study.training import Mixture, found_in, train_mixed
from segcn.train.loop import train
from segcn.utils import io
from segcn.utils.args import to_json
from segcn.utils.errors import UserError
from segcn.utils.io import write_text
from segcn.utils.paths import WEIGHTS
from segcn.utils.progress import clock

COUNTS = "found_in_test.npy"  # of a finished segmenter


@dataclass
class Study:
    """What is at hand while a study runs."""

    config: UtilityConfig
    rows: dict[float, Split]  # of each fraction, in a folder of their own
    test: Split
    log: Callable[[str], None]
    clock: "Clock" = field(init=False)

    def __post_init__(self):
        self.clock = Clock(list(self.units()), self.log)

    def units(self) -> Iterator[tuple[str, float]]:
        """Kind and seconds of every piece of work that is still to do."""
        for fraction in self.config.some:
            if not finished_controlnet(self.controlnet(fraction)):
                yield "controlnet", self.training_time(fraction)
            if not finished_images(self.synthetic(fraction)):
                yield "synthetic", estimate(self.config, "synthetic")
        for arm in arms(self.config):
            for seed in range(self.config.seeds):
                if io.problem(self.segmenter(arm, seed)):
                    yield "segmenter", estimate(self.config, "segmenter")

    def smaller(self, fraction: float) -> Path | None:
        """The ControlNet of the next smaller fraction, whose rows this one holds."""
        place = self.config.some.index(fraction)
        return self.controlnet(self.config.some[place - 1]) if place else None

    def training_time(self, fraction: float) -> float:
        """Seconds, as estimated, of the ControlNet of a fraction."""
        return estimate(self.config, "larger controlnet" if self.smaller(fraction) else "controlnet")

    def controlnet(self, fraction: float) -> Path:
        smaller = self.smaller(fraction)
        more = (smaller.name, self.config.controlnet_more_steps) if smaller else ()
        key = key_of(self.config, self.rows[fraction], "controlnet", *more)
        return self._folder("controlnets", f"{fraction:g}", key)

    def synthetic(self, fraction: float) -> Path:
        """Its name depends on the ControlNet and on the segmenter that vets, too."""
        parents = self.controlnet(fraction).name, self.segmenter(Arm(fraction, 0.0), 0).name
        return self._folder("images", f"{fraction:g}", key_of(self.config, self.rows[fraction], "synthetic", *parents))

    def segmenter(self, arm: Arm, seed: int) -> Path:
        mixed = () if arm.ratio == 0 else (self.synthetic(arm.fraction).name, *self.config.mixing)
        more = (arm.ratio, seed, self.test.fingerprint, *mixed)
        key = key_of(self.config, self.rows[arm.fraction], "segmenter", *more)
        return self._folder("segmenters", f"{arm.fraction:g}-{arm.name}-{seed}", key)

    def _folder(self, kind: str, name: str, key: str) -> Path:
        return self.config.folder / kind / f"{name}-{key}"


class Clock:
    """How far a study is, and how long the rest may take at the pace so far."""

    def __init__(self, units: list[tuple[str, float]], log: Callable[[str], None]):
        self.left, self.log = sum(seconds for _, seconds in units), log
        self.total, self.done, self.began, self.expected = len(units), 0, time.monotonic(), 0.0

    def finished(self, seconds: float, what: str) -> None:
        """Say what was done; seconds: what it was expected to take."""
        self.done, self.expected, self.left = self.done + 1, self.expected + seconds, self.left - seconds
        gone = time.monotonic() - self.began
        left = self.left * gone / self.expected
        self.log(f"[{self.done}/{self.total}] {what}; {clock(gone)} gone, about {clock(left)} left")


def evaluate_utility(config: UtilityConfig, log: Callable[[str], None] = print) -> dict:
    """The whole study; writes rows.json, metrics.json, utility.md and utility.png, and returns the metrics.

    Every ControlNet, set of images and segmenter stands in a folder of its own and is made once: killed anywhere, the
    same command goes on and ends with the same metrics. UserError for what cannot be, before anything is trained.
    """
    study = open_study(config, log)
    log(f"{study.clock.total} pieces of work, about {clock(study.clock.left)} on two slow cores; {config.folder}")
    learn(study, [(Arm(fraction, 0.0), range(1)) for fraction in config.some])  # they vet the images
    for fraction in config.some:
        train_controlnet(study, fraction)
    learn(study, [(arm, range(config.seeds)) for arm in arms(config)])
    counts = {arm: counts_of(study, arm) for arm in arms(config)}
    metrics = metrics_of(config, study.rows, images_made(study), counts) | {"last_fall": largest_fall(study)}
    write_report(metrics, config.folder)
    return metrics


def open_study(config: UtilityConfig, log: Callable[[str], None]) -> Study:
    """Check the settings and both splits, and set the rows of each fraction apart."""
    check(config)
    train_rows, test = read_split(config.dataset_name, "train"), read_split(config.dataset_name, "test")
    if test.palette.fingerprint != train_rows.palette.fingerprint:
        raise UserError(f"{config.dataset_name}: expected one palette, found another one in {test.folder}")
    for split in (train_rows, test):
        check_split(split, log)
    chosen = {fraction: drawn_rows(train_rows, fraction, config.seed) for fraction in config.some}
    config.folder.mkdir(parents=True, exist_ok=True)
    places = {fraction: config.folder / "rows" / f"{fraction:g}-{train_rows.fingerprint[:6]}-{config.seed}"
              for fraction in config.some}  # fmt: skip
    named = {f"{fraction:g}": [train_rows[row].image_name for row in rows] for fraction, rows in chosen.items()}
    write_text(config.folder / "rows.json", json.dumps(named, indent=1) + "\n")
    write_text(config.folder / "utility_config.json", to_json(config))
    rows = {fraction: stage_rows(train_rows, chosen[fraction], places[fraction]) for fraction in config.some}
    for split in rows.values():
        settings = generation_config(config, split, Path(), Path(), Path())
        read_prompts(settings, read_controls(settings))  # so that what it refuses is refused before anything is trained
    return Study(config, rows, test, log)


def learn(study: Study, wanted: list[tuple[Arm, range]]) -> None:
    """Train the segmenters of arms and seeds that do not stand yet, on a CPU one on each core, to the same bytes."""
    stop = threading.Event()

    def go_on(line: str) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    with one_core() as cores, ThreadPoolExecutor(
        cores if pick_device() == "cpu" else 1, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:  # fmt: skip
        begun: dict[Future, tuple[Arm, int]] = {}
        for arm, some in wanted:
            begun |= begin(study, pool, arm, some, go_on)
        try:
            for future in as_completed(begun):
                future.result()
                told = study.segmenter(*begun.pop(future)).name
                study.clock.finished(estimate(study.config, "segmenter"), f"segmenter {told}")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def begin(
    study: Study, pool: ThreadPoolExecutor, arm: Arm, some: range, log: Callable[[str], None]
) -> dict[Future, tuple[Arm, int]]:
    """Hand the segmenters of an arm that do not stand yet to the pool.

    They share a mixture, whose images leave the memory with the last of them.
    """
    missing = [seed for seed in some if io.problem(study.segmenter(arm, seed))]
    if not missing:
        return {}
    mixture = mixture_of(study, arm)
    return {pool.submit(learn_one, study, mixture, arm, seed, log): (arm, seed) for seed in missing}


def mixture_of(study: Study, arm: Arm) -> Mixture:
    """What an arm learns from."""
    real = None if arm.ratio is None else study.rows[arm.fraction]
    synthetic = None if arm.ratio == 0 else read_split(study.synthetic(arm.fraction))
    return Mixture(real, synthetic, arm.share, *study.config.mixing)


def learn_one(study: Study, mixture: Mixture, arm: Arm, seed: int, log: Callable[[str], None]) -> None:
    """Train a segmenter, and count what it finds in the test images."""
    segmenter, folder = train_mixed(mixture, segmenter_config(study.config, seed), log), study.segmenter(arm, seed)
    counts = found_in(segmenter, study.test)

    def write(staged: Path) -> None:
        write_segmenter(segmenter, study.test.palette, staged)
        np.save(staged / COUNTS, counts)

    io.commit(folder.parent, folder.name, write)


def train_controlnet(study: Study, fraction: float) -> None:
    """The ControlNet of a fraction, and the images that it paints, vetted by the first segmenter of the fraction."""
    config, rows, where = study.config, study.rows[fraction], study.controlnet(fraction)
    if not finished_controlnet(where):
        train(controlnet_config(config, rows, study.smaller(fraction), where))
        study.clock.finished(study.training_time(fraction), f"ControlNet {where.name}")
    images = study.synthetic(fraction)
    if not finished_images(images):
        vetter = study.segmenter(Arm(fraction, 0.0), 0)
        generate_dataset(generation_config(config, rows, where, vetter, images), log=study.log)
        study.clock.finished(estimate(config, "synthetic"), f"images {images.name}")


def finished_controlnet(folder: Path) -> bool:
    """Whether its training came to the end."""
    return (folder / WEIGHTS).is_file()


def finished_images(folder: Path) -> bool:
    """Whether every image was painted."""
    return any((folder / name).is_file() for name in METADATA)  # written last


def images_made(study: Study) -> dict[float, dict]:
    """Of each fraction how many images were painted and kept, and which share of their pixels does not count."""
    made = {}
    for fraction in study.config.some:
        folder = study.synthetic(fraction)
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        kept = [line for line in lines if line["kept"]]
        made[fraction] = {
            "painted": len(lines), "kept": len(kept),
            "miou": round(float(np.mean([line["miou"] for line in kept])), 4),
            "ignored": round(float(np.mean([line["ignored"] for line in kept])), 4),
        }  # fmt: skip
    return made


def largest_fall(study: Study) -> float:
    """By which share the loss still fell in the last tenth of the steps, on average: of the arm where it was most."""
    told = [
        [json.loads((study.segmenter(arm, seed) / "config.json").read_text())["last_fall"]
         for seed in range(study.config.seeds)]
        for arm in arms(study.config)
    ]  # fmt: skip
    return round(float(np.mean(told, 1).max()), 4)


def counts_of(study: Study, arm: Arm) -> np.ndarray:
    """int64 [seeds, images, 3, K]: what the segmenters of an arm found in the test images."""
    return np.stack([np.load(study.segmenter(arm, seed) / COUNTS) for seed in range(study.config.seeds)])
