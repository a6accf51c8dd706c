# PYTHON_ARGCOMPLETE_OK: the shell completes commands and flags (pip install argcomplete; see README)
"""The `segcn` command: one table of sub-commands, each with its config and the function that it calls.

Modules are imported only when a command runs, so that --help and mistakes on the command line are answered at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from segcn.utils.args import RESUME, flags_parser, main_guard, parse, stoppable, suggest
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS, use_writable_home


@dataclass(frozen=True)
class Command:
    """A sub-command: what it does, its config class, and the function of that config whose text or path is printed.

    places: the flags that its words without a flag are for. stopped: what it says when a signal or Ctrl-C stops it.
    Without a config it only groups other commands.
    """

    help: str
    config: str = ""
    function: str = ""
    places: tuple[str, ...] = ()
    stopped: str = RESUME


NOTHING = "Stopped. Nothing was written."
COMMANDS = {
    "run": Command(
        "run notebooks 01 to 05 in order: data, augmentation, training, generation, evaluation",
        "segcn.notebook.config:RunConfig", "segcn.notebook.run:run"),
    "samples": Command("write sample data (landscapes, earth) or a base model; draw typical failures; measure the base"),
    "samples landscapes": Command(
        "procedural landscapes with exact masks and captions",
        "segcn.samples.config:SampleSetConfig", "segcn.cli:landscapes", ("out",)),
    "samples earth": Command(
        "real places in three styles with MODIS land cover; needs pip install 'segcn[samples]'",
        "segcn.samples.config:SampleSetConfig", "segcn.cli:earth", ("out",)),
    "samples base": Command(
        "train the embedded base model: hours on a CPU; resumes",
        "segcn.samples.config:BaseConfig", "segcn.cli:embedded_base", ("out",)),
    "samples sd15": Command(
        "write a base of Stable Diffusion 1.5's size with random weights, for timings",
        "segcn.samples.config:LargeBaseConfig", "segcn.cli:large_base", ("out",), NOTHING),
    "samples failures": Command(
        "draw what typical failures look like, provoked on the landscapes",
        "segcn.samples.config:FailuresConfig", "segcn.cli:failures", ("out",)),
    "samples measure": Command(
        "measure the embedded base and its ControlNet on held-out images",
        "segcn.samples.config:MeasureConfig", "segcn.cli:measure_base"),
    "import": Command(
        "write a data set of this package from image and mask files, metadata files, parquet or saved datasets",
        "segcn.data.config:ImportConfig", "segcn.cli:import_files", ("source", "out"), NOTHING),
    "validate": Command(
        "check a data set: decode every file and report every fault with its row",
        "segcn.data.config:DoctorConfig", "segcn.cli:validate_dataset", ("dataset_name",),
        "Stopped. No report was written."),
    "palette": Command(
        "write a palette.json for masks that have none: a ready one, or one proposed from the masks",
        "segcn.data.config:PaletteConfig", "segcn.data.importers.palettes:make_palette", ("dataset_name",), NOTHING),
    "bench": Command("compare training (train) or generation (generate) with diffusers"),
    "bench train": Command(
        "training and diffusers' train_controlnet.py in turns: pace, memory, steps until images follow their masks",
        "segcn.bench.config:BenchTrainConfig", "segcn.bench.train:bench_train"),
    "bench generate": Command(
        "generation and one pipeline call for each image in turns: pace, faithfulness, distance to real images",
        "segcn.bench.config:BenchGenerateConfig", "segcn.cli:bench_generation"),
    "train": Command(
        "train a ControlNet; the same as accelerate launch -m segcn.train",
        "segcn.train.config:TrainConfig", "segcn.train.loop:train"),
    "infer": Command(
        "one mask and one or more prompts to a PNG that records its settings",
        "segcn.generate.config:InferConfig", "segcn.generate.infer:infer", (), NOTHING),
    "generate": Command(
        "masks to a data set of new images; the same as accelerate launch -m segcn.generate",
        "segcn.generate.config:GenerateConfig", "segcn.generate.__main__:command"),
    "evaluate": Command(
        "do generated images follow their masks, and how far are they from real ones? (also: compare, utility)",
        "segcn.evaluate.config:EvaluateConfig", "segcn.cli:evaluate"),
    "evaluate compare": Command(
        "two evaluations side by side",
        "segcn.evaluate.config:CompareConfig", "segcn.cli:compare_runs", ("run", "other")),
    "evaluate utility": Command(
        "do generated images help to train a segmenter?",
        "segcn.study.config:UtilityConfig", "segcn.cli:utility"),
}  # fmt: skip


def main() -> None:
    """Entry point of `segcn`."""
    if "_ARGCOMPLETE" in os.environ:
        from argcomplete import autocomplete

        autocomplete(command_tree())
    use_writable_home(OUTPUTS / ".home")
    main_guard(lambda: start(sys.argv[1:]))


def start(words: list[str]) -> None:
    """Run the command that the words name, or print what they ask for; UserError for an unknown command."""
    name, rest = split_command(words)
    if name in COMMANDS and COMMANDS[name].config:
        command = COMMANDS[name]
        check_subcommand(name, rest)
        config = parse(load(command.config), rest, f"segcn {name}", command.places)
        with stoppable(command.stopped):
            result = load(command.function)(config)
        if isinstance(result, str | Path):
            print(result)
    elif rest[:1] in ([], ["-h"], ["--help"]):
        print(usage(name))
    elif rest[0] == "--version":
        print(f"segcn {version('segcn')}")
    else:
        program = f"segcn {name}".rstrip()
        known = [other.split()[-1] for other in subcommands(name)]
        raise UserError(f"{program}: no command {rest[0]!r}.{suggest(rest[0], known)} {program} --help lists all.")


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """The longest command that the words begin with, "" where there is none, and the other words."""
    for count in (2, 1):
        if " ".join(words[:count]) in COMMANDS and len(words) >= count:
            return " ".join(words[:count]), words[count:]
    return "", words


def subcommands(name: str) -> list[str]:
    """The commands one level below a command; "" for those of `segcn`."""
    return [other for other in COMMANDS if other.rpartition(" ")[0] == name]


def check_subcommand(name: str, rest: Sequence[str]) -> None:
    """UserError for a word without a flag behind a command that has sub-commands, such as evaluate comapre."""
    known = [other.split()[-1] for other in subcommands(name)]
    if known and rest and not rest[0].startswith("-"):
        raise UserError(f"segcn {name}: no command {rest[0]!r}.{suggest(rest[0], known)}")


def usage(name: str) -> str:
    """The commands below a command, with one line each."""
    program = f"segcn {name}".rstrip()
    lines = [f"  {'segcn ' + other:24} {COMMANDS[other].help}" for other in subcommands(name)]
    last = f"{program} COMMAND --help lists the flags of a command. --debug shows the traceback of an error."
    return "\n".join([f"Usage: {program} COMMAND [--flag VALUE ...]", "", *lines, "", last])


def command_tree(name: str = "") -> argparse.ArgumentParser:
    """argparse's sub-commands with the flags of each, for the completion in the shell."""
    command = COMMANDS.get(name, Command(""))
    if command.config:
        parser = flags_parser(load(command.config), f"segcn {name}", command.places)
    else:
        parser = argparse.ArgumentParser("segcn", add_help=False)
    if below := subcommands(name):
        tree = parser.add_subparsers()
        for other in below:
            tree.add_parser(other.split()[-1], parents=[command_tree(other)], add_help=False)
    return parser


def load(name: str) -> Any:
    """A class or function by "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def landscapes(config: Any) -> None:
    """`segcn samples landscapes`."""
    from segcn.samples.landscapes.scene import write_landscapes

    write_landscapes(config.out, config.count, config.resolution, config.seed, config.test)


def earth(config: Any) -> None:
    """`segcn samples earth`."""
    from segcn.samples.earth import write_earth

    write_earth(config.out, config.count, config.resolution, config.seed, config.test)


def embedded_base(config: Any) -> None:
    """`segcn samples base`."""
    from segcn.samples.base_model.recipe import SMOKE, BaseRecipe, build_base

    build_base(Path(config.work), Path(config.out), SMOKE if config.smoke else BaseRecipe())


def large_base(config: Any) -> None:
    """`segcn samples sd15`."""
    from segcn.samples.base_model.recipe import build_sd15

    build_sd15(Path(config.out), config.seed)


def failures(config: Any) -> None:
    """`segcn samples failures`."""
    from segcn.samples.landscapes.scene import sample_landscapes
    from segcn.samples.measure import write_failures

    write_failures(Path(config.out), Path(config.work), sample_landscapes())


def measure_base(config: Any) -> None:
    """`segcn samples measure`."""
    from segcn.data.metadata import read_split
    from segcn.data.visualize import quiet
    from segcn.samples.landscapes.scene import sample_landscapes
    from segcn.samples.measure import measure

    quiet()
    measure(config, read_split(sample_landscapes(), "train"))


def import_files(config: Any) -> None:
    """`segcn import`."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; read when huggingface_hub is first imported
    from segcn.data.importers.importer import import_dataset

    import_dataset(config)


def validate_dataset(config: Any) -> None:
    """`segcn validate`; exit code 1 where training would be wrong."""
    from segcn.data.doctor.report import validate

    sys.exit(1 if validate(config).errors else 0)


def bench_generation(config: Any) -> None:
    """`segcn bench generate`."""
    from segcn.bench.generate import bench_generate
    from segcn.data.visualize import quiet

    quiet()
    bench_generate(config)


def evaluate(config: Any) -> str | None:
    """`segcn evaluate`: the table of results, in the first of several processes."""
    from segcn.data.visualize import quiet
    from segcn.evaluate.run import evaluate_folders
    from segcn.evaluate.tables import table
    from segcn.samples.recognizer import caption_reader

    quiet()
    evaluation = evaluate_folders(config, caption_reader)
    return table(evaluation.metrics) if evaluation else None


def compare_runs(config: Any) -> str:
    """`segcn evaluate compare`."""
    from segcn.evaluate.tables import compare

    return compare(config.run, config.other).rstrip("\n")


def utility(config: Any) -> str:
    """`segcn evaluate utility`."""
    from segcn.data.visualize import quiet
    from segcn.study.report import report
    from segcn.study.run import evaluate_utility

    quiet()
    return report(evaluate_utility(config))


if __name__ == "__main__":
    main()
