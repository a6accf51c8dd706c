"""The `segcn` command: each word below starts one function of the package."""

import argparse
import contextlib
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from segcn.data.config import DoctorConfig, ImportConfig, PaletteConfig
from segcn.evaluate.config import EvaluateConfig
from segcn.generate.config import InferConfig
from segcn.train.config import TrainConfig
from segcn.utils.args import GOES_ON, main_guard, parse, stoppable
from segcn.utils.paths import OUTPUTS, use_writable_home

COMMANDS = {
    "run": "notebooks 01 to 05 in order: data, augmentation, training, generation, evaluation",
    "samples": "sample data (landscapes, earth), failures, the embedded base (base) and its figures (measure)",
    "import": "images and masks, metadata files, parquet or saved datasets to a data set of this package",
    "validate": "check a data set: decode every file and report every fault with its row",
    "palette": "write a palette.json for masks that have none: a ready one, or one proposed from them",
    "bench": "measure: data sets (validate, metadata), training (step, train) or painting (generate)",
    "train": "train a ControlNet; the same as accelerate launch -m segcn.train",
    "infer": "one mask and one or more prompts to an image that knows how it was made",
    "generate": "masks to a data set of new images; the same as accelerate launch -m segcn.generate",
    "evaluate": "do generated images obey their masks, are they near real ones? compare: two runs; utility: their use",
}


def main() -> None:
    """Entry point of `segcn`."""
    use_writable_home(OUTPUTS / ".home")
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] not in COMMANDS:
        print(f"Error: no command {words[0]!r}.\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    else:
        main_guard(lambda: globals()[f"do_{words[0]}"](sys.argv[2:]))


def usage() -> str:
    """The commands with one line each."""
    lines = [f"  segcn {name:10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["Usage: segcn COMMAND [--help]", *lines])


def do_run(words: list[str]) -> None:
    """`segcn run`."""
    from segcn.notebook.config import RunConfig
    from segcn.notebook.run import run

    with stoppable(GOES_ON):
        run(parse(RunConfig, words, "segcn run"))


def do_samples(words: list[str]) -> None:
    """`segcn samples`."""
    from segcn.samples.cli import command

    with stoppable(GOES_ON):
        command(words)


def do_import(words: list[str]) -> None:
    """`segcn import`."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched; read when huggingface_hub is first imported
    from segcn.data.importers.importer import import_dataset

    places = list(itertools.takewhile(lambda word: not word.startswith("-"), words))[:2]
    first = [word for pair in zip(("--source", "--out"), places, strict=False) for word in pair]
    config = parse(ImportConfig, first + words[len(places) :], "segcn import")
    with stoppable("Stopped: nothing was written."):  # what is half written goes again
        import_dataset(config)


def do_validate(words: list[str]) -> None:
    """`segcn validate`."""
    from segcn.data.doctor.report import validate

    first = ["--dataset_name"] if words and not words[0].startswith("-") else []
    with stoppable("Stopped: no report was written."):
        found = validate(parse(DoctorConfig, first + words, "segcn validate"))
    sys.exit(1 if found.errors else 0)


def do_palette(words: list[str]) -> None:
    """`segcn palette`."""
    from segcn.data.importers.palettes import make_palette

    first = ["--dataset_name"] if words and not words[0].startswith("-") else []
    print(f"palette: {make_palette(parse(PaletteConfig, first + words, 'segcn palette'))}")


def do_bench(words: list[str]) -> None:
    """`segcn bench`."""
    if words[:1] == ["train"]:
        return bench_training(words[1:])
    if words[:1] == ["generate"]:
        return bench_generating(words[1:])
    from segcn.bench.old import bench_metadata, bench_step, bench_validate

    parser = argparse.ArgumentParser(prog="segcn bench", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = functools.partial(kinds.add_parser, argument_default=argparse.SUPPRESS)  # defaults: the functions' own
    validate = kind("validate", help="segcn validate against merely decoding every file")
    validate.add_argument("dataset", type=Path)
    validate.add_argument("--rounds", type=int, help="each of both in turns")
    metadata = kind("metadata", help="read and check a large metadata.csv: seconds and memory")
    metadata.add_argument("--rows", type=int)
    step = kind("step", help="a training step with each layout of memory and weights on the CPU")
    step.add_argument("--pretrained_model_name_or_path", type=Path, help="base model folder")
    step.add_argument("--resolution", type=int, help="pixels a side")
    step.add_argument("--batch_size", type=int)
    step.add_argument("--steps", type=int, help="timed in each process")
    step.add_argument("--rounds", type=int, help="each layout in turns")
    kinds.add_parser("train", help="training against diffusers' train_controlnet.py: pace, memory, time to obey")
    kinds.add_parser("generate", help="painting against one pipeline call an image: pace, faithfulness, distance")
    options = vars(parser.parse_args(words))
    found: dict[str, Callable] = {"validate": bench_validate, "metadata": bench_metadata, "step": bench_step}
    found[options.pop("kind")](**options)


def bench_training(words: list[str]) -> None:
    """`segcn bench train`."""
    from segcn.bench.config import BenchTrainConfig
    from segcn.bench.train import bench_train

    with stoppable("Stopped: the runs that finished are kept, and the same command goes on."):
        bench_train(parse(BenchTrainConfig, words, "segcn bench train"))


def bench_generating(words: list[str]) -> None:
    """`segcn bench generate`."""
    from segcn.bench.config import BenchGenerateConfig
    from segcn.bench.generate import bench_generate
    from segcn.data.visualize import quiet

    quiet()
    with stoppable("Stopped: the turns that finished are kept, and the same command goes on."):
        bench_generate(parse(BenchGenerateConfig, words, "segcn bench generate"))


def do_train(words: list[str]) -> None:
    """`segcn train`."""
    from segcn.train.launch import STOPPED, training_lines

    with (
        stoppable(STOPPED, (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),  # the training commits a checkpoint
        contextlib.closing(training_lines(parse(TrainConfig, words, "segcn train"))) as lines,
    ):
        for line in lines:
            print(line, flush=True)


def do_infer(words: list[str]) -> None:
    """`segcn infer`."""
    from segcn.generate.infer import infer

    print(infer(parse(InferConfig, words, "segcn infer")))


def do_generate(words: list[str]) -> None:
    """`segcn generate`."""
    from segcn.generate.writer import command

    command(words)


def do_evaluate(words: list[str]) -> None:
    """`segcn evaluate`."""
    if words[:1] == ["utility"]:
        from segcn.study.run import command

        return command(words[1:])
    if words[:1] == ["compare"]:
        return compare_runs(words[1:])
    from segcn.data.visualize import quiet
    from segcn.evaluate.run import evaluate_folders
    from segcn.evaluate.tables import table
    from segcn.samples.recognizer import caption_reader

    quiet()
    with stoppable(GOES_ON):
        evaluation = evaluate_folders(parse(EvaluateConfig, words, "segcn evaluate"), caption_reader)
    if evaluation:
        print(table(evaluation.metrics))


def compare_runs(words: list[str]) -> None:
    """`segcn evaluate compare`."""
    from segcn.evaluate.tables import compare

    parser = argparse.ArgumentParser(prog="segcn evaluate compare", allow_abbrev=False)
    parser.add_argument("run", nargs=2, help="folder of an evaluation, or its metrics.json")
    print(compare(*parser.parse_args(words).run), end="")


if __name__ == "__main__":
    main()
