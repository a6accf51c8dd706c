"""Promise: imports point downward, what reads data knows no network, and sample data are imported only from the top."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import segcn

PACKAGE = Path(segcn.__file__).parent
DATA_ROOMS = ("labels", "masks", "records", "geometry", "augment", "dataset", "scan", "tables")
NETWORK_ROOMS = {"models", "segmenter", "trainable", "latents", "pipeline"}


def imported(path):
    """The rooms of ours that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "segcn":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segcn."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("segcn."))


def rooms():
    """What each room imports; the sample data are one room."""
    found = {path.stem: set(imported(path)) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    samples = {name for path in (PACKAGE / "samples").glob("*.py") for name in imported(path)} - {"samples"}
    return found | {"samples": samples}


def test_imports_point_downward():
    order = list(TopologicalSorter(rooms()).static_order())  # a CycleError names the rooms of a circle
    assert set(order) == set(rooms()) and not any("cli" in below for below in rooms().values())


def test_what_reads_data_knows_no_network():
    below = rooms()
    for room in DATA_ROOMS:
        reached, todo = set(), [room]
        while todo:
            todo += (new := below[todo.pop()] - reached)
            reached |= new
        assert not reached & NETWORK_ROOMS, f"{room} reaches {reached & NETWORK_ROOMS}"


def test_sample_data_are_imported_only_from_the_top():
    assert {room for room, below in rooms().items() if "samples" in below} <= {"cli", "samples_cli", "workspace"}
