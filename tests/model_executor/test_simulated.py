"""Prices of steps, worked by hand, and the executor that lets a clock pass them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from block_manager.embedding_cache import EmbeddingCache
from helm_engine.clock import VirtualClock
from model_executor.cost_profile import CostProfile
from model_executor.simulated_executor import SimulatedExecutor
from model_executor.step import CandidateScoring, Retrieval, ScheduledRequest, SchedulerOutput

FIGURES: dict[str, float] = {
    "step_ms": 0.5,
    "prefill_row_ms": 0.1,
    "attention_pair_ms": 0.01,
    "candidate_ms": 0.002,
    "retrieval_ms": 0.7,
    "row_miss_ms": 0.03,
}


def make_profile(**changes: float) -> CostProfile:
    return CostProfile(device="toy", source="made up for a test", **{**FIGURES, **changes})


def request(
    name: str, start: int, num_rows: int, task: CandidateScoring | Retrieval | None = None
) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=name,
        start=start,
        row_index=np.arange(num_rows),
        block_table=np.arange(1, 2),
        features=np.zeros((start + num_rows, 2), dtype=np.int64),
        task=task,
    )


def candidates(number: int) -> CandidateScoring:
    return CandidateScoring(np.arange(number), np.zeros((number, 2), dtype=np.int64))


def step_of(*requests: ScheduledRequest, resident: int = 0, missing: int = 0) -> SchedulerOutput:
    """A step over so many rows that are in the pool and so many that are not."""
    emb = EmbeddingCache(np.array([1]), 64, 100)
    first = emb.plan(np.arange(resident), np.ones(resident, dtype=np.int64))
    emb.commit(first)
    rows = np.arange(resident + missing)
    plan = emb.plan(rows, np.ones(len(rows), dtype=np.int64))
    emb.commit(plan)
    emb.check_integrity()
    return SchedulerOutput(requests=requests, rows=plan)


# ---------------------------------------------------------------- prices


def test_prefill_pays_for_the_step_its_rows_and_their_pairs() -> None:
    # Rows 3 and 4 attend to 4 and 5 rows.
    price = make_profile().price(step_of(request("a", start=3, num_rows=2)))
    assert price.prefill == pytest.approx(0.5 + 2 * 0.1 + 9 * 0.01)


def test_step_is_paid_once_for_all_its_requests() -> None:
    # Three rows alone make 1 + 2 + 3 pairs; row 10 makes 11.
    price = make_profile().price(step_of(request("a", 0, 3), request("b", 10, 1)))
    assert price.prefill == pytest.approx(0.5 + 4 * 0.1 + 17 * 0.01)


def test_prefill_in_chunks_costs_the_extra_steps_and_nothing_else() -> None:
    profile = make_profile()
    whole = profile.price(step_of(request("a", 0, 10))).prefill
    chunks = [profile.price(step_of(request("a", *chunk))).prefill for chunk in ((0, 4), (4, 6))]
    assert sum(chunks) == pytest.approx(whole + 0.5)


def test_only_rows_that_are_not_resident_are_paid_for() -> None:
    price = make_profile().price(step_of(request("a", 0, 5), resident=2, missing=3))
    assert price.load == pytest.approx(3 * 0.03)


def test_every_candidate_of_every_request_is_paid_for() -> None:
    step = step_of(
        request("a", 0, 1, candidates(4)), request("b", 0, 1), request("c", 0, 1, candidates(3))
    )
    assert make_profile().price(step).score == pytest.approx(7 * 0.002)


def test_a_candidate_is_paired_with_the_whole_context() -> None:
    profile = make_profile(candidate_pair_ms=0.001)
    step = step_of(request("a", 6, 4, candidates(5)), request("b", 0, 2))
    assert profile.price(step).score == pytest.approx(5 * 0.002 + 5 * 10 * 0.001)


def test_each_request_of_a_step_is_paid_for() -> None:
    profile = make_profile(request_ms=0.25)
    price = profile.price(step_of(request("a", 0, 1), request("b", 0, 1)))
    assert price.prefill == pytest.approx(0.5 + 2 * 0.25 + 2 * 0.1 + 2 * 0.01)
    assert profile.price(step_of()).prefill == 0.0


@pytest.mark.parametrize("value", [-0.001, -1, float("nan")])
@pytest.mark.parametrize("field", FIGURES)
def test_cost_below_zero_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        make_profile(**{field: value})


def test_cost_of_zero_is_allowed() -> None:
    assert make_profile(row_miss_ms=0.0).row_miss_ms == 0.0


# ---------------------------------------------------------------- the executor


def test_clock_advances_by_the_price_of_each_step() -> None:
    clock = VirtualClock()
    executor = SimulatedExecutor(make_profile(), clock)
    step = step_of(request("a", 3, 2, candidates(4)), missing=3)
    price_s = (0.5 + 2 * 0.1 + 9 * 0.01 + 4 * 0.002 + 3 * 0.03) / 1000
    executor.execute(step)
    assert clock.now() == pytest.approx(price_s)
    executor.execute(step)
    assert clock.now() == pytest.approx(2 * price_s)


def test_timings_of_the_answer_are_the_price() -> None:
    profile = make_profile()
    step = step_of(request("a", 3, 2, candidates(4)), missing=3)
    output = SimulatedExecutor(profile, VirtualClock()).execute(step)
    assert output.timings_ms == profile.price(step)


def test_every_candidate_gets_a_score_and_every_retrieval_an_answer() -> None:
    step = step_of(
        request("scored", 0, 1, candidates(4)),
        request("searched", 0, 1, Retrieval(5, np.empty(0, dtype=np.int64))),
        request("prefilled", 0, 1),
    )
    output = SimulatedExecutor(make_profile(), VirtualClock()).execute(step)
    shapes: dict[str, Any] = {name: part.shape for name, part in output.candidate_scores.items()}
    assert shapes == {"scored": (4, 1)}
    assert output.retrieved.keys() == {"searched"}
