"""Config dataclasses and the command line: flags with ranges, presets, help texts, and how a command starts and stops.

A config is a frozen dataclass with one field for each flag. Command lines, the parameters of notebooks and the JSON in
a run folder are the same dataclass. Flags have the names of diffusers' train_controlnet.py and pipelines where these
have one.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from segcn.utils.errors import UserError
from segcn.utils.paths import ROOT, SYMLINKS
from segcn.utils.progress import never_silent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PRECISIONS = ("no", "fp16", "bf16")
SMALL_BASE = 32  # latent cells, the size up to which a base counts as small
RESUME = "Stopped. What is finished is kept; rerun the same command to resume."
NUMBERS = {int: ("a whole number", "N"), float: ("a number", "X")}
Config = TypeVar("Config", bound="DataclassInstance")


def flag(
    default: Any,
    help: str,
    choices: Sequence | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    required: bool = False,
) -> Any:
    """A field of a config: its default, its meaning for --help, and the values that are accepted.

    default: a list is copied for each config. choices: all valid values. low, high: the range, both ends included;
    above: values must be larger. required: a command line must give it.
    """
    accepted = {"choices": choices, "low": low, "high": high, "above": above}
    metadata = {"help": help} | {name: value for name, value in accepted.items() if value is not None}
    metadata |= {"required": True} if required else {}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def suggest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean train?", or nothing where no known word is similar."""
    similar = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {similar[0]}?" if similar else ""


def preset_defaults(kind: type, preset: str) -> dict[str, Any]:
    """The defaults that a preset changes for a config class; UserError for an unknown name."""
    presets = getattr(kind, "PRESETS", {})
    if presets and preset not in presets:
        raise UserError(
            f"--preset: expected one of {', '.join(presets)}, found {preset!r}.{suggest(str(preset), presets)}"
        )
    return presets[preset] | {"preset": preset} if presets else {}


def preset_of_base(folder: str | Path) -> str:
    """The preset that fits a base: tiny for one of small images, such as the embedded one, else sd15."""
    part = "transformer" if (Path(folder) / "transformer").is_dir() else "unet"  # what denoises
    try:
        side = json.loads((Path(folder) / part / "config.json").read_text())["sample_size"]  # latent cells
        return "tiny" if side <= SMALL_BASE else "sd15"
    except (OSError, ValueError, KeyError, TypeError):  # a name on the hub
        return "sd15"


def make(kind: type[Config], preset: str | None = None, **values: Any) -> Config:
    """Build a config from a preset and the values that are not None; UserError for an unknown name or a bad value."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"{kind.__name__}: unknown setting {unknown[0]!r}.{suggest(unknown[0], known)}"
            f" It has {', '.join(sorted(known))}"
        )
    given = {name: value for name, value in values.items() if value is not None}
    config = kind(**((preset_defaults(kind, preset) if preset else {}) | given))
    check_values(config)
    return config


def check_values(config: Any) -> None:
    """UserError for the first value outside of its field's choices or range: "--name: expected 0 to 1, found 2"."""
    for field in fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        low, high, above = (field.metadata.get(name) for name in ("low", "high", "above"))
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            if choices and item not in choices:
                hint = suggest(str(item), map(str, choices))
                expected, hint = f"one of {', '.join(map(str, choices))}", f".{hint}" if hint else ""
                raise UserError(f"--{field.name}: expected {expected}, found {item!r}{hint}")
            inside = (low is None or item >= low, high is None or item <= high, above is None or item > above)
            if not all(inside):  # NaN never is
                raise UserError(f"--{field.name}: expected {_range(field)}, found {item!r}")


def _range(field: dataclasses.Field) -> str:
    """The range of a field in words."""
    low, high, above = (field.metadata.get(name) for name in ("low", "high", "above"))
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    least = f"{low:g} or more" if low is not None else "" if above is None else f"more than {above:g}"
    return least + ("" if high is None else f"{', ' * bool(least)}at most {high:g}")


def parse(kind: type[Config], arguments: list[str], program: str, places: Sequence[str] = ()) -> Config:
    """Read a command line; given values replace those of the preset. Prints the help and exits for --help.

    places: the flags that words without a flag are for, in this order. UserError for an unknown flag or a bad value. A
    token is put into the environment, where the hub's client looks for it, and is never kept in a config.
    """
    if {"-h", "--help"} & set(arguments):
        preset = re.search(r"--preset[= ](\S+)", " ".join(arguments))
        with contextlib.suppress(BrokenPipeError):  # --help | head
            print(help_text(kind, program, places, preset and preset[1]), flush=True)
        sys.exit(0)
    reader = _reader(kind, program)
    if hasattr(kind, "PRESETS"):
        named, base = reader.parse_known_args(arguments)[0], "pretrained_model_name_or_path"
        given = any(re.match(r"--preset(=|$)", word) for word in arguments)
        reader.set_defaults(**preset_defaults(kind, named.preset if given else preset_of_base(getattr(named, base))))
    config, rest = reader.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    hidden = {f"--{no}{name}" for name in getattr(kind, "HIDDEN", ()) for no in ("", "no_")}
    for word in [*rest, *(word for word in arguments if word.partition("=")[0] in hidden)]:
        if word.startswith("-"):
            name = word.partition("=")[0]
            hint = suggest(name.replace("-", "_").replace("__", "--", 1), set(reader._option_string_actions) - hidden)
            raise UserError(f"{program}: unknown flag {name}.{hint} {program} --help lists all flags.")
    free = [name for name in places if not getattr(config, name)]
    if len(rest) > len(free):
        raise UserError(f"{program}: unexpected word {rest[len(free)]!r}. {program} --help lists all flags.")
    config = dataclasses.replace(config, **dict(zip(free, rest, strict=False)))
    for field in fields(kind):
        if field.metadata.get("required") and not getattr(config, field.name):
            shown = field.name.upper() if field.name in places else f"--{field.name}"
            raise UserError(f"{program} needs {shown}: {field.metadata['help']}")
    check_values(config)
    if getattr(config, "allow_symlinks", False):
        os.environ[SYMLINKS] = "1"  # for the processes and notebooks that this one starts, too
    if getattr(config, "hub_token", None):
        os.environ["HF_TOKEN"] = config.hub_token  # not on their command lines, which every user of a machine can see
        config = dataclasses.replace(config, hub_token=None)
    return config


def _reader(kind: type, program: str) -> Any:
    """HfArgumentParser without help, whose errors are UserErrors; choices and ranges are left to `check_values`."""
    from transformers.hf_argparser import HfArgumentParser

    class Reader(HfArgumentParser):
        def add_argument(self, *names: str, **how: Any) -> Any:
            for name in ("choices", "low", "high", "above", "required"):
                how.pop(name, None)
            if how.get("type") in NUMBERS:
                how["type"] = _number(how["type"])
            return super().add_argument(*names, **how)

        def error(self, message: str) -> Any:
            raise UserError(f"{program}: " + re.sub(r"^argument (-[\w-]+)\S*:", r"\1:", message))

    return Reader(kind, prog=program, add_help=False, allow_abbrev=False)


def _number(kind: type) -> Callable[[str], float]:
    """Reads an int or a float, and says what was expected."""

    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {NUMBERS[kind][0]}, found {text!r}") from None

    return read


def help_text(kind: type, program: str, places: Sequence[str] = (), preset: str | None = None) -> str:
    """Every flag once, at most 100 columns wide, with the default that acts under the preset, and other presets'."""
    return flags_parser(kind, program, places, preset).format_help().rstrip()


def flags_parser(
    kind: type, program: str, places: Sequence[str] = (), preset: str | None = None
) -> argparse.ArgumentParser:
    """An argparse parser to show and to complete the flags of a config.

    Its SECTIONS name the first flag of each; its HIDDEN fields, which keep their defaults, are no flags.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    parser = argparse.ArgumentParser(
        program,
        usage=" ".join([program, *(f"[{name.upper()}]" for name in places), "[--flag VALUE ...]"]),
        description=kind.__doc__,
        epilog=getattr(kind, "EPILOG", None),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
        add_help=False,
    )
    defaults = {field.name: getattr(kind(), field.name) for field in fields(kind)}
    presets = getattr(kind, "PRESETS", {})
    chosen = preset or (preset_of_base(defaults["pretrained_model_name_or_path"]) if presets else None)
    acting = {name: defaults | preset_defaults(kind, name) for name in {chosen: 0} | presets}
    group, sections = parser.add_argument_group("flags"), getattr(kind, "SECTIONS", {})
    for field in (field for field in fields(kind) if field.name not in getattr(kind, "HIDDEN", ())):
        if field.name in sections:
            group = parser.add_argument_group(sections[field.name])
        value = acting[chosen][field.name]
        others = {name: values[field.name] for name, values in acting.items() if values[field.name] != value}
        names = [f"--{field.name}", f"--no_{field.name}"][: 2 if field.default is True else 1]
        group.add_argument(*names, **_shown(field, value, others if field.name != "preset" else {}))
    return parser


def _shown(field: dataclasses.Field, value: Any, others: dict[str, Any]) -> dict[str, Any]:
    """How argparse shows a flag: what follows its name, its meaning, its range and its default."""
    hint, metadata = str(field.type), field.metadata
    notes = [_range(field)] if "low" in metadata and "high" in metadata else []
    if value not in (None, "", False) and value != []:
        notes.append(f"default: {f'--{field.name}' if value is True else _text(value)}")
    notes += [f"--preset {name}: {_text(other)}" for name, other in others.items()]
    text = metadata.get("help", "").replace("%", "%%") + (f" ({'; '.join(notes)})" if notes else "")
    if "bool" in hint:
        return {"action": "store_true", "help": text}
    if metadata.get("choices"):
        return {"choices": [str(choice) for choice in metadata["choices"]], "help": text}
    metavar = next((sign for number, (_, sign) in NUMBERS.items() if number.__name__ in hint), "TEXT")
    return {"metavar": metavar, "nargs": "+" if "list" in hint else None, "help": text}


def _text(value: Any) -> str:
    """A value as it is typed on a command line; paths below the repository are shortened."""
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value).replace(f"{ROOT}/", "")


def to_json(config: Any) -> str:
    """One setting a line, without tokens."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "hub_token"}
    return json.dumps(values, indent=1) + "\n"


def arguments_of(config: Any) -> list[str]:
    """The command line that gives this config."""
    words: list[str] = []
    for field in (field for field in fields(config) if field.name not in getattr(config, "HIDDEN", ())):
        value = getattr(config, field.name)
        if value is False and field.default is True:
            words.append(f"--no_{field.name}")
        if value is None or value is False or value == [] or value == "":
            continue
        words.append(f"--{field.name}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words


@contextlib.contextmanager
def stoppable(
    message: str | int = RESUME, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
) -> Iterator[None]:
    """In the block these signals act as Ctrl-C, and each ends the program with a message or an exit code.

    A signal that the process ignores, such as SIGHUP under nohup, stays ignored.
    """
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in signals}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(message)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main_guard(program: Callable[[], Any]) -> None:
    """Run a command: a mistake of the user, or a file that cannot be read, is one message and exit code 2.

    It is never silent for long. With --debug on the command line the traceback is shown.
    """
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        with never_silent():
            program()
    except (UserError, OSError) as error:
        if debug:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"Error: {message}", file=sys.stderr)
        sys.exit(2)
