"""An executor in virtual time that has memory: it notices a read of what is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from block_manager.pool_layout import PoolLayout
from block_manager.row_plan import RefillPlan
from helm_engine.clock import VirtualClock
from helm_engine.request import Request
from model_executor.cost_profile import CostProfile
from model_executor.exceptions import RowsUnavailableError
from model_executor.simulated_executor import SimulatedExecutor
from model_executor.step import Int64Array, ModelOutput, SchedulerOutput

NOTHING = -1
_PRIME = (1 << 61) - 1


class DeviceMemory:
    """What is in every slot and in every token's place; a page is the same bytes for both."""

    def __init__(self, layout: PoolLayout) -> None:
        self.rows = np.full((layout.num_pages, layout.rows_per_page), NOTHING)
        self.tokens = np.full((layout.num_pages, layout.block_tokens), NOTHING)

    def write_rows(self, slots: Int64Array, rows: Int64Array | int) -> None:
        pages = slots // self.rows.shape[1]
        self.tokens[pages] = NOTHING
        self.rows[pages, slots % self.rows.shape[1]] = rows

    def rows_at(self, slots: Int64Array) -> Int64Array:
        return self.rows[slots // self.rows.shape[1], slots % self.rows.shape[1]]

    def write_tokens(self, pages: Int64Array, start: int, tokens: Int64Array) -> None:
        """Tokens start .. start + n - 1 of a sequence in these pages."""
        places = np.arange(start, start + len(tokens))
        used = pages[places // self.tokens.shape[1]]
        self.rows[used] = NOTHING
        self.tokens[used, places % self.tokens.shape[1]] = tokens

    def tokens_of(self, pages: Int64Array, number: int) -> Int64Array:
        return self.tokens[pages].reshape(-1)[:number]

    def poison(self, pages: list[int]) -> None:
        self.rows[pages] = NOTHING
        self.tokens[pages] = NOTHING


class CheckingExecutor(SimulatedExecutor):
    """Holds every read against what was asked for; some steps and some refills fail."""

    def __init__(
        self,
        profile: CostProfile,
        clock: VirtualClock,
        layout: PoolLayout,
        seed: int,
        failing: float,
    ) -> None:
        super().__init__(profile, clock)
        self.memory = DeviceMemory(layout)
        self.expected: dict[str, Int64Array] = {}
        """What each token's K and V depend on, by request, as a number."""
        self.mistakes: list[str] = []
        """Kept and not raised: an engine takes what an executor raises for a failed step."""
        self.num_moved_rows = self.num_refilled_rows = self.num_failed = 0
        self.amid: Callable[[], None] = lambda: None
        """Called while each step runs: what others do then."""
        self._rng = np.random.default_rng(seed)
        self._failing = failing

    def expect(self, request: Request, user: str) -> None:
        """Takes note of a request that will come: a token depends on all before it."""
        running, numbers = sum(user.encode()), []
        for row, features in zip(request.tokens.rows, request.tokens.features, strict=True):
            running = hash((running, int(row), *features.tolist())) % _PRIME
            numbers.append(running)
        self.expected[request.request_id] = np.array(numbers, dtype=np.int64)

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Carries out a step, or breaks down before, amid or after its loads."""
        breaks = self._rng.random() < self._failing
        phase = int(self._rng.integers(4)) if breaks else 4
        if phase > 0:
            held = self.memory.rows_at(step.moves.sources)
            self.memory.write_rows(step.moves.destinations, held)
            self.num_moved_rows += len(held)
        self.amid()
        if phase > 1:
            self.memory.poison(step.dead_blocks)
            self.memory.write_rows(step.dead_slots, NOTHING)
        if phase > 2:
            admitted = step.rows.admitted
            self.memory.write_rows(step.rows.slots[admitted], step.rows.row_ids[admitted])
        if breaks:
            self.num_failed += 1
            if phase > 1:
                raise RowsUnavailableError("the host tier is down, as it was to be")
            # Nobody is told how far this step came.
            raise RuntimeError("the device is broken, as it was to be")
        self._compute(step)
        output = super().execute(step)
        if output.refilled is not None and self._rng.random() < self._failing:
            return replace(output, refilled=None, refill_failed=output.refilled)
        self._put(output.refilled)
        return output

    def _compute(self, step: SchedulerOutput) -> None:
        slots = step.rows.slots
        in_pool = slots >= 0
        found = self.memory.rows_at(slots[in_pool])
        if not np.array_equal(found, step.rows.row_ids[in_pool]):
            self.mistakes.append("a slot holds another row")
        for request in step.requests:
            tokens = self.expected[request.request_id]
            cached = self.memory.tokens_of(request.block_table, request.start)
            if not np.array_equal(cached, tokens[: request.start]):
                self.mistakes.append(f"{request.request_id} reads K and V of other tokens")
            end = request.start + request.num_rows
            self.memory.write_tokens(
                request.block_table, request.start, tokens[request.start : end]
            )

    def _put(self, refilled: RefillPlan | None) -> None:
        if refilled is not None:
            self.memory.write_rows(refilled.slots, refilled.row_ids)
            self.num_refilled_rows += len(refilled)
