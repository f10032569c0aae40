from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_executor import memory_meter
from model_executor.device_budget import DeviceBudget, as_size
from model_executor.exceptions import DeviceMemoryError

GIB = 1 << 30
LARGE = 80 * GIB


def budget(
    free: int = LARGE, utilization: float = 0.9, num_engines: int = 1, total: int = LARGE
) -> DeviceBudget:
    return DeviceBudget("cuda:0", total, free, utilization, num_engines)


def test_the_pool_is_what_weights_and_workspace_leave() -> None:
    assert budget().pool_bytes(10 * GIB, 2 * GIB, smallest_pool=GIB) == 60 * GIB
    assert budget(num_engines=3).pool_bytes(10 * GIB, 2 * GIB, smallest_pool=GIB) == 12 * GIB


@given(
    total=st.integers(1, 1 << 40),
    utilization=st.floats(0.001, 1.0),
    num_engines=st.integers(1, 9),
    weights=st.integers(0, 1 << 39),
    workspace=st.integers(0, 1 << 39),
    smallest=st.integers(1, 1 << 39),
)
def test_engines_never_take_more_than_their_share(
    total: int, utilization: float, num_engines: int, weights: int, workspace: int, smallest: int
) -> None:
    shared = budget(total, utilization, num_engines, total)
    needed = weights + workspace + smallest
    try:
        pool = shared.pool_bytes(weights, workspace, smallest)
    except DeviceMemoryError:
        assert needed > shared.share
    else:
        assert pool >= smallest
        assert num_engines * (weights + workspace + pool) <= total * utilization + 1


def test_too_little_is_told_with_what_is_needed_free_and_there() -> None:
    with pytest.raises(DeviceMemoryError) as error:
        budget(free=79 * GIB, utilization=0.1).pool_bytes(6 * GIB, 3 * GIB // 2, GIB)
    assert str(error.value) == (
        "gpu_memory_utilization: 0.1 of the 80.00 GiB of cuda:0 is 8.00 GiB, and 8.50 GiB are "
        "needed: 6.00 GiB of weights, 1.50 GiB for the largest step, 1.00 GiB for the smallest "
        "pool (79.00 GiB were free); lower max_num_batched_tokens, max_num_seqs or "
        "max_retrieval_matrix_bytes, or raise gpu_memory_utilization"
    )


def test_memory_that_others_hold_is_told_with_what_would_fit() -> None:
    budget(free=72 * GIB).check_free()
    with pytest.raises(DeviceMemoryError) as error:
        budget(free=30 * GIB).check_free()
    assert str(error.value) == (
        "gpu_memory_utilization: 0.9 of the 80.00 GiB of cuda:0 is 72.00 GiB, and only 30.00 GiB "
        "are free: other processes hold 50.00 GiB; end them, or lower it to 0.37"
    )
    budget(free=30 * GIB, utilization=0.37).check_free()
    with pytest.raises(DeviceMemoryError, match=r"for each of 2 engines is 36\.00 GiB"):
        budget(free=30 * GIB, num_engines=2).check_free()


def test_sizes_are_told_in_units_of_their_own() -> None:
    assert [as_size(size) for size in (0, 1023, 1024, 3 << 19, 5 << 29, -(1 << 20))] == [
        "0 bytes",
        "1023 bytes",
        "1.00 KiB",
        "1.50 MiB",
        "2.50 GiB",
        "-1.00 MiB",
    ]


def test_out_of_memory_becomes_a_line_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, LARGE))
    with (
        pytest.raises(DeviceMemoryError) as error,
        memory_meter.memory_errors_told(torch.device("cuda", 1), "the weights", "use bfloat16"),
    ):
        raise torch.OutOfMemoryError("tried to allocate")
    assert str(error.value) == (
        "device: cuda:1 has no room for the weights: 3.00 GiB of 80.00 GiB are free; use bfloat16"
    )


def test_the_meter_of_a_gpu_asks_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"memory_allocated": 1000, "max_memory_allocated": 1700}
    asked: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats", *said):

        def answer(device: torch.device, name: str = name) -> int | None:
            asked.append(name)
            return said.get(name)

        monkeypatch.setattr(torch.cuda, name, answer)
    meter = memory_meter.CudaMemoryMeter(torch.device("cuda", 0))
    meter.begin()
    assert asked == ["synchronize", "reset_peak_memory_stats", "memory_allocated"]
    assert meter.most_added() == 700
