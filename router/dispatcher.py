"""Picks an engine for each request: the one object that fronts, simulators and Ray use.

`route` prices the request on every engine, lets the policy score them, picks one and counts the
predicted work towards it at once. Every assignment is ended by exactly one of `finished`, `failed`
and `abandoned`, which give that count back; further ones do nothing. Time is given, in seconds of
any clock that does not go back. One thread at a time, but events may reach `residency` on others.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from router.circuit_breaker import BreakerConfig
from router.cost import EngineCosts, Int64Array, Work, amounts_of_work, price_ms
from router.engine_registry import NEVER, EngineRegistry, EngineState
from router.engine_slots import VACANT, EngineSlots
from router.expected_blocks import ExpectedBlocks
from router.policies import Offers, policy_named
from router.prefix_index import hash_keys
from router.residency import Residency

EXPECTED_FOR_S = 2.0
"""How long a routed history counts as resident without an event: a request takes milliseconds and
its event a digest interval, and what does not come by then does not come."""


class NoEngineError(RuntimeError):
    """There is no engine that a request could be sent to."""


class Outcome(TypedDict, total=False):
    """What an engine says of a request that it answered; see `Dispatcher.finished`."""

    service_ms: float | None
    cached_tokens: int | None
    rows_requested: int | None
    rows_resident: int | None


@dataclass(slots=True, eq=False)
class Assignment:
    """A request on its way to an engine, as the router believes."""

    engine: str
    predicted_ms: float
    """Until the answer: the engine's queue and the request's own work."""
    charged_ms: float
    """The request's own work, counted towards the engine until the request ends."""
    cached_tokens: int
    """Context tokens whose KV the engine holds, as far as the policy may know."""
    rows_missing: int
    """Distinct rows that the engine must load, likewise."""
    num_tokens: int
    num_candidates: int
    slot: int
    life: int
    """Of the engine: a restarted one knows nothing of this request."""
    is_trial: bool
    """Whether a broken engine is tried with it."""
    block_keys: Int64Array = field(repr=False)
    """From `hash_keys`, int64 [blocks]."""
    has_ended: bool = False


class Dispatcher:
    """Routes requests over the engines that were added to it."""

    def __init__(
        self,
        policy: str = "joint",
        seed: int | None = None,
        *,
        expected_for_s: float = EXPECTED_FOR_S,
        breakers: BreakerConfig | None = None,
    ) -> None:
        """Starts without engines.

        Args:
            policy: a name in `router.policies.POLICIES`.
            seed: of the choice among equals; None = another one each time.
            expected_for_s: seconds that a routed history counts as resident without an event;
                0 = not at all (without events, all of it would be guesses).
            breakers: when an engine that fails is left alone.

        Raises:
            ValueError: names the argument that is out of range.
        """
        self.policy = policy_named(policy)
        slots = EngineSlots()
        self.registry = EngineRegistry(slots, breakers)
        self.residency = Residency(slots)
        self._slots = slots
        self._expected = ExpectedBlocks(expected_for_s)
        self._random = random.Random(seed)
        self._last_picked = VACANT

    # ---------------------------------------------------------------- engines

    def add_engine(
        self,
        name: str,
        costs: EngineCosts,
        *,
        num_rows: int = 0,
        num_positions: int = 0,
        state: EngineState = EngineState.READY,
    ) -> None:
        """Takes in an engine of which nothing is known to be resident.

        Args:
            name: unique in the fleet; `residency` takes its events by it.
            costs: of its device.
            num_rows: of the catalogue.
            num_positions: of its row digest; 0 = it sends none.
            state: whether requests may be sent yet.

        Raises:
            ValueError: the name is taken or empty, or its row digest has another size than those
                of the engines before it.
        """
        self.registry.add(name, costs, state)
        try:
            self.residency.add_engine(name, num_rows, num_positions)
        except ValueError:
            self.registry.remove(name)
            raise

    def restart_engine(self, name: str, state: EngineState = EngineState.READY) -> None:
        """The engine is a new process, cold and idle; raises KeyError for an unknown name."""
        self.registry.restart(name, state)
        self.residency.forget(name)
        self._expected.forget(self._slots[name])

    def remove_engine(self, name: str) -> None:
        """The engine has left the fleet; raises KeyError for an unknown name."""
        self._expected.forget(self._slots[name])
        self.residency.remove_engine(name)
        self.registry.remove(name)

    # ---------------------------------------------------------------- requests

    def route(self, work: Work, now: float, exclude: Collection[str] = ()) -> Assignment:
        """Picks an engine and counts the work towards it.

        Args:
            work: the request.
            now: seconds.
            exclude: engines to be taken only when there are no others.

        Raises:
            NoEngineError: no engine is up.
        """
        registry = self.registry
        reluctance = registry.reluctance(now, exclude)
        least = int(reluctance.min(initial=NEVER))
        if least >= NEVER:
            raise NoEngineError("no engine is up")
        keys = hash_keys(work.block_hashes)
        cached = self._cached_tokens(work, keys, now)
        missing = self.residency.rows_missing(
            work.rows, work.candidate_rows, cached, self.policy.knows_rows
        )
        num_candidates = len(work.candidate_rows)
        amounts = amounts_of_work(work.num_tokens, num_candidates, cached, missing)
        offers = Offers(
            is_open=reluctance == least,
            queue_ms=registry.queue_ms(),
            service_ms=price_ms(registry.costs, amounts) * registry.calibration.factors(now),
            name_hashes=registry.name_hashes,
            turns=registry.turns_after(self._last_picked),
            user_tag=work.user_tag,
        )
        slot = self._pick(offers)
        charged_ms = float(offers.service_ms[slot])
        self._last_picked = self._slots.names[slot]
        if self.policy.knows_kv:
            self._expected.expect(slot, keys, now)
        return Assignment(
            engine=self._last_picked,
            predicted_ms=float(offers.queue_ms[slot]) + charged_ms,
            charged_ms=charged_ms,
            cached_tokens=int(cached[slot]),
            rows_missing=int(missing[slot]),
            num_tokens=work.num_tokens,
            num_candidates=num_candidates,
            slot=slot,
            life=registry.charge(slot, charged_ms),
            is_trial=registry.breakers[slot].sent(now),
            block_keys=keys,
        )

    def _cached_tokens(self, work: Work, keys: Int64Array, now: float) -> Int64Array:
        """Tokens of the context that each engine holds, as far as the policy may know: [E]."""
        if not self.policy.knows_kv:
            return np.zeros(len(self._slots), dtype=np.int64)
        blocks = self.residency.cached_blocks_of_keys(keys)
        self._expected.extend(blocks, keys, now)
        return np.minimum(blocks * work.block_tokens, work.num_tokens)

    def _pick(self, offers: Offers) -> int:
        """The slot with the lowest score, one of them at random where there are several."""
        scores = np.where(offers.is_open, self.policy.score(offers), np.inf)
        best = np.flatnonzero(scores == scores.min())
        return int(best[self._random.randrange(len(best)) if len(best) > 1 else 0])

    def finished(
        self,
        assignment: Assignment,
        now: float,
        *,
        service_ms: float | None = None,
        cached_tokens: int | None = None,
        rows_requested: int | None = None,
        rows_resident: int | None = None,
    ) -> None:
        """The engine answered; what it says of the work corrects later predictions.

        Args:
            assignment: from `route`.
            now: seconds.
            service_ms: the request's own share of the steps that it took: where a step serves
                several requests, each has its part, so that the sum over requests is the time
                that the engine was busy.
            cached_tokens: context tokens whose KV was reused.
            rows_requested: distinct rows that were needed.
            rows_resident: those of them that the engine held.
        """
        if not self._end(assignment):
            return
        self.registry.breakers[assignment.slot].answered(now)
        if service_ms is None:
            return
        cached = assignment.cached_tokens if cached_tokens is None else cached_tokens
        missing = assignment.rows_missing
        if rows_requested is not None and rows_resident is not None:
            missing = rows_requested - rows_resident
        self._learn(assignment, now, service_ms, cached, missing)

    def _learn(
        self, assignment: Assignment, now: float, took_ms: float, cached: int, missing: int
    ) -> None:
        """Compares with the price of what was really done.

        What was wrongly believed to be resident says nothing about the engine's speed.
        """
        amounts = amounts_of_work(
            assignment.num_tokens,
            assignment.num_candidates,
            np.array([cached]),
            np.array([missing]),
        )
        slot = assignment.slot
        priced_ms = float(price_ms(self.registry.costs[slot : slot + 1], amounts)[0])
        if priced_ms > 0.0 and took_ms > 0.0:
            self.registry.calibration.learn(slot, took_ms / priced_ms, now)

    def failed(self, assignment: Assignment, now: float) -> None:
        """The engine failed the request, or did not answer in time."""
        if self._end(assignment):
            self.registry.breakers[assignment.slot].failed(now)
            self._expected.withdraw(assignment.slot, assignment.block_keys)

    def abandoned(self, assignment: Assignment) -> None:
        """Nobody waits for the answer any more; that tells nothing about the engine."""
        if self._end(assignment):
            if assignment.is_trial:
                self.registry.breakers[assignment.slot].abandoned()
            self._expected.withdraw(assignment.slot, assignment.block_keys)

    def _end(self, assignment: Assignment) -> bool:
        """Gives the charge back; whether this is the end, and the engine is still the same."""
        if assignment.has_ended:
            return False
        assignment.has_ended = True
        return self.registry.discharge(assignment.slot, assignment.life, assignment.charged_ms)
