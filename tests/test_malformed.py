"""Promise: each of hundreds of malformed data sets gives one error with file and row; nothing is written or hangs."""

import os
import signal
import subprocess
import sys

import malformed
import pytest

from segcn.data.config import DoctorConfig
from segcn.data.doctor import scan
from segcn.data.doctor.findings import examine
from segcn.data.metadata import check_split, read_split
from segcn.utils.errors import UserError

CORPUS = malformed.corpus()


@pytest.fixture(autouse=True)
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
    examine(DoctorConfig(dataset_name=str(malformed.sound(tmp_path_factory.mktemp("first") / "pairs"))), log=len)
    sys.addaudithook(note)
    watching.append(True)
    yield paths
    watching.clear()  # the hook itself stays to the end
    patch.undo()


def listing(folder):
    """Every name below a folder with its kind and bytes."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else b"" for path in folder.rglob("*")}


def test_the_corpus_is_large_and_what_it_breaks_was_sound(tmp_path):
    assert len(CORPUS) >= 150
    check_split(read_split(malformed.sound(tmp_path / "pairs")))


@pytest.mark.parametrize("name", CORPUS)
def test_a_malformed_data_set_is_refused_with_file_and_row_and_no_file_outside_is_opened(tmp_path, name, opened):
    """Training names the first fault; the doctor finds it too, in that row alone. Neither leaves the folder."""
    change, where = CORPUS[name]
    folder = malformed.sound(tmp_path / "pairs")
    change(folder)
    before, rows = listing(tmp_path), {1}
    opened.clear()
    with pytest.raises(UserError) as refused:
        check_split(read_split(folder))
    try:
        rows = {finding.row for finding in examine(DoctorConfig(dataset_name=str(folder)), log=len).errors}
    except UserError:
        assert "row 1" not in where
    inside = os.path.realpath(folder) + os.sep
    assert [path for path in opened if not os.path.realpath(path).startswith(inside)] == []
    assert where in str(refused.value) and str(folder) in str(refused.value)
    assert "Traceback" not in str(refused.value) and str(refused.value).isprintable()
    assert (rows == {1} and opened) or "row 1" not in where
    assert listing(tmp_path) == before


def test_the_commands_give_one_line_and_exit_code_2(tmp_path):
    folder = malformed.sound(tmp_path / "pairs")
    malformed.csv_of("image,mask\n")(folder)
    for words in (
        ["validate", str(folder)],
        ["train", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "o")],
    ):
        ended = subprocess.run([sys.executable, "-m", "segcn.cli", *words], capture_output=True, text=True, timeout=300,
                               env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
        assert ended.returncode != 0 and "metadata.csv, line 1" in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stdout + ended.stderr
    assert not (tmp_path / "o").exists()
