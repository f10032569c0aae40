"""Rows through the rings of buffers, over a device that copies as late as it may."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from block_manager.refill import TrafficClass
from model_executor import staged_link
from model_executor.device_link import CarriedRows, Land
from model_executor.row_loader import RowLoader
from model_executor.staged_link import NUM_BUFFERS, NUM_REFILL_BUFFERS, StagedLink
from tests.model_executor.fake_copies import FakeCopies

DEMAND, ONBOARDING, REFILL = TrafficClass
WIDTH = 4
CHUNK_ROWS = 3
WAIT_SECONDS = 60
Rows = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_link, "CHUNK_BYTES", CHUNK_ROWS * WIDTH * 4)


class Target:
    """A table on the device that lands rows, as the pool does."""

    def __init__(self, device: FakeCopies) -> None:
        self.device = device
        self.rows = torch.full((1000, WIDTH), torch.nan)

    def land_at(self, place: int) -> Land:
        """What enqueues writes of chunks from a place on."""

        def land(first: int, rows: Tensor) -> None:
            begin = place + first

            def write() -> None:
                self.rows[begin : begin + len(rows)] = rows

            self.device.enqueue(write)

        return land


def some_rows(first: int, number: int) -> Rows:
    return np.arange(first * WIDTH, (first + number) * WIDTH, dtype=np.float32).reshape(-1, WIDTH)


@given(
    loads=st.lists(
        st.tuples(st.sampled_from(TrafficClass), st.integers(0, 60), st.integers(0, 40)),
        max_size=8,
    )
)
def test_no_buffer_is_used_again_before_its_rows_have_landed(
    loads: list[tuple[TrafficClass, int, int]],
) -> None:
    device = FakeCopies()
    link, target = StagedLink(device, WIDTH), Target(device)
    waiting: list[tuple[CarriedRows, int]] = []
    total = sum(number for _, number, _ in loads)
    first = 0
    for traffic, number, progress in loads:
        rows = some_rows(first, number)
        if traffic is REFILL:
            waiting.append((link.carry_refill(rows), first))
        else:
            link.carry(traffic, rows, target.land_at(first))
        rows[:] = np.nan  # The host's copy may be thrown away at once.
        first += number
        device.run_some(device.compute.num_done + progress)
        if len(waiting) == NUM_REFILL_BUFFERS or progress % 2:
            _land(waiting, target)
    _land(waiting, target)
    device.run_all()
    np.testing.assert_array_equal(target.rows[:total].numpy(), some_rows(0, total))


def _land(waiting: list[tuple[CarriedRows, int]], target: Target) -> None:
    while waiting:
        carried, place = waiting.pop()
        carried.land(target.land_at(place))


def test_the_host_waits_for_the_device_only_when_every_buffer_is_on_its_way() -> None:
    device = FakeCopies()
    link, target = StagedLink(device, WIDTH), Target(device)
    link.carry(DEMAND, some_rows(0, NUM_BUFFERS * CHUNK_ROWS), target.land_at(0))
    assert device.compute.num_done == 0
    link.carry(DEMAND, some_rows(0, 1), target.land_at(0))
    assert device.compute.num_done > 0


def test_rows_of_a_refill_are_on_the_device_before_they_land() -> None:
    device = FakeCopies()
    link, target = StagedLink(device, WIDTH), Target(device)
    carried = link.carry_refill(some_rows(5, 2))
    assert device.streams[REFILL].num_done == 1
    assert device.compute.work == []
    carried.land(target.land_at(0))
    device.run_all()
    np.testing.assert_array_equal(target.rows[:2].numpy(), some_rows(5, 2))


def test_a_buffer_comes_back_when_its_rows_could_not_be_landed() -> None:
    device = FakeCopies()
    link = StagedLink(device, WIDTH)

    def fails(first: int, rows: Tensor) -> None:
        raise RuntimeError("no memory is left")

    for _ in range(2 * NUM_REFILL_BUFFERS):
        carried = link.carry_refill(some_rows(0, 1))
        with pytest.raises(RuntimeError, match="no memory"):
            carried.land(fails)


def test_a_refill_waits_while_no_chunk_lands_and_ends_when_the_link_is_closed() -> None:
    link = StagedLink(FakeCopies(), WIDTH)
    for _ in range(NUM_REFILL_BUFFERS):
        link.carry_refill(some_rows(0, 1))
    raised: list[str] = []

    def one_more() -> None:
        try:
            link.carry_refill(some_rows(0, 1))
        except RuntimeError as error:
            raised.append(str(error))

    refill = threading.Thread(target=one_more)
    refill.start()
    link.close()
    refill.join(WAIT_SECONDS)
    assert raised == ["the link is closed"]


def test_both_rings_are_counted() -> None:
    device = FakeCopies()
    rows = NUM_BUFFERS * CHUNK_ROWS + NUM_REFILL_BUFFERS * 64
    assert StagedLink(device, WIDTH).device_bytes == rows * WIDTH * 4


class Table:
    """Writes down how much had been copied when a step's rows were asked for."""

    num_rows = 10_000

    def __init__(self, device: FakeCopies) -> None:
        self._device = device
        self.asked = 0

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> Rows:
        if threading.current_thread().name != "refill":
            self.asked = len(self._device.log)
        return np.repeat(row_ids[:, None], WIDTH, axis=1).astype(np.float32)


def test_a_loader_copies_at_most_one_chunk_of_refill_while_a_miss_is_on_its_way() -> None:
    """With real threads, and whatever orders they happen to take."""
    device = FakeCopies()
    table, target = Table(device), Target(device)
    loader = RowLoader(table, WIDTH * 4, StagedLink(device, WIDTH), chunk_rows=2)
    landed = rounds = 0
    while landed < 100:
        if not loader.is_refilling:
            loader.start_refill(np.arange(40))
        # What was begun before the miss came up ends; nothing else is begun.
        loader.load(np.arange(20), target.land_at(0))
        own = device.log[table.asked :]
        last = len(own) - own[::-1].index(DEMAND)
        assert own[:last].count(REFILL) <= 1
        assert own[:last].count(DEMAND) == 7
        rounds += 1
        for one in loader.take_landed():
            assert one.rows is not None
            one.rows.land(lambda first, rows: None)
            landed += len(one.row_ids)
        time.sleep(0.001)
    loader.close()
    assert loader.traffic.num_bytes(DEMAND) == rounds * 20 * WIDTH * 4
