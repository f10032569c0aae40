"""The engines of a fleet by name: state, costs, and the work that is on its way to each.

Work is counted in predicted milliseconds when it is routed, not when the engine next reports, and
given back to the last bit when it ends. Arrays over engines are indexed by slot.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection
from enum import IntEnum

import numpy as np

from router.calibration import Calibration
from router.circuit_breaker import BreakerConfig, CircuitBreaker
from router.cost import NUM_KINDS, EngineCosts, FloatArray, Int64Array
from router.engine_slots import VACANT, EngineSlots

NEVER = 1 << 10
"""Reluctance towards an engine that is down: it is not picked at all."""
_IF_DRAINING, _IF_BROKEN, _IF_EXCLUDED = 1, 2, 4


class EngineState(IntEnum):
    """What may be sent to an engine."""

    READY = 0
    DRAINING = 1
    """It finishes what it has and gets nothing new."""
    DOWN = 2
    """It is starting, stopped or dead."""


class EngineRegistry:
    """Engines that requests can be routed to, and what is known of their load and speed."""

    def __init__(
        self, slots: EngineSlots | None = None, breakers: BreakerConfig | None = None
    ) -> None:
        """Takes the slots, if others index by them too."""
        self.slots = EngineSlots() if slots is None else slots
        self.calibration = Calibration()
        self.costs = np.zeros((0, NUM_KINDS))
        """Milliseconds per kind of work, `EngineCosts.as_array` of each engine."""
        self.name_hashes = np.zeros(0, dtype=np.uint64)
        """Hash of each engine's name."""
        self.breakers: list[CircuitBreaker] = []
        """Of the engine at each slot."""
        self._breaker_config = BreakerConfig() if breakers is None else breakers
        self._states = np.zeros(0, dtype=np.int64)
        self._charged_ms = np.zeros(0)
        self._others_ms = np.zeros(0)
        self._num_charges = np.zeros(0, dtype=np.int64)
        self._lives = np.zeros(0, dtype=np.int64)
        self._num_lives = 0
        self._sorted_names: list[str] = []
        self._name_ranks = np.zeros(0, dtype=np.int64)

    # ---------------------------------------------------------------- coming and going

    def add(self, name: str, costs: EngineCosts, state: EngineState = EngineState.READY) -> None:
        """Takes in a new engine.

        Raises:
            ValueError: an engine of that name is here already, or the name is empty.
        """
        if name in self.slots:
            raise ValueError(f"name: there is an engine {name!r} already")
        slot = self.slots.add(name)
        while len(self.breakers) <= slot:
            self._grow()
        self.costs[slot] = costs.as_array()
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.name_hashes[slot] = int.from_bytes(digest, "little")
        self.restart(name, state)
        self._rank_names()

    def restart(self, name: str, state: EngineState = EngineState.READY) -> None:
        """The engine of that name is a new process: what the old one had to do is gone."""
        slot = self.slots[name]
        self._num_lives += 1
        self._lives[slot] = self._num_lives
        self._charged_ms[slot] = self._others_ms[slot] = 0.0
        self._num_charges[slot] = 0
        self._states[slot] = state
        self.breakers[slot].reset()
        self.calibration.forget(slot)

    def remove(self, name: str) -> None:
        """Forgets an engine; raises KeyError for an unknown name."""
        self.restart(name, EngineState.DOWN)
        self.slots.remove(name)
        self._rank_names()

    def _grow(self) -> None:
        self.costs = np.append(self.costs, np.zeros((1, NUM_KINDS)), axis=0)
        self.name_hashes = np.append(self.name_hashes, np.zeros(1, dtype=np.uint64))
        self.breakers.append(CircuitBreaker(self._breaker_config))
        self._states = np.append(self._states, np.int64(EngineState.DOWN))
        self._charged_ms = np.append(self._charged_ms, 0.0)
        self._others_ms = np.append(self._others_ms, 0.0)
        self._num_charges = np.append(self._num_charges, np.int64(0))
        self._lives = np.append(self._lives, np.int64(0))

    def _rank_names(self) -> None:
        self._sorted_names = sorted(name for name in self.slots.names if name != VACANT)
        ranks = {name: rank for rank, name in enumerate(self._sorted_names)}
        self._name_ranks = np.array([ranks.get(name, 0) for name in self.slots.names])

    # ---------------------------------------------------------------- who may be picked

    def state(self, name: str) -> EngineState:
        """What may be sent to an engine; raises KeyError for an unknown name."""
        return EngineState(int(self._states[self.slots[name]]))

    def set_state(self, name: str, state: EngineState) -> None:
        """Says what may be sent to an engine; raises KeyError for an unknown name."""
        self._states[self.slots[name]] = state

    def set_costs(self, name: str, costs: EngineCosts) -> None:
        """Replaces an engine's costs; raises KeyError for an unknown name."""
        self.costs[self.slots[name]] = costs.as_array()

    def reluctance(self, now: float, exclude: Collection[str] = ()) -> Int64Array:
        """Which engines to pick from: those with the lowest number, below NEVER, int64 [E].

        0 is an engine without fault. One that is draining, broken or excluded is better than none,
        in this order.
        """
        passes = np.array([breaker.lets_pass(now) for breaker in self.breakers], dtype=np.bool_)
        reluctance = np.where(self._states == EngineState.DRAINING, _IF_DRAINING, 0)
        reluctance[~passes] += _IF_BROKEN
        for name in exclude:
            slot = self.slots.get(name)
            if slot is not None:
                reluctance[slot] += _IF_EXCLUDED
        reluctance[self._states == EngineState.DOWN] = NEVER
        return reluctance

    def turns_after(self, name: str) -> Int64Array:
        """How many engines stand between a name and each engine, going round by name: int64 [E]."""
        first = bisect_right(self._sorted_names, name)
        turns: Int64Array = (self._name_ranks - first) % max(1, len(self._sorted_names))
        return turns

    # ---------------------------------------------------------------- work on its way

    def queue_ms(self) -> FloatArray:
        """Predicted milliseconds of work routed to each engine and not finished: float64 [E]."""
        queue: FloatArray = self._charged_ms + self._others_ms
        return queue

    def charge(self, slot: int, charged_ms: float) -> int:
        """Counts work towards an engine; returns the life of the engine that it was sent to."""
        self._charged_ms[slot] += charged_ms
        self._num_charges[slot] += 1
        return int(self._lives[slot])

    def discharge(self, slot: int, life: int, charged_ms: float) -> bool:
        """Takes a charge back; False, and nothing done, where that life of the engine is over."""
        if self._lives[slot] != life:
            return False
        self._num_charges[slot] -= 1
        left = self._charged_ms[slot] - charged_ms
        # Sums of fractions do not come back to nothing by themselves.
        self._charged_ms[slot] = max(0.0, left) if self._num_charges[slot] else 0.0
        return True

    def num_outstanding(self, name: str) -> int:
        """Requests routed to an engine and not ended; raises KeyError for an unknown name."""
        return int(self._num_charges[self.slots[name]])

    def set_others_ms(self, name: str, others_ms: float) -> None:
        """Takes over what an engine says that other routers' requests still cost it.

        Raises:
            KeyError: the name is unknown.
            ValueError: the figure is below 0 or not finite.
        """
        if not 0.0 <= others_ms < np.inf:
            raise ValueError(f"others_ms: must be at least 0 and finite, not {others_ms}")
        self._others_ms[self.slots[name]] = others_ms
