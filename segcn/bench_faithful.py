"""How long a training takes until what it paints obeys masks: both sides' checkpoints, scored after the run."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from segcn import checkpoint, models
from segcn.arguments import make
from segcn.bench_plan import BenchTrainConfig, Book, command
from segcn.config import WEIGHTS, SampleConfig
from segcn.devices import pick_device
from segcn.errors import UserError
from segcn.judge import PAINTED_AT_ONCE, held_out_rows, open_judge, paint, score
from segcn.pipeline import Painter
from segcn.records import find_splits, read_split
from segcn.train_config import TrainConfig

SHARE = 0.5  # of the ceiling, which has to be reached


def bench_faithful(config: BenchTrainConfig, book: Book) -> list[dict]:
    """An entry for the peer at each learning rate and for ours: at which checkpoint it obeyed, and when that stood.

    The time runs from the start of the process, cache building included, to the checkpoint's weights on disk. Scoring
    is not counted. It stops at the first checkpoint that obeys.
    """
    if "test" not in find_splits(config.dataset):
        raise UserError(f"--until_faithful: {config.dataset_name} has no test/ with masks that are held out")
    entries = [train_contender(config, book, *contender) for contender in contenders(config)]
    scorer = None
    for entry in entries:
        if "reached" not in entry:
            scorer = scorer or Scorer(config, book.log)
            scorer.score(entry, partial(book.add, entry))
            shutil.rmtree(entry["where"])
    return entries


def contenders(config: BenchTrainConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """(title, side, words) of each run; the peer gets our share of empty captions too, as guidance needs them."""
    ours = ("--preset", config.preset, "--checkpoints_total_limit", str(config.faithful_steps))
    found: list[tuple[str, str, tuple[str, ...]]] = [("segcn at its defaults", "ours", ours)]
    if not config.peer:
        return [("segcn --cache none at its defaults", "peer", ours), *found]
    empty = str(make(TrainConfig, config.preset).proportion_empty_prompts)
    for rate in reversed(config.peer_learning_rates):
        words = ("--learning_rate", str(rate), "--proportion_empty_prompts", empty)
        found.insert(0, (f"diffusers at {rate:g}", "peer", words))
    return found


def train_contender(config: BenchTrainConfig, book: Book, title: str, side: str, words: tuple[str, ...]) -> dict:
    """The entry of a finished run, from the book or run now; its checkpoints wait to be scored."""
    where = config.folder / "runs" / f"faithful-{title.replace(' ', '_')}"
    line = command(config, side, where, config.faithful_steps, config.checkpointing_steps, words)
    scored = {"rows": config.faithfulness_rows, "share": SHARE}
    entry = book.find(line)
    if entry is None or entry["scored"] != scored or ("reached" not in entry and not where.is_dir()):
        entry, timed = book.run(line, where, config.faithful_steps, title)
        stood = {str(step): weights.stat().st_mtime - timed.began for step, weights in saved(where).items()}
        entry |= {"title": title, "side": side, "where": str(where), "scored": scored}
        entry |= {"stood": stood, "peak_gib": timed.peak_gib()}
        book.add(entry)
    return entry


def saved(where: Path) -> dict[int, Path]:
    """The ControlNet's weights in each checkpoint of a run by step; both sides lay them out alike."""
    return {step: folder / "controlnet" / WEIGHTS for step, folder in checkpoint.steps(where / "out").items()}


class Scorer:
    """The judge of segcn's own validation and the base: what scores the checkpoints of both sides."""

    def __init__(self, config: BenchTrainConfig, log: Callable[[str], None]):
        self.log, self.device = log, pick_device()
        shared = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path, "seed": config.seed}
        self.settings = make(SampleConfig, config.preset, **shared)
        training = make(
            TrainConfig, config.preset, **shared, dataset_name=config.dataset_name, resolution=config.resolution,
            faithfulness_rows=config.faithfulness_rows,
        )  # fmt: skip
        split = read_split(config.dataset, "train")
        held_out = held_out_rows(training, split)
        assert held_out is not None
        self.judge = open_judge(training, held_out, split, config.folder, self.device, log)
        self.ceiling = self.judge.ceiling["miou"]
        self.base = models.load_base(config.pretrained_model_name_or_path, self.device)

    def score(self, entry: dict, keep: Callable[[], None]) -> None:
        """Paint from each checkpoint in turn until one obeys; `keep` is called when it is known which."""
        entry |= {"ceiling": self.ceiling, "scores": {}}
        reached = None
        for step, weights in saved(Path(entry["where"])).items():
            miou = self.faithfulness_of(weights.parent)
            entry["scores"][str(step)] = miou
            self.log(f"{entry['title']}, step {step}: mIoU {miou:.3f}, of the ceiling {self.ceiling:.3f}")
            if miou >= SHARE * self.ceiling:
                reached = step
                break
        entry["reached"] = reached
        keep()

    def faithfulness_of(self, folder: Path) -> float:
        """mIoU of the held-out masks, painted with this ControlNet."""
        controlnet = models.load_controlnet(folder, self.device).eval()
        painter = Painter(self.base, controlnet, self.judge.rows.palette, str(folder))
        return score(self.judge, paint(self.judge, painter, self.settings, PAINTED_AT_ONCE, lambda *_: False))["miou"]


def faithful_lines(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line a run, and ours against the quickest of the peer's."""
    ceiling = entries[0]["ceiling"]
    lines = [
        f"Until {config.faithfulness_rows} held-out masks are obeyed (mIoU {SHARE * ceiling:.3f}, half of what real "
        f"images reach), start-up and cache building included, looked at every {config.checkpointing_steps} steps:"
    ]
    lines += [f"  {entry['title']:36} {told(config, entry)}" for entry in entries]
    peers, ours = ([seconds(entry) for entry in entries if entry["side"] == side] for side in ("peer", "ours"))
    if min(ours) < float("inf") and min(peers) < float("inf"):
        lines.append(f"  the quickest of the others / segcn: {min(peers) / min(ours):.2f}x the time")
    return lines


def seconds(entry: dict) -> float:
    """Until its masks were obeyed; infinity where they never were."""
    return entry["stood"][str(entry["reached"])] if entry["reached"] else float("inf")


def told(config: BenchTrainConfig, entry: dict) -> str:
    """When a run began to obey, or how far it came."""
    best = max(entry["scores"].values())
    if entry["reached"]:
        return f"{seconds(entry):7.0f} s, step {entry['reached']} (mIoU {best:.3f})"
    return f"not within {config.faithful_steps} steps (best mIoU {best:.3f})"
