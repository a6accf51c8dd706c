"""Promise: there is one rule for the rows that are held out, and a data set with test/ decides for itself."""

import pytest
from malformed import sound

from segcn.data.metadata import hold_out, read_named_split, write_metadata
from segcn.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return sound(tmp_path / "pairs")


def repeat_rows(folder, rows):
    write_metadata(folder, [("images/0.png", "masks/0.png", f"hill {number}") for number in range(rows)])


@pytest.mark.parametrize(("rows", "kept"), [(3, 1), (16, 14), (80, 70), (1024, 896), (2000, 1872)])
def test_without_test_the_last_eighth_is_held_out_at_least_2_and_at_most_128(folder, rows, kept):
    repeat_rows(folder, rows)
    for dataset in (folder, folder / "metadata.csv"):
        train, held_out = hold_out(dataset)
        assert (train, held_out) == (f"train[:{kept}]", f"train[{kept}:]")
        assert len(read_named_split(dataset, train)) == kept
        assert len(read_named_split(dataset, held_out)) == rows - kept


def test_a_test_split_is_taken_and_two_rows_are_too_few(folder, tmp_path):
    sound(tmp_path / "splits/train"), sound(tmp_path / "splits/test")
    assert hold_out(tmp_path / "splits") == ("train", "test")
    repeat_rows(folder, 2)
    with pytest.raises(UserError, match="at least 3 rows, some of them to hold out, found 2"):
        hold_out(folder)
