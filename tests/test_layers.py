"""Promise: imports between the rooms point downward, never in a circle, and a public name has one meaning."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import segcn

PACKAGE = Path(segcn.__file__).parent
ROOMS = ("utils", "data", "models", "evaluate", "generate", "train", "study", "samples", "bench", "notebook", "cli")
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(path):
    """The modules of ours that a file imports, inside functions as well, but not for its type annotations alone."""
    tree = ast.parse(path.read_text())
    typing = {id(node) for block in tree.body if isinstance(block, ast.If) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segcn") and id(node) not in typing:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def room(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_between_rooms_point_downward(module):
    mine = room(module)
    if mine in ROOMS:
        below = {room(other) for other in imported(MODULES[module])} - {""}
        assert all(ROOMS.index(other) <= ROOMS.index(mine) for other in below), sorted(below)


def test_no_module_imports_itself_in_a_circle():
    tuple(TopologicalSorter({name: set(imported(path)) for name, path in MODULES.items()}).static_order())


def test_the_package_is_ten_rooms_and_the_command_line():
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert found == {*ROOMS, "__init__"}


ON_PURPOSE = {  # names that several modules define, and why
    "main": "what `python -m` runs: one in each module that is a program",
    "Log": "the type of a function that takes a line, named where it is used",
}


def public_names(path):
    """What a module defines at its top level, without what it imports."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_no_public_name_is_defined_in_two_modules():
    found = Counter(name for path in MODULES.values() for name in set(public_names(path)) if name[0] != "_")
    twice = {name for name, count in found.items() if count > 1}
    assert sorted(twice - set(ON_PURPOSE)) == []
