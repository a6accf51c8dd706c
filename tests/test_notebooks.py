import ast
import json
import re
from itertools import pairwise

import nbformat
import papermill
import pytest
from diffusers import ControlNetModel
from PIL import Image

from segcn.config import ROOT
from segcn.records import check_split, read_split

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
COMMON = {"preset", "pretrained_model_name_or_path", "dataset_name", "output_dir"}
NAMES = ["01_inspect_data", "02_paired_augmentation", "03_train", "04_generate", "05_evaluate"]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each_notebook
def test_it_is_committed_without_outputs(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(book))
    assert book.metadata.kernelspec.name == "python3"


@each_notebook
def test_parameters_are_typed_scalars_with_a_comment(path):
    book = nbformat.read(path, 4)
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code_cells(book)[:1]
    lines = tagged[0].source.splitlines()
    assert all(re.fullmatch(r"\w+: (str|int|float|bool) = \S+ +# .+", line) for line in lines)
    assert {line.split(":")[0] for line in lines} >= COMMON
    assert set(papermill.inspect_notebook(str(path))) == {line.split(":")[0] for line in lines}


@each_notebook
def test_logic_lives_in_the_package(path):
    for cell in code_cells(nbformat.read(path, 4)):
        assert len(cell.source.splitlines()) <= 15, cell.source
        nodes = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not nodes & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try}, cell.source


@each_notebook
def test_prose_stands_before_each_code_cell(path):
    cells = nbformat.read(path, 4).cells
    assert cells[0].source.startswith("# ") and cells[-1].source.startswith("## What to try next")
    assert all(before.cell_type == "markdown" for before, cell in pairwise(cells) if cell.cell_type == "code")


@each_notebook
def test_it_mentions_no_place_of_one_machine(path):
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory, landscapes, random_base):
    """Notebooks 01 to 05 in order with toy sizes, from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("run")
    common = {
        "pretrained_model_name_or_path": str(random_base),
        "dataset_name": str(landscapes),
        "output_dir": str(folder / "out"),
    }
    toy = {
        "02_paired_augmentation": {"resolution": 64},
        "03_train": {"max_train_steps": 4, "train_batch_size": 2, "resolution": 64, "validation_steps": 2},
        "04_generate": {"limit": 4, "num_inference_steps": 2},
        "05_evaluate": {"limit": 4, "floor_limit": 3, "segmenter_steps": 3},
    }
    books = {}
    for name in NAMES:
        books[name] = papermill.execute_notebook(
            str(ROOT / "notebooks" / f"{name}.ipynb"),
            str(folder / f"{name}.ipynb"),
            common | toy.get(name, {}),
            progress_bar=False,
            cwd=str(folder),
            kernel_name="python3",
        )
    return folder / "out", books


def printed(book):
    return "".join(
        output.text for cell in code_cells(book) for output in cell.outputs if output.output_type == "stream"
    )


def pictures(book):
    outputs = [output for cell in code_cells(book) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_runs_headless(run):
    out, _ = run
    assert ControlNetModel.from_pretrained(out / "controlnet")
    assert [len(read_split(out / name)) for name in ("generated", "reconstructions", "painted")] == [4, 4, 1]
    assert len(read_split(out / "generated_without_mask")) == 3
    for name in ("generated", "painted"):
        check_split(read_split(out / name))
    assert set(json.loads((out / "metrics.json").read_text())["faithfulness"]) >= {"real", "synthetic", "floor"}
    assert Image.open(out / "story.png").width >= 1400


def test_the_runs_are_free_of_litter(run):
    for name, book in run[1].items():
        errors = [output for cell in code_cells(book) for output in cell.outputs if output.get("name") == "stderr"]
        assert not errors, (name, errors)
        assert "Warning" not in printed(book), name


def test_each_notebook_shows_pictures(run):
    assert [pictures(book) >= least for book, least in zip(run[1].values(), (5, 3, 3, 3, 3), strict=True)] == [True] * 5
