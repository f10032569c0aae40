"""Several tables as one range of rows: every row is that of its own table."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_executor.checkpoint import map_tables
from model_executor.host_store import MemoryMappedTables
from tests.toy_models import random_tables, toy_config, write_toy_model

Table = npt.NDArray[np.float32]


def make_tables(sizes: list[int], width: int = 3) -> list[Table]:
    """Tables in which every number occurs once."""
    ends = np.cumsum([0, *sizes]) * width
    return [
        np.arange(first, last, dtype=np.float32).reshape(-1, width)
        for first, last in pairwise(ends)
    ]


def ids(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    width=st.integers(1, 4),
    shares=st.lists(st.floats(0.0, 1.0, exclude_max=True), max_size=30),
)
def test_rows_are_those_of_all_tables_laid_end_to_end(
    sizes: list[int], width: int, shares: list[float]
) -> None:
    tables = make_tables(sizes, width)
    store = MemoryMappedTables(tables)
    wanted = [int(share * sum(sizes)) for share in shares]
    rows = store.read_rows(ids(*wanted))
    assert rows.shape == (len(wanted), width)
    assert rows.dtype == np.float32
    # Numbers in the tables count on, so that row r holds width * r, width * r + 1, ...
    for row, row_id in zip(rows, wanted, strict=True):
        assert row.tolist() == list(range(width * row_id, width * (row_id + 1)))


@pytest.mark.parametrize("sizes", [[7], [1, 1, 1], [2, 1, 9]])
def test_number_of_rows_is_that_of_all_tables(sizes: list[int]) -> None:
    assert MemoryMappedTables(make_tables(sizes)).num_rows == sum(sizes)


@pytest.mark.parametrize("sizes", [[6], [2, 4]])
def test_rows_are_read_in_the_order_asked_for_and_more_than_once(sizes: list[int]) -> None:
    rows = MemoryMappedTables(make_tables(sizes, width=1)).read_rows(ids(5, 1, 2, 5, 0, 1))
    assert rows[:, 0].tolist() == [5, 1, 2, 5, 0, 1]


@pytest.mark.parametrize("sizes", [[6], [2, 4]])
def test_read_rows_are_copies(sizes: list[int]) -> None:
    store = MemoryMappedTables(make_tables(sizes))
    store.read_rows(ids(0, 1, 2))[:] = -1.0
    assert store.read_rows(ids(0, 1, 2)).ravel().tolist() == list(range(9))


def test_tables_of_a_model_directory_are_found_behind_one_another(tmp_path: Path) -> None:
    contextual = [{"name": name, "num_rows": rows} for name, rows in (("z", 5000), ("a", 4097))]
    config = toy_config("stu", contextual=contextual)
    directory = write_toy_model(tmp_path / "toy", config, seed=3)
    tables = random_tables(config, seed=3)
    store = MemoryMappedTables(map_tables(directory, config))
    assert store.num_rows == 60 + 5000 + 4097
    rows = store.read_rows(ids(5060, 59, 60, 9156, 0, 5059))
    places = [("a", 0), (None, 59), ("z", 0), ("a", 4096), (None, 0), ("z", 4999)]
    for row, (name, place) in zip(rows, places, strict=True):
        table = tables["item_embedding" if name is None else f"contextual.{name}"]
        assert np.array_equal(row, table[place].numpy())
