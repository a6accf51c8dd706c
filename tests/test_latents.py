"""Promise: what is frozen is encoded once, by any number of processes, survives kills, and is never used damaged.

A file that goes bad after the check ends the run by name, or the next good row is cached in its place.
"""

import gc
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ALONE
from torch.utils.data import DataLoader

from segcn.data.dataset import PairedDataset
from segcn.data.masks import read_mask, write_mask
from segcn.data.metadata import read_split
from segcn.data.transforms import AUGMENTS
from segcn.models.base import encode_moments, load_base
from segcn.train import latent_cache, setup
from segcn.train.batches import Examples, Plan
from segcn.train.latent_cache import parse_limit, settle_draws
from segcn.utils.errors import UserError

FILES = 2 + 1 + 2 * 2  # layout and captions, one of text, and of each of two draws of 12 rows two


@pytest.fixture(scope="module")
def rows(landscapes):
    return PairedDataset(read_split(landscapes, "train"), 32, AUGMENTS["affine"], 0)


@pytest.fixture(scope="module")
def whole(rows, base, tmp_path_factory):
    """A cache of two draws."""
    folder = tmp_path_factory.mktemp("whole")
    latent_cache.build(folder, rows, base, 2, ALONE, print)
    return folder


def content(folder):
    """Every file of a cache; none of them left aside."""
    assert not list(folder.glob(".*"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def together(count, work):
    """Let `count` processes, threads here, each do work(accelerator)."""
    barrier = threading.Barrier(count, timeout=120)

    def run(rank):
        process = {"is_main_process": rank == 0, "process_index": rank, "num_processes": count}
        try:
            work(SimpleNamespace(**process, wait_for_everyone=barrier.wait))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))


@pytest.mark.parametrize("count, own", [(2, None), (3, None), (2, ALONE)], ids=["two", "three", "two runs at once"])
def test_any_number_of_processes_or_runs_builds_the_same_cache(rows, base, whole, tmp_path, count, own):
    together(count, lambda process: latent_cache.build(tmp_path, rows, base, 2, own or process, print))
    assert content(tmp_path) == content(whole)


class Killed(BaseException):
    """The death of a process, which no `except Exception` sees."""


@pytest.mark.parametrize("step, points", [("fsync", range(0, FILES, 3)), ("replace", range(FILES))])
def test_a_build_killed_at_any_file_resumes_with_what_exists(rows, base, whole, tmp_path, monkeypatch, step, points):
    order = []

    def die(*_):
        order.append(step)
        if len(order) > done:
            raise Killed

    real = getattr(os, step)
    for done in points:
        folder = tmp_path / str(done)
        order.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, step, lambda *given: (die(), real(*given)))
            latent_cache.build(folder, rows, base, 2, ALONE, print)
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
        assert len(kept) == max(0, done - 2)
        (folder / ".1-2-draw.npy").touch()  # what a kill leaves
        os.utime(folder / ".1-2-draw.npy", (0, 0))
        latent_cache.build(folder, rows, base, 2, ALONE, print)
        assert content(folder) == content(whole)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
        shutil.rmtree(folder)


def test_a_file_has_its_name_only_after_it_is_on_disk(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    latent_cache.write_file(tmp_path / "file", "x")
    assert order == ["fsync", "replace"] and content(tmp_path) == {"file": b"x"}


def test_a_cache_is_used_again_and_more_draws_are_added_to_it(rows, base, whole, tmp_path, monkeypatch):
    latent_cache.build(tmp_path, rows, base, 1, ALONE, print)
    first, encoded = content(tmp_path), []
    monkeypatch.setattr(latent_cache, "encode_text", None)
    monkeypatch.setattr(
        latent_cache, "encode_moments", lambda *given: encoded.append(len(given[1])) or encode_moments(*given)
    )
    latent_cache.build(tmp_path, rows, base, 2, ALONE, print)
    assert sum(encoded) == len(rows)
    monkeypatch.setattr(latent_cache, "encode_moments", None)  # nothing is left to encode
    for count in (1, 2):
        assert latent_cache.build(tmp_path, rows, base, count, ALONE, print).draws == count
    assert content(tmp_path) == content(whole) and first.items() < content(whole).items()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_a_damaged_file_is_named_with_what_fixes_it(rows, base, whole, tmp_path, kept):
    cache = shutil.copytree(whole, tmp_path / "cache")
    paths = sorted(cache.glob("*.npy"))
    assert len(paths) == FILES - 2
    for path in paths:
        os.truncate(path, int(path.stat().st_size * kept))
        with pytest.raises(UserError, match=f"damaged .*; remove it, rm {path}"):
            latent_cache.build(cache, rows, base, 2, ALONE, print)
        with pytest.raises(UserError, match=f"rm {path}"):
            latent_cache.LatentCache(cache, 2)
        path.unlink()
        with pytest.raises(UserError, match=f"{path}: .*found none"):
            latent_cache.LatentCache(cache, 2)
        latent_cache.build(cache, rows, base, 2, ALONE, print)
    assert content(cache) == content(whole)


def test_a_cache_keeps_few_files_open(whole, monkeypatch):
    def mapped():
        return sum(str(whole) in line for line in Path("/proc/self/maps").read_text().splitlines())

    plain = latent_cache.LatentCache(whole, 2)
    monkeypatch.setattr(latent_cache, "OPEN_FILES", 1)
    cache = latent_cache.LatentCache(whole, 2)
    for draw, row in [(0, 0), (1, 0), (0, 0), (1, cache.layout.rows - 1)]:
        assert cache.entry(draw, row) == plain.entry(draw, row)
    del plain
    assert len(cache._draws) > 1 and mapped() == 1


def test_a_full_disk_is_one_message_and_leaves_nothing_aside(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device(?s:.*)--cache_dir.*--cache none"):
        latent_cache.write_file(tmp_path / "file.npy", np.zeros(3))
    assert not list(tmp_path.iterdir())


def test_the_key_changes_with_weights_precision_and_tokenizer_of_the_base(random_base, base):
    same, weights, words = (load_base(random_base) for _ in range(3))
    with torch.no_grad():
        next(weights.vae.parameters())[0] += 1
    words.tokenizer.add_tokens(["lighthouse"])
    half = load_base(random_base, dtype=torch.bfloat16)
    first, again, *others = map(latent_cache.encoders_fingerprint, (base, same, half, weights, words))
    assert first == again and len({first, *others}) == 4


def examples_of(rows, cache, **settings):
    return Examples(rows, cache, 8, (12, 4, 4), {"seed": 0, "timesteps": 1000} | settings)


def test_cached_examples_are_memory_mapped_and_the_same_from_two_workers(rows, whole):
    cache = latent_cache.LatentCache(whole, 2)
    assert all(isinstance(cache._open(block), np.memmap) for block in (*cache._draws, *cache._text))
    examples, plan = examples_of(rows, cache, empty_prompts=0.3, empty_controls=0.3), Plan(12, 0, 0, 8, 1, 3)
    batches = [list(DataLoader(examples, batch_sampler=plan, num_workers=workers)) for workers in (0, 2)]
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_controls_are_dropped_by_visit_and_row_alike_with_and_without_cache(rows, whole):
    keys, dropped = [(visit, row) for visit in range(2) for row in range(12)], []
    for cache in (latent_cache.LatentCache(whole, 2), None):
        plain, half, none = (examples_of(rows, cache, empty_controls=share) for share in (0.0, 0.5, 1.0))
        empty = [bool((half[key]["control"] == 0).all()) for key in keys]
        assert 4 < sum(empty) < 20 and not any((plain[key]["control"] == 0).all() for key in keys)
        assert all((none[key]["control"] == 0).all() for key in keys[:3])
        kept = keys[empty.index(False)]
        assert torch.equal(half[kept]["control"], plain[kept]["control"])
        assert torch.equal(half[kept]["cells"], none[kept]["cells"])
        dropped.append(empty)
    assert dropped[0] == dropped[1]


def test_cached_moments_are_those_of_the_image_of_that_draw(rows, base, whole):
    cache = latent_cache.LatentCache(whole, 2)
    for draw, row in [(0, 0), (0, 9), (1, 11), (1, 7)]:
        moments = encode_moments(base.vae, rows.sample(row, draw).image[None])[0].numpy()
        assert np.allclose(cache.entry(draw, row)["moments"], moments, atol=2e-3, rtol=2e-3)
    assert not np.allclose(cache.entry(0, 9)["moments"], cache.entry(1, 9)["moments"], atol=0.1)


@pytest.mark.parametrize("settings", [{}, {"cache": "none"}, {"faithfulness_rows": 2}])
def test_with_the_cache_both_encoders_leave_memory_unless_they_are_used(quick, tmp_path, monkeypatch, settings):
    loaded, load = [], load_base

    def remember(*given, **named):
        base = load(*given, **named)
        loaded.extend(weakref.ref(part) for part in (base.vae, base.text_encoder))
        return base

    monkeypatch.setattr("segcn.train.setup.load_base", remember)
    run = setup.prepare(quick(tmp_path / "run", **settings))
    gc.collect()
    assert len(loaded) == 2 and [part() is None for part in loaded] == [not settings] * 2
    assert (run.base.vae is None) == (not settings)


BYTES = st.integers(1, 10**12)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(visits=st.floats(0.01, 50), draw=BYTES, text=BYTES, budget=BYTES, free=BYTES, there=BYTES)
def test_as_many_draws_as_fit_and_are_visited(visits, draw, text, budget, free, there):
    def fits(count):
        new = count * draw + text - there
        return count * draw <= budget and (new <= 0 or new <= free - latent_cache.SPARE)

    if not fits(1):
        with pytest.raises(UserError, match=r"found a budget of .*--cache_budget_gb, .*--cache_dir, .*--cache none"):
            latent_cache.resolve_draws(None, visits, draw, text, budget, free, there)
        return
    count = latent_cache.resolve_draws(None, visits, draw, text, budget, free, there)
    assert count >= 1 and fits(count) and count - 1 < visits
    assert count >= visits or not fits(count + 1)


def test_draws_that_are_given_are_kept_or_refused():
    one = 10**9
    assert latent_cache.resolve_draws(7, 1.0, one, 0, 0, 9 * one) == 7
    assert latent_cache.resolve_draws(7, 1.0, one, one, 0, 0, there=8 * one) == 7
    for count, words in ((9, r"needs 9\.0 GB for 9 draw.*8\.0 GB of disk"), (0, "expected 1 or more, found 0")):
        with pytest.raises(UserError, match=words):
            latent_cache.resolve_draws(count, 20.0, one, 0, 20 * one, 9 * one)


def test_the_bytes_counted_are_the_bytes_written(rows, base, whole):
    layout, captions = latent_cache.layout_of(rows, base), latent_cache.cached_captions(rows)
    counted = 2 * layout.draw_bytes + len(captions) * layout.embedding.itemsize
    written = sum(path.stat().st_size for path in whole.glob("*.npy"))
    assert counted < written <= counted + 256 * (FILES - 2)  # a header of 256 bytes at most


def test_a_resumed_run_keeps_its_draws(quick, rows, base, tmp_path):
    lines = []

    def settled(**changes):
        config = quick(tmp_path / "run", preset="sd15", cache_draws=None, cache_dir=str(tmp_path / "cache"), **changes)
        return settle_draws(config, rows, base, ALONE, SimpleNamespace(say=lines.append)).cache_draws

    assert settled(max_train_steps=6) == 1 and settled(max_train_steps=19) == 4
    assert "each draw is seen 0.8 times in 19 steps; --cache none draws again each time" in lines[-1]
    assert str(tmp_path / "cache") in lines[-1] and "4 draw(s)" in lines[-1] and "MB" in lines[-1]
    one = latent_cache.layout_of(rows, base).draw_bytes / 1e9
    assert settled(max_train_steps=600, cache_budget_gb=3.5 * one) == 3
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_config.json").write_text('{"cache_draws": 3}')
    assert settled(max_train_steps=6000) == 3 == settled(max_train_steps=6)
    assert not Path(tmp_path / "cache").exists()


@pytest.fixture
def own(landscapes, tmp_path):
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


def test_a_wrong_flag_is_refused_with_what_is_expected():
    for text in ("", "skip", "skip:", "skip:0", "skip:-1", "skip:1.5", "skip:²", "Fail", "fail:1", "3"):
        with pytest.raises(UserError, match=r"--on_bad_sample: expected fail, or skip:N .*found"):
            parse_limit(text)
    assert parse_limit("fail") == 0 and parse_limit("skip:12") == 12


@pytest.mark.parametrize(
    ("fault", "found"), [("unreadable", "cannot be read"), ("other size", "found 64 x 40"), ("undeclared", "200")]
)
@pytest.mark.parametrize("how", ["cache", "none", "worker"])
def test_by_default_the_run_ends_with_file_and_row_and_leaves_no_thread(own, base, tmp_path, fault, found, how):
    spoil(own, 5, fault)
    before = set(threading.enumerate())
    with pytest.raises(UserError) as caught:
        if how == "cache":
            latent_cache.build(tmp_path / "cache", own, base, 1, ALONE, print)
        else:
            plan = Plan(12, 0, 0, 6, 1, 2)
            list(DataLoader(examples_of(own, None), batch_sampler=plan, num_workers=int(how == "worker")))
    assert not [thread for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
    record = own.split[5]
    spoiled, message = record.image if fault == "unreadable" else record.mask, str(caught.value)
    for words in ("metadata.csv, line 7 (row 5)", f"{spoiled.parent.name}/{spoiled.name}", found):
        assert words in message
    assert "Traceback" not in message and ("--on_bad_sample skip:1 trains" in message) == (how == "cache")


def test_the_next_good_row_is_used_with_the_noise_of_the_bad_one(own, base, tmp_path):
    good = [examples_of(own, None)[1, row] for row in range(12)]
    for row in (4, 5, 11):
        spoil(own, row)
    cache = latent_cache.build(tmp_path / "cache", own, base, 2, ALONE, print, bad_limit=3)
    found = [examples_of(own, cache)[1, row] for row in range(12)]
    assert [each["row"] for each in found] == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 0]
    assert all((each["control"] == good[each["row"]]["control"]).all() for each in found)
    assert all((each["noise"] == good[row]["noise"]).all() for row, each in enumerate(found))


def test_more_bad_rows_than_allowed_or_no_good_row_are_listed(own, base, tmp_path):
    for row in (2, 5, 6, 9):
        spoil(own, row)
    with pytest.raises(UserError, match=r"skip:3: expected at most 3 bad rows, found 4:(?s:.*row 2\).*row 9\))"):
        latent_cache.build(tmp_path / "cache", own, base, 1, ALONE, print, bad_limit=3)
    with pytest.raises(UserError, match=r"found 2:\n  a\n  b$"):
        latent_cache.check_bad_rows({0: "a", 1: "b"}, 99, 2)


def test_the_marks_of_a_cache_stay_and_a_strict_run_refuses_them(own, base, tmp_path, monkeypatch):
    spoil(own, 3)
    folder = tmp_path / "cache"
    assert list(latent_cache.build(folder, own, base, 1, ALONE, print, bad_limit=1).bad) == [3]
    monkeypatch.setattr(latent_cache, "encode_moments", None)
    assert list(latent_cache.build(folder, own, base, 1, ALONE, print, bad_limit=1).bad) == [3]
    spoiled = own.split[3].image
    expected = rf"1 that could not be read(?s:.*row 3\).*{spoiled}.*)skip:1 .* or .*rm -r {folder}"
    with pytest.raises(UserError, match=expected):
        latent_cache.build(folder, own, base, 1, ALONE, print)


def test_a_file_that_goes_bad_after_the_check_is_named_and_skipped(own, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "check_rows", lambda *_: spoil(own, 3))
    given = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "on_bad_sample": "skip:1"}
    run = setup.prepare(quick(tmp_path / "run", **given))
    seen = [row for batch in DataLoader(run.examples, batch_sampler=Plan(12, 0, 0, 6, 1, 2)) for row in batch["row"]]
    assert 3 not in seen and capsys.readouterr().out.count("Bad row 3, the next good one is used instead") == 1
