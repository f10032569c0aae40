"""The boundary moves while requests come, are withdrawn, are late and fail: in virtual time."""

from __future__ import annotations

from collections import Counter
from math import inf

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from block_manager.pool_layout import PoolConfig, plan_layout
from helm_engine.clock import VirtualClock
from helm_engine.config import SchedulerConfig
from helm_engine.engine_core import EngineCore
from helm_engine.exceptions import DeadlineExceededError, RequestAbortedError, StepFailedError
from helm_engine.request import Request, RequestStatus
from helm_engine.scheduler import build_scheduler
from model_executor.capabilities import StepRules
from model_executor.cost_profile import CostProfile
from tests.helm_engine.checking_executor import NOTHING, CheckingExecutor
from tests.helm_engine.test_scheduler import BLOCK_TOKENS, NUM_ITEMS, make_request

PROFILE = CostProfile(
    device="invented",
    source="round numbers for tests",
    step_ms=1.0,
    prefill_row_ms=0.01,
    attention_pair_ms=0.0,
    candidate_ms=0.001,
    retrieval_ms=0.1,
    row_miss_ms=0.02,
)
LONGEST = 400
NUM_USERS = 9
IDLE_STEPS = 10_000
"""In which whatever goes on in the background must have come to its end."""


class Storm:
    """An engine in virtual time, users that come back, and somebody at the boundary."""

    def __init__(self, seed: int, pages: int, rows_per_page: int, failing: float = 0.05) -> None:
        self.rng = np.random.default_rng(seed)
        row_bytes = BLOCK_TOKENS * 1024 // rows_per_page // 4 * 4
        config = SchedulerConfig(
            max_num_batched_tokens=192,
            max_num_seqs=6,
            max_pages_per_step=int(self.rng.integers(1, 9)),
        )
        self.layout = plan_layout(
            PoolConfig(
                pool_bytes=pages * BLOCK_TOKENS * 1024 + config.max_num_batched_tokens * row_bytes,
                emb_fraction=float(self.rng.random()),
                block_tokens=BLOCK_TOKENS,
            ),
            kv_bytes_per_token=1024,
            row_bytes=row_bytes,
            max_context_tokens=LONGEST,
            staging_rows=config.max_num_batched_tokens,
        )
        self.clock = VirtualClock()
        self.executor = CheckingExecutor(PROFILE, self.clock, self.layout, seed, failing)
        rules = StepRules(recomputes_last_row=bool(self.rng.integers(2)))
        self.scheduler = build_scheduler(config, self.layout, NUM_ITEMS, rules, track_dead=True)
        self.core = EngineCore(self.scheduler, self.executor, self.clock)
        self.lengths = [20] * NUM_USERS
        self.sent: dict[str, Request] = {}
        self.ended: Counter[str] = Counter()

    def send(self, patience: float = 0.1) -> None:
        """A user comes back with some events more; half of them wait so many seconds at most."""
        rng, user = self.rng, int(self.rng.integers(NUM_USERS))
        self.lengths[user] = 20 + (self.lengths[user] + int(rng.integers(60))) % (LONGEST - 20)
        now = self.clock.now()
        name = f"u{user}"
        request = make_request(
            f"r{len(self.sent)}",
            self.lengths[user],
            int(rng.integers(0, 90)),
            user=name,
            deadline=now + float(rng.exponential(patience)) if rng.random() < 0.5 else inf,
            priority=int(rng.integers(-1, 2)),
            arrival=now,
        )
        request.user_tag = 1 + user
        self.executor.expect(request, name)
        self.sent[request.request_id] = request
        self.core.add_request(request)

    def step(self) -> None:
        before, failed = self.scheduler.boundary.num_moved_pages, self.executor.num_failed
        in_a_row = self.core.failed_in_a_row
        for request in self.core.step():
            self.ended[request.request_id] += 1
        # No step fails but those that were to.
        assert self.core.failed_in_a_row <= in_a_row or self.executor.num_failed == failed + 1
        assert not self.executor.mistakes
        moved = self.scheduler.boundary.num_moved_pages - before
        assert moved <= self.scheduler.boundary.max_pages_per_step
        num_kv_pages = self.layout.num_pages - self.scheduler.pool.num_emb_pages
        assert num_kv_pages >= self.layout.min_kv_pages
        self.scheduler.check_integrity()
        self.clock.advance(1e-4)

    def interfere(self) -> None:
        """Now and then somebody withdraws, forgets a user or wants another split."""
        rng = self.rng
        open_requests = [one for one in self.sent.values() if not one.has_ended]
        if open_requests and rng.random() < 0.05:
            chosen = open_requests[int(rng.integers(len(open_requests)))]
            self.core.fail_request(chosen, RequestAbortedError("withdrawn"))
        if rng.random() < 0.03:
            self.core.forget_user(1 + int(rng.integers(NUM_USERS)))
        if rng.random() < 0.1:
            self.core.set_target(float(rng.random()))

    def come_to_rest(self) -> None:
        for _ in range(IDLE_STEPS):
            if not self.core.has_work and not self.core.has_background_work:
                return
            self.step()
            self.clock.advance(0.001)
        raise AssertionError("the engine does not come to rest")


@settings(
    max_examples=max(12, settings().max_examples // 8),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # No seed is simpler than another.
)
@given(
    seed=st.integers(0, 2**32 - 1),
    pages=st.integers(27, 120),
    rows_per_page=st.sampled_from([1, 7, 64]),
)
def test_nothing_is_lost_read_wrong_or_answered_twice(
    seed: int, pages: int, rows_per_page: int
) -> None:
    storm = Storm(seed, pages, rows_per_page)
    storm.executor.amid = storm.interfere
    for _ in range(300):
        for _ in range(int(storm.rng.poisson(0.7))):
            storm.send()
        storm.interfere()
        storm.step()
    storm.come_to_rest()
    assert storm.ended == dict.fromkeys(storm.sent, 1)
    told = (DeadlineExceededError, RequestAbortedError, StepFailedError)
    for request in storm.sent.values():
        is_finished = request.status is RequestStatus.FINISHED
        assert is_finished == (request.error is None)
        assert is_finished or isinstance(request.error, told)
    storm.core.check_nothing_leaked()
    assert storm.scheduler.boundary.lag_pages == 0
    assert storm.scheduler.kv.pool.num_held_blocks == 0


def test_where_nothing_breaks_every_request_is_answered_while_the_boundary_sweeps() -> None:
    storm = Storm(seed=3, pages=60, rows_per_page=7, failing=0.0)
    for number in range(1500):
        if number % 20 == 0:
            storm.core.set_target(0.1 if number % 40 else 0.9)
        if number % 2:
            storm.send(patience=inf)
        storm.step()
    storm.come_to_rest()
    assert len(storm.ended) == 750
    # All that the moves are about has happened.
    boundary, executor = storm.scheduler.boundary, storm.executor
    assert boundary.num_moved_pages > 500
    assert boundary.num_moved_rows == executor.num_moved_rows > 0
    assert executor.num_refilled_rows > 0
    assert storm.scheduler.stats.prefix_hits > 0
    assert storm.scheduler.stats.row_hits > 0


@pytest.mark.parametrize("place", ["rows", "tokens"])
def test_memory_that_holds_something_else_is_noticed(place: str) -> None:
    storm = Storm(seed=3, pages=120, rows_per_page=7, failing=0.0)
    storm.core.set_target(0.5)
    for _ in range(2 * NUM_USERS):
        storm.send(patience=inf)
        storm.come_to_rest()
    getattr(storm.executor.memory, place).fill(NOTHING)
    with pytest.raises(AssertionError, match="mistakes"):
        for _ in range(2 * NUM_USERS):
            storm.send(patience=inf)
            storm.come_to_rest()
