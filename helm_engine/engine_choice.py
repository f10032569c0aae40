"""Which engine of a fleet gets a request: the router's dispatcher, fed with what it needs to know.

The router knows engines by name, costs and what they hold; here it is told of engines that come and
go, of requests in its own terms, and of what became of them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from block_manager.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ExternalBlockHash,
    KVEventBatch,
    RowEventBatch,
    RowsCleared,
    RowsRemoved,
    RowsStored,
)
from helm_engine.clock import Clock
from helm_engine.fleet_member import Engine
from helm_engine.request import Request
from model_executor.cost_profile import CostProfile
from router.cost import EngineCosts, Work
from router.dispatcher import Assignment, Dispatcher, Outcome
from router.event_subscriber import EventSubscriber

DEFAULT_COSTS = EngineCosts(
    step_ms=1.0,
    request_ms=0.1,
    prefill_row_ms=0.01,
    attention_pair_ms=1e-5,
    candidate_ms=0.005,
    candidate_pair_ms=0.0,
    row_miss_ms=0.002,
    round_trip_ms=0.0,
)
"""Of an engine without a cost profile, as on two CPU cores: the scale is learned while it serves,
the proportions are not."""


class EngineChoice:
    """The dispatcher of one front."""

    def __init__(self, policy: str, clock: Clock, seed: int | None = None) -> None:
        """Knows no engine yet.

        Args:
            policy: name of a policy of the router.
            clock: whose seconds the router sees.
            seed: of its choice among equals; None = drawn.

        Raises:
            ValueError: there is no such policy.
        """
        self._clock = clock
        self._dispatcher = Dispatcher(policy, seed)
        self._subscribers: dict[str, EventSubscriber] = {}

    def joined(self, name: str, engine: Engine) -> None:
        """An engine is ready: it holds nothing yet, or its events will say what."""
        num_rows, residency = engine.served.model_config.num_rows, engine.served.config.residency
        told = residency.endpoint is not None
        self._dispatcher.add_engine(
            name,
            costs_of(engine.served.cost_profile),
            num_rows=num_rows,
            num_positions=min(num_rows, residency.digest_positions) if told else 0,
        )
        if residency.endpoint is not None:
            self._subscribers[name] = EventSubscriber(
                name, residency.endpoint, residency.replay_endpoint, self._dispatcher.residency
            )

    def left(self, name: str) -> None:
        """An engine is gone, and with it what it held."""
        subscriber = self._subscribers.pop(name, None)
        if subscriber is not None:
            subscriber.close()
        self._dispatcher.remove_engine(name)

    def pick(self, request: Request, block_tokens: int, avoid: Collection[str]) -> Assignment:
        """Chooses, and counts the work towards the engine at once.

        Args:
            request: as it will be submitted.
            block_tokens: tokens of a block.
            avoid: engines that must not get it; there is at least one other.
        """
        work = work_of(request, block_tokens)
        return self._dispatcher.route(work, self._clock.now(), avoid)

    def finished(self, assignment: Assignment, request: Request) -> None:
        """It was answered."""
        self._dispatcher.finished(assignment, self._clock.now(), **outcome_of(request))

    def failed(self, assignment: Assignment) -> None:
        """It failed by the engine's fault."""
        self._dispatcher.failed(assignment, self._clock.now())

    def abandoned(self, assignment: Assignment) -> None:
        """It ended without telling anything of the engine."""
        self._dispatcher.abandoned(assignment)

    def close(self) -> None:
        """Listens to no engine any more."""
        for subscriber in self._subscribers.values():
            subscriber.close()
        self._subscribers.clear()


def work_of(request: Request, block_tokens: int) -> Work:
    """A request as the router sees it; blocks have so many tokens."""
    tokens = request.tokens
    return Work(
        block_hashes=request.block_hashes,
        block_tokens=block_tokens,
        num_tokens=request.num_tokens,
        rows=tokens.rows,
        candidate_rows=tokens.candidate_rows,
        user_tag=request.user_tag,
    )


def outcome_of(request: Request) -> Outcome:
    """What the router learns of a request that was answered."""
    return {
        "service_ms": request.own_ms,
        "cached_tokens": request.cached_tokens,
        "rows_requested": request.rows_requested,
        "rows_resident": request.rows_resident,
    }


def costs_of(profile: CostProfile | None) -> EngineCosts:
    """What work costs on an engine, as far as that was measured."""
    if profile is None:
        return DEFAULT_COSTS
    return EngineCosts(
        step_ms=profile.step_ms,
        request_ms=profile.request_ms,
        prefill_row_ms=profile.prefill_row_ms,
        attention_pair_ms=profile.attention_pair_ms,
        candidate_ms=profile.candidate_ms,
        candidate_pair_ms=profile.candidate_pair_ms,
        row_miss_ms=profile.row_miss_ms,
        round_trip_ms=profile.round_trip_ms,
    )


def load_routing_kernels() -> None:
    """Compiles what routing computes with, or reads it from disk: no request waits for that."""
    dispatcher = Dispatcher()
    residency = dispatcher.residency
    dispatcher.add_engine("a", DEFAULT_COSTS, num_rows=1, num_positions=1)
    # More than an index has room for at first: it grows.
    hashes: list[ExternalBlockHash] = [place.to_bytes(32, "little") for place in range(1 << 12)]
    stored = BlockStored(hashes, None, [], 1, None, None, None)
    position = bytes(4)
    for kv, rows in (
        (stored, RowsStored(position)),
        (BlockRemoved(hashes, None), RowsRemoved(position)),
        (stored, RowsStored(position)),
        (AllBlocksCleared(), RowsCleared()),
    ):
        residency.apply_kv("a", KVEventBatch(0.0, [kv]))
        residency.apply_rows("a", RowEventBatch(0.0, [rows], 1))
        row = np.zeros(1, dtype=np.int64)
        assignment = dispatcher.route(Work([bytes(32)], 1, 1, row, row), 0.0)
        dispatcher.finished(assignment, 0.0, service_ms=1.0)
