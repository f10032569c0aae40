"""An executor that takes the time a device would take, and computes nothing."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from block_manager.row_plan import RefillPlan
from model_executor.cost_profile import CostProfile
from model_executor.row_loader import CHUNK_ROWS
from model_executor.step import (
    CandidateScoring,
    ModelOutput,
    Retrieval,
    SchedulerOutput,
    StepTimings,
)


class MovableClock(Protocol):
    """A clock in seconds that moves only when told to."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def advance(self, seconds: float) -> None:
        """Moves forward."""
        ...


def nothing_computed(
    step: SchedulerOutput,
    timings: StepTimings,
    refilled: RefillPlan | None = None,
    refill_failed: RefillPlan | None = None,
) -> ModelOutput:
    """The output of a step that scores every candidate 0 and retrieves nothing."""
    scores = {
        request.request_id: np.zeros((request.num_candidates, 1), dtype=np.float32)
        for request in step.requests
        if isinstance(request.task, CandidateScoring)
    }
    nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    retrieved = {
        request.request_id: nothing
        for request in step.requests
        if isinstance(request.task, Retrieval)
    }
    return ModelOutput(scores, retrieved, timings, refilled, refill_failed)


class SimulatedExecutor:
    """Prices each step with a cost profile and advances a clock by it; every score is 0.

    A refill has the host link to itself while no step loads rows. A step's own loads come first and
    wait for the rest of one chunk of the refill at most.
    """

    def __init__(
        self, profile: CostProfile, clock: MovableClock, chunk_rows: int = CHUNK_ROWS
    ) -> None:
        """A refill is read `chunk_rows` rows at a time."""
        self._profile = profile
        self._chunk_ms = profile.row_miss_ms * chunk_rows
        self._clock = clock
        self._refill: RefillPlan | None = None
        self._refill_ms = 0.0
        """What the refill under way takes on the link."""
        self._refill_done_ms = 0.0
        self._seen = clock.now()

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Passes a step's time; see `Executor.execute`."""
        self._refill_goes_on((self._clock.now() - self._seen) * 1e3)
        refilled = self._take_refilled()
        price = self._profile.price(step)
        timings = StepTimings(price.load + self._wait_for_link(step), price.prefill, price.score)
        if step.refill is not None:
            self._begin_refill(step.refill)
        self._refill_goes_on(timings.prefill + timings.score)
        self._clock.advance((timings.load + timings.prefill + timings.score) / 1e3)
        self._seen = self._clock.now()
        return nothing_computed(step, timings, refilled)

    @property
    def refill_ends(self) -> float | None:
        """When the refill under way will be done if no step loads rows; None = there is none."""
        if self._refill is None:
            return None
        return self._seen + (self._refill_ms - self._refill_done_ms) / 1e3

    def _begin_refill(self, refill: RefillPlan) -> None:
        self._refill, self._refill_done_ms = refill, 0.0
        self._refill_ms = self._profile.round_trip_ms + self._profile.row_miss_ms * len(refill)

    def _refill_goes_on(self, milliseconds: float) -> None:
        self._refill_done_ms = min(self._refill_ms, self._refill_done_ms + milliseconds)

    def _take_refilled(self) -> RefillPlan | None:
        if self._refill is None or self._refill_done_ms < self._refill_ms:
            return None
        refilled, self._refill = self._refill, None
        return refilled

    def _wait_for_link(self, step: SchedulerOutput) -> float:
        """Milliseconds until the chunk of a refill that is on the link is through."""
        chunk_ms = self._chunk_ms
        if self._refill is None or not step.rows.num_missing or not chunk_ms:
            return 0.0
        left = self._refill_ms - self._refill_done_ms
        wait = min(left, chunk_ms - self._refill_done_ms % chunk_ms)
        self._refill_done_ms += wait
        return wait
