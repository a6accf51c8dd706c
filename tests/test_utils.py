"""Promise: settings are compared by meaning, pages escape texts, work is split and its progress is shown."""

import json
import sys

import numpy as np
import pytest

from segcn.utils.errors import UserError
from segcn.utils.html import img, render
from segcn.utils.io import Process, same_settings
from segcn.utils.progress import Progress


def test_settings_are_recorded_compared_by_meaning_and_changed_on_request_alone(tmp_path):
    path, said = tmp_path / "run" / "settings.json", []
    assert same_settings(path, {"sides": (1, 2), "seed": 0, "steps": 5}) == []
    written = path.read_bytes()
    assert same_settings(path, {"steps": 9, "sides": [1, 2], "seed": 0}, free={"steps"}, write=False) == []
    assert path.read_bytes() == written
    with pytest.raises(
        UserError, match=r"holds a study with other settings:\n  seed: was 0, is 1\n  rate: was 2, is 3"
    ):
        same_settings(path, {"seed": 1, "rate": 3}, what="study", defaults={"rate": 2})
    assert path.read_bytes() == written
    assert same_settings(path, {"seed": 1}, allow=True, log=said.append) == ["seed: was 0, is 1"]
    assert json.loads(path.read_text()) == {"seed": 1} and said == ["Changed: seed: was 0, is 1"]
    path.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        same_settings(path, {"seed": 1})


@pytest.mark.parametrize(("count", "world"), [(0, 1), (7, 3), (2, 5)])
def test_every_piece_of_work_belongs_to_one_process(count, world):
    shares = [list(Process(rank, world).share(count)) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_page_escapes_texts_and_holds_its_images():
    text = render("utils/templates/page.html", title="<b>a & b</b>")
    assert "<h1>&lt;b&gt;a &amp; b&lt;/b&gt;</h1>" in text and text.startswith("<!doctype html>")
    assert img(np.zeros((2, 2, 3), np.uint8)).startswith('<img alt="" src="data:image/png;base64,')


def test_progress_is_a_bar_in_a_terminal_and_a_line_now_and_then_in_a_log(monkeypatch, capsys):
    lines, clock = [], iter([0.0, 4.0, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress("rows encoded", 4, lines.append)
    for done in (1, 2, 3):
        progress(done)
    assert lines == ["  rows encoded 2 of 4, 0.2 per second"]
    monkeypatch.undo()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("rows encoded", 2)
    progress.bar.delay = 0
    progress(1)
    assert "rows encoded" in progress.bar.desc and progress.bar.n == 1
    progress(2)
    assert progress.bar.disable and "per second" not in capsys.readouterr().out
