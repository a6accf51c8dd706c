"""`segcn evaluate`: read the data sets, open or train what judges them, measure, and write metrics and report."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from segcn.data.metadata import Split, find_splits, read_image, read_named_split, read_split
from segcn.evaluate.config import EvaluateConfig
from segcn.evaluate.evaluator import METRICS, PARTS_OF, Evaluation, Observer, evaluate
from segcn.evaluate.report import write_report
from segcn.models.features import Reader, clip_reader, open_extractor
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, open_segmenter, shared_folder, train_segmenter
from segcn.utils.errors import UserError

Log = Callable[[str], None]
CaptionReader = Callable[[Path, Split, Path, Log], Reader | None]
CHANGE_NO_NUMBER = ("output_dir", "cache_dir", "batch_size", "allow_symlinks")


def evaluate_folders(
    config: EvaluateConfig, caption_reader: CaptionReader | None = None, log: Log = print
) -> Evaluation | None:
    """Measure, and write metrics.json, the bootstrap's draws and report.html; None in all processes but the first.

    caption_reader: opens what reads captions off images where a data set has one. The same command goes on where it was
    killed: what was seen of each image is kept. UserError where the folder holds the evaluation of another set.
    """
    if not (config.real and config.synthetic):
        raise UserError("segcn evaluate needs --real DATASET and --synthetic DATASET")
    process, wait = processes()
    log = log if process[0] == 0 else lambda line: None
    splits = read_splits(config)
    folder = Path(config.output_dir) if config.output_dir else splits["synthetic"].folder.absolute().parent
    refuse_another(folder, splits["synthetic"])
    cache = Path(config.cache_dir) if config.cache_dir else folder / "cache"
    if process[0]:
        wait()  # the first process trains what the others then load
    elif process[1] > 1:
        torch.set_num_threads(os.cpu_count() or 1)  # as without torchrun: what is trained depends on it
    observer = open_observer(config, splits, cache, process, caption_reader, log)
    if process[1] > 1:
        if process[0] == 0:
            wait()
        for name, split in splits.items():
            observer.observe(split, PARTS_OF[name], log)
        wait()
    if process[0]:
        return None
    whole = Observer(observer.segmenter, observer.extractor, observer.readers, cache, config.batch_size)
    evaluation = evaluate(**splits, observer=whole, log=log)
    kept = {name: value for name, value in asdict(config).items() if name not in CHANGE_NO_NUMBER}
    evaluation.metrics["settings"] |= kept
    log(f"Wrote {evaluation.write(folder)}.")
    log(f"Wrote {write_report(evaluation, folder)}.")
    return evaluation


def processes() -> tuple[tuple[int, int], Callable[[], None]]:
    """(this process, of how many), and what waits for all of them, as torchrun and accelerate launch tell."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return (0, 1), lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return (state.process_index, state.num_processes), state.wait_for_everyone


def read_splits(config: EvaluateConfig) -> dict[str, Split]:
    """Every set that is there, by the name of its argument of `evaluate`."""
    splits = {"real": read_named_split(config.real, "test"), "synthetic": read_split(config.synthetic)}
    splits |= {
        name: read_split(folder)
        for name in ("floor", "reconstructions")
        if (folder := getattr(config, name)) is not None
    }
    if "train" in find_splits(config.real):
        train = read_split(config.real, "train")
        splits |= {"train": train} if train.metadata != splits["real"].metadata else {}
    return splits


def refuse_another(folder: Path, synthetic: Split) -> None:
    """UserError where a folder holds the evaluation of other images: nobody's result is replaced unasked."""
    path = folder / METRICS
    if not path.is_file():
        return
    try:
        measured = json.loads(path.read_text())["sets"]["synthetic"]["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        measured = "something else, or by an older version"
    if measured != str(synthetic.folder):
        raise UserError(
            f"{path} tells of {measured}, not of {synthetic.folder}: choose another --output_dir, or move it away"
        )


def open_observer(
    config: EvaluateConfig,
    splits: dict[str, Split],
    cache: Path,
    process: tuple[int, int] = (0, 1),
    caption_reader: CaptionReader | None = None,
    log: Log = print,
) -> Observer:
    """The segmenter that is given, or one trained on the real rows that are not tested on, and all else that looks."""
    segmenter = _segmenter(config, splits, cache, log)
    readers = open_readers(config.clip, Path(config.real), splits.get("train"), cache, caption_reader, log)
    extractor = open_extractor(segmenter, config.inception_weights)
    return Observer(segmenter, extractor, readers, cache, config.batch_size, process)


def open_readers(
    clip: str | None, dataset: Path, train: Split | None, cache: Path, caption_reader: CaptionReader | None, log: Log
) -> tuple[Reader, ...]:
    """What reads captions: CLIP where a folder is given, and `caption_reader` where it knows the data set."""
    own = caption_reader(dataset, train, cache, log) if caption_reader and train else None
    return (*([clip_reader(clip)] if clip else []), *([own] if own else []))


def _segmenter(config: EvaluateConfig, splits: dict[str, Split], cache: Path, log: Log) -> AnySegmenter:
    resolution = config.resolution or _side(splits["synthetic"], config.fit)
    if config.segmenter:
        return open_segmenter(config.segmenter, splits["real"].palette, resolution, config.fit)
    if "train" not in splits:
        raise UserError(
            f"--real {config.real} has no train/ and test/: the segmenter must not be trained on the images that it is "
            "tested on. Split the data set, or give a trained segmenter by --segmenter."
        )
    settings = SegmenterConfig(resolution=resolution, seed=config.seed, fit=config.fit)
    return train_segmenter(splits["train"], settings, shared_folder(cache, splits["train"], settings), log)


def _side(split: Split, fit: str) -> int:
    """Pixels a side of the square that was painted: what is padded was cut off again."""
    return (max if fit == "pad" else min)(read_image(split[0].image).shape[:2])
