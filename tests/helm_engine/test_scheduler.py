"""The scheduler in virtual time: the same code as in a server, over a simulated executor."""

from __future__ import annotations

import numpy as np
import pytest

from block_manager.block_hash import hash_blocks, root_hash
from block_manager.pool_layout import PoolConfig, plan_layout
from helm_engine.clock import VirtualClock
from helm_engine.config import SchedulerConfig
from helm_engine.engine_core import EngineCore
from helm_engine.exceptions import (
    DeadlineExceededError,
    QueueFullError,
    RequestAbortedError,
    StepFailedError,
)
from helm_engine.request import Request, RequestStatus
from helm_engine.scheduler import build_scheduler
from model_executor.capabilities import StepRules
from model_executor.cost_profile import CostProfile
from model_executor.inputs.features import TokenSequence
from model_executor.simulated_executor import SimulatedExecutor
from model_executor.step import ModelOutput, SchedulerOutput

BLOCK_TOKENS = 16
NUM_ITEMS = 5_000
PROFILE = CostProfile(
    device="invented",
    source="round numbers for tests",
    step_ms=1.0,
    prefill_row_ms=0.01,
    attention_pair_ms=0.0,
    candidate_ms=0.001,
    retrieval_ms=0.1,
    row_miss_ms=0.002,
)


class RecordingExecutor(SimulatedExecutor):
    """Keeps the steps it was given."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(PROFILE, clock)
        self.steps: list[SchedulerOutput] = []

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        self.steps.append(step)
        return super().execute(step)


class Simulation:
    """An engine core in virtual time."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        pages: int = 60,
        emb_fraction: float = 0.3,
        rules: StepRules | None = None,
    ) -> None:
        self.config = config or SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=8)
        row_bytes = 256
        layout = plan_layout(
            PoolConfig(
                pool_bytes=pages * BLOCK_TOKENS * 1024
                + self.config.max_num_batched_tokens * row_bytes,
                emb_fraction=emb_fraction,
                block_tokens=BLOCK_TOKENS,
            ),
            kv_bytes_per_token=1024,
            row_bytes=row_bytes,
            max_context_tokens=400,
            staging_rows=self.config.max_num_batched_tokens,
        )
        self.clock = VirtualClock()
        self.executor = RecordingExecutor(self.clock)
        self.scheduler = build_scheduler(self.config, layout, NUM_ITEMS, rules or StepRules())
        self.core = EngineCore(self.scheduler, self.executor, self.clock)

    def drain(self) -> list[Request]:
        """Steps until nothing is left; returns requests in the order they ended."""
        ended: list[Request] = []
        for _ in range(100_000):
            if not self.core.has_work:
                self.core.check_integrity()
                return ended
            ended += self.core.step()
        raise AssertionError("the engine makes no progress")


def make_request(
    name: str,
    length: int = 20,
    candidates: int = 10,
    *,
    user: str | None = None,
    deadline: float = float("inf"),
    priority: int = 0,
    arrival: float = 0.0,
) -> Request:
    """A request over items that are fixed by the user, or by the request's name."""
    rng = np.random.default_rng(sum((user or name).encode()))
    item_ids = rng.integers(1, NUM_ITEMS, 400)[:length]
    times = np.arange(length + 1)
    tokens = TokenSequence(
        rows=item_ids,
        features=np.stack([times[:-1], times[1:]], axis=1),
        candidate_rows=np.arange(1, candidates + 1),
        candidate_features=np.zeros((candidates, 2), dtype=np.int64),
        num_final=length - 1,
    )
    hashes = []
    if user is not None:
        root = root_hash("m", user.encode())
        hashes = hash_blocks(root, tokens.hash_inputs(), BLOCK_TOKENS)
    return Request(
        request_id=name,
        tokens=tokens,
        top_k=10,
        excluded_ids=np.empty(0, dtype=np.int64),
        block_hashes=hashes,
        arrival=arrival,
        deadline=deadline,
        priority=priority,
    )


def test_200_requests_in_virtual_time_all_end_with_no_page_leaked() -> None:
    simulation = Simulation()
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(0.004, 200))
    lengths = np.full(12, 20)
    ended: list[Request] = []
    for number, arrival in enumerate(arrivals):
        while simulation.core.has_work and simulation.clock.now() < arrival:
            ended += simulation.core.step()
        if simulation.clock.now() < arrival:
            simulation.clock.advance(float(arrival) - simulation.clock.now())
        user = int(rng.integers(0, 12))
        lengths[user] = min(400, lengths[user] + int(rng.integers(1, 40)))
        simulation.core.add_request(
            make_request(
                f"r{number}",
                int(lengths[user]),
                candidates=int(rng.integers(0, 600)),
                user=f"u{user}",
                arrival=float(arrival),
            )
        )
    ended += simulation.drain()
    assert sorted(request.request_id for request in ended) == sorted(f"r{n}" for n in range(200))
    assert all(request.status is RequestStatus.FINISHED for request in ended)
    assert all(request.finished_at > request.arrival for request in ended)
    pool = simulation.scheduler.kv.pool
    assert pool.num_held_blocks == 0
    # Twelve users whose histories together exceed the pool.
    assert simulation.scheduler.stats.prefix_hits > 0
    assert pool.num_evictions > 0
    assert simulation.scheduler.stats.row_hits > 0
    assert simulation.scheduler.emb.num_evictions > 0


def test_the_simulated_run_is_reproducible_to_the_last_tick() -> None:
    def run() -> list[tuple[str, float]]:
        simulation = Simulation()
        for number in range(30):
            simulation.core.add_request(
                make_request(f"r{number}", 10 * number + 5, 100, user=f"u{number % 4}")
            )
        return [(request.request_id, request.finished_at) for request in simulation.drain()]

    assert run() == run()


def test_no_step_exceeds_the_token_budget_and_every_row_and_candidate_runs() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4))
    requests = [make_request(f"r{n}", 50 + 70 * n, 90) for n in range(5)]
    for request in requests:
        simulation.core.add_request(request)
    simulation.drain()
    rows: dict[str, set[int]] = {}
    candidates: dict[str, int] = {}
    for step in simulation.executor.steps:
        tokens = 0
        for chunk in step.requests:
            scored = 0 if chunk.task is None else len(getattr(chunk.task, "row_index", ()))
            tokens += chunk.num_rows + scored
            rows.setdefault(chunk.request_id, set()).update(
                range(chunk.start, chunk.start + chunk.num_rows)
            )
            candidates[chunk.request_id] = candidates.get(chunk.request_id, 0) + scored
        assert tokens <= 64
    for request in requests:
        assert rows[request.request_id] == set(range(request.num_tokens))
        assert candidates[request.request_id] == 90


def test_the_earliest_deadline_runs_first_among_equal_priorities() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=1))
    simulation.core.add_request(make_request("late", deadline=0.9))
    simulation.core.add_request(make_request("none"))
    simulation.core.add_request(make_request("soon", deadline=0.5))
    simulation.core.add_request(make_request("vip", deadline=0.8, priority=-1))
    assert [request.request_id for request in simulation.drain()] == [
        "vip",
        "soon",
        "late",
        "none",
    ]


def test_an_urgent_request_shares_the_budget_before_a_running_long_prefill() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=40, max_num_seqs=4))
    simulation.core.add_request(make_request("long", 400))
    simulation.core.step()
    simulation.core.add_request(make_request("urgent", 20, 10, deadline=0.5))
    assert [request.request_id for request in simulation.core.step()] == ["urgent"]
    assert [request.request_id for request in simulation.drain()] == ["long"]


def test_a_request_that_finds_no_blocks_waits_and_is_not_overtaken() -> None:
    # 26 KV pages hold one history of 400 rows; the second must wait, the small third behind it.
    simulation = Simulation(pages=27, emb_fraction=0.0)
    simulation.core.add_request(make_request("first", 400))
    simulation.core.add_request(make_request("second", 400))
    simulation.core.add_request(make_request("third", 5))
    assert [request.request_id for request in simulation.drain()] == ["first", "second", "third"]


def test_a_request_without_a_deadline_is_not_starved_by_those_with_one() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=1))
    simulation.core.add_request(make_request("patient"))
    ended: list[Request] = []
    for number in range(2000):
        now = simulation.clock.now()
        hurried = make_request(f"r{number}", arrival=now, deadline=now + 0.05)
        simulation.core.add_request(hurried)
        ended += simulation.core.step()
        if any(request.request_id == "patient" for request in ended):
            break
    patient = next(request for request in ended if request.request_id == "patient")
    assert patient.status is RequestStatus.FINISHED
    # It was due a second after it came.
    assert 0.9 < patient.finished_at < 1.1
    simulation.drain()


def test_an_expired_request_is_told_at_once_even_behind_others_that_wait() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=1))
    simulation.core.add_request(make_request("running", 400, priority=-1))
    simulation.core.step()
    simulation.core.add_request(make_request("vip", priority=-1, deadline=100.0))
    simulation.core.add_request(make_request("late", deadline=simulation.clock.now()))
    simulation.clock.advance(0.001)
    assert [request.request_id for request in simulation.core.step()] == ["late"]
    assert simulation.scheduler.num_waiting == 1
    simulation.drain()


def test_withdrawn_requests_leave_the_queue_at_once() -> None:
    simulation = Simulation(SchedulerConfig(max_num_seqs=1, max_num_waiting=3))
    requests = [make_request(f"r{number}") for number in range(4)]
    for _ in range(50):
        for request in requests:
            simulation.core.add_request(request)
        assert simulation.scheduler.num_waiting == 4
        for request in requests:
            simulation.core.fail_request(request, RequestAbortedError("withdrawn"))
        assert simulation.scheduler.num_waiting == 0
    simulation.drain()


def test_a_full_queue_refuses_and_names_the_limit() -> None:
    simulation = Simulation(SchedulerConfig(max_num_seqs=1, max_num_waiting=2))
    for name in "abc":  # One of them has a free seat.
        simulation.core.add_request(make_request(name))
    with pytest.raises(QueueFullError, match="the limit is 2"):
        simulation.core.add_request(make_request("d"))
    assert len(simulation.drain()) == 3


def test_a_request_past_its_deadline_ends_with_an_error_and_frees_its_blocks() -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=2))
    simulation.core.add_request(make_request("running", 400, deadline=0.002))
    simulation.core.step()
    simulation.core.add_request(make_request("waiting", deadline=0.003))
    simulation.clock.advance(1.0)
    ended = simulation.drain()
    assert {request.request_id for request in ended} == {"running", "waiting"}
    assert all(isinstance(request.error, DeadlineExceededError) for request in ended)


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_a_withdrawn_request_gives_everything_back(steps_before: int) -> None:
    simulation = Simulation(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=1))
    gone = make_request("gone", 300)
    simulation.core.add_request(gone)
    simulation.core.add_request(make_request("stays", 30))
    for _ in range(steps_before):
        simulation.core.step()
    simulation.core.fail_request(gone, RequestAbortedError("withdrawn"))
    ended = {request.request_id: request for request in simulation.drain()}
    assert isinstance(ended["gone"].error, RequestAbortedError)
    assert ended["stays"].status is RequestStatus.FINISHED
    pool = simulation.scheduler.kv.pool
    assert pool.num_held_blocks == 0


def test_a_failed_step_fails_its_requests_and_nothing_it_loaded_counts_as_resident() -> None:
    simulation = Simulation()
    simulation.core.add_request(make_request("doomed", user="u"))
    working = simulation.executor.execute

    def broken(step: SchedulerOutput) -> ModelOutput:
        raise OSError("the host is gone")

    simulation.executor.execute = broken  # type: ignore[method-assign]
    (doomed,) = simulation.core.step()
    assert isinstance(doomed.error, StepFailedError)
    assert "the host is gone" in str(doomed.error)
    assert simulation.scheduler.emb.num_resident == 0
    simulation.executor.execute = working  # type: ignore[method-assign]
    simulation.core.add_request(make_request("next", user="u"))
    (following,) = simulation.drain()
    assert following.status is RequestStatus.FINISHED
    assert (following.cached_tokens, following.rows_resident) == (0, 0)


def test_rows_are_counted_once_and_as_first_scheduled() -> None:
    simulation = Simulation()
    first = make_request("first", 33, candidates=20, user="u")
    second = make_request("second", 33, candidates=20, user="u")
    simulation.core.add_request(first)
    simulation.drain()
    simulation.core.add_request(second)
    simulation.drain()
    everything = len(set(first.tokens.rows.tolist()) | set(range(1, 21)))
    assert (first.rows_requested, first.rows_resident) == (everything, 0)
    # Two blocks of sixteen rows are reused, so only the last event's row and the candidates count.
    assert second.cached_tokens == 32
    needed = len(set(second.tokens.rows[32:].tolist()) | set(range(1, 21)))
    assert (second.rows_requested, second.rows_resident) == (needed, needed)
