"""Promise: a file that goes bad after the check ends the run by name, or the next good row is cached in its place."""

import os
import shutil
import threading

import numpy as np
import pytest
from runs import ALONE
from torch.utils.data import DataLoader

from segcn.data.dataset import PairedDataset
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split
from segcn.data.transforms import AUGMENTS
from segcn.train import latent_cache, setup
from segcn.train.batches import Examples, Plan
from segcn.train.latent_cache import parse_limit
from segcn.utils.errors import UserError


@pytest.fixture
def rows(landscapes, tmp_path):
    """A copy of twelve rows, which may be spoiled."""
    shutil.copytree(landscapes, tmp_path / "data")
    return PairedDataset(read_split(tmp_path / "data", "train"), 32, AUGMENTS["affine"], 0)


def spoil(rows, row, fault="unreadable"):
    """Spoil the files of a row, their sizes and times kept where they can be."""
    record = rows.split[row]
    mask = read_mask(record.mask, rows.split.palette)
    if fault == "unreadable":
        status = record.image.stat()
        record.image.write_bytes(bytes(status.st_size))
        os.utime(record.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif fault == "other size":
        write_mask(record.mask, mask[:40], rows.split.palette)
    else:
        write_mask(record.mask, np.full_like(mask, 200), rows.split.palette)


def examples(rows, cache=None):
    return Examples(rows, cache, 8, (12, 4, 4), {"seed": 0, "timesteps": 1000})


@pytest.mark.parametrize(
    "text", ["", "skip", "skip:", "skip:0", "skip:-1", "skip:1.5", "skip:²", "Fail", "fail:1", "3"]
)
def test_a_wrong_flag_is_refused_with_what_is_expected(text):
    with pytest.raises(UserError, match=r"--on_bad_sample: expected fail, or skip:N .*found"):
        parse_limit(text)
    assert parse_limit("fail") == 0 and parse_limit("skip:12") == 12


@pytest.mark.parametrize(
    ("fault", "found"), [("unreadable", "cannot be read"), ("other size", "found 64 x 40"), ("undeclared", "200")]
)
@pytest.mark.parametrize("cached", [True, False])
def test_by_default_the_run_ends_with_file_and_row_and_leaves_no_thread(rows, base, tmp_path, fault, found, cached):
    spoil(rows, 5, fault)
    before = set(threading.enumerate())
    with pytest.raises(UserError) as caught:
        if cached:
            latent_cache.build(tmp_path / "cache", rows, base, 1, ALONE, print)
        else:
            examples(rows)[0, 5]
    assert not [thread for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
    record = rows.split[5]
    spoiled, message = record.image if fault == "unreadable" else record.mask, str(caught.value)
    for words in ("metadata.csv, line 7 (row 5)", f"{spoiled.parent.name}/{spoiled.name}", found):
        assert words in message
    assert ("--on_bad_sample skip:1 trains" in message) == cached


def test_the_message_is_the_same_from_a_worker(rows):
    spoil(rows, 5)
    messages = []
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(DataLoader(examples(rows), batch_sampler=Plan(12, 0, 0, 6, 1, 2), num_workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "Traceback" not in messages[0] and "row 5" in messages[0]


def test_the_next_good_row_is_used_with_the_noise_of_the_bad_one(rows, base, tmp_path):
    good = [examples(rows)[1, row] for row in range(12)]
    for row in (4, 5, 11):
        spoil(rows, row)
    cache = latent_cache.build(tmp_path / "cache", rows, base, 2, ALONE, print, bad_limit=3)
    found = [examples(rows, cache)[1, row] for row in range(12)]
    assert [each["row"] for each in found] == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 0]
    assert all((each["control"] == good[each["row"]]["control"]).all() for each in found)
    assert all((each["noise"] == good[row]["noise"]).all() for row, each in enumerate(found))


def test_more_bad_rows_than_allowed_or_no_good_row_are_listed(rows, base, tmp_path):
    for row in (2, 5, 6, 9):
        spoil(rows, row)
    with pytest.raises(UserError, match=r"skip:3: expected at most 3 bad rows, found 4:(?s:.*row 2\).*row 9\))"):
        latent_cache.build(tmp_path / "cache", rows, base, 1, ALONE, print, bad_limit=3)
    with pytest.raises(UserError, match=r"found 2:\n  a\n  b$"):
        latent_cache.check_bad_rows({0: "a", 1: "b"}, 99, 2)


def test_the_marks_of_a_cache_stay_and_a_strict_run_refuses_them(rows, base, tmp_path, monkeypatch):
    spoil(rows, 3)
    folder = tmp_path / "cache"
    assert list(latent_cache.build(folder, rows, base, 1, ALONE, print, bad_limit=1).bad) == [3]
    monkeypatch.setattr(latent_cache, "encode_moments", None)
    assert list(latent_cache.build(folder, rows, base, 1, ALONE, print, bad_limit=1).bad) == [3]
    spoiled = rows.split[3].image
    expected = rf"1 that could not be read(?s:.*row 3\).*{spoiled}.*)skip:1 .* or .*rm -r {folder}"
    with pytest.raises(UserError, match=expected):
        latent_cache.build(folder, rows, base, 1, ALONE, print)


def test_a_file_that_goes_bad_after_the_check_is_named_and_skipped(rows, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "check_rows", lambda *_: spoil(rows, 3))
    given = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "on_bad_sample": "skip:1"}
    run = setup.prepare(quick(tmp_path / "run", **given))
    seen = [row for batch in DataLoader(run.examples, batch_sampler=Plan(12, 0, 0, 6, 1, 2)) for row in batch["row"]]
    assert 3 not in seen and capsys.readouterr().out.count("Bad row 3, the next good one is used instead") == 1
