"""Sorting on disk gives what sorting in memory gives, however the rows are cut up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_server.lm.estimate import external_sort as es


def rows_of(keys, values=None):
    keys = np.array(keys, np.uint64)
    rows = np.zeros(len(keys), es.row_type(keys.shape[1], ("value", "<i8")))
    rows["key"], rows["value"] = keys, np.arange(len(keys)) if values is None else values
    return rows


@given(st.integers(1, 3), st.integers(0, 300), st.sampled_from([1, 3, 30, 64]), st.integers(0, 99))
def test_rows_are_sorted_by_all_columns(columns, count, bits, seed):
    rng = np.random.default_rng(seed)
    # As packed words are: the second column's low bits are unused.
    keys = rng.integers(0, 2**bits - 1, (count, columns), np.uint64, endpoint=True)
    if columns > 1 and bits < 64:
        keys[:, 1] <<= np.uint64(64 - bits)
    got = es.sort_rows(rows_of(keys.reshape(count, columns)))
    assert [tuple(k) for k in got["key"].tolist()] == sorted(tuple(k) for k in keys.tolist())
    # Every row has kept its value.
    np.testing.assert_array_equal(keys[got["value"]], got["key"])


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("memory", [1, 10**5, 10**9])
def test_runs_are_merged_and_equal_keys_added_up(tmp_path, monkeypatch, columns, memory):
    monkeypatch.setattr(es, "_SMALLEST_BLOCK", 50)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 40, (7000, columns), np.uint64)
    rows = rows_of(keys, np.ones(7000, int))

    def add_up(some):
        starts = es.starts_of_groups(some["key"])
        joined = some[starts]
        joined["value"] = np.add.reduceat(some["value"], starts)
        return joined

    chunks = np.array_split(rows, 13)
    blocks = list(es.external_sort(chunks, memory, tmp_path, "test", add_up))
    got = np.concatenate(blocks)
    unique, counts = np.unique(keys, axis=0, return_counts=True)
    np.testing.assert_array_equal(got["key"], unique)
    np.testing.assert_array_equal(got["value"], counts)
    if memory == 1:
        assert max(map(len, blocks)) < 7000 / 2
    assert not list(tmp_path.iterdir())


def test_no_rows_give_no_blocks(tmp_path):
    assert list(es.external_sort([], 1000, tmp_path, "test")) == []
    empty = es.external_sort([rows_of(np.zeros((0, 2)))], 1000, tmp_path, "test")
    assert sum(map(len, empty)) == 0


def test_runs_are_removed_when_reading_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(es, "_SMALLEST_BLOCK", 10)
    rows = rows_of(np.arange(1000, dtype=np.uint64)[::-1, None])
    blocks = es.external_sort([rows], 1, tmp_path, "test")
    next(blocks)
    assert len(list(tmp_path.iterdir())) > 10
    blocks.close()
    assert not list(tmp_path.iterdir())


def test_blocks_are_cut_between_groups(tmp_path):
    rows = rows_of(np.repeat(np.arange(30, dtype=np.uint64), 7)[:, None])
    cut = [rows[i : i + 11] for i in range(0, len(rows), 11)]
    whole = list(es.regroup(cut, lambda block: block["key"]))
    np.testing.assert_array_equal(np.concatenate(whole)["value"], rows["value"])
    ends = [int(block["key"][-1, 0]) for block in whole]
    assert all(int(b["key"][0, 0]) == e + 1 for b, e in zip(whole[1:], ends, strict=False))
    assert len(whole) > 5


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_rows_up_to_a_bound_are_counted(keys, bound):
    key = np.array(sorted(keys), np.uint64)
    assert es.rows_up_to(key, bound) == sum(one <= bound for one in keys)
