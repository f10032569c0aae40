"""How a request is cut into steps under each model's rules, in virtual time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_manager.block_hash import hash_blocks, root_hash
from helm_engine.config import SchedulerConfig
from helm_engine.request import Request, RequestStatus
from model_executor.capabilities import StepRules
from model_executor.step import NO_ROW, CandidateScoring, Retrieval, SchedulerOutput
from tests.helm_engine.test_scheduler import BLOCK_TOKENS, Simulation, make_request

WHOLE = StepRules(chunkable=False, recomputes_last_row=False)
RANKING = StepRules(recomputes_last_row=False)


def simulate(
    rules: StepRules, budget: int, *requests: Request, max_num_seqs: int = 8
) -> Simulation:
    """Runs requests that came together to their ends."""
    config = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
    simulation = Simulation(config, rules=rules)
    for request in requests:
        simulation.core.add_request(request)
    ended = simulation.drain()
    assert {request.request_id for request in ended} == {one.request_id for one in requests}
    assert all(request.status is RequestStatus.FINISHED for request in ended)
    return simulation


@dataclass
class Work:
    """What the steps did for one request, in their order."""

    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Start and rows of each share that computed any."""
    batches: list[int] = field(default_factory=list)
    """Candidates of each share that scored any."""

    @property
    def rows(self) -> list[int]:
        """Context rows computed, as often as they were."""
        return [row for start, rows in self.chunks for row in range(start, start + rows)]


def work_of(simulation: Simulation) -> dict[str, Work]:
    found: dict[str, Work] = defaultdict(Work)
    for step in simulation.executor.steps:
        for share in step.requests:
            work = found[share.request_id]
            if share.num_rows:
                work.chunks.append((share.start, share.num_rows))
            if isinstance(share.task, CandidateScoring):
                work.batches.append(share.num_candidates)
    return found


def tokens_of(step: SchedulerOutput) -> int:
    return sum(share.num_rows + share.num_candidates for share in step.requests)


# ---------------------------------------------------------------- any rules


@st.composite
def _scenario(draw: st.DrawFn) -> tuple[StepRules, int, list[Request]]:
    rules = StepRules(
        chunkable=draw(st.booleans()),
        microbatch_unit=draw(st.integers(1, 7)),
        recomputes_last_row=draw(st.booleans()),
    )
    budget = draw(st.integers(max(2, rules.min_tokens), 90))
    # A context that may not be chunked fits into a step: longer ones are refused before.
    longest = 120 if rules.chunkable else budget
    requests = [
        make_request(
            f"r{number}",
            draw(st.integers(1, longest)),
            draw(st.integers(1, 60)),
            user=draw(st.none() | st.sampled_from(["ada", "bob"])) if rules.chunkable else None,
            deadline=draw(st.just(float("inf")) | st.floats(50.0, 90.0)),
        )
        for number in range(draw(st.integers(1, 6)))
    ]
    return rules, budget, requests


@settings(max_examples=150)
@given(scenario=_scenario())
def test_every_row_and_candidate_runs_as_the_rules_allow(
    scenario: tuple[StepRules, int, list[Request]],
) -> None:
    rules, budget, requests = scenario
    simulation = simulate(rules, budget, *requests)
    assert all(0 < tokens_of(step) <= budget for step in simulation.executor.steps)
    done = work_of(simulation)
    for request in requests:
        work, length = done[request.request_id], request.num_tokens
        assert sum(work.batches) == request.num_candidates
        assert all(batch % rules.microbatch_unit == 0 for batch in work.batches[:-1])
        assert set(work.rows) == set(range(request.cached_tokens, length))
        again = len(work.rows) - len(set(work.rows))
        if rules.recomputes_last_row:
            # The step that reaches the end may have had no room for a candidate.
            assert again in (len(work.batches) - 1, len(work.batches))
            assert work.rows.count(length - 1) == 1 + again
        else:
            assert again == 0
        if not rules.chunkable:
            assert (0, length) in work.chunks
            assert all(start + rows == length for start, rows in work.chunks)


# ---------------------------------------------------------------- contexts in one step


def test_context_that_may_not_be_chunked_waits_for_a_step_with_room_for_all_of_it() -> None:
    requests = [make_request(name, 40, candidates=5) for name in "ab"]
    simulation = simulate(WHOLE, 64, *requests)
    shares = [
        [
            (share.request_id, share.start, share.num_rows, share.num_candidates)
            for share in step.requests
        ]
        for step in simulation.executor.steps
    ]
    # The second finds 19 tokens left in the first step, and takes no part in it.
    assert shares == [[("a", 0, 40, 5)], [("b", 0, 40, 5)]]


def test_context_that_takes_a_whole_steps_budget_is_scored_in_later_steps() -> None:
    simulation = simulate(WHOLE, 40, make_request("a", 40, candidates=90))
    work = work_of(simulation)["a"]
    assert work.chunks == [(0, 40)]
    assert work.batches == [40, 40, 10]
    assert len(simulation.executor.steps) == 4


def test_shorter_contexts_may_use_what_a_whole_one_leaves() -> None:
    requests = [make_request("a", 50, 5), make_request("b", 50, 5), make_request("c", 4, 5)]
    simulation = simulate(WHOLE, 64, *requests)
    first, second = simulation.executor.steps
    assert [share.request_id for share in first.requests] == ["a", "c"]
    assert [share.request_id for share in second.requests] == ["b"]


def test_context_that_needs_a_whole_step_is_not_starved_by_a_stream_of_short_ones() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4), rules=WHOLE)
    whole = make_request("whole", 64, candidates=5)
    for number in range(3):
        simulation.core.add_request(make_request(f"before{number}", 30, 10))
    simulation.core.add_request(whole)
    for number in range(2000):
        now = simulation.clock.now()
        simulation.core.add_request(make_request(f"r{number}", 30, 10, arrival=now))
        simulation.core.step()
        if whole.has_ended:
            break
    assert whole.status is RequestStatus.FINISHED
    assert simulation.clock.now() < 0.1
    simulation.drain()


def test_context_that_may_be_chunked_fills_every_step() -> None:
    simulation = simulate(RANKING, 32, make_request("a", 100, candidates=60))
    assert [tokens_of(step) for step in simulation.executor.steps] == [32, 32, 32, 32, 32]
    work = work_of(simulation)["a"]
    assert work.chunks == [(0, 32), (32, 32), (64, 32), (96, 4)]
    assert work.batches == [28, 32]


# ---------------------------------------------------------------- micro-batches


def test_candidates_are_split_at_multiples_of_the_unit() -> None:
    rules = StepRules(microbatch_unit=8, recomputes_last_row=False)
    simulation = simulate(rules, 30, make_request("a", 13, candidates=55))
    # 17 tokens are left beside the context, and 30 in the next step.
    assert work_of(simulation)["a"].batches == [16, 24, 15]


def test_last_micro_batch_may_be_any_size() -> None:
    rules = StepRules(microbatch_unit=8, recomputes_last_row=False)
    simulation = simulate(rules, 30, make_request("a", 13, candidates=17))
    assert work_of(simulation)["a"].batches == [17]


def test_request_with_less_room_than_a_unit_leaves_it_to_others() -> None:
    rules = StepRules(microbatch_unit=8, recomputes_last_row=False)
    requests = [make_request("a", 26, candidates=20), make_request("b", 3, candidates=1)]
    simulation = simulate(rules, 32, *requests)
    first, second = simulation.executor.steps
    assert [(one.request_id, one.num_rows, one.num_candidates) for one in first.requests] == [
        ("a", 26, 0),
        ("b", 3, 1),
    ]
    assert [(one.request_id, one.num_rows, one.num_candidates) for one in second.requests] == [
        ("a", 0, 20)
    ]


# ---------------------------------------------------------------- the last row


def test_last_row_is_computed_again_by_each_micro_batch_that_is_scored_with_it() -> None:
    simulation = simulate(StepRules(), 16, make_request("a", 20, candidates=40))
    work = work_of(simulation)["a"]
    assert work.chunks == [(0, 16), (16, 4), (19, 1), (19, 1)]
    assert work.batches == [12, 15, 13]


def test_no_row_is_computed_again_where_candidates_are_rows_themselves() -> None:
    simulation = simulate(RANKING, 16, make_request("a", 20, candidates=40))
    work = work_of(simulation)["a"]
    assert work.chunks == [(0, 16), (16, 4)]
    assert work.batches == [12, 16, 12]


@pytest.mark.parametrize(("rules", "cached"), [(StepRules(), 32), (RANKING, 48)])
def test_whole_context_is_taken_from_the_cache_where_no_row_of_it_is_an_output(
    rules: StepRules, cached: int
) -> None:
    simulation = Simulation(rules=rules)
    length = 3 * BLOCK_TOKENS

    def ask(name: str) -> Request:
        request = make_request(name, length, candidates=7)
        hashes = hash_blocks(
            root_hash("m", b"ada"), np.zeros((length, 1), dtype=np.int64), BLOCK_TOKENS
        )
        request.block_hashes = hashes
        simulation.core.add_request(request)
        simulation.drain()
        return request

    assert ask("first").cached_tokens == 0
    again = ask("again")
    assert again.cached_tokens == cached
    (share,) = simulation.executor.steps[-1].requests
    assert (share.start, share.num_rows, share.num_candidates) == (cached, length - cached, 7)
    assert len(share.features) == length
    assert len(share.block_table) == 3


def test_retrieval_needs_the_last_row_and_gets_it() -> None:
    simulation = simulate(StepRules(), 16, make_request("a", 20, candidates=0))
    shares = [share for step in simulation.executor.steps for share in step.requests]
    assert [(share.start, share.num_rows) for share in shares] == [(0, 16), (16, 4)]
    assert [isinstance(share.task, Retrieval) for share in shares] == [False, True]


# ---------------------------------------------------------------- tokens without rows


def test_tokens_without_a_pool_row_are_planned_for_no_row() -> None:
    request = make_request("a", 6, candidates=3)
    request.tokens.rows[[0, 3]] = NO_ROW
    request.tokens.rows[[1, 4]] = 9
    simulation = simulate(RANKING, 64, request)
    (step,) = simulation.executor.steps
    (share,) = step.requests
    rows = step.rows.row_ids
    assert NO_ROW not in rows
    assert len(set(rows.tolist())) == len(rows)
    assert share.row_index[[0, 3]].tolist() == [NO_ROW, NO_ROW]
    has_row = share.row_index != NO_ROW
    assert rows[share.row_index[has_row]].tolist() == request.tokens.rows[has_row].tolist()
    assert isinstance(share.task, CandidateScoring)
    assert rows[share.task.row_index].tolist() == [1, 2, 3]
    assert request.rows_requested == len(rows)


def test_step_of_tokens_without_any_row_plans_none() -> None:
    request = make_request("a", 40, candidates=3)
    request.tokens.rows[:] = NO_ROW
    simulation = simulate(RANKING, 16, request)
    first, second, _ = simulation.executor.steps
    assert len(first.rows.row_ids) == len(second.rows.row_ids) == 0
    assert (first.requests[0].row_index == NO_ROW).all()
    assert request.rows_requested == 3


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("rules", "least"),
    [
        (StepRules(microbatch_unit=4, recomputes_last_row=False), 4),
        (StepRules(microbatch_unit=4, recomputes_last_row=True), 5),
        (StepRules(chunkable=False, microbatch_unit=9, recomputes_last_row=False), 9),
    ],
)
def test_budget_too_small_for_the_model_is_refused_by_field(rules: StepRules, least: int) -> None:
    with pytest.raises(ValueError, match=f"^max_num_batched_tokens: must be at least {least} "):
        Simulation(SchedulerConfig(max_num_batched_tokens=least - 1), rules=rules)


@pytest.mark.parametrize("unit", [2, 4, 9])
@pytest.mark.parametrize("recomputes", [False, True])
def test_smallest_budget_of_a_model_is_enough(unit: int, recomputes: bool) -> None:
    rules = StepRules(microbatch_unit=unit, recomputes_last_row=recomputes)
    requests = [make_request(f"r{number}", 11 * number + 1, 4 * unit + 1) for number in range(3)]
    simulate(rules, rules.min_tokens, *requests)
    assert [request.num_scored for request in requests] == [4 * unit + 1] * 3
