"""Promise: the benchmarks run, and a metadata file of a million rows is read in seconds and little memory."""

import pytest

from segcn.bench.old import bench_metadata, bench_validate


def test_the_doctor_is_timed_against_decoding_alone(landscapes):
    said = []
    share = bench_validate(landscapes, rounds=1, log=said.append)
    assert share > 0 and "36 files" in said[0] and f"{share:.0%}" in said[-1]


def test_fifty_thousand_rows_take_little():
    seconds, gib = bench_metadata(50_000, log=len)
    assert seconds < 5 and gib < 1


@pytest.mark.slow
def test_a_million_rows_take_less_than_20_seconds_and_a_gib():
    seconds, gib = bench_metadata(log=len)
    assert seconds < 20 and gib < 1
