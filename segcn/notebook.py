"""How every notebook begins: quietly, and with the parameters that it has, of the types that it has."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from IPython import get_ipython

from segcn.errors import UserError
from segcn.show import quiet

INJECTED = "# Parameters\n"  # how papermill begins the cell that it puts behind the one tagged `parameters`
TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def begin() -> None:
    """Set the figures' style, silence notices, and check what papermill put behind the parameters cell.

    To be called soon after that cell. UserError names an unknown parameter, of which papermill itself only warns, and
    one of another type.
    """
    quiet()
    shell = get_ipython()
    if shell is not None:
        check_cells(shell.user_ns["In"][1:3])


def check_cells(cells: Sequence[str]) -> None:
    """The same, of the first two cells that were executed."""
    if len(cells) < 2 or not cells[1].startswith(INJECTED):
        return
    types, given = types_of(cells[0]), values_of(cells[1])
    unknown = [name for name in given if name not in types]
    if unknown:
        raise UserError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(types)}")
    for name, value in given.items():
        fits = isinstance(value, TYPES[types[name]]) and isinstance(value, bool) == (types[name] == "bool")
        if not fits:
            raw = f"; papermill takes texts as they are by -r {name} VALUE" if types[name] == "str" else ""
            raise UserError(f"parameter {name}: expected {types[name]}, found {value!r}{raw}")


def types_of(cell: str) -> dict[str, str]:
    """The name and the type of every line such as `limit: int = 16  # rows`."""
    return dict(re.findall(r"^(\w+): (\w+) = ", cell, re.MULTILINE))


def values_of(cell: str) -> dict[str, Any]:
    """The name and the value of every assignment of a literal."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
