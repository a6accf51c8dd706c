"""Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.

Names are those of diffusers' train_controlnet.py and pipelines wherever these have one."""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from segcn.utils.errors import UserError
from segcn.utils.paths import ROOT, SYMLINKS

# --- config: Settings of every command but training: command line, notebook parameters and run folder share these dataclasses.
#
# Names are those of diffusers' train_controlnet.py and pipelines wherever these have one.

PRECISIONS = ("no", "fp16", "bf16")


def flag(default: Any, help: str, choices: tuple | None = None, aliases: tuple = ()) -> Any:
    """A dataclass field with its meaning, shown by --help; aliases: older flags that are still read."""
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    return dataclasses.field(default=default, metadata=metadata | ({"aliases": list(aliases)} if aliases else {}))


# --- arguments: Settings from where they are given: presets and keywords, a command line, and back to a command line or JSON.

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
GOES_ON = "Stopped: what is finished is kept, and the same command goes on."
Config = TypeVar("Config", bound="DataclassInstance")


def preset_defaults(kind: type, preset: str) -> dict[str, Any]:
    """The defaults that a preset changes for a config class; UserError for an unknown name."""
    presets = getattr(kind, "PRESETS", {})
    if presets and preset not in presets:
        raise UserError(f"--preset: expected one of {', '.join(presets)}, found {preset!r}")
    return presets[preset] | {"preset": preset} if presets else {}


def make(kind: type[Config], preset: str | None = None, **values: Any) -> Config:
    """Build a config from a preset and the values that are not None; UserError names an unknown setting."""
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"{kind.__name__}: unknown setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    given = {name: value for name, value in values.items() if value is not None}
    defaults = preset_defaults(kind, preset) if preset else {}
    return kind(**(defaults | given))


def parse(kind: type[Config], arguments: list[str], program: str) -> Config:
    """Read a command line; the preset's defaults stand below whatever is given.

    A token goes into the environment, where the hub's client looks for it, and never stands in a config.
    """
    if {"-h", "--help"} & set(arguments):
        with contextlib.suppress(BrokenPipeError):  # --help | head
            print(help_text(kind, program), flush=True)
        sys.exit(0)
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, prog=program, add_help=False, allow_abbrev=False)
    if "preset" in {field.name for field in fields(kind)}:
        preset = parser.parse_known_args(arguments)[0].preset
        parser.set_defaults(**preset_defaults(kind, preset))
    config, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if rest:
        raise UserError(f"{program}: unknown {rest[0]!r}; {program} --help lists every flag")
    if getattr(config, "allow_symlinks", False):
        os.environ[SYMLINKS] = "1"  # for the processes and notebooks that this one starts, too
    if getattr(config, "hub_token", None):
        os.environ["HF_TOKEN"] = config.hub_token  # for them, too: a command line is seen by every user of a machine
        config = dataclasses.replace(config, hub_token=None)
    return config


def help_text(kind: type, program: str) -> str:
    """Every flag once, at most 100 columns wide, under the titles of SECTIONS, each of which begins at its field."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    parser = argparse.ArgumentParser(
        usage=f"{program} [--flag VALUE ...]",
        description=kind.__doc__,
        epilog=getattr(kind, "EPILOG", None),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
        add_help=False,
    )
    group, sections = parser.add_argument_group("flags"), getattr(kind, "SECTIONS", {})
    for field in fields(kind):
        if field.name in sections:
            group = parser.add_argument_group(sections[field.name])
        names = [f"--{field.name}", f"--no_{field.name}"][: 2 if field.default is True else 1]
        group.add_argument(*names, **_look(field))
    return parser.format_help().rstrip()


def _look(field: dataclasses.Field) -> dict[str, Any]:
    """How argparse shows a flag: what stands behind its name, its meaning, and its default where it has one."""
    default, hint, text = field.default, str(field.type), field.metadata.get("help", "").replace("%", "%%")
    if isinstance(default, bool):
        return {"action": "store_true", "help": f"{text} (default: --{field.name})" if default else text}
    if default not in (None, "", dataclasses.MISSING):
        shown = f"{default:g}" if isinstance(default, float) else str(default).replace(f"{ROOT}/", "")
        text += f" (default: {shown})"
    if field.metadata.get("choices"):
        return {"choices": field.metadata["choices"], "help": text}
    metavar = "N" if "int" in hint else "X" if "float" in hint else "TEXT"
    return {"metavar": metavar, "nargs": "+" if "list" in hint else None, "help": text}


def to_json(config: Any) -> str:
    """One setting a line; tokens are left out."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "hub_token"}
    return json.dumps(values, indent=1) + "\n"


def arguments_of(config: Any) -> list[str]:
    """The command line that gives this config again."""
    words: list[str] = []
    for field in fields(config):
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
def stoppable(message: str | int, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP)) -> Iterator[None]:
    """In the block these signals act as Ctrl-C, and either ends the program, with a message or a code."""
    for number in signals:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(message)


def main_guard(program: Any) -> None:
    """Run a command: a mistake of the user's, or a file that fails, is one message and exit code 2.

    --debug: with the traceback.
    """
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        program()
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"Error: {_told(error)}", file=sys.stderr)
        sys.exit(2)


def _told(error: UserError | OSError) -> str:
    """The message of an error, with the file that the system names."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
