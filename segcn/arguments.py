"""Settings from where they are given: presets and keywords, a command line, and back to a command line or JSON."""

import dataclasses
import json
import os
import sys
from dataclasses import fields
from typing import Any, TypeVar

from segcn.errors import UserError
from segcn.files import SYMLINKS

Config = TypeVar("Config")


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
    """Read a command line; the preset's defaults stand below whatever is given."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, prog=program, description=kind.__doc__, allow_abbrev=False)
    if "preset" in {field.name for field in fields(kind)}:
        preset = parser.parse_known_args(arguments)[0].preset
        parser.set_defaults(**preset_defaults(kind, preset))
    config, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if rest:
        raise UserError(f"{program}: unknown {rest[0]!r}; {program} --help lists every flag")
    if getattr(config, "allow_symlinks", False):
        os.environ[SYMLINKS] = "1"  # for the processes and notebooks that this one starts, too
    return config


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


def main_guard(program: Any) -> None:
    """Run a command: a user's mistake is one message and exit code 2, without a traceback unless --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        program()
    except UserError as error:
        if debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
