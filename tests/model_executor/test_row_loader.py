"""Demand reads and refill over one store: what lands, in which order, and who goes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from block_manager.refill import TrafficClass
from model_executor.device_link import SharedMemoryLink
from model_executor.exceptions import RowsUnavailableError
from model_executor.row_loader import CHUNK_BYTES, LandedRows, RowLoader

DEMAND, ONBOARDING, REFILL = TrafficClass
TABLE = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
ROW_BYTES = 16
WAIT_SECONDS = 60


class Store:
    """A table in memory; reads are written down, may be held up, and may fail."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, int]] = []
        self.gates: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Event] = {}
        self.failing: Callable[[npt.NDArray[np.int64]], Exception | None] = lambda row_ids: None

    num_rows = len(TABLE)

    def hold(self, who: str) -> threading.Event:
        """Holds up reads of the thread of this kind; returns what is set once one is held up."""
        self.gates[who], self.entered[who] = threading.Event(), threading.Event()
        return self.entered[who]

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        who = "refill" if threading.current_thread().name == "refill" else "demand"
        self.reads.append((who, len(row_ids)))
        if who in self.gates:
            self.entered[who].set()
            assert self.gates[who].wait(WAIT_SECONDS)
        error = self.failing(row_ids)
        if error is not None:
            raise error
        return np.take(TABLE, row_ids, axis=0)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def loader(store: Store) -> Iterator[RowLoader]:
    loader = RowLoader(store, ROW_BYTES, SharedMemoryLink())
    yield loader
    for gate in store.gates.values():
        gate.set()
    loader.close()


def ids(*row_ids: int) -> npt.NDArray[np.int64]:
    return np.array(row_ids, dtype=np.int64)


def load(loader: RowLoader, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """What the loader lands for a step."""
    found = np.full((len(row_ids), TABLE.shape[1]), np.nan, dtype=np.float32)

    def land(first: int, rows: torch.Tensor) -> None:
        found[first : first + len(rows)] = rows.numpy()

    loader.load(row_ids, land)
    return found


def landed_rows(landed: LandedRows) -> npt.NDArray[np.float32]:
    """The rows of a part of a refill, which must have come."""
    assert landed.rows is not None
    found: list[npt.NDArray[np.float32]] = []
    landed.rows.land(lambda _, rows: found.append(rows.numpy()))
    return found[0]


def until(condition: Callable[[], bool]) -> None:
    stop_waiting = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < stop_waiting
        time.sleep(0.001)


def all_landed(loader: RowLoader) -> list[LandedRows]:
    until(lambda: not loader.is_refilling)
    return loader.take_landed()


def test_demand_reads_are_the_stores_rows_and_counted(loader: RowLoader) -> None:
    np.testing.assert_array_equal(load(loader, ids(3, 1, 3)), TABLE[[3, 1, 3]])
    load(loader, ids(7))
    assert [loader.traffic.num_bytes(one) for one in TrafficClass] == [64, 0, 0]


def test_a_demand_read_that_fails_is_counted_and_said(loader: RowLoader, store: Store) -> None:
    store.failing = lambda row_ids: RowsUnavailableError("gone")
    with pytest.raises(RowsUnavailableError, match="gone"):
        load(loader, ids(3))
    assert loader.traffic.num_failures(DEMAND) == 1
    assert loader.traffic.num_bytes(DEMAND) == 0


@given(
    refills=st.lists(st.lists(st.integers(0, 999), max_size=200), max_size=5),
    chunk_rows=st.integers(1, 70),
    broken=st.sets(st.integers(0, 999), max_size=3),
)
def test_every_row_of_a_refill_lands_once_in_order_or_with_an_error(
    refills: list[list[int]], chunk_rows: int, broken: set[int]
) -> None:
    store = Store()
    store.failing = lambda row_ids: (
        RowsUnavailableError("broken") if broken & set(row_ids.tolist()) else None
    )
    loader = RowLoader(store, ROW_BYTES, SharedMemoryLink(), chunk_rows)
    num_bytes = 0
    for wanted in refills:
        loader.start_refill(ids(*wanted))
        landed = all_landed(loader)
        assert [row for one in landed for row in one.row_ids.tolist()] == wanted
        for place, one in enumerate(landed):
            if one.rows is None:
                assert "broken" in str(one.error)
                # Nothing more is read: at most the rest lands with the same error.
                assert len(landed) - place <= 2
            else:
                assert one.error is None and len(one.row_ids) <= chunk_rows
                np.testing.assert_array_equal(landed_rows(one), TABLE[one.row_ids])
                num_bytes += one.rows.nbytes
        if not broken & set(wanted):
            assert all(one.rows is not None for one in landed)
    assert loader.traffic.num_bytes(REFILL) == num_bytes
    assert loader.traffic.num_bytes(DEMAND) == 0
    loader.close()


def test_no_chunk_is_begun_while_a_demand_read_is_in_progress(
    loader: RowLoader, store: Store
) -> None:
    held_up = store.hold("demand")
    demand = threading.Thread(target=load, args=(loader, ids(1)))
    demand.start()
    assert held_up.wait(WAIT_SECONDS)
    loader.start_refill(np.arange(200))
    # Not a proof, but time enough for a chunk to be begun if it could be.
    time.sleep(0.05)
    assert store.reads == [("demand", 1)]
    assert loader.is_refilling and loader.take_landed() == []
    store.gates["demand"].set()
    demand.join(WAIT_SECONDS)
    assert sum(len(one.row_ids) for one in all_landed(loader)) == 200


def test_a_demand_read_does_not_wait_for_the_chunk_that_is_being_read(
    loader: RowLoader, store: Store
) -> None:
    held_up = store.hold("refill")
    loader.start_refill(np.arange(200))
    assert held_up.wait(WAIT_SECONDS)
    np.testing.assert_array_equal(load(loader, ids(5)), TABLE[[5]])
    assert store.reads == [("refill", 64), ("demand", 1)]
    store.gates["refill"].set()
    assert [len(one.row_ids) for one in all_landed(loader)] == [64, 64, 64, 8]


@pytest.mark.parametrize(("row_bytes", "rows"), [(16, 64), (8192, 32), (CHUNK_BYTES * 2, 1)])
def test_chunks_are_bounded_in_rows_and_bytes(store: Store, row_bytes: int, rows: int) -> None:
    loader = RowLoader(store, row_bytes, SharedMemoryLink())
    loader.start_refill(np.arange(64))
    all_landed(loader)
    loader.close()
    assert store.reads == [("refill", rows)] * (64 // rows)


def test_one_refill_at_a_time(loader: RowLoader, store: Store) -> None:
    store.hold("refill")
    loader.start_refill(ids(1, 2))
    with pytest.raises(RuntimeError, match="has not landed yet"):
        loader.start_refill(ids(3))
    store.gates["refill"].set()
    assert len(all_landed(loader)) == 1
    loader.start_refill(ids(3))
    assert len(all_landed(loader)) == 1


def test_whatever_goes_wrong_in_a_refill_lands_and_the_next_one_works(
    loader: RowLoader, store: Store
) -> None:
    store.failing = lambda row_ids: ZeroDivisionError("a bug")
    loader.start_refill(np.arange(100))
    landed = all_landed(loader)
    assert [len(one.row_ids) for one in landed] == [64, 36]
    assert all("a bug" in str(one.error) for one in landed)
    assert loader.traffic.num_failures(REFILL) == 2
    store.failing = lambda row_ids: None
    np.testing.assert_array_equal(load(loader, ids(9)), TABLE[[9]])
    loader.start_refill(ids(8))
    (one,) = all_landed(loader)
    np.testing.assert_array_equal(landed_rows(one), TABLE[[8]])


def test_rows_asked_for_may_be_changed_afterwards(loader: RowLoader, store: Store) -> None:
    store.hold("refill")
    wanted = np.arange(100)
    loader.start_refill(wanted)
    wanted[:] = 0
    store.gates["refill"].set()
    assert [row for one in all_landed(loader) for row in one.row_ids] == list(range(100))


def test_a_closed_loader_reads_no_further_chunk(store: Store) -> None:
    loader = RowLoader(store, ROW_BYTES, SharedMemoryLink())
    held_up = store.hold("refill")
    loader.start_refill(np.arange(200))
    assert held_up.wait(WAIT_SECONDS)
    closing = threading.Thread(target=loader.close)
    closing.start()
    until(lambda: not loader._waiting)
    store.gates["refill"].set()
    closing.join(WAIT_SECONDS)
    assert store.reads == [("refill", 64)]
    with pytest.raises(RuntimeError, match="closed"):
        loader.start_refill(ids(1))
    loader.close()


def test_a_loader_that_never_refills_has_no_thread(store: Store) -> None:
    before = threading.active_count()
    loader = RowLoader(store, ROW_BYTES, SharedMemoryLink())
    load(loader, ids(1))
    assert threading.active_count() == before
    loader.close()
