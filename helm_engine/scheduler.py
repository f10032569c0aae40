"""Which requests run in the next step, and with how many tokens.

Continuous batching under a token budget, earliest deadline first. A token is one row of a context
or one candidate. Long contexts are prefilled in chunks and candidates are scored in micro-batches,
as far as the model allows (`StepRules`). Where candidates are scored with the context's last row,
that row is never cached and each micro-batch recomputes it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import count, takewhile
from math import inf

import numpy as np

from block_manager.block_pool import BlockPool
from block_manager.boundary import Boundary
from block_manager.distinct_rows import DistinctRows
from block_manager.embedding_cache import EmbeddingCache
from block_manager.embedding_tenant import EmbeddingTenant, WidthClass
from block_manager.exceptions import IntegrityError
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.page_pool import PagePool, Tenant
from block_manager.page_value import PageValueEstimator
from block_manager.pool_layout import PoolLayout
from block_manager.refill import RefillConfig, RefillThrottle
from block_manager.refill_planner import RefillPlanner
from block_manager.row_plan import RefillPlan, RowMoves
from helm_engine.config import SchedulerConfig
from helm_engine.exceptions import DeadlineExceededError, HelmError, QueueFullError
from helm_engine.request import Request, RequestStatus
from helm_engine.request_queue import QueueKey, RequestQueue
from helm_engine.step_share import StepShare, share_of
from helm_engine.step_times import StepTimes
from model_executor.capabilities import StepRules
from model_executor.step import (
    CandidateScoring,
    Int64Array,
    ModelOutput,
    Retrieval,
    ScheduledRequest,
    SchedulerOutput,
    StepTimings,
)

_NO_MOVES = RowMoves()
_NO_ROWS = np.empty(0, dtype=np.int64)
_TOO_NEAR = "the deadline is too near for the request to be finished"


@dataclass(frozen=True, slots=True)
class _Live:
    """An unfinished request, and where it stands in the queues."""

    request: Request
    urgency: QueueKey
    """Priority, time it is due, number of arrival."""
    deadline: QueueKey
    """Deadline, number of arrival."""


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the start."""

    steps: int = 0
    """Steps planned."""
    prefix_queries: int = 0
    """Context tokens of admitted requests."""
    prefix_hits: int = 0
    """Those whose K and V were reused."""
    row_queries: int = 0
    """Distinct rows asked for, step by step."""
    row_hits: int = 0
    """Those that were in the pool."""
    load_ms: float = 0.0
    """Milliseconds that steps spent on loading and copying rows."""
    prefill_ms: float = 0.0
    score_ms: float = 0.0

    def add_times(self, spent: StepTimings) -> None:
        """Counts a step that was carried out."""
        self.load_ms += spent.load
        self.prefill_ms += spent.prefill
        self.score_ms += spent.score


class Scheduler:
    """Queues requests and turns them into steps; owns no memory but asks both tenants for it."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        kv: KVCacheManager,
        emb: EmbeddingCache,
        boundary: Boundary,
        refills: RefillPlanner,
        rules: StepRules,
        page_values: PageValueEstimator | None = None,
    ) -> None:
        """Takes both tenants, what moves pages and rows between steps, and the model's rules.

        Raises:
            ValueError: a step has no room for the least that the model needs.
        """
        if config.max_num_batched_tokens < rules.min_tokens:
            raise ValueError(
                f"max_num_batched_tokens: must be at least {rules.min_tokens} for this model, "
                f"not {config.max_num_batched_tokens}"
            )
        self.config = config
        self.rules = rules
        self.pool = pool
        self.kv = kv
        self.emb = emb
        self.boundary = boundary
        self.refills = refills
        self.page_values = page_values
        self.stats = SchedulerStats()
        self._distinct = DistinctRows(emb.num_rows)
        self._live: dict[str, _Live] = {}
        self._waiting = RequestQueue()
        self._running = RequestQueue()
        self._deadlines = RequestQueue()
        self._arrivals = count()
        self._step_times = StepTimes()
        self._failed: list[Request] = []

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold nothing yet."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or failed and not yet reported."""
        return bool(self._live) or bool(self._failed)

    def has_background_work(self, now: float) -> bool:
        """Whether pages or rows are to be moved, with or without requests."""
        if self.boundary.lag_pages or self.emb.is_refilling:
            return True
        return self.refills.is_wanted(now)

    def add_request(self, request: Request) -> None:
        """Queues a request.

        Raises:
            QueueFullError: as many wait, beyond those that have a free seat, as may wait.
        """
        free_seats = self.config.max_num_seqs - self.num_running
        if self.num_waiting - free_seats >= self.config.max_num_waiting:
            raise QueueFullError(
                f"the queue is full, the limit is {self.config.max_num_waiting} waiting requests; "
                "try again later"
            )
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id!r} is in use")
        number = next(self._arrivals)
        has_deadline = request.deadline < inf
        patience = request.arrival + self.config.patience_ms / 1e3
        due = request.deadline if has_deadline else patience
        live = _Live(request, (request.priority, due, number), (request.deadline, number))
        self._live[request.request_id] = live
        self._waiting.add(live.urgency, request)
        if has_deadline:
            self._deadlines.add(live.deadline, request)

    def fail(self, request: Request, error: HelmError) -> None:
        """Ends a request with an error and frees what it held, unless it has ended before."""
        if request.request_id in self._live:
            self._release(request)
            request.status = RequestStatus.FAILED
            request.error = error
            self._failed.append(request)

    def _release(self, *requests: Request) -> None:
        """Takes requests out of the queues that they are in and gives back their blocks."""
        for request in requests:
            live = self._live.pop(request.request_id)
            is_running = request.status is RequestStatus.RUNNING
            (self._running if is_running else self._waiting).remove(live.urgency)
            if request.deadline < inf:
                self._deadlines.remove(live.deadline)
        self.kv.free(*(request.request_id for request in requests))
        if not self._live:
            self._step_times.forget()

    def take_failed(self) -> list[Request]:
        """Drains the requests that ended with an error since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def schedule(self, now: float) -> SchedulerOutput | None:
        """Plans the next step, or None when there is nothing to run.

        The step must be given to `update` or to `fail_step` before the next call.
        """
        self._expire(now)
        # The model's rows are of one width: there is one class, and its moves are all moves.
        moves = next((move.rows for move in self.boundary.step().rows), _NO_MOVES)
        shares = self._share_budget(now)
        refill = self.refills.plan(now)
        if not shares and not len(moves) and not self.emb.is_refilling:
            return None
        if shares:
            self.stats.steps += 1
            self._step_times.begin(now)
        return self._build_step(shares, moves, refill, now)

    def _expire(self, now: float) -> None:
        """Ends what is late, and what waits and would be late even if it ran in the next step."""
        if self._deadlines.first is None:
            return
        late = DeadlineExceededError("the deadline passed before the request was finished")
        while (head := self._deadlines.first) is not None and head[1].deadline < now:
            self.fail(head[1], late)
        step_ends = now + self._step_times.expected
        due = takewhile(lambda entry: entry[1].deadline < step_ends, self._deadlines)
        hopeless = [request for _, request in due if request.status is RequestStatus.WAITING]
        # Where nothing else would run one is tried, so that an estimate that is out of date ends.
        if hopeless and not self._running and len(hopeless) == len(self._waiting):
            hopeless.pop()
        for request in hopeless:
            self.fail(request, DeadlineExceededError(_TOO_NEAR))

    def _share_budget(self, now: float) -> list[StepShare]:
        """Gives the budget to running and waiting requests, earliest deadline first.

        A waiting request that finds no blocks is not overtaken by later ones, so none starves.
        """
        budget = self.config.max_num_batched_tokens
        running = deque(self._running)
        admitted: list[Request] = []
        admitting = True
        shares: list[StepShare] = []
        while budget > 0:
            waiting = self._waiting.first if admitting else None
            if waiting is not None and (not running or waiting[0] < running[0][0]):
                admitting = self._admit(*waiting, now)
                if not admitting:
                    continue
                request = waiting[1]
                admitted.append(request)
            elif running:
                request = running.popleft()[1]
            else:
                break
            share = share_of(request, budget, self.rules)
            if share is not None and shares and self._is_in_vain(share, now):
                self.fail(request, DeadlineExceededError(_TOO_NEAR))
            elif share is not None:
                shares.append(share)
                budget -= share.num_tokens
        self._count_rows(admitted)
        return shares

    def _count_rows(self, admitted: list[Request]) -> None:
        """What requests need of the table: candidates, and what of the context is not cached."""
        if not admitted:
            return
        parts = [
            part
            for one in admitted
            for part in (one.tokens.rows[one.cached_tokens :], one.tokens.candidate_rows)
        ]
        lengths = [one.num_tokens - one.cached_tokens + one.num_candidates for one in admitted]
        counts = self._distinct.count(np.concatenate(parts), lengths, self.emb.slot_of_row)
        for request, (needed, resident) in zip(admitted, counts.tolist(), strict=True):
            request.rows_requested, request.rows_resident = needed, resident

    def _is_in_vain(self, share: StepShare, now: float) -> bool:
        """Whether a request that this step does not finish would be late after the next."""
        deadline = share.request.deadline
        if deadline == inf or share.is_last:
            return False
        return deadline < now + 2 * self._step_times.expected

    def _admit(self, key: QueueKey, request: Request, now: float) -> bool:
        if len(self._running) >= self.config.max_num_seqs:
            return False
        reusable = request.num_tokens - self.rules.recomputes_last_row
        cached = self.kv.allocate(
            request.request_id,
            request.block_hashes,
            num_tokens=request.num_tokens,
            max_cached_tokens=reusable,
        )
        if cached is None:
            return False
        if self.page_values is not None:
            self.page_values.observe_request(
                request.user_tag,
                request.block_hashes,
                request.tokens.rows,
                request.tokens.candidate_rows,
                self.emb.slot_of_row,
                self.num_running,
                reusable,
            )
        request.status = RequestStatus.RUNNING
        request.first_scheduled = now
        request.num_computed = request.cached_tokens = cached
        self._waiting.remove(key)
        self._running.add(key, request)
        self.stats.prefix_queries += request.num_tokens
        self.stats.prefix_hits += cached
        return True

    def _build_step(
        self, shares: list[StepShare], moves: RowMoves, refill: RefillPlan | None, now: float
    ) -> SchedulerOutput:
        rows = self._distinct.of(
            np.concatenate([_NO_ROWS, *(part for share in shares for part in share.row_ids)])
        )
        if self.page_values is not None:
            self.page_values.set_capacity(self.kv.pool.num_pages, self.emb.num_pages)
            self.page_values.observe_step(rows.row_ids, rows.counts, now)
        plan = self.emb.plan(rows.row_ids, rows.counts)
        self.stats.row_queries += len(plan.row_ids)
        self.stats.row_hits += len(plan.row_ids) - plan.num_missing
        self.refills.count_demand(plan.num_missing, now)
        scheduled, first = [], 0
        for share in shares:
            end = first + share.num_tokens
            scheduled.append(self._schedule_share(share, rows.places[first:end]))
            first = end
        return SchedulerOutput(
            requests=tuple(scheduled),
            rows=plan,
            dead_blocks=self.kv.pool.take_dead_blocks(),
            dead_slots=self.emb.take_dead_slots(),
            moves=moves,
            refill=refill,
        )

    def _schedule_share(self, share: StepShare, row_index: Int64Array) -> ScheduledRequest:
        request = share.request
        end = share.start + share.num_rows
        table = self.kv.block_table(request.request_id)
        task: CandidateScoring | Retrieval | None = None
        if share.num_candidates:
            first = request.num_scored
            features = request.tokens.candidate_features[first : first + share.num_candidates]
            task = CandidateScoring(row_index[share.num_rows :], features)
        elif request.is_retrieval and end == request.num_tokens:
            task = Retrieval(request.top_k, request.excluded_ids)
        return ScheduledRequest(
            request_id=request.request_id,
            start=share.start,
            row_index=row_index[: share.num_rows],
            block_table=table[: -(-end // self.kv.block_tokens)],
            features=request.tokens.features[:end],
            task=task,
        )

    def update(self, step: SchedulerOutput, output: ModelOutput, now: float) -> list[Request]:
        """Commits a step that was carried out; returns the requests it finished."""
        if step.requests:
            self._step_times.end(now)
        self.stats.add_times(output.timings_ms)
        self.emb.commit(step.rows)
        self.refills.settle(output.refilled, output.refill_failed, now)
        finished = []
        timings = output.timings_ms
        tokens = sum(one.num_rows + one.num_candidates for one in step.requests)
        token_ms = (timings.load + timings.prefill + timings.score) / max(1, tokens)
        for scheduled in step.requests:
            live = self._live.get(scheduled.request_id)
            if live is None:
                continue  # Withdrawn while the step ran.
            request = live.request
            request.own_ms += token_ms * (scheduled.num_rows + scheduled.num_candidates)
            self._commit(request, scheduled, output)
            if request.is_done:
                finished.append(request)
        self._release(*finished)
        for request in finished:
            request.status = RequestStatus.FINISHED
            request.finished_at = now
        return finished

    def _commit(self, request: Request, scheduled: ScheduledRequest, output: ModelOutput) -> None:
        """Takes over what a step did for one request."""
        request.add_timings(output.timings_ms)
        request.num_computed = scheduled.start + scheduled.num_rows
        self.kv.cache_blocks(
            request.request_id,
            request.block_hashes,
            request.num_computed,
            request.user_tag,
            request.tokens,
        )
        if isinstance(scheduled.task, CandidateScoring):
            request.take_scores(output.candidate_scores[request.request_id])
        elif isinstance(scheduled.task, Retrieval):
            request.retrieved = output.retrieved[request.request_id]

    def fail_step(self, step: SchedulerOutput, error: HelmError, moves_made: bool = False) -> None:
        """A step could not be carried out: its requests fail, its row plan is undone.

        Unless it is known that its moves were made, rows that it was to move are taken for lost.
        """
        self.emb.abandon(step.rows)
        if not moves_made:
            self.emb.forget(step.moves)
        if step.refill is not None:
            self.emb.abandon_refill(step.refill)
        for scheduled in step.requests:
            live = self._live.get(scheduled.request_id)
            if live is not None:
                self.fail(live.request, error)

    def forget_user(self, user_tag: int) -> int:
        """Makes a user's KV unreachable, also that which requests in flight would leave.

        Returns:
            Blocks that were reusable.
        """
        for live in self._live.values():
            if live.request.user_tag == user_tag:
                live.request.block_hashes = []
        return self.kv.forget_user(user_tag)

    def check_nothing_leaked(self) -> None:
        """Cheap check of an idle engine: everything is free or reusable again.

        Raises:
            IntegrityError: says what is still held.
        """
        held = self.kv.pool.num_held_blocks
        if held:
            raise IntegrityError(f"KV: {held} blocks are held though no request is there")
        if not self.emb.is_settled:
            raise IntegrityError("EMB: slots are reserved though no step runs")

    def check_integrity(self) -> None:
        """Every page has one owner and both tenants' books add up.

        Raises:
            IntegrityError: says what does not.
        """
        self.pool.check_integrity(self.kv.pool, self.emb)
        self.kv.check_integrity()


def build_scheduler(
    config: SchedulerConfig,
    layout: PoolLayout,
    num_table_rows: int,
    rules: StepRules,
    track_dead: bool = False,
    page_values: PageValueEstimator | None = None,
    refill: RefillConfig | None = None,
    host_row_bytes: int | None = None,
    rows_stand_for: int = 1,
) -> Scheduler:
    """Builds the pool's books and the scheduler over them."""
    pool = PagePool(layout)
    blocks = BlockPool(pool.pages_of(Tenant.KV), layout.num_pages, track_dead)
    emb = EmbeddingCache(
        pool.pages_of(Tenant.EMB),
        layout.rows_per_page,
        num_table_rows,
        layout.num_pages,
        track_dead,
        rows_stand_for,
    )
    tenant = EmbeddingTenant([WidthClass(emb, miss_ms=1.0)])
    boundary = Boundary(pool, blocks, tenant, layout, config.max_pages_per_step)
    return Scheduler(
        config,
        pool,
        KVCacheManager(blocks, layout.block_tokens),
        emb,
        boundary,
        RefillPlanner(emb, boundary, RefillThrottle(refill), host_row_bytes or layout.row_bytes),
        rules,
        page_values,
    )
