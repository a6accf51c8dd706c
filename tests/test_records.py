"""Promise: metadata are read exactly, and each of hundreds of malformed data sets gives one error with file and row."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import malformed
import numpy as np
import pytest
from malformed import MASK, PALETTE, sound
from PIL import Image

from segcn.data.config import DoctorConfig
from segcn.data.doctor import scan
from segcn.data.doctor.findings import examine
from segcn.data.masks import write_mask
from segcn.data.metadata import COLUMNS, check_split, hold_out, read_named_split, read_split, write_metadata
from segcn.utils.errors import UserError

CORPUS = malformed.corpus()


@pytest.fixture
def folder(tmp_path):
    return sound(tmp_path / "pairs")


def refused(dataset, check=read_split):
    with pytest.raises(UserError) as caught:
        check(dataset)
    return str(caught.value)


def test_reads_what_was_written(folder):
    split = read_split(folder)
    assert [(record.row, record.line) for record in split.records] == [(0, 2), (1, 3), (2, 4)]
    assert (split[2].caption, split.palette) == ("a hill, number 2", PALETTE)
    assert (split[2].image, split[2].mask) == (folder / "images/2.png", folder / "masks/2.png")
    assert read_split(folder / "metadata.csv").records == read_split(folder, "train").records == split.records
    for name, message in ((folder, "test"), (folder / "metadata.csv", "name the folder above")):
        with pytest.raises(UserError, match=message):
            read_split(name, "test")


def test_splits_are_folders_under_one_palette_and_test_is_held_out(tmp_path, folder):
    for name, rows in (("train", 3), ("test", 2)):
        (sound(tmp_path / "splits" / name, rows) / "palette.json").unlink()
    splits = tmp_path / "splits"
    PALETTE.save(splits / "palette.json")
    assert len(read_split(splits)) == len(read_split(splits, "train")) == 3
    assert len(read_split(splits, "test")) == len(read_split(splits / "test")) == 2
    with pytest.raises(UserError, match="expected a split val, found test, train"):
        read_split(splits, "val")
    assert hold_out(splits) == ("train", "test")
    assert "at least 3 rows, some of them to hold out, found 2" in refused(splits / "test", hold_out)


@pytest.mark.parametrize(("rows", "kept"), [(3, 1), (16, 14), (80, 70), (1024, 896), (2000, 1872)])
def test_without_test_the_last_eighth_is_held_out_at_least_2_and_at_most_128(folder, rows, kept):
    write_metadata(folder, [("images/0.png", "masks/0.png", f"hill {number}") for number in range(rows)])
    for dataset in (folder, folder / "metadata.csv"):
        assert hold_out(dataset) == (f"train[:{kept}]", f"train[{kept}:]")
        assert [len(read_named_split(dataset, name)) for name in hold_out(dataset)] == [kept, rows - kept]


def test_metadata_keep_column_order_quotes_and_commas_and_a_failed_write_leaves_the_old_file(folder):
    write_metadata(folder, [("images/0.png", "masks/0.png", 'a "red"\nhouse, at dusk')])
    before = (folder / "metadata.csv").read_text()
    assert before.splitlines()[0] == ",".join(COLUMNS) and read_split(folder)[0].caption == 'a "red" house, at dusk'
    with pytest.raises(ValueError, match="unpack"):
        write_metadata(folder, [("images/0.png", "a caption")])
    assert (folder / "metadata.csv").read_text() == before and not list(folder.glob(".*"))


def test_a_folder_without_metadata_and_one_with_two_are_refused(tmp_path, folder):
    assert "found none" in refused(tmp_path) and "no such folder" in refused(tmp_path / "nowhere")
    assert "found a .json file" in refused(folder / "palette.json")
    (folder / "metadata.jsonl").write_text("{}")
    assert "expected one metadata file" in refused(folder)


def test_the_message_names_the_first_file_that_does_not_fit_and_how_many_more_rows_fail(folder):
    def message():
        return refused(folder, lambda dataset: check_split(read_split(dataset)))

    for row in (1, 2):
        Image.fromarray(np.full_like(MASK, 9)).save(folder / f"masks/{row}.png")
    for part in ("line 3 (row 1)", "masks/1.png", "value 9 (24 pixels)", "1 more of 3 rows fail"):
        assert part in message()
    write_mask(folder / "masks/1.png", MASK[:, 1:], PALETTE)
    for part in ("metadata.csv, line 3 (row 1)", "6 x 4", "5 x 4", "masks/1.png"):
        assert part in message()
    (folder / "images/0.png").write_bytes(b"nothing")
    assert "line 2 (row 0): column file_name" in message()
    for path in (folder / "images").iterdir():
        path.unlink()
    assert "line 2 (row 0)" in message() and "2 more of 3 rows fail" in message()


def test_the_fingerprint_changes_with_any_file(folder):
    before = read_split(folder).fingerprint
    assert before == read_split(folder).fingerprint == read_split(folder / "metadata.csv").fingerprint
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "images/1.png")
    assert read_split(folder).fingerprint != before


def test_reading_metadata_does_not_import_torch():
    code = "import sys, segcn.data.metadata; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_of_the_data_contract_run(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[1] / "data" / "README.md"
    examples = [part.split("```")[0] for part in readme.read_text().split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    for example in examples[:2]:  # the third needs `datasets`, see test_import.py
        exec(compile(example, str(readme), "exec"), values)
    expected = "8 pairs, 2 classes\n(3, 64, 64) (64, 64) a green hill under a clear sky\n"
    assert len(examples) == 3 and capsys.readouterr().out == expected


@pytest.fixture
def no_hang():
    """A test that takes minutes ends with an error."""

    def fail(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What an audit hook notes: every file that is opened while `watching`; imports and the tokenizer come before."""
    paths, watching = [], []

    def note(event, args):
        if watching and event == "open" and isinstance(args[0], (str, bytes)):
            paths.append(os.path.abspath(os.fsdecode(args[0])))

    tokenizer, patch = scan.caption_tokenizer(DoctorConfig().pretrained_model_name_or_path), pytest.MonkeyPatch()
    patch.setattr(scan, "caption_tokenizer", lambda folder: tokenizer)
    examine(DoctorConfig(dataset_name=str(sound(tmp_path_factory.mktemp("first") / "pairs"))), log=len)
    sys.addaudithook(note)
    watching.append(True)
    yield paths
    watching.clear()  # the hook itself stays to the end
    patch.undo()


def listing(folder):
    """Every name below a folder with its kind and bytes."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else b"" for path in folder.rglob("*")}


def test_the_corpus_is_large_and_what_it_breaks_was_sound(folder):
    assert len(CORPUS) >= 150 and malformed.WORDS.keys() <= CORPUS.keys()
    check_split(read_split(folder))


@pytest.mark.parametrize("name", CORPUS)
def test_a_malformed_data_set_is_refused_with_file_and_row_and_no_file_outside_is_opened(
    tmp_path, folder, name, opened, no_hang
):
    """Training names the first fault; the doctor finds it too, in that row alone. Neither leaves the folder."""
    change, where = CORPUS[name]
    change(folder)
    before, rows = listing(tmp_path), {1}
    opened.clear()
    message = refused(folder, lambda dataset: check_split(read_split(dataset)))
    try:
        rows = {finding.row for finding in examine(DoctorConfig(dataset_name=str(folder)), log=len).errors}
    except UserError:
        assert "row 1" not in where
    inside = os.path.realpath(folder) + os.sep
    assert [path for path in opened if not os.path.realpath(path).startswith(inside)] == []
    assert all(part in message for part in (where, str(folder), malformed.WORDS.get(name, "")))
    assert "Traceback" not in message and message.isprintable()
    assert (rows == {1} and opened) or "row 1" not in where
    assert listing(tmp_path) == before


def test_the_commands_give_one_line_and_exit_code_2(tmp_path, folder):
    malformed.csv_of("image,mask\n")(folder)
    out = tmp_path / "o"
    for words in (["validate", folder], ["train", "--dataset_name", folder, "--output_dir", out]):
        ended = subprocess.run([sys.executable, "-m", "segcn.cli", *words], capture_output=True, text=True, timeout=300)
        assert ended.returncode == 2 and "metadata.csv, line 1" in ended.stderr and "Traceback" not in ended.stderr
    assert not out.exists()
