"""Promise: the notebooks are clean and run headless on own data; `segcn run` picks some and names a failing cell."""

import ast
import base64
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import papermill
import pytest
from diffusers import ControlNetModel
from PIL import Image

from segcn.data.files import read_image
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import check_split, read_split, write_metadata
from segcn.data.palette import Label, Palette
from segcn.models.segmenter import SegmenterConfig, train_segmenter
from segcn.notebook import app
from segcn.notebook import run as running
from segcn.notebook.config import AppConfig, RunConfig
from segcn.notebook.workspace import check_cells, with_parameters
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LESSON_COMMON = {"pretrained_model_name_or_path", "output_dir"}
COMMON = LESSON_COMMON | {"preset", "dataset_name"}
NAMES = ["01_inspect_data", "02_paired_augmentation", "03_train", "04_generate", "05_evaluate"]
LESSON = "00_embedded_base"
BENCHMARK, SWEEP, APP = "06_benchmark", "07_sweep", "08_app"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@each_notebook
def test_it_is_clean_and_its_parameters_are_typed_scalars_with_a_comment(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(book))
    assert book.metadata.kernelspec.name == "python3"
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code_cells(book)[:1]
    lines = tagged[0].source.splitlines()
    assert all(re.fullmatch(r"\w+: (str|int|float|bool) = \S+ +# .+", line) for line in lines)
    assert {line.split(":")[0] for line in lines} >= (COMMON if path.stem in NAMES else LESSON_COMMON)
    assert set(papermill.inspect_notebook(str(path))) == {line.split(":")[0] for line in lines}
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), "a place of one machine"


@each_notebook
def test_logic_is_in_the_package_and_prose_before_each_code_cell(path):
    cells = nbformat.read(path, 4).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert cells[0].source.startswith("# ") and any(text.startswith("## What to try next") for text in prose[-2:])
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown" and len(cell.source.splitlines()) <= 15, cell.source
            nodes = {type(node) for node in ast.walk(ast.parse(cell.source))}
            assert not nodes & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try}, cell.source


def test_segcn_run_takes_the_parameters_of_the_five_notebooks_and_passes_on_what_each_has():
    assert [path.stem for path in NOTEBOOKS] == [LESSON, *NAMES, BENCHMARK, SWEEP, APP]
    assert [path.stem for path in running.choose("")] == NAMES
    assert [path.stem for path in running.choose("03,4")] == ["03_train", "04_generate"]
    with pytest.raises(UserError, match="no notebook 09"):
        running.choose("03,09")
    names = {name for path in running.choose("") for name in papermill.inspect_notebook(str(path))}
    assert set(RunConfig.__dataclass_fields__) == names | {"only", "allow_symlinks"}
    config = RunConfig(max_train_steps=7, limit=9, dataset_name="mine")
    given = [running.parameters_for(path, config) for path in running.choose("01,03,04")]
    common = {"preset": "tiny", "dataset_name": "mine"}
    assert given == [common, common | {"max_train_steps": 7}, common | {"limit": 9}]


def test_segcn_app_fills_in_the_parameters_of_the_notebook_that_voila_serves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set(papermill.inspect_notebook(str(app.NOTEBOOK)))
    assert set(AppConfig.__dataclass_fields__) == names | app.OF_SERVER
    (tmp_path / "08.ipynb").write_text(app.with_settings(app.NOTEBOOK, AppConfig(dataset_name="mine", resolution=64)))
    book = nbformat.read(tmp_path / "08.ipynb", 4)
    nbformat.validate(book)
    given: dict = {}
    exec(code_cells(book)[0].source, given)
    assert set(given) == names | {"__builtins__"} and given["resolution"] == 64
    assert given["dataset_name"] == str(tmp_path / "mine") and given["segmenter"] == ""


def test_paths_of_the_command_line_count_from_where_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = running.from_here(RunConfig(dataset_name="mine"))
    assert config.dataset_name == str(tmp_path / "mine") and config.pretrained_model_name_or_path == ""
    assert config.output_dir == str(OUTPUTS / "tiny")


def test_a_failing_cell_is_named_and_the_executed_copy_kept(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Break"), nbformat.v4.new_code_cell("1 / 0")]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "broken.ipynb")
    with pytest.raises(UserError, match=r"broken\.ipynb, cell 1: ZeroDivisionError"):
        running.execute(tmp_path / "broken.ipynb", tmp_path / "out", {})
    assert (tmp_path / "out" / "notebooks" / "broken.html").is_file()


def test_a_page_of_a_notebook_loads_nothing_from_elsewhere_and_says_what_each_image_shows():
    png = base64.b64encode((ROOT / "data" / "study.png").read_bytes()).decode()
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Panel(...)"}
    cells = [nbformat.v4.new_markdown_cell("## What it <shows>\n\nMore.")]
    for data in ({"image/png": png, "text/plain": "<Figure>"}, view):
        cells.append(nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", data)]))
    page = running.offline_page(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"state": 1}}))
    assert f'<img alt="What it &lt;shows&gt;" src="data:image/png;base64,{png}"' in page
    assert running.NEEDS_KERNEL in page and "Panel(...)" not in page and "No description" not in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\W?http[^>]*>|import .*http", page)


def test_unknown_parameters_and_wrong_types_are_refused_by_name():
    cell = (
        'limit: int = 128  # rows\nscale: float = 0.0  # weight\nname: str = ""  # text\nfast: bool = False  # or not'
    )
    check_cells([cell])
    check_cells([cell, "# Parameters\nlimit = 3\nscale = 2\nname = 'a'\nfast = True\n"])
    check_cells([cell, "import os"])
    for given, message in {
        "limits = 3": "unknown parameter limits; this notebook has limit, scale, name, fast",
        "limit = 'three'": "parameter limit: expected int, found 'three'",
        "limit = True": "parameter limit: expected int, found True",
        "name = 2": "parameter name: expected str, found 2; papermill takes texts as they are by -r name",
        "fast = 1": "parameter fast: expected bool, found 1",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            check_cells([cell, f"# Parameters\n{given}\n"])
    message = "--limit: expected 1, found 0; see --more, or run segcn validate DATA --limit 3"
    assert with_parameters(message, {"limit"}) == message[2:], "flags within a command stay flags"


def execute(name, folder, **parameters):
    """A notebook executed by papermill with its kernel in `folder`."""
    return papermill.execute_notebook(
        str(next((ROOT / "notebooks").glob(f"{name}*.ipynb"))), str(folder / f"{name}.ipynb"), parameters,
        progress_bar=False, cwd=str(folder), kernel_name="python3",
    )  # fmt: skip


@pytest.mark.parametrize(("parameters", "line"), [
    ({"limits": 3}, "unknown parameter limits; this notebook has preset, pretrained_model_name_or_path, "),
    ({"preset": "sd15"}, "preset sd15 needs pretrained_model_name_or_path DIR and dataset_name DIR of your own"),
])  # fmt: skip
def test_an_error_is_one_line_that_names_the_parameter(parameters, line, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"01_inspect_data.ipynb: {line}")):
        running.execute(ROOT / "notebooks" / "01_inspect_data.ipynb", tmp_path, parameters)
    cells = code_cells(nbformat.read(tmp_path / "notebooks" / "01_inspect_data.ipynb", 4))
    (error,) = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert error.ename == "UserError" and error.evalue.startswith(line)
    assert error.traceback == [f"Error: {error.evalue}"] and "\n" not in error.evalue


@pytest.fixture(scope="module")
def own_data(tmp_path_factory, landscapes):
    """A user's own data: 18 rows of 64 x 56 pixels without test/, other classes with gaps in their ids."""
    folder = tmp_path_factory.mktemp("own") / "data"
    palette = Palette(
        (Label(1, "air", (9, 9, 200)), Label(4, "land", (9, 200, 9)), Label(7, "thing", (200, 9, 9)),
         Label(255, "void", (0, 0, 0), ignore=True))
    )  # fmt: skip
    classes = np.array([1, 1, 1, 4, 4, 4, 7, 7, 255], np.uint8)
    rows = []
    for record in [*read_split(landscapes, "train").records, *read_split(landscapes, "test").records]:
        names = f"photos/{len(rows)}.png", f"labels/{len(rows)}.png"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(read_image(record.image)[:56]).save(folder / names[0])
        mask = read_mask(record.mask, read_split(landscapes, "test").palette)[:56]
        write_mask(folder / names[1], classes[mask], palette)
        rows.append((*names, f"a scene with number {len(rows)}"))
    palette.save(folder / "palette.json")
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, own_data, random_base):
    """Notebooks 01 to 05 in order on own base and data with toy sizes, from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("run")
    common = {
        "preset": "sd15", "pretrained_model_name_or_path": str(random_base),
        "dataset_name": str(own_data / "metadata.csv"), "output_dir": str(folder / "out"),
    }  # fmt: skip
    settings = SegmenterConfig(steps=3, batch_size=2, width=8, resolution=64)
    train_segmenter(read_split(own_data), settings, folder / "segmenter", lambda line: None)
    flags = f"--validation_steps 2 --segmenter {folder / 'segmenter'}"
    toy = {
        "02_paired_augmentation": {"resolution": 64},
        "03_train": {"max_train_steps": 4, "train_batch_size": 2, "resolution": 64, "more_flags": flags},
        "04_generate": {"limit": 4, "num_inference_steps": 2, "guidance_scale": 3.0},
        "05_evaluate": {"limit": 4, "floor_limit": 1, "segmenter_steps": 3},
    }
    given = {name: common | toy.get(name, {}) for name in NAMES}
    return Run(folder / "out", given, {name: execute(name, folder, **given[name]) for name in NAMES})


class Run(NamedTuple):
    """The folder of a run, the parameters of its notebooks, and the executed notebooks."""

    out: Path
    given: dict
    books: dict


def printed(book):
    return "".join(
        output.text for cell in code_cells(book) for output in cell.outputs if output.output_type == "stream"
    )


@pytest.fixture
def again(run, tmp_path):
    """A function that executes a notebook in a copy of the run with other parameters, and gives what it printed."""
    shutil.copytree(run.out, tmp_path / "out")
    given = {"output_dir": str(tmp_path / "out")}
    return lambda name, **changes: printed(execute(name, tmp_path, **run.given[name] | given | changes))


def names_and_first(folder):
    """The data sets of other settings that are kept, and the first image of the one of these settings."""
    kept = sorted(path.name for path in folder.glob("generated*-*"))
    return kept, (folder / "generated" / "images" / "000000.png").read_bytes()


def test_other_settings_never_stop_notebook_04(run, again, tmp_path):
    out, (_, first) = tmp_path / "out", names_and_first(run.out)
    text = again("04_generate", seed=1)
    sets, other = names_and_first(out)
    assert other != first and sets == ["generated-1"] and "it is generated-1 now" in text
    assert (out / "generated-1" / "images" / "000000.png").read_bytes() == first
    again("04_generate")
    assert names_and_first(out) == (["generated-2"], first)
    again("04_generate", seed=2, replace=True)
    assert names_and_first(out)[0] == ["generated-2"]


def test_after_more_training_steps_notebooks_04_and_05_go_on_with_a_folder_of_their_own(run, again, tmp_path):
    out, first = tmp_path / "out", names_and_first(run.out)[1]
    again("03_train", max_train_steps=6)
    recaptioned = ["generated_with_other_captions-1", "generated_without_class_words-1"]
    for notebook, more in {"04_generate": [], "05_evaluate": recaptioned}.items():
        assert "it is generated-1 now" in again(notebook)
        sets, other = names_and_first(out)
        assert other != first  # without its mask an image does not depend on the ControlNet
        assert sets == ["generated-1", *more]
        for name in more:
            shutil.rmtree(out / name)
        shutil.rmtree(out / "generated")
        (out / "generated-1").rename(out / "generated")
        assert names_and_first(out) == ([], first)
    assert (out / "metrics.json").read_bytes() != (run.out / "metrics.json").read_bytes()


def images(book):
    outputs = [output for cell in code_cells(book) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_runs_headless(run):
    out, metrics = run.out, json.loads((run.out / "metrics.json").read_text())
    assert ControlNetModel.from_pretrained(out / "controlnet")
    assert [len(read_split(out / name)) for name in ("generated", "reconstructions", "saved")] == [2, 2, 1]
    assert len(read_split(out / "generated_without_mask")) == 1
    for name in ("generated", "saved"):
        check_split(read_split(out / name))
    for name in ("generated", "generated_without_mask", "reconstructions", "saved"):
        assert Image.open(read_split(out / name)[0].image).size == (64, 64)  # as in training
    assert metrics["segmenter"]["resolution"] == 64 and set(metrics["faithfulness"]) == {
        "real", "reconstructions", "synthetic", "without_classes", "other_captions", "floor",
    }  # fmt: skip
    assert Image.open(out / "story.png").width >= 1400


def test_the_held_out_rows_are_said_and_not_trained_on(run, own_data):
    out, _, books = run
    assert "its last 2 rows are held out" in printed(books["01_inspect_data"])
    assert json.loads((out / "controlnet" / "train_config.json").read_text())["max_train_samples"] == 16
    captions = [record.caption for record in read_split(own_data).records]
    assert [record.caption for record in read_split(out / "generated").records] == captions[16:]


def test_the_training_is_scored_on_the_held_out_rows_and_names_its_best_checkpoint(run):
    out, _, books = run
    text = printed(books["03_train"])
    assert "on the 2 held-out real images (12 were requested" in text and "is the best:" in text
    best = json.loads((out / "controlnet" / "best.json").read_text())["checkpoint"]
    assert ControlNetModel.from_pretrained(out / "controlnet" / best / "controlnet")


def test_the_floor_and_the_sets_with_other_captions_have_the_settings_of_the_generated_set(run):
    names = "generated", *(f"generated_with{what}" for what in ("out_mask", "out_class_words", "_other_captions"))
    made, floor, cut, mixed = (json.loads((run.out / name / "generation.json").read_text()) for name in names)
    for other, flag in ((cut, "without_class_words"), (mixed, "mix_prompts")):
        assert {name for name in made if made[name] != other[name]} <= {flag, "rows"} and other[flag] and not made[flag]
    changed = {name for name in made if name not in floor or made[name] != floor[name]}
    assert changed <= {"without_control", "controlnet", "controlnet_weights"} and not made["without_control"]
    assert (floor["num_inference_steps"], floor["guidance_scale"], floor["resolution"]) == (2, 3.0, 64)


def test_each_notebook_shows_images_and_no_warnings(run):
    for (name, book), least in zip(run.books.items(), (5, 3, 5, 3, 3), strict=True):
        errors = [output for cell in code_cells(book) for output in cell.outputs if output.get("name") == "stderr"]
        assert not errors and "Warning" not in printed(book), (name, errors)
        assert images(book) >= least, name


def test_the_lesson_runs_headless(tmp_path):
    book = execute(LESSON, tmp_path, output_dir=str(tmp_path / "lesson"), steps=2, num_inference_steps=2)
    text = printed(book)
    assert "stopped before" in text and "Resuming from work/vae/checkpoint-2" in text and "Warning" not in text
    assert images(book) == 10 and (tmp_path / "lesson" / "scratch" / "base" / "unet").is_dir()


@pytest.mark.usefixtures("sample_set")
def test_the_benchmark_shows_the_newest_results(tmp_path, random_base):
    settings = {
        "baseline": "train_controlnet.py", "pretrained_model_name_or_path": str(random_base), "dataset_name": "",
        "warmup_steps": 1, "measured_steps": 2, "resolution": 64, "train_batch_size": 8, "max_train_samples": 8,
        "seed": 0,
    }  # fmt: skip
    shared = {"versions": {"torch": "2"}, "machine": "a machine", "other_load": 0.1, "step_ends": [], "first_step": 9.0}
    entries = [
        shared | {"variant": variant, "side": side, "round": 1, "began": began, "settings": settings, "peak_gib": 2.0,
                  "samples_per_second": pace, "samples_per_second_with_start": 1.0, "seconds_per_step": 8 / pace}
        for variant in ("ours", "same") for began, side, pace in ((1, "baseline", 5.0), (2, "ours", 9.2))
    ]  # fmt: skip
    older = [entry | {"machine": "another", "began": 0, "samples_per_second": 77.0} for entry in entries]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "train.json").write_text(json.dumps(older + entries))
    book = execute(BENCHMARK, tmp_path, output_dir=str(tmp_path / "bench"))
    text = printed(book)
    assert text.count("1.84x") == 2 and "77" not in text and "GFLOP a step" in text and "Warning" not in text
    assert images(book) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("sample_set")
def test_the_benchmark_runs_headless_without_a_baseline(tmp_path):
    book = execute(BENCHMARK, tmp_path, output_dir=str(tmp_path / "bench"), measured_steps=2)
    assert "segcn --cache none" in printed(book) and images(book) == 1
    assert len(json.loads((tmp_path / "bench" / "train.json").read_text())) == 2
