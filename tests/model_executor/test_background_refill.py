"""A refill on its way to its slots: what comes out of it, also where memory or threads fail."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch

from block_manager.row_plan import RefillPlan
from model_executor.background_refill import BackgroundRefill
from model_executor.device_link import SharedMemoryLink
from model_executor.exceptions import RowsUnavailableError
from model_executor.row_loader import CHUNK_ROWS, RowLoader
from model_executor.row_pages import RowPages

WIDTH = 4
CPU = torch.device("cpu")


class Store:
    """Row r is r, r, r, r; it may be gone."""

    num_rows = 10_000
    is_gone = False

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if self.is_gone:
            raise RowsUnavailableError("the store is gone")
        return np.repeat(row_ids[:, None], WIDTH, axis=1).astype(np.float32)


class Refills:
    """Everything between a host store and the pool's slots."""

    def __init__(self) -> None:
        self.store = Store()
        self.loader = RowLoader(self.store, 4 * WIDTH, SharedMemoryLink())
        storage = torch.full((64 * 64,), torch.nan)
        self.rows = RowPages(storage, 64, 256, WIDTH, torch.float32)
        self.refill = BackgroundRefill(self.loader, self.rows, CPU, torch.float32)

    def run(self, plan: RefillPlan) -> tuple[RefillPlan | None, RefillPlan | None]:
        """Begins a refill; what comes of it: refilled, failed."""
        self.refill.begin(plan)
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            self.refill.write_landed()
            ended = self.refill.take_ended()
            if any(one is not None for one in ended):
                return ended
            time.sleep(0.001)
        raise AssertionError("the refill never ends")


def plan_of(number: int) -> RefillPlan:
    rows = np.arange(number, dtype=np.int64) * 7
    return RefillPlan(rows, np.arange(number, dtype=np.int64)[::-1].copy())


@pytest.mark.parametrize("number", [1, CHUNK_ROWS, 3 * CHUNK_ROWS + 1])
def test_all_rows_are_in_their_slots_when_a_refill_is_done(number: int) -> None:
    refills, plan = Refills(), plan_of(number)
    assert refills.run(plan) == (plan, None)
    found = refills.rows.read(torch.from_numpy(plan.slots))
    assert found[:, 0].tolist() == plan.row_ids.tolist()


def test_rows_that_are_not_to_be_had_fail_the_refill_and_the_next_one_goes_on() -> None:
    refills, plan = Refills(), plan_of(200)
    refills.store.is_gone = True
    assert refills.run(plan) == (None, plan)
    refills.store.is_gone = False
    assert refills.run(plan) == (plan, None)


@pytest.mark.parametrize("number", [10, 200])
def test_rows_that_cannot_be_written_are_never_taken_for_loaded(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refills, plan = Refills(), plan_of(number)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(refills.rows, "write", out_of_memory)
        assert refills.run(plan) == (None, plan)
    assert refills.run(plan) == (plan, None)


def test_a_refill_for_which_there_is_no_thread_fails_and_later_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refills, plan = Refills(), plan_of(5)

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert refills.run(plan) == (None, plan)
    assert refills.run(plan) == (plan, None)


def test_nothing_is_read_after_the_loader_was_closed() -> None:
    refills, plan = Refills(), plan_of(5)
    refills.loader.close()
    assert refills.run(plan) == (None, plan)
