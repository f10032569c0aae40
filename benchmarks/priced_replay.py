"""A trace of returning users, replayed through the real scheduler in virtual time and priced.

The brute force behind `page_value.py`: the same requests come at the same moments whatever the
tenants hold, so what two replays differ by is what the pages between them are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_digest, user_tag
from block_manager.page_value import PageValue, PageValueEstimator, SamplingConfig
from block_manager.pool_layout import PoolLayout
from block_manager.reuse_distance import PageCosts
from helm_engine.clock import VirtualClock
from helm_engine.config import SchedulerConfig
from helm_engine.datasets.returning_users import ReturningUsers, ReturningUsersConfig, Visit
from helm_engine.engine_core import EngineCore
from helm_engine.request import Request
from helm_engine.scheduler import build_scheduler
from model_executor.capabilities import StepRules
from model_executor.cost_profile import CostProfile
from model_executor.inputs.features import TokenSequence
from model_executor.simulated_executor import SimulatedExecutor
from model_executor.step import ModelOutput, SchedulerOutput

BLOCK_TOKENS = 16
ROWS_PER_PAGE = 32
_ROW_BYTES = 256
_NO_FEATURES = np.zeros((1 << 13, 1), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class TracedVisit:
    """A request before it is made: requests change while they run, a trace does not."""

    arrival: float
    """Virtual clock, seconds."""
    tokens: TokenSequence
    block_hashes: list[BlockHash]
    user_tag: int

    def request(self, name: str) -> Request:
        """A new request of this visit."""
        return Request(
            request_id=name,
            tokens=self.tokens,
            top_k=10,
            excluded_ids=np.empty(0, dtype=np.int64),
            block_hashes=self.block_hashes,
            arrival=self.arrival,
            user_tag=self.user_tag,
        )


def traced_visits(
    config: ReturningUsersConfig, num_visits: int, visits_per_s: float
) -> list[TracedVisit]:
    """Visits of the generator at the moments of a Poisson process."""
    rng = np.random.default_rng(config.seed)
    arrivals = np.cumsum(rng.exponential(1.0 / visits_per_s, num_visits))
    stream = ReturningUsers(config).visits(num_visits)
    return [_traced(visit, float(at)) for visit, at in zip(stream, arrivals, strict=True)]


def _traced(visit: Visit, arrival: float) -> TracedVisit:
    rows, candidates = visit.history.item_ids, visit.candidates.item_ids
    tokens = TokenSequence(
        rows=rows,
        features=_NO_FEATURES[: len(rows)],
        candidate_rows=candidates,
        candidate_features=_NO_FEATURES[: len(candidates)],
        num_final=len(rows) - 1,
    )
    user = user_digest(str(visit.user), b"replay")
    hashes = hash_blocks(root_hash("m", user), tokens.hash_inputs(), BLOCK_TOKENS)
    return TracedVisit(arrival, tokens, hashes, user_tag(user))


class PricingExecutor(SimulatedExecutor):
    """Adds up what steps cost, apart from the fixed cost of a step."""

    def __init__(self, profile: CostProfile, clock: VirtualClock) -> None:
        super().__init__(profile, clock)
        self._step_ms = profile.step_ms
        self.total_ms = 0.0

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Passes a step's time; see `Executor.execute`."""
        output = super().execute(step)
        spent = output.timings_ms
        self.total_ms += spent.load + spent.prefill + spent.score - self._step_ms
        return output


class Panel:
    """Several estimators that watch one engine, which they cannot influence."""

    def __init__(self, estimators: Sequence[PageValueEstimator], every_s: float) -> None:
        """Their estimates are taken every `every_s` seconds of virtual time."""
        self.estimators = estimators
        self.estimates: list[list[PageValue]] = []
        self._every = every_s
        self._next = every_s

    def set_capacity(self, kv_pages: int, emb_pages: int) -> None:
        """See `PageValueEstimator`, as for the rest."""
        for one in self.estimators:
            one.set_capacity(kv_pages, emb_pages)

    def observe_request(self, *observed: Any) -> None:
        """Hands it on."""
        for one in self.estimators:
            one.observe_request(*observed)

    def observe_step(self, row_ids: Any, times: Any, now: float) -> None:
        """Hands it on."""
        for one in self.estimators:
            one.observe_step(row_ids, times, now)
        if now >= self._next:
            self._next = now + self._every
            self.estimates.append([one.estimate(now) for one in self.estimators])

    def means(self) -> Any:
        """Mean estimates since the last call: [estimators, tenants, (more, less, samples)]."""
        means = np.array(self.estimates, dtype=np.float64).mean(axis=0)
        self.estimates.clear()
        return means


class Replay:
    """One engine in virtual time, with so many pages for each tenant."""

    def __init__(
        self,
        kv_pages: int,
        emb_pages: int,
        num_rows: int,
        profile: CostProfile,
        samplings: Sequence[SamplingConfig] = (),
    ) -> None:
        config = SchedulerConfig(max_num_batched_tokens=2048, max_num_seqs=8)
        layout = PoolLayout(
            page_bytes=ROWS_PER_PAGE * _ROW_BYTES,
            num_pages=kv_pages + emb_pages,
            num_emb_pages=emb_pages,
            min_kv_pages=1,
            block_tokens=BLOCK_TOKENS,
            row_bytes=_ROW_BYTES,
            rows_per_page=ROWS_PER_PAGE,
            staging_rows=config.max_num_batched_tokens,
        )
        costs = PageCosts(profile.prefill_row_ms, profile.attention_pair_ms, profile.row_miss_ms)
        estimators = [
            PageValueEstimator(
                layout.num_pages, ROWS_PER_PAGE, BLOCK_TOKENS, num_rows, costs, sampling
            )
            for sampling in samplings
        ]
        self.panel = Panel(estimators, every_s=1.0)
        self.clock = VirtualClock()
        self.executor = PricingExecutor(profile, self.clock)
        self.scheduler = build_scheduler(config, layout, num_rows, StepRules())
        if estimators:
            self.scheduler.page_values = self.panel  # type: ignore[assignment]
        self.core = EngineCore(self.scheduler, self.executor, self.clock)
        self._num_begun = 0

    def play(self, visits: Sequence[TracedVisit]) -> float:
        """Runs visits to their end; returns the milliseconds that they cost.

        They follow on those of the last call.
        """
        before = self.executor.total_ms
        for visit in visits:
            while self.core.has_work and self.clock.now() < visit.arrival:
                self.core.step()
            if self.clock.now() < visit.arrival:
                self.clock.advance(visit.arrival - self.clock.now())
            self.core.add_request(visit.request(str(self._num_begun)))
            self._num_begun += 1
        self.core.run_until_idle()
        return self.executor.total_ms - before
