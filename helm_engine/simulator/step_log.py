"""What every step of a simulation did: a column for each quantity."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from helm_engine.clock import Clock
from helm_engine.scheduler import Scheduler
from model_executor.executor import Executor
from model_executor.step import ModelOutput, SchedulerOutput

COLUMNS = (
    "began_s", "ended_s", "requests", "tokens", "candidates", "rows", "missing_rows",
    "load_ms", "prefill_ms", "score_ms", "refilled_rows", "moved_rows", "emb_pages",
    "target_emb_pages",
)  # fmt: skip
"""Seconds since the start; tokens are those computed; rows are the distinct ones that the
step reads; refilled rows are those of a refill that it found done; pages are as they were while it
ran."""

_SCALED = ("rows", "missing_rows", "refilled_rows", "moved_rows", "emb_pages", "target_emb_pages")
"""What is told in the device's own pages and rows, however many of them one stands for."""


class StepLog:
    """Passes steps on to an executor and writes down what they were."""

    def __init__(
        self, executor: Executor, scheduler: Scheduler, clock: Clock, scale: int = 1
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._clock = clock
        self._scale = scale
        self._lines: list[tuple[float, ...]] = []
        self.service_ms: defaultdict[str, float] = defaultdict(float)
        """Of each request so far: its share of the time that its steps took, by the tokens and
        candidates computed for it and for the others."""

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """See `Executor.execute`; a step that fails is not written down."""
        began = self._clock.now()
        output = self._executor.execute(step)
        spent, pool = output.timings_ms, self._scheduler.pool
        tokens = sum(request.num_rows for request in step.requests)
        candidates = sum(request.num_candidates for request in step.requests)
        service_ms = spent.load + spent.prefill + spent.score
        for request in step.requests:
            share = (request.num_rows + request.num_candidates) / (tokens + candidates)
            self.service_ms[request.request_id] += service_ms * share
        self._lines.append(
            (
                began,
                self._clock.now(),
                len(step.requests),
                tokens,
                candidates,
                len(step.rows.resident),
                len(step.rows.resident) - int(np.count_nonzero(step.rows.resident)),
                spent.load,
                spent.prefill,
                spent.score,
                0 if output.refilled is None else len(output.refilled),
                len(step.moves),
                pool.num_emb_pages,
                pool.num_emb_pages + self._scheduler.boundary.lag_pages,
            )
        )
        return output

    def latest(self, number: int) -> list[dict[str, float]]:
        """The steps from that number on, for each its columns; rows and pages unscaled."""
        return [dict(zip(COLUMNS, line, strict=True)) for line in self._lines[number:]]

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._lines)

    def columns(self, begin: float = 0.0) -> dict[str, npt.NDArray[np.float64]]:
        """Each quantity over all steps, float64 [steps]; seconds since `begin` on the clock."""
        lines = np.array(self._lines, dtype=np.float64).reshape(-1, len(COLUMNS))
        columns = dict(zip(COLUMNS, lines.T, strict=True))
        for name in _SCALED:
            columns[name] *= self._scale
        for name in ("began_s", "ended_s"):
            columns[name] -= begin
        return columns


def write_steps(path: Path, steps: dict[str, npt.NDArray[np.float64]]) -> None:
    """Writes the columns of a log as a NumPy archive (.npz).

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **steps)
