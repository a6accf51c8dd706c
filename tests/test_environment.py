"""Promise: one list of dependencies, in pyproject.toml; environment.yml only points to it."""

import ast
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USED_THROUGH_ANOTHER = dict.fromkeys(("tensorboard", "jupyterlab", "voila"))
OTHER_NAMES = {"pillow": "PIL"} | USED_THROUGH_ANOTHER


def extras():
    return PROJECT["optional-dependencies"]


def test_conda_installs_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert plain == [f"python{PROJECT['requires-python']}", "pip"] and pip == ["-e .[dev]"]


def test_dev_is_test_and_samples():
    assert extras()["dev"][0] == "segcn[test,samples]"


def test_every_dependency_is_imported():
    text = "\n".join(path.read_text() for path in (ROOT / "segcn").rglob("*.py"))
    modules = set()
    for node in ast.walk(ast.parse(text.replace("from __future__", "#"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
    for requirement in PROJECT["dependencies"]:
        name = requirement.split(">=")[0]
        module = OTHER_NAMES.get(name, name)
        assert module is None or module in modules, f"{name} is listed but never imported"


def test_every_dependency_says_why_it_is_there():
    lines = re.findall(r'^    "[a-z][\w-]*(?:>=[\d.]+)?",.*', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    listed = [*PROJECT["dependencies"], *(one for name in ("samples", "test") for one in extras()[name])]
    assert len(lines) == len(listed) and all(re.search(r",\s+# \S", line) for line in lines)


def test_hooks_before_a_commit_are_local_and_run_what_dev_installs():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]
    entries = [hook["entry"].split()[0] for hook in repositories[0]["hooks"]]
    assert entries == ["ruff", "ruff", "mypy", "jupyter"]
    assert {"ruff", "mypy"} <= {word.split(">=")[0] for word in extras()["test"]}
    assert {"segcn[test,samples]", "pre-commit"} <= {word.split(">=")[0] for word in extras()["dev"]}
