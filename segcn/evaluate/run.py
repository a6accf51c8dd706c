"""`segcn evaluate`: read the data sets, open or train the segmenter, evaluate, and write metrics and report."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from segcn.data.files import read_image
from segcn.data.metadata import Split, find_splits, hold_out, read_named_split, read_split
from segcn.evaluate.config import EvaluateConfig
from segcn.evaluate.evaluator import (
    METRICS_FILE,
    PARTS_OF,
    REWARD_LOOKS_AT,
    Evaluation,
    Log,
    Observer,
    evaluate,
    rewarding_observer,
)
from segcn.evaluate.page import write_evaluation_report
from segcn.evaluate.provenance import RECAPTIONED, generation_of
from segcn.models.base import weights_digest
from segcn.models.features import Reader, backbone_extractor, clip_extractor, clip_reader, open_extractor
from segcn.models.segmenter import AnySegmenter, SegmenterConfig, open_segmenter, segmenter_of
from segcn.utils.errors import UserError
from segcn.utils.io import Process, one_at_a_time, this_process
from segcn.utils.paths import RUN_FILE

CaptionReader = Callable[[Path, Split, Path, Log], Reader | None]
CHANGE_NO_NUMBER = ("output_dir", "cache_dir", "batch_size", "allow_symlinks")


def evaluate_folders(
    config: EvaluateConfig, caption_reader: CaptionReader | None = None, log: Log = print
) -> Evaluation | None:
    """Evaluate, and write metrics.json, the bootstrap's draws and report.html; None in all processes but the first.

    caption_reader: opens what reads captions off images where a data set has one. Rerun after an interruption, it uses
    what was computed of each image. UserError where the folder holds the evaluation of another set.
    """
    if not (config.real and config.synthetic):
        raise UserError("segcn evaluate needs --real DATASET and --synthetic DATASET")
    process = this_process()
    if process.rank:
        log = lambda line: None  # noqa: E731
    splits = read_splits(config)
    folder = Path(config.output_dir) if config.output_dir else splits["synthetic"].folder.absolute().parent
    refuse_another(folder, splits["synthetic"])
    cache = Path(config.cache_dir) if config.cache_dir else folder / "cache"
    if process.world > 1:
        torch.set_num_threads(os.cpu_count() or 1)  # torchrun sets 1: what is trained depends on it
    with one_at_a_time(cache / ".networks.lock"):  # one process trains what the others then load
        segmenter = independent_segmenter(config, splits, cache, log)
        extractor = open_extractor(segmenter, config.inception_weights)
        others = (*([backbone_extractor(config.features)] if config.features else []),
                  *([clip_extractor(config.clip)] if config.clip else []))  # fmt: skip
        readers = open_readers(config.clip, Path(config.real), splits.get("train"), cache, caption_reader, log)
    observer = Observer(segmenter, extractor, readers, cache, config.batch_size, others=others)
    if process.world > 1:
        _share(observer, splits, process, log)
        if process.rank:
            return None
    floor, reconstructions, train, without_classes, other_captions = (
        splits.get(name) for name in ("floor", "reconstructions", "train", *RECAPTIONED)
    )
    evaluation = evaluate(
        splits["real"], splits["synthetic"], observer, floor, reconstructions, train, log=log,
        without_classes=without_classes, other_captions=other_captions,
    )  # fmt: skip
    evaluation.metrics["warnings"] += trained_on_held_out(config, splits)
    kept = {name: value for name, value in asdict(config).items() if name not in CHANGE_NO_NUMBER}
    evaluation.metrics["settings"] |= kept
    log(f"Wrote {evaluation.write(folder)}.")
    log(f"Wrote {write_evaluation_report(evaluation, folder)}.")
    return evaluation


def trained_on_held_out(config: EvaluateConfig, splits: dict[str, Split]) -> list[str]:
    """A warning where the ControlNet of the generated set was trained on rows that count as held out here."""
    if "test" in find_splits(config.real) or "train" not in splits:
        return []
    try:
        made = generation_of(splits["synthetic"])
        trained = json.loads((Path(made["controlnet"]) / RUN_FILE).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return []
    kept, used = len(splits["train"]), trained.get("max_train_samples")
    if Path(trained["dataset_name"]).absolute() != Path(config.real).absolute() or (used is not None and used <= kept):
        return []
    return [
        f"{config.real} has no test/, so its last {len(splits['real'])} rows count as held out; but the ControlNet was "
        f"trained on them, too: the scores flatter it. Move rows to test/, or train with --max_train_samples {kept}."
    ]


def _share(observer: Observer, splits: dict[str, Split], process: Process, log: Log) -> None:
    """Each process looks at its share of the images and leaves its findings in the cache, for the first one."""
    from accelerate import PartialState

    part = replace(observer, process=process)
    for name, split in splits.items():
        part.observe(split, PARTS_OF[name], log)
    if rewarding := rewarding_observer(splits["synthetic"], part):
        for name in REWARD_LOOKS_AT:
            rewarding.observe(splits[name], ("faithfulness",), log)
    PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def read_splits(config: EvaluateConfig) -> dict[str, Split]:
    """Every set that is there, by the name of its argument of `evaluate`."""
    train = None
    if "test" in find_splits(config.real) or not config.segmenter:
        train, held_out = hold_out(config.real)
        real = read_named_split(config.real, held_out)
    else:
        real = read_split(config.real)
    splits = {"real": real, "synthetic": read_split(config.synthetic)}
    for name in ("floor", "reconstructions", *RECAPTIONED):
        if getattr(config, name) is not None:
            splits[name] = read_split(getattr(config, name))
    if train and (train != "train" or "train" in find_splits(config.real)):
        splits["train"] = read_named_split(config.real, train)
    return splits


def refuse_another(folder: Path, synthetic: Split) -> None:
    """UserError where a folder holds the evaluation of other images, so that no result is replaced by mistake."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text())["sets"]["synthetic"]
        measured, same = known["folder"], known["fingerprint"] == synthetic.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        measured, same = "something else", False
    if not same and measured != str(synthetic.folder):
        raise UserError(
            f"{path} is the evaluation of {measured}, not of {synthetic.folder}: choose another --output_dir, or move"
            " it away"
        )


def open_readers(
    clip: str | None, dataset: Path, train: Split | None, cache: Path, caption_reader: CaptionReader | None, log: Log
) -> tuple[Reader, ...]:
    """What reads captions: CLIP where a folder is given, and `caption_reader` where it knows the data set."""
    own = caption_reader(dataset, train, cache, log) if caption_reader and train else None
    return (*([clip_reader(clip)] if clip else []), *([own] if own else []))


def independent_segmenter(config: EvaluateConfig, splits: dict[str, Split], cache: Path, log: Log) -> AnySegmenter:
    """The segmenter that scores: neither the one that filtered these images nor the one that rewarded the training.

    In place of such a one, one is trained on real rows, with the next seed where it would be the same again.
    """
    made, segmenter = generation_of(splits["synthetic"]), _segmenter(config, splits, cache, log)
    uses = {"segmenter_weights": "filtered these images", "reward_segmenter_weights": "rewarded the training"}
    used = {made[name]: use for name, use in uses.items() if made.get(name)}
    while (digest := weights_digest(segmenter)) in used:
        named, seed = config.segmenter is not None, config.seed + (config.segmenter is None)
        flag = f"--segmenter {config.segmenter}" if named else f"the segmenter of --seed {config.seed}"
        log(f"{flag} {used[digest]}: one that is trained on real rows with seed {seed} scores them.")
        config = replace(config, segmenter=None, seed=seed)
        segmenter = _segmenter(config, splits, cache, log)
    return segmenter


def _segmenter(config: EvaluateConfig, splits: dict[str, Split], cache: Path, log: Log) -> AnySegmenter:
    """The segmenter that is given, or one trained on real rows at the resolution of the generated images."""
    shape = read_image(splits["synthetic"][0].image).shape[:2]
    generated = max(shape) if config.fit == "pad" else min(shape)  # what was padded was cut off again
    made = generation_of(splits["synthetic"])
    resolution = config.resolution or (made["resolution"] if made.get("buckets") else generated)
    if config.segmenter:
        return open_segmenter(config.segmenter, splits["real"].palette, resolution, config.fit)
    if "train" not in splits:
        raise UserError(
            f"--real {config.real} has no train/ beside test/: the segmenter must not be trained on the images that it"
            " is tested on. Split the data set, or give a trained segmenter by --segmenter."
        )
    settings = SegmenterConfig(
        resolution=resolution, seed=config.seed, fit=config.fit, architecture=config.segmenter_architecture
    )
    return segmenter_of(splits["train"], settings, cache, log)
