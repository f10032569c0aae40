"""A trace of returning users, replayed through the real scheduler in virtual time and priced.

The brute force behind `page_value.py`: the same requests come at the same moments whatever the
tenants hold, so what two replays differ by is what the pages are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_digest, user_tag
from block_manager.pool_layout import PoolLayout
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


@dataclass(frozen=True, slots=True)
class TracedVisit:
    """A request before it is made: requests change while they run, a trace does not."""

    arrival: float
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
    rows, candidates = visit.history.item_ids.copy(), visit.candidates.item_ids.copy()
    tokens = TokenSequence(
        rows=rows,
        features=np.zeros((len(rows), 1), dtype=np.int64),
        candidate_rows=candidates,
        candidate_features=np.zeros((len(candidates), 1), dtype=np.int64),
        num_final=len(rows) - 1,
    )
    user = user_digest(str(visit.user), b"replay")
    hashes = hash_blocks(root_hash("m", user), tokens.hash_inputs(), BLOCK_TOKENS)
    return TracedVisit(arrival, tokens, hashes, user_tag(user))


class PricingExecutor(SimulatedExecutor):
    """Adds up what steps cost, apart from the fixed cost of a step."""

    def __init__(self, profile: CostProfile, clock: VirtualClock) -> None:
        super().__init__(profile, clock.advance)
        self._step_ms = profile.step_ms
        self.total_ms = 0.0
        self.load_ms = 0.0

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Passes a step's time; see `Executor.execute`."""
        output = super().execute(step)
        spent = output.timings_ms
        self.total_ms += spent.load + spent.prefill + spent.score - self._step_ms
        self.load_ms += spent.load
        return output


class Replay:
    """One engine in virtual time, with so many pages for each tenant."""

    def __init__(
        self, kv_pages: int, emb_pages: int, num_rows: int, profile: CostProfile
    ) -> None:
        config = SchedulerConfig(max_num_batched_tokens=2048, max_num_seqs=8)
        layout = PoolLayout(
            page_bytes=ROWS_PER_PAGE * 256,
            num_pages=kv_pages + emb_pages,
            num_emb_pages=emb_pages,
            block_tokens=BLOCK_TOKENS,
            row_bytes=256,
            rows_per_page=ROWS_PER_PAGE,
            staging_rows=config.max_num_batched_tokens,
        )
        self.clock = VirtualClock()
        self.executor = PricingExecutor(profile, self.clock)
        self.scheduler = build_scheduler(config, layout, num_rows, StepRules())
        self.core = EngineCore(self.scheduler, self.executor, self.clock)
        self.num_ended = 0

    def play(self, visits: list[TracedVisit]) -> None:
        """Runs visits to their end; they follow on those of the last call."""
        for visit in visits:
            while self.core.has_work and self.clock.now() < visit.arrival:
                self.core.step()
            if self.clock.now() < visit.arrival:
                self.clock.advance(visit.arrival - self.clock.now())
            self.core.add_request(visit.request(str(self.num_ended)))
            self.num_ended += 1
        self.core.run_until_idle()
