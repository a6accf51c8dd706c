# PYTHON_ARGCOMPLETE_OK: the shell completes commands and flags (pip install argcomplete; see README)
"""The `segcn` command: one table of sub-commands, each with its config and the function that it calls.

Modules are imported only when a command runs, so that --help and mistakes on the command line are answered at once.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from segcn.utils.args import (
    RESUME,
    flags_parser,
    main_guard,
    make,
    parse,
    preset_of_base,
    stoppable,
    suggest,
)
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS, use_writable_home


@dataclass(frozen=True)
class Command:
    """A sub-command: what it does, its config class, and the function of that config, whose text or path is printed.

    places: the flags that words without a flag are for. unpack: the function takes the fields of the config as
    arguments. stopped: what a signal or Ctrl-C prints. Without a config it only groups other commands.
    """

    help: str
    config: str = ""
    function: str = ""
    places: tuple[str, ...] = ()
    unpack: bool = False
    stopped: str = RESUME


NOTHING, CLOSED = "Stopped. Nothing was written.", "Closed."
SAMPLES, GENERATE, DATA = "segcn.samples.config:", "segcn.generate.config:", "segcn.data.config:"
COMMANDS = {
    "run": Command("run notebooks 01 to 05 in order: data, augmentation, training, generation, evaluation",
                   "segcn.notebook.config:RunConfig", "segcn.notebook.run:run"),
    "app": Command("draw masks and generate images in the browser, from the model and the masks that come with it",
                   "segcn.notebook.config:AppConfig", "segcn.notebook.app:serve", ("dataset_name",), stopped=CLOSED),
    "samples": Command("sample data (landscapes, earth, echo), bases (base, sd15, sdxl, sd3), failures, measurements"),
    "samples landscapes": Command("procedural landscapes with exact masks and captions", SAMPLES + "LandscapesConfig",
                                  "segcn.samples.landscapes.scene:write_landscapes", ("out",), True),
    "samples earth": Command("real places with MODIS land cover; needs pip install 'segcn[samples]'",
                             SAMPLES + "EarthConfig", "segcn.samples.earth:write_earth", ("out",), True),
    "samples echo": Command("made-up echocardiograms with exact masks: a domain that the base has never seen",
                            SAMPLES + "SampleSetConfig", "segcn.samples.echo:write_echo", ("out",), True),
    "samples base": Command("train the embedded base model: hours on a CPU; resumes",
                            SAMPLES + "BaseConfig", "segcn.cli:train_base", ("out",)),
    "samples sd15": Command("a base of Stable Diffusion 1.5's size with random weights, for timings",
                            SAMPLES + "LargeBaseConfig", "segcn.samples.base_model.recipe:build_sd15", ("out",), True,
                            NOTHING),
    "samples sdxl": Command("a base of Stable Diffusion XL's size, or a toy, with random weights",
                            SAMPLES + "BaseXLConfig", "segcn.samples.base_model.sdxl:build_sdxl", ("out",), True,
                            NOTHING),
    "samples sd3": Command("a base of Stable Diffusion 3.5 medium's size, or a toy, with random weights",
                           SAMPLES + "BaseSD3Config", "segcn.samples.base_model.sd3:build_sd3", ("out",), True,
                           NOTHING),
    "samples failures": Command("a figure of typical failures, provoked on the landscapes",
                                SAMPLES + "FailuresConfig", "segcn.cli:draw_failures", ("out",)),
    "samples measure": Command("measure the embedded base and its ControlNet on held-out images",
                               SAMPLES + "MeasureConfig", "segcn.cli:measure_base"),
    "import": Command("write a data set from image and mask files, metadata files, parquet or saved datasets",
                      DATA + "ImportConfig", "segcn.cli:import_files", ("source", "out"), stopped=NOTHING),
    "validate": Command("check a data set: decode every file and report every fault with its row",
                        DATA + "DoctorConfig", "segcn.cli:validate_dataset", ("dataset_name",), stopped=NOTHING),
    "palette": Command("write a palette.json for masks that have none: a ready one, or one proposed from them",
                       DATA + "PaletteConfig", "segcn.data.importers.palettes:make_palette", ("dataset_name",)),
    "check": Command("does a base fit a data set? reconstructions, captions, memory and time",
                     "segcn.evaluate.config:CheckConfig", "segcn.cli:check_dataset", ("dataset_name",)),
    "bench": Command("compare training (train), generation (generate) or both on a GPU (gpu) with diffusers"),
    "bench train": Command("time training and diffusers' train_controlnet.py in turns",
                           "segcn.bench.config:BenchTrainConfig", "segcn.bench.train:bench_train"),
    "bench generate": Command("time and score generation and one pipeline call for each image, in turns",
                              "segcn.bench.config:BenchGenerateConfig", "segcn.bench.generate:bench_generate"),
    "bench gpu": Command("training and generation at the sizes of Stable Diffusion 1.5 and XL, on a GPU",
                         "segcn.bench.config:BenchGpuConfig", "segcn.bench.gpu:bench_gpu"),
    "train": Command("train a ControlNet; the same as accelerate launch -m segcn.train",
                     "segcn.train.config:TrainConfig", "segcn.train.loop:train"),
    "adapt": Command("teach the base a domain from images alone: a LoRA, or its own weights",
                     "segcn.train.config:AdaptConfig", "segcn.train.loop:train", ("dataset_name",)),
    "infer": Command("one mask and one or more prompts to a PNG that records its settings",
                     GENERATE + "InferConfig", "segcn.generate.infer:infer", stopped=NOTHING),
    "generate": Command("masks to a data set of new images; the same as accelerate launch -m segcn.generate",
                        GENERATE + "GenerateConfig", "segcn.generate.__main__:generate_share_of_process"),
    "layouts": Command("new masks for generate, made from those of a data set",
                       GENERATE + "LayoutsConfig", "segcn.generate.layouts:make_layouts", ("dataset_name",)),
    "evaluate": Command("do generated images follow their masks, and are they like real ones? (compare)",
                        "segcn.evaluate.config:EvaluateConfig", "segcn.cli:run_evaluation"),
    "evaluate compare": Command("two evaluations side by side", "segcn.evaluate.config:CompareConfig",
                                "segcn.evaluate.report:comparison", ("one", "other"), True),
    "study": Command("are generated images worth training on? segmenters with and without them, on held-out real rows",
                     "segcn.study.config:StudyConfig", "segcn.cli:run_study"),
}  # fmt: skip


def main() -> None:
    """Entry point of `segcn`."""
    if "_ARGCOMPLETE" in os.environ:
        from argcomplete import autocomplete

        autocomplete(command_tree())
    use_writable_home(OUTPUTS / ".home")
    main_guard(lambda: run_command(sys.argv[1:]))


def run_command(words: list[str]) -> None:
    """Run the command that the words name, or print what they ask for; UserError for an unknown command."""
    count = next((count for count in (2, 1) if len(words) >= count and " ".join(words[:count]) in COMMANDS), 0)
    name, rest = " ".join(words[:count]), words[count:]
    command, program = COMMANDS.get(name, Command("")), f"segcn {name}".rstrip()
    first, known = rest[0] if rest else "--help", [other.split()[-1] for other in below(name)]
    if first == "--version":
        print(f"segcn {version('segcn')}")
    elif known and first not in ("-h", "--help") and not (command.config and first.startswith("-")):
        raise UserError(f"{program}: no command {first!r}.{suggest(first, known)} {program} --help lists all.")
    elif not command.config:
        print(usage(name))
    else:
        config = parse(find(command.config), rest, program, command.places)
        with stoppable(command.stopped):
            function = find(command.function)
            result = function(**vars(config)) if command.unpack else function(config)
        if isinstance(result, str | Path):
            print(str(result).rstrip("\n"))


def below(name: str) -> list[str]:
    """The commands one level below a command; "" for those of `segcn`."""
    return [other for other in COMMANDS if other.rpartition(" ")[0] == name]


def usage(name: str) -> str:
    """The commands below a command, with one line each."""
    program = f"segcn {name}".rstrip()
    lines = [f"  {'segcn ' + other:24} {COMMANDS[other].help}" for other in below(name)]
    last = f"{program} COMMAND --help lists the flags of a command. --debug shows the traceback of an error."
    return "\n".join([f"Usage: {program} COMMAND [--flag VALUE ...]", "", *lines, "", last])


def command_tree(name: str = "") -> argparse.ArgumentParser:
    """argparse's sub-commands with the flags of each, for the completion in the shell."""
    command = COMMANDS.get(name, Command(""))
    if command.config:
        parser = flags_parser(find(command.config), f"segcn {name}", command.places)
    else:
        parser = argparse.ArgumentParser("segcn", add_help=False)
    if children := below(name):
        tree = parser.add_subparsers()
        for other in children:
            tree.add_parser(other.split()[-1], parents=[command_tree(other)], add_help=False)
    return parser


def find(name: str) -> Any:
    """A class or function by "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def train_base(config: Any) -> None:
    """`segcn samples base`."""
    from segcn.samples.base_model.recipe import SMOKE, BaseRecipe, build_base

    build_base(Path(config.work), Path(config.out), SMOKE if config.smoke else BaseRecipe())


def draw_failures(config: Any) -> None:
    """`segcn samples failures`."""
    from segcn.samples.landscapes.scene import sample_landscapes
    from segcn.samples.measure import write_failures

    write_failures(Path(config.out), Path(config.work), sample_landscapes())


def measure_base(config: Any) -> None:
    """`segcn samples measure`."""
    from segcn.data.metadata import read_split
    from segcn.data.visualize import quiet
    from segcn.samples.landscapes.scene import sample_landscapes
    from segcn.samples.measure import measure_sample_base

    quiet()
    measure_sample_base(config, read_split(sample_landscapes(), "train"))


def import_files(config: Any) -> None:
    """`segcn import`."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; read when huggingface_hub is first imported
    from segcn.data.importers.importer import import_dataset

    import_dataset(config)


def validate_dataset(config: Any) -> None:
    """`segcn validate`; exit code 1 where training would be wrong."""
    from segcn.data.doctor.report import validate

    sys.exit(1 if validate(config).errors else 0)


def check_dataset(config: Any) -> None:
    """`segcn check`: the base with held-out rows, then two steps of a training."""
    from segcn.data.metadata import hold_out, read_named_split
    from segcn.evaluate.base_check import BASE_CHECK, check_base
    from segcn.models.base import load_base, pick_device
    from segcn.models.segmenter import SegmenterConfig, segmenter_of
    from segcn.train.config import TrainConfig
    from segcn.train.loop import micro_steps
    from segcn.train.memory import preflight

    name, out = config.pretrained_model_name_or_path, Path(config.output_dir)
    given = {name: getattr(config, name) for name in ("dataset_name", "lora", "resolution", "fit", "output_dir")}
    training = make(TrainConfig, preset_of_base(name), pretrained_model_name_or_path=name, **given)
    rows, held_out = (read_named_split(config.dataset_name, part) for part in hold_out(config.dataset_name))
    segmenter = segmenter_of(rows, SegmenterConfig(resolution=training.resolution, fit=config.fit))
    base = load_base(name, pick_device(), lora=config.lora)
    checked = check_base(held_out, base, training.resolution, config.fit, segmenter)
    checked.write(out / BASE_CHECK)
    preflight(training, micro_steps, check=False)


def run_evaluation(config: Any) -> str | None:
    """`segcn evaluate`: the table of results, in the first of several processes."""
    from segcn.data.visualize import quiet
    from segcn.evaluate.report import metrics_table
    from segcn.evaluate.run import evaluate_folders
    from segcn.samples.recognizer import caption_reader

    quiet()
    evaluation = evaluate_folders(config, caption_reader)
    return metrics_table(evaluation.metrics) if evaluation else None


def run_study(config: Any) -> str:
    """`segcn study`."""
    from segcn.data.visualize import quiet
    from segcn.study.report import report
    from segcn.study.run import study

    quiet()
    return report(study(config))


if __name__ == "__main__":
    main()
