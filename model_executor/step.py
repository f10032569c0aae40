"""The only types between scheduler and executor: what one step does, and what came of it.

NumPy arrays throughout, so that a simulated executor needs no torch. A request's sequence is its
context (contextual tokens, then the tokens of its history), whose K and V go to pages, and its
candidates, whose K and V live in a step only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from block_manager.distinct_rows import NO_ROW as NO_ROW
from block_manager.row_plan import RefillPlan, RowMoves, RowPlan

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CandidateScoring:
    """Score a micro-batch of explicit candidates; the whole context is computed by then."""

    row_index: Int64Array
    """Place of each candidate's row in the step's row plan, [candidates]."""
    features: Int64Array
    """What the model reads of each beside its row, [candidates, F]."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Find the best items of the whole catalogue with the history's last row."""

    top_k: int
    excluded_ids: Int64Array
    """Distinct item ids that must not be returned."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step: context tokens start .. start + num_rows - 1."""

    request_id: str
    start: int
    """Tokens whose K and V are already in pages."""
    row_index: Int64Array
    """Place of each token's embedding in the step's row plan, or NO_ROW, [num_rows]."""
    block_table: Int64Array
    """Pages of tokens 0 .. start + num_rows - 1, [blocks]."""
    features: Int64Array
    """What the model reads of tokens 0 .. start + num_rows - 1 beside their rows,
    [start + num_rows, F]; the columns are the model's."""
    task: CandidateScoring | Retrieval | None
    """Set when the chunk ends with the context's last token and something is to be scored."""

    @property
    def num_rows(self) -> int:
        """Context tokens to compute."""
        return len(self.row_index)

    @property
    def num_candidates(self) -> int:
        """Candidates to score."""
        return len(self.task.row_index) if isinstance(self.task, CandidateScoring) else 0


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """Everything an executor must do in one step.

    In this order: move rows, poison, put refilled rows in their slots, load, prefill, score, begin
    the refill. A step that fails begins none.
    """

    requests: tuple[ScheduledRequest, ...]
    rows: RowPlan
    """Where the distinct rows of all requests are and which must be loaded first."""
    dead_blocks: list[int] = field(default_factory=list)
    """Pages whose KV died; only filled when freed memory is to be poisoned."""
    dead_slots: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Slots whose row died; likewise."""
    moves: RowMoves = field(default_factory=RowMoves)
    """Copies to be made before anything is written."""
    refill: RefillPlan | None = None
    """Rows to begin to load in the background; no other refill is under way."""


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Milliseconds a step spent in each phase."""

    load: float
    prefill: float
    score: float


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a step computed, by request id."""

    candidate_scores: dict[str, Float32Array]
    """Scores of the step's candidates, in the order they were scheduled, [candidates, tasks]; one
    column where the model has no tasks."""
    retrieved: dict[str, tuple[Int64Array, Float32Array]]
    """Item ids and scores, best first; ties by item id."""
    timings_ms: StepTimings
    refilled: RefillPlan | None = None
    """A refill, begun by an earlier step, whose rows are in their slots now."""
    refill_failed: RefillPlan | None = None
    """A refill whose rows could not be had."""
