"""Promise: one guard compares settings by meaning, one template engine escapes what it shows, one split shares work."""

import json

import numpy as np
import pytest

from segcn.utils.errors import UserError
from segcn.utils.html import img, render
from segcn.utils.io import Process, same_settings


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


def test_a_page_escapes_texts_and_holds_its_images(tmp_path, monkeypatch):
    text = render("utils/templates/page.html", title="<b>a & b</b>")
    assert "<h1>&lt;b&gt;a &amp; b&lt;/b&gt;</h1>" in text and text.startswith("<!doctype html>")
    assert img(np.zeros((2, 2, 3), np.uint8)).startswith('<img alt="" src="data:image/png;base64,')
