"""An executor that takes the time a device would take, and computes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model_executor.cost_profile import CostProfile
from model_executor.step import CandidateScoring, ModelOutput, Retrieval, SchedulerOutput


class SimulatedExecutor:
    """Prices each step with a cost profile and advances a clock by it; every score is 0."""

    def __init__(self, profile: CostProfile, advance: Callable[[float], None]) -> None:
        """`advance` moves the virtual clock forward by the given seconds."""
        self._profile = profile
        self._advance = advance

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Passes a step's time; see `Executor.execute`."""
        cost = self._profile.price(step)
        self._advance((cost.load + cost.prefill + cost.score) / 1e3)
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
        return ModelOutput(scores, retrieved, cost)
