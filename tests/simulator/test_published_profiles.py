"""Profiles of devices that were only read about follow from their sources."""

from __future__ import annotations

import pytest

from helm_engine.simulator.workloads import BUILTIN
from model_executor.cost_profile import CostProfile, load_cost_profile

# meta-recsys/generative-recommenders issue 530: H100, 32 users of 1,024 events, taken for 0 to
# 2,048 evenly, and 2,048 candidates each; 9.30 ms, of which 39.8 % in matrix products and 39.1 % in
# attention.
H100_MS = 9.30
TOKENS = 32 * (1024 + 2048)
PAIRS = 32 * (2048**2 / 3 / 2 + 2048 * 1024)
PRODUCTS_MS, ATTENTION_MS = 0.398 * H100_MS, 0.391 * H100_MS
OTHERS_MS = H100_MS - PRODUCTS_MS - ATTENTION_MS
# NVIDIA's data sheets: bf16 TFLOP/s without sparsity, TB/s.
H100, A100, L20 = (989.0, 3.35), (312.0, 2.04), (119.5, 0.864)
ROW_BYTES = 1024


def profile(name: str) -> CostProfile:
    return load_cost_profile(BUILTIN / "profiles" / f"{name}.json")


@pytest.mark.parametrize(("name", "device"), [("a100-remote-ps", A100), ("l20-25gbe", L20)])
def test_compute_is_the_measured_h100_scaled_by_the_data_sheets(
    name: str, device: tuple[float, float]
) -> None:
    slower, less_bandwidth = H100[0] / device[0], H100[1] / device[1]
    row = (PRODUCTS_MS * slower + OTHERS_MS * less_bandwidth) / TOKENS
    pair = ATTENTION_MS * slower / PAIRS
    found = profile(name)
    assert found.prefill_row_ms == pytest.approx(row, rel=0.01)
    assert found.attention_pair_ms == pytest.approx(pair, rel=0.01)
    assert found.candidate_ms == pytest.approx(row + 1024 * pair, rel=0.01)
    assert found.row_copy_ms == pytest.approx(2 * ROW_BYTES / device[1] / 1e9, rel=0.05)
    # NVIDIA/recsys-examples, FLEXKV_CPU_BREAKDOWN.md, onboard round, 1,024 events: lookup 1.830,
    # allocate 0.275.
    assert found.step_ms == pytest.approx(1.830 + 0.275, rel=0.01)
    assert found.round_trip_ms == 0.5  # Dean's "numbers everyone should know".


def test_rows_of_the_a100_come_from_one_redis_process() -> None:
    # gist.github.com/dspezia/1386203: GETs of 1,000 bytes over a network, without pipelining.
    per_s = 113_250.28
    wire_ms = 8 * ROW_BYTES / (25e9 / 8) * 1e3
    assert profile("a100-remote-ps").row_miss_ms == pytest.approx(1e3 / per_s, rel=0.01)
    assert profile("a100-remote-ps").row_miss_ms > wire_ms


def test_rows_of_the_l20_come_pipelined_over_its_own_link() -> None:
    # gist.github.com/antirez/1892983: GETs, 16 in a pipeline; then the row is on the wire.
    per_s = 862_812.75
    wire_ms = 8 * ROW_BYTES / 25e9 * 1e3
    assert profile("l20-25gbe").row_miss_ms == pytest.approx(1e3 / per_s + wire_ms, rel=0.03)
