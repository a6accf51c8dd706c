"""Promise: each of hundreds of malformed data sets gives one error with file and row; nothing is written or hangs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import malformed
import pytest

from segcn.data.config import DoctorConfig
from segcn.data.doctor import scan
from segcn.data.doctor.findings import examine
from segcn.data.metadata import check_split, read_split
from segcn.utils.errors import UserError

CORPUS = malformed.corpus()
WATCHED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import malformed
from segcn.data.doctor import scan
from segcn.data.config import DoctorConfig
from segcn.data.doctor.findings import examine
from segcn.utils.errors import UserError
from segcn.data.metadata import check_split, read_split

opened = []
def hook(event, args):
    if event == "open" and watching and isinstance(args[0], (str, bytes)):
        opened.append(os.path.abspath(os.fsdecode(args[0])))
watching = False
sys.addaudithook(hook)
tokenizer = scan.caption_tokenizer(DoctorConfig().pretrained_model_name_or_path)
scan.caption_tokenizer = lambda folder: tokenizer
examine(DoctorConfig(dataset_name=str(malformed.sound(Path(sys.argv[2], "first")))), log=len)
for number, (name, (change, _)) in enumerate(malformed.corpus().items()):
    folder = malformed.sound(Path(sys.argv[2], str(number), "pairs"))
    change(folder)
    watching, opened[:] = True, []
    config = DoctorConfig(dataset_name=str(folder))
    for check in (lambda: check_split(read_split(folder)), lambda: examine(config, log=len)):
        try:
            check()
        except UserError:
            pass
    watching = False
    inside = os.path.realpath(folder) + os.sep
    print(json.dumps([name, [path for path in opened if not os.path.realpath(path).startswith(inside)]]))
"""


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
def tokenizer():
    return scan.caption_tokenizer(DoctorConfig().pretrained_model_name_or_path)


def listing(folder):
    """Every name below a folder with its kind and bytes."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else b"" for path in folder.rglob("*")}


def test_the_corpus_is_large_and_what_it_breaks_was_sound(tmp_path):
    assert len(CORPUS) >= 150
    check_split(read_split(malformed.sound(tmp_path / "pairs")))


@pytest.mark.parametrize("name", CORPUS)
def test_a_malformed_data_set_is_refused_with_file_and_row(tmp_path, name):
    change, where = CORPUS[name]
    folder = malformed.sound(tmp_path / "pairs")
    change(folder)
    before = listing(tmp_path)
    with pytest.raises(UserError) as refused:
        check_split(read_split(folder))
    assert where in str(refused.value) and str(folder) in str(refused.value)
    assert "Traceback" not in str(refused.value) and str(refused.value).isprintable()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", [name for name, (_, where) in CORPUS.items() if "row 1" in where])
def test_the_doctor_finds_it_too_in_that_row_alone(tmp_path, name, tokenizer, monkeypatch):
    monkeypatch.setattr(scan, "caption_tokenizer", lambda folder: tokenizer)
    folder = malformed.sound(tmp_path / "pairs")
    CORPUS[name][0](folder)
    before = listing(tmp_path)
    errors = examine(DoctorConfig(dataset_name=str(folder)), log=len).errors
    assert {finding.row for finding in errors} == {1}
    assert listing(tmp_path) == before


def test_no_file_outside_the_folder_is_opened(tmp_path):
    """The folders of the corpus, read and examined while an audit hook notes every file that is opened."""
    words = [sys.executable, "-c", WATCHED, str(Path(__file__).parent), str(tmp_path)]
    lines = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    outside = dict(map(json.loads, lines))
    assert list(outside) == list(CORPUS)
    assert {name: paths for name, paths in outside.items() if paths} == {}


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
