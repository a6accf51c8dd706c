"""Promise: `segcn run` picks the notebooks asked for, passes on what each one knows, and names the cell that fails."""

import shutil

import nbformat
import papermill
import pytest

from segcn import cli
from segcn.data.metadata import read_split
from segcn.notebook import run
from segcn.notebook.config import RunConfig
from segcn.notebook.workspace import NOTEBOOKS, open_workspace
from segcn.utils.errors import UserError
from segcn.utils.paths import OUTPUTS


def test_a_part_of_the_notebooks_can_be_chosen():
    assert [path.stem for path in run.choose("03,4")] == ["03_train", "04_generate"]
    assert [path.stem[:2] for path in run.choose("")] == ["01", "02", "03", "04", "05"]
    with pytest.raises(UserError, match="no notebook 09"):
        run.choose("03,09")


def test_each_notebook_gets_the_settings_that_it_has():
    config = RunConfig(max_train_steps=7, limit=9, dataset_name="mine")
    given = [run.parameters_for(path, config) for path in run.choose("01,03,04")]
    common = {"preset": "tiny", "dataset_name": "mine"}
    assert given == [common, common | {"max_train_steps": 7}, common | {"limit": 9}]


def test_a_failing_cell_is_named_and_the_executed_copy_kept(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Break"), nbformat.v4.new_code_cell("1 / 0")]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "broken.ipynb")
    with pytest.raises(UserError, match=r"broken\.ipynb, cell 1: ZeroDivisionError"):
        run.execute(tmp_path / "broken.ipynb", tmp_path / "out", {})
    assert (tmp_path / "out" / "notebooks" / "broken.html").is_file()


def test_paths_of_the_command_line_count_from_where_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run.from_here(RunConfig(dataset_name="mine"))
    assert config.dataset_name == str(tmp_path / "mine") and config.pretrained_model_name_or_path == ""
    assert config.output_dir == str(OUTPUTS / "tiny")


def test_without_a_test_folder_the_last_rows_are_held_out(landscapes, tmp_path):
    whole = read_split(landscapes, "train")
    ws = open_workspace(dataset_name=str(landscapes / "train" / "metadata.csv"), output_dir=str(tmp_path))
    assert (ws.train_split().records, ws.test_split().records) == (whole.records[:10], whole.records[10:])
    split = open_workspace(dataset_name=str(landscapes), output_dir=str(tmp_path))
    assert (len(split.train_split()), len(split.test_split())) == (12, 6)


def test_too_few_rows_to_hold_some_out_are_refused(landscapes, tmp_path):
    shutil.copytree(landscapes / "train", tmp_path, dirs_exist_ok=True)
    shutil.copy(landscapes / "palette.json", tmp_path)
    rows = (landscapes / "train" / "metadata.csv").read_text().splitlines()
    (tmp_path / "metadata.csv").write_text("\n".join(rows[:3]) + "\n")
    with pytest.raises(UserError, match="expected at least 3 rows, some of them to hold out, found 2"):
        open_workspace(dataset_name=str(tmp_path), output_dir=str(tmp_path / "out"))


def test_the_sd15_preset_asks_for_what_it_needs():
    with pytest.raises(UserError, match="--pretrained_model_name_or_path"):
        open_workspace("sd15")


def test_segcn_run_takes_the_parameters_of_the_five_notebooks_and_no_others():
    names = set()
    for number in range(1, 6):
        path = next((NOTEBOOKS).glob(f"0{number}_*.ipynb"))
        names |= set(papermill.inspect_notebook(str(path)))
    assert set(RunConfig.__dataclass_fields__) == names | {"only", "allow_symlinks"}
    with pytest.raises(UserError, match=r"unknown flag --max_train_stepz\. Did you mean --max_train_steps"):
        cli.run_command(["run", "--max_train_stepz", "3"])
    with pytest.raises(UserError, match="--limit: expected a whole number, found 'three'"):
        cli.run_command(["run", "--limit", "three"])
