"""Promise: a file that goes bad after the check ends the run by name, or another row stands in, alike everywhere."""

import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segcn.data.dataset import PairedDataset
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split
from segcn.data.transforms import AUGMENTS
from segcn.models.base import load_base
from segcn.train import latent_cache, setup
from segcn.train.batches import Examples, Plan
from segcn.train.latent_cache import BadRows, first_good, overlook_bad, parse_limit, remember_stamps
from segcn.train.loop import train
from segcn.utils.args import arguments_of
from segcn.utils.errors import UserError

ALONE = SimpleNamespace(
    is_main_process=True,
    process_index=0,
    num_processes=1,
    device="cpu",
    wait_for_everyone=lambda: None,
    gather=lambda tensor: tensor,
)


@pytest.fixture(scope="module")
def base(random_base):
    return load_base(str(random_base))


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


def examples(rows, cache=None, limit=0):
    return Examples(rows, cache, 8, (12, 4, 4), {"seed": 0, "timesteps": 1000, "bad_limit": limit})


@pytest.mark.parametrize(
    "text", ["", "skip", "skip:", "skip:0", "skip:-1", "skip:1.5", "skip:²", "Fail", "fail:1", "3"]
)
def test_a_wrong_flag_is_refused_with_what_is_expected(text):
    with pytest.raises(UserError, match=r"--on_bad_sample: expected fail, or skip:N .*found"):
        parse_limit(text)
    assert parse_limit("fail") == 0 and parse_limit("skip:12") == 12


@pytest.mark.parametrize(
    ("fault", "said"),
    [("unreadable", "cannot be read"), ("other size", "expected its image's size"), ("undeclared", "200")],
)
@pytest.mark.parametrize("cached", [True, False])
def test_by_default_the_run_ends_with_file_and_row(rows, base, tmp_path, fault, said, cached):
    spoil(rows, 5, fault)
    with pytest.raises(UserError) as caught:
        if cached:
            latent_cache.build(tmp_path / "cache", rows, base, 1, ALONE, print)
        else:
            examples(rows)[0, 5]
    record = rows.split[5]
    spoiled = record.image if fault == "unreadable" else record.mask
    assert "metadata.csv, line 7 (row 5)" in str(caught.value) and str(spoiled) in str(caught.value)
    assert said in str(caught.value) and "--on_bad_sample skip:N" in str(caught.value)


def test_a_run_that_ends_leaves_no_thread_reading_ahead(rows, base, tmp_path):
    spoil(rows, 5)
    before = set(threading.enumerate())
    with pytest.raises(UserError) as caught:
        latent_cache.build(tmp_path / "cache", rows, base, 1, ALONE, print)
    reading = [thread for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
    assert caught.tb and not reading


def test_the_message_is_the_same_from_a_worker(rows):
    spoil(rows, 5)
    told = []
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(DataLoader(examples(rows), batch_sampler=Plan(12, 0, 0, 6, 1, 2), num_workers=workers))
        told.append(str(caught.value))
    assert told[0] == told[1] and "Traceback" not in told[0] and "row 5" in told[0]


def test_the_next_good_row_stands_in_alike_with_and_without_cache(rows, base, tmp_path):
    good = [examples(rows)[1, row] for row in range(12)]
    for row in (4, 5, 11):
        spoil(rows, row)
    cache = latent_cache.build(tmp_path / "cache", rows, base, 2, ALONE, print, bad_limit=3)
    for source in (examples(rows, cache, 3), examples(rows, None, 3)):
        found = [source[1, row] for row in range(12)]
        assert [each["row"] for each in found] == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 0]
        assert [each["bad_row"] for each in found] == [-1, -1, -1, -1, 4, 5, -1, -1, -1, -1, -1, 11]
        assert all(torch.equal(each["control"], good[each["row"]]["control"]) for each in found)
        assert all(torch.equal(each["noise"], good[row]["noise"]) for row, each in enumerate(found))
    first = [
        list(DataLoader(examples(rows, None, 3), 4, num_workers=n, sampler=[(0, r) for r in range(12)])) for n in (0, 2)
    ]
    assert all(one[name] == other[name] if name == "caption" else torch.equal(one[name], other[name])
               for one, other in zip(*first, strict=True) for name in one)  # fmt: skip


def test_more_bad_rows_than_allowed_are_listed(rows, base, tmp_path):
    for row in (2, 5, 6, 9):
        spoil(rows, row)
    with pytest.raises(UserError, match=r"skip:3: expected at most 3 bad rows, found 4:(?s:.*row 2\).*row 9\))"):
        latent_cache.build(tmp_path / "cache", rows, base, 1, ALONE, print, bad_limit=3)
    with pytest.raises(UserError, match=r"skip:1: expected at most 1 bad rows, found 2:(?s:.*row 5\).*row 6\))"):
        examples(rows, None, 1)[0, 5]
    bad = BadRows(tmp_path, 3, rows, ALONE, print)
    bad.seen({"bad_row": torch.tensor([-1, 2]), "row": torch.tensor([0, 3])})
    with pytest.raises(UserError, match=r"found 4:(?s:.*row 2\).*row 5\).*row 6\).*row 9\))"):
        bad.seen({"bad_row": torch.tensor([9, 5]), "row": torch.tensor([10, 7])})


def test_no_good_row_at_all_ends_the_search():
    def read(row):
        raise UserError(f"row {row}")

    with pytest.raises(UserError, match=r"row 2\n  row 0\n  row 1$"):
        first_good(read, 2, 3, limit=99)


def test_the_marks_of_a_cache_stay_and_a_strict_run_refuses_them(rows, base, tmp_path, monkeypatch):
    spoil(rows, 3)
    folder = tmp_path / "cache"
    assert list(latent_cache.build(folder, rows, base, 1, ALONE, print, bad_limit=1).bad) == [3]
    monkeypatch.setattr(latent_cache, "encode_moments", None)
    assert list(latent_cache.build(folder, rows, base, 1, ALONE, print, bad_limit=1).bad) == [3]
    spoiled = rows.split[3].image
    with pytest.raises(
        UserError, match=rf"1 that could not be read(?s:.*row 3\): {spoiled}.*)skip:1; or .*rm -r {folder}"
    ):
        latent_cache.build(folder, rows, base, 1, ALONE, print)


def test_all_processes_know_the_same_bad_rows_each_told_once_also_after_a_resume(rows, tmp_path):
    spoil(rows, 2), spoil(rows, 11)
    barrier, mailbox, known, said = threading.Barrier(2), {}, {}, []

    def work(rank, batches):
        def gather(tensor):
            mailbox[rank] = tensor
            barrier.wait()
            whole = torch.cat([mailbox[0], mailbox[1]])
            barrier.wait()
            return whole

        parts = {"device": "cpu", "gather": gather, "wait_for_everyone": barrier.wait}
        log = said.append if rank == 0 else lambda line: None
        bad = BadRows(tmp_path, 2, rows, SimpleNamespace(is_main_process=rank == 0, **parts), log)
        for batch in batches:
            bad.seen(batch)
        known[rank] = bad.known

    def run(first, second):
        threads = [threading.Thread(target=work, args=each) for each in ((0, first), (1, second))]
        [thread.start() for thread in threads], [thread.join(60) for thread in threads]
        assert known[0] == known[1]
        return sorted(known.pop(0))

    def batch(bad, used):
        return {"bad_row": torch.tensor([bad, -1]), "row": torch.tensor([used, 7])}

    assert run([batch(-1, 1), batch(11, 0)], [batch(-1, 4), batch(-1, 5)]) == [11]
    assert len(said) == 1 and "row 11)" in said[0] and str(rows.split[11].image) in said[0]
    assert run([batch(-1, 1), batch(11, 0)], [batch(2, 3), batch(-1, 5)]) == [2, 11]
    assert len(said) == 2 and "row 2)" in said[1]
    assert sorted(json.loads((tmp_path / "bad_rows.json").read_text())) == ["11", "2"]


def test_strict_runs_exchange_nothing(rows, tmp_path):
    BadRows(tmp_path, 0, rows, SimpleNamespace(wait_for_everyone=lambda: None), print).seen({})


@pytest.fixture
def began(rows, quick, tmp_path):
    """A function to train for so many steps in a run folder; one step of "whole" is done, then two rows go bad."""

    def run(name, steps, **settings):
        given = {"dataset_name": str(tmp_path / "data"), "cache": "none", "train_batch_size": 4}
        train(quick(tmp_path / name, max_train_steps=steps, checkpointing_steps=1, **given | settings))

    run("whole", 1)
    first = {row for _, row in next(iter(Plan(12, 0, 0, 1, 1, 4)))}
    bad = sorted(set(range(12)) - first)[:3:2]
    spoil(rows, bad[0])
    spoil(rows, bad[1], "other size")
    return run


def test_a_run_that_skips_ends_with_the_same_bytes_after_a_break(began, tmp_path, capsys):
    """It is cut once more after its second step; both commands are the first one, but for skipping."""
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    printed = []
    for name, steps in (("whole", 3), ("cut", 2), ("cut", 3)):
        began(name, steps, on_bad_sample="skip:2")
        printed.append(capsys.readouterr().out.count("Bad row"))
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1] and printed[0] == printed[1] + printed[2] == 2
    for limit in ("fail", "skip:1"):
        with pytest.raises(UserError, match=r"row \d"):
            began("cut", 6, on_bad_sample=limit)


@pytest.mark.parametrize(
    ("fault", "limit", "overlooked"),
    [("bad", 2, True), ("bad", 1, False), ("bad", 0, False), ("other content", 2, False), ("metadata", 2, False)],
)
def test_only_rows_gone_bad_are_overlooked_when_a_run_goes_on(rows, tmp_path, fault, limit, overlooked):
    before = rows.split.fingerprint
    remember_stamps(rows.split, tmp_path / "cache")
    spoil(rows, 2, "other size"), spoil(rows, 9, "undeclared")
    if fault == "other content":
        shutil.copy(rows.split[1].image, rows.split[9].image)
        shutil.copy(rows.split[1].mask, rows.split[9].mask)
    elif fault == "metadata":
        rows.split.metadata.write_text(rows.split.metadata.read_text().replace("landscape", "image"))
    split = read_split(tmp_path / "data", "train")
    assert split.fingerprint != before
    overlook_bad(split, before, tmp_path / "cache", limit)
    assert (split.fingerprint == before) == overlooked


@pytest.mark.slow
def test_two_processes_with_workers_skip_the_rows_that_one_skips(rows, quick, tmp_path):
    given = {
        "dataset_name": str(tmp_path / "data"),
        "cache": "none",
        "on_bad_sample": "skip:2",
        "checkpointing_steps": 1,
    }

    def two(steps):
        config = quick(tmp_path / "two", max_train_steps=steps, train_batch_size=2, dataloader_num_workers=1, **given)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "segcn.train"]
        done = subprocess.run([*launcher, *arguments_of(config)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def one(steps):
        train(quick(tmp_path / "one", max_train_steps=steps, train_batch_size=4, **given))

    one(1), two(1)
    first = {row for _, row in next(iter(Plan(12, 0, 0, 1, 1, 4)))}
    for row in sorted(set(range(12)) - first)[:3:2]:
        spoil(rows, row, "other size")
    one(3)
    assert two(3).count("Bad row") == 2
    told = [json.loads((tmp_path / name / "bad_rows.json").read_text()) for name in ("one", "two")]
    assert told[0] == told[1] and len(told[0]) == 2
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for left, right in zip(*logs, strict=True):
        assert json.loads(left)["loss"] == pytest.approx(json.loads(right)["loss"], rel=1e-4)


def test_the_bad_rows_of_a_cache_are_told_once_in_the_run_folder(rows, quick, tmp_path, monkeypatch, capsys):
    """The file goes bad between the check and the encoding; nothing that a step then sees counts it again."""
    monkeypatch.setattr(setup, "check_rows", lambda *_: spoil(rows, 3))
    given = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "on_bad_sample": "skip:1"}
    for told in (1, 0):
        run = setup.prepare(quick(tmp_path / "run", **given))
        for batch in DataLoader(run.examples, batch_sampler=Plan(12, 0, 0, 6, 1, 2)):
            run.bad_rows.seen(batch)
        assert capsys.readouterr().out.count("Bad row 3") == told
    assert list(json.loads((tmp_path / "run" / "bad_rows.json").read_text())) == ["3"]
