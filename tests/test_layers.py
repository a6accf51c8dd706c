"""Promise: imports between the rooms point downward, a public name has one meaning; one list of dependencies."""

import ast
import re
import tomllib
from collections import Counter
from graphlib import TopologicalSorter

import pytest
import yaml

from segcn.utils.paths import ROOT

PACKAGE = ROOT / "segcn"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
OTHER_NAMES = {"pillow": "PIL", "tensorboard": None, "jupyterlab": None, "voila": None}  # None: used through another
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
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__", "README"))}
    assert found == {*ROOMS, "__init__"}


ON_PURPOSE = {"main", "Log"}  # what `python -m` runs; the type of a function that takes a line


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
    assert not twice - ON_PURPOSE, sorted(twice - ON_PURPOSE)


def test_conda_installs_what_pyproject_lists_and_dev_is_all_of_it():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert plain == [f"python{PROJECT['requires-python']}", "pip"] and pip == ["-e .[dev]"]
    assert EXTRAS["dev"][0] == "segcn[test,samples]"


def test_every_dependency_is_imported_and_says_why_it_is_there():
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    modules = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    names = [requirement.split(">=")[0] for requirement in PROJECT["dependencies"]]
    assert {OTHER_NAMES.get(name, name) for name in names} - {None} <= modules
    lines = re.findall(r'^    "[a-z][\w-]*(?:>=[\d.]+)?",.*', PYPROJECT, re.MULTILINE)
    assert len(lines) == len([*names, *EXTRAS["samples"], *EXTRAS["formats"], *EXTRAS["test"][1:]])
    assert all(re.search(r",\s+# \S", line) for line in lines)


def test_hooks_before_a_commit_are_local_and_run_what_dev_installs():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]
    assert [hook["entry"].split()[0] for hook in repositories[0]["hooks"]] == ["ruff", "ruff", "mypy", "jupyter"]
    assert {"ruff", "mypy"} <= {word.split(">=")[0] for word in EXTRAS["test"]}
    assert "pre-commit" in {word.split(">=")[0] for word in EXTRAS["dev"]}
