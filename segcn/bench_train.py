"""Our training against a peer's in turns: samples per second and memory as ratios, then the time to obey masks."""

import dataclasses
import shutil
import statistics
from collections.abc import Callable, Iterator

from segcn.atomic import write_text
from segcn.bench_faithful import bench_faithful, faithful_lines
from segcn.bench_plan import SIDES, VARIANTS, BenchTrainConfig, Book, check, command, variant_words
from segcn.errors import UserError
from segcn.records import read_split
from segcn.timed import Timed
from segcn.workspace import sample_landscapes

MEASURES = {  # of an entry: its head in the table
    "samples_per_second": "samples/s",
    "samples_per_second_with_start": "with start-up",
    "peak_gib": "peak GiB",
}
BUSY = 0.2  # cores that others may use before the times are doubted


def bench_train(config: BenchTrainConfig, log: Callable[[str], None] = print) -> list[dict]:
    """Run what is not in output_dir/train.json yet, write it there and the table to train.txt; returns all its entries.

    Interrupted, it ends the training that runs; the same command goes on after the last finished one.
    """
    check(config)
    config = dataclasses.replace(config, dataset_name=config.dataset_name or str(sample_landscapes()))
    rows = len(read_split(config.dataset, "train"))
    if rows < (config.max_train_samples or 0):
        raise UserError(f"--max_train_samples {config.max_train_samples}: {config.dataset_name} has {rows} rows")
    config.folder.mkdir(parents=True, exist_ok=True)
    book = Book(config, log)
    pairs = bench_pairs(config, book)
    lines = [*table(config, pairs), *remarks(config, pairs)] if pairs else []
    if config.until_faithful:
        lines += ["", *faithful_lines(config, bench_faithful(config, book))]
    write_text(config.folder / "train.txt", "\n".join(lines) + "\n")
    log("\n".join(["", *lines, "", f"Wrote train.json and train.txt to {config.folder}."]))
    return book.entries


def bench_pairs(config: BenchTrainConfig, book: Book) -> list[dict]:
    """Each variant once by both sides in every round, another one first in every other round."""
    entries = []
    for number in range(1, config.rounds + 1):
        for variant in config.chosen:
            for side in SIDES if number % 2 else reversed(SIDES):
                entries.append(bench_once(config, book, variant, side, number))
    return entries


def bench_once(config: BenchTrainConfig, book: Book, variant: str, side: str, number: int) -> dict:
    """The entry of one run, from the book or run now; its weights and caches do not stay."""
    where = config.folder / "runs" / f"{variant}-{side}-{number}"
    words = command(config, side, where, config.steps, config.steps, variant_words(config, variant, side))
    title = f"round {number}, {variant}, {config.names[side]}"
    entry = book.find(words)
    if entry is None:
        entry, timed = book.run(words, where, config.steps, title)
        entry |= {"variant": variant, "side": side, "round": number, "settings": config.settings}
        entry |= measures(config, timed)
        book.add(entry)
        shutil.rmtree(where)
    book.log(
        f"{title}: {entry['samples_per_second']:.3g} samples/s, {number_of(entry['peak_gib'])} GiB, "
        f"first step after {entry['first_step']:.0f} s"
    )
    return entry


def measures(config: BenchTrainConfig, timed: Timed) -> dict[str, float | None]:
    """The numbers of a run; the last step, which waits for a checkpoint, counts in the memory alone."""
    last, batch = config.warmup_steps + config.measured_steps, config.train_batch_size
    pace = timed.seconds_per_step(config.warmup_steps, last)
    return {
        "seconds_per_step": pace,
        "samples_per_second": batch / pace,
        "samples_per_second_with_start": last * batch / timed.step_ends[last],
        "first_step": timed.step_ends[1],
        "peak_gib": timed.peak_gib(),
        "peak_gib_without_saving": timed.peak_gib(until=timed.step_ends[last]),
    }


def pairs_of(entries: list[dict], variant: str) -> Iterator[tuple[dict, dict]]:
    """(peer's entry, ours) of each finished round."""
    found = {(entry["side"], entry["round"]): entry for entry in entries if entry.get("variant") == variant}
    for number in sorted({number for _, number in found}):
        if all((side, number) in found for side in SIDES):
            peer, ours = (found[side, number] for side in SIDES)
            yield peer, ours


def ratios(entries: list[dict], variant: str, measure: str) -> list[float]:
    """Ours / the peer's in each round; none where it was not measured."""
    pairs = [(peer[measure], ours[measure]) for peer, ours in pairs_of(entries, variant)]
    return [ours / peer for peer, ours in pairs if peer and ours]


def table(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """A line a variant: of each measure the other side's median, ours, and the median of the rounds' ratios."""
    width = max(len(VARIANTS[name].text) for name in config.chosen)
    heads = f" {'diffusers' if config.peer else 'no cache':>9}{'segcn':>7}{'ratio':>7}"
    lines = [" " * width + "".join(f" |{head:^24}" for head in MEASURES.values())]
    lines.append(" " * width + f" |{heads}" * len(MEASURES))
    for variant in config.chosen:
        cells = "".join(f" |{cell(entries, variant, measure)}" for measure in MEASURES)
        lines.append(f"{VARIANTS[variant].text:{width}}{cells}")
    return [line.rstrip() for line in lines]


def cell(entries: list[dict], variant: str, measure: str) -> str:
    """The three numbers of a variant and measure."""
    shares = ratios(entries, variant, measure)
    if not shares:
        return f"{'not measured':^24}"
    sides = zip(*pairs_of(entries, variant), strict=True)
    peer, ours = (statistics.median(entry[measure] for entry in side) for side in sides)
    return f" {peer:9.3g}{ours:7.3g}{statistics.median(shares):6.2f}x"


def remarks(config: BenchTrainConfig, entries: list[dict]) -> list[str]:
    """What the numbers are of, when the cache is paid back, and whether the machine was idle."""
    first = entries[0]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items() if value)
    lines = [
        "",
        f"Medians of {config.rounds} round(s); ratio: segcn / {config.names['peer']}, taken in each round.",
        f"samples/s: steps {config.warmup_steps + 1} to {config.warmup_steps + config.measured_steps}, batch "
        f"{config.train_batch_size}, {config.resolution} pixels.",
        "with start-up: from the start of the process, cache building included.",
        "peak GiB: VmHWM of the process, a checkpoint included.",
        *(line for variant in config.chosen for line in paid_back(entries, variant)),
        first["machine"],
        versions,
    ]
    load = max(entry["other_load"] or 0 for entry in entries)
    if load > BUSY:
        lines.append(f"Other programs kept up to {load:.1f} cores busy during a run: its times mean little.")
    return lines


def paid_back(entries: list[dict], variant: str) -> Iterator[str]:
    """The rounds' ratios, and the step at which ours has caught up with the other, its longer start included."""
    pairs = list(pairs_of(entries, variant))
    if pairs:
        start = statistics.median(ours["first_step"] - peer["first_step"] for peer, ours in pairs)
        gain = statistics.median(peer["seconds_per_step"] - ours["seconds_per_step"] for peer, ours in pairs)
        begins = f"segcn's first step ends {abs(start):.1f} s {'later' if start > 0 else 'earlier'}"
        if start > 0:
            begins += f", it is ahead after {1 + start / gain:.0f} steps" if gain > 0 else ", it is never ahead"
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios(entries, variant, "samples_per_second"))
        yield f"{variant}: samples/s {listed} in the rounds; {begins}."


def number_of(value: float | None) -> str:
    """Three digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"
