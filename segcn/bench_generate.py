"""Our painting against one call of diffusers' pipeline an image: pace, faithfulness, distance, colour and memory."""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from segcn.atomic import write_text
from segcn.bench_peaks import peaks
from segcn.bench_plan import machine
from segcn.bench_scores import Scores, distance_interval, excess_interval, score
from segcn.bench_sides import Masks, Side, read_masks, take_turns, variant
from segcn.bench_verdicts import remarks, table, verdicts
from segcn.config import OUTPUTS, GenerateConfig, SampleConfig, flag
from segcn.errors import UserError
from segcn.features import Extractor, open_extractor
from segcn.pipeline import Painter, load_painter
from segcn.records import Split, read_named_split, read_split
from segcn.sampling import check_sampling
from segcn.segmenter import Segmenter, SegmenterConfig, load_segmenter, shared_folder, train_segmenter
from segcn.workspace import held_out_landscapes, sample_landscapes

SHARED = ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "palette", "resolution", "fit",
          "negative_prompt", "seed", "mixed_precision")  # fmt: skip
HELD_OUT_ROWS = 1000  # landscapes at least
PLAIN_MEMORY_MASKS = 8  # it holds one image at a time
Log = Callable[[str], None]


@dataclass(frozen=True)
class BenchGenerateConfig(SampleConfig):
    """Paint the same masks with segcn and by one call of diffusers' pipeline an image, in turns, and score both."""

    dataset_name: str | None = flag(
        None, "data set: its train rows teach the judge, the rows of --split are painted; none: landscapes"
    )
    split: str = flag("test", "rows to paint; train[:64]: to choose settings on, since nothing is reported of these")
    output_dir: str = flag(
        str(OUTPUTS / "bench_generate"), "bench_generate.json and .txt, and what is painted; goes on there"
    )
    limit: int = flag(500, "rows to paint, at most")
    batch_size: int = flag(16, "pictures that segcn paints at once")
    rows_a_turn: int = flag(32, "rows that a side paints before the other one does")
    plain_guidance_scales: list[float] = field(
        default_factory=lambda: [1.5, 2.5, 7.5], metadata={"help": "guidance of the plain way; its best is compared"}
    )
    plain_steps: int = flag(20, "steps of the plain way, with UniPC")
    variants: list[str] = field(
        default_factory=list,
        metadata={"help": "several settings of segcn: num_inference_steps=8,guidance_end=0.6 guidance_scale=1 ..."},
    )
    without_plain: bool = flag(False, "compare only the variants")
    memory_masks: int = flag(
        1000, "masks that segcn generate paints to show its memory, a tenth of them first; 0: none"
    )
    segmenter: str | None = flag(None, "trained segmenter folder, the judge; none: trained on the train rows")
    inception_weights: str | None = flag(None, "weights-inception-2015-12-05-6726825d.pth, for a KID as published")

    @property
    def out(self) -> Path:
        return Path(self.output_dir).absolute()


def bench_generate(config: BenchGenerateConfig, log: Log = print) -> dict:
    """Paint what does not stand yet, score all of it, and write bench_generate.json and .txt; returns the figures."""
    check(config)
    train, real = rows_of(config)
    painter = load_painter(config, real.palette)
    masks = read_masks(real.first(config.limit), config)
    sides = sides_of(config, painter, masks.real)
    log(f"Painting {len(masks.ids)} masks of {real.folder} in {len(sides)} ways.")
    turns = take_turns(sides, masks, config.rows_a_turn, log)
    judge = open_judge(config, train, masks, log)
    extractor = open_extractor(judge, config.inception_weights)
    found = figures(sides, turns, masks, judge, extractor, log)
    if config.memory_masks:
        add_memory(config, found, sides, real, log)
    lines = [*table(found), "", *remarks(found), *verdicts(found)]
    write_text(config.out / "bench_generate.json", json.dumps(found, indent=1) + "\n")
    write_text(config.out / "bench_generate.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote bench_generate.json and .txt to {config.out}."]))
    return found


def check(config: BenchGenerateConfig) -> None:
    """UserError for what would fail only after hours."""
    for name, least in (("limit", 2), ("batch_size", 1), ("rows_a_turn", 1), ("plain_steps", 1), ("memory_masks", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name}: expected at least {least}, found {getattr(config, name)}")
    if not config.without_plain and (not config.plain_guidance_scales or min(config.plain_guidance_scales) <= 1):
        raise UserError(f"--plain_guidance_scales: expected some above 1, found {config.plain_guidance_scales}")
    for words in config.variants:
        check_sampling(variant(config, words))


def rows_of(config: BenchGenerateConfig) -> tuple[Split, Split]:
    """(rows that teach the judge, rows to paint)."""
    if config.dataset_name is None and config.split == "test":
        held_out = held_out_landscapes(max(HELD_OUT_ROWS, config.limit, config.memory_masks))
        return read_split(sample_landscapes(), "train"), read_split(held_out)
    data = config.dataset_name or sample_landscapes()
    return read_split(data, "train"), read_named_split(data, config.split)


def sides_of(config: BenchGenerateConfig, painter: Painter, real: Split) -> list[Side]:
    """The plain way at each of its guidance scales, then ours, once or once a variant."""
    own = SampleConfig(**{name.name: getattr(config, name.name) for name in fields(SampleConfig)})
    shared = {name: getattr(config, name) for name in SHARED}
    data = hashlib.sha256(real.metadata.read_bytes()).hexdigest()
    place = (painter, config.out / "sides", data)
    sides = []
    for scale in () if config.without_plain else config.plain_guidance_scales:
        plain = SampleConfig(**shared, scheduler="unipc", num_inference_steps=config.plain_steps, guidance_scale=scale)
        sides.append(Side(f"diffusers, guidance {scale:g}", plain, 0, *place))
    for words in config.variants or [""]:
        settings = variant(own, words) if words else own
        sides.append(Side(f"segcn {words}".strip(), settings, config.batch_size, *place))
    return sides


def open_judge(config: BenchGenerateConfig, train: Split, masks: Masks, log: Log) -> Segmenter:
    """The segmenter given, or one trained on the real train rows at the size of the masks."""
    if config.segmenter:
        return load_segmenter(config.segmenter)
    settings = SegmenterConfig(resolution=min(masks.ids.shape[1:]), seed=config.seed, fit=config.fit)
    return train_segmenter(train, settings, shared_folder(config.out / "cache", train, settings), log)


def figures(
    sides: list[Side], turns: list[str], masks: Masks, judge: Segmenter, extractor: Extractor, log: Log
) -> dict:
    """What is told of each side, and of ours against the plain way's best in each respect."""
    real = score(masks.real, masks.real, judge, extractor)
    scores = {}
    for side in sides:
        scores[side.title] = score(side.painted(), masks.real, judge, extractor)
        log(f"{side.title}: mIoU {scores[side.title].miou:.3f}")
    entries = {side.title: entry(side, turns, len(masks.ids), real, scores[side.title]) for side in sides}
    plain, ours = ([side.title for side in sides if side.plain is plain] for plain in (True, False))
    return {
        "images": len(masks.ids), "machine": machine(), "extractor": extractor.name, "ceiling": real.miou,
        "undisturbed": undisturbed(sides, turns), "sides": entries,
        "against": {title: against(title, plain, entries, scores, real) for title in ours} if plain else {},
    }  # fmt: skip


def entry(side: Side, turns: list[str], images: int, real: Scores, found: Scores) -> dict:
    """The numbers of a side."""
    taken = [side.turns[name] for name in turns]
    distance, interval = distance_interval(real.features, found.features)
    return {
        "plain": side.plain, "settings": dataclasses.asdict(side.settings), "batch_size": side.batch_size,
        "folder": str(side.out), "images_per_second": images / sum(turn["seconds"] for turn in taken),
        "images_per_cpu_second": images / sum(turn["cpu_seconds"] for turn in taken),
        "turns": [turn["seconds"] for turn in taken], "miou": found.miou,
        "kernel_distance": distance, "kernel_distance_interval": interval, "colour_shift": found.colour,
    }  # fmt: skip


def against(title: str, plain: list[str], entries: dict, scores: dict[str, Scores], real: Scores) -> dict:
    """Ours against the plain way's fastest, its most faithful and its closest: not one of these need be the same."""
    ours, theirs = entries[title], [entries[name] for name in plain]
    quickest = [min(seconds) for seconds in zip(*(entry["turns"] for entry in theirs), strict=True)]
    ratios = [other / own for other, own in zip(quickest, ours["turns"], strict=True)]
    closest = min(plain, key=lambda name: entries[name]["kernel_distance"])
    excess, interval = excess_interval(real.features, scores[title].features, scores[closest].features)
    return {
        "times_faster": statistics.median(ratios), "times_faster_range": [min(ratios), max(ratios)],
        "miou_less_best": ours["miou"] - max(entry["miou"] for entry in theirs),
        "kernel_distance_less_best": excess, "kernel_distance_less_best_interval": interval,
    }  # fmt: skip


def undisturbed(sides: list[Side], turns: list[str]) -> dict:
    """Whether the times can be compared: other programs' load, and the turns that all sides painted in one run."""
    taken = [[side.turns[name] for side in sides] for name in turns]
    load = max((turn["other_load"] or 0.0 for row in taken for turn in row), default=0.0)
    return {
        "other_load": load,
        "turns": len(turns),
        "together": sum(len({t["run"] for t in row}) == 1 for row in taken),
    }


def add_memory(config: BenchGenerateConfig, found: dict, sides: list[Side], real: Split, log: Log) -> None:
    """The peaks of our first side and of a plain one, in processes of their own."""
    count = min(config.memory_masks, len(real))
    for plain in (True, False):
        side = next((side for side in sides if side.plain is plain), None)
        if side is None:
            continue
        counts = (min(PLAIN_MEMORY_MASKS, count),) if plain else (max(1, count // 10), count)
        found["sides"][side.title]["peak_gib"] = memory_of(config, side, counts, real, log)


def memory_of(config: BenchGenerateConfig, side: Side, counts: tuple[int, ...], real: Split, log: Log) -> dict:
    """The peaks after so many masks, as they stand beside what the side painted, or measured now."""
    path = side.out / f"peak_gib-{counts[-1]}.json"
    if not path.is_file():
        log(f"Memory: {side.title} paints {counts[-1]} masks.")
        where = {"controls": str(real.metadata), "split": "train", "output_dir": str(config.out / "memory")}
        settings = dataclasses.asdict(side.settings) | where
        painting = GenerateConfig(**settings, batch_size=side.batch_size)
        write_text(path, json.dumps(peaks(painting, counts)) + "\n")
    return json.loads(path.read_text())
