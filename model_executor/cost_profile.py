"""What work costs on a device, in milliseconds: measured there, read by the simulator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec

from model_executor.step import Retrieval, SchedulerOutput, StepTimings


@dataclass(frozen=True, slots=True)
class CostProfile:
    """A linear model of a step's cost."""

    device: str
    source: str
    """Where the figures come from: the command that measured them, or a citation."""
    step_ms: float
    """Fixed cost of a step."""
    prefill_row_ms: float
    """Cost of one history row, attention apart."""
    attention_pair_ms: float
    """Cost of one query-key pair over all layers."""
    candidate_ms: float
    """Cost of scoring one candidate; its pairs with the context too where `candidate_pair_ms` is
    0."""
    retrieval_ms: float
    """Cost of searching the catalogue once."""
    row_miss_ms: float
    """Cost of loading one row from the host tier."""
    round_trip_ms: float = 0.0
    """Cost of loading any rows at all in a step, beside those of each."""
    row_copy_ms: float = 0.0
    """Cost of copying one row to another slot on the device."""
    candidate_pair_ms: float = 0.0
    """Cost of one pair of a candidate and a context token over all layers: candidates of a ranking
    model read the whole context."""
    request_ms: float = 0.0
    """Cost of a request's part of a step, whatever is in it."""

    def __post_init__(self) -> None:
        """Checks that every cost is at least 0 and finite.

        Raises:
            ValueError: names the field.
        """
        for name, value in asdict(self).items():
            if not isinstance(value, str) and not 0.0 <= value < inf:
                raise ValueError(f"{name}: must be at least 0 and finite, not {value}")

    def price(self, step: SchedulerOutput) -> StepTimings:
        """Predicted cost of a step, phase by phase."""
        work = work_of(step)
        load = self.row_copy_ms * work.moves
        if work.missing:
            load += self.round_trip_ms + self.row_miss_ms * work.missing
        step_ms = self.step_ms + self.request_ms * work.requests if work.requests else 0.0
        return StepTimings(
            load=load,
            prefill=step_ms + self.prefill_row_ms * work.rows + self.attention_pair_ms * work.pairs,
            score=self.candidate_ms * work.candidates
            + self.candidate_pair_ms * work.candidate_pairs
            + self.retrieval_ms * work.retrievals,
        )


class StepWork(NamedTuple):
    """How much of each kind of work a step is."""

    requests: int
    rows: int
    """Context tokens to compute."""
    pairs: int
    """Of these and the tokens that they attend to."""
    candidates: int
    candidate_pairs: int
    """Of candidates and tokens of their contexts."""
    retrievals: int
    missing: int
    """Distinct rows to load from the host tier."""
    moves: int
    """Rows to copy to other slots."""


def work_of(step: SchedulerOutput) -> StepWork:
    """Counts the work of a step."""
    rows = pairs = candidates = candidate_pairs = retrievals = 0
    for request in step.requests:
        num_rows, num_candidates = request.num_rows, request.num_candidates
        rows += num_rows
        # Row i of a chunk attends to the rows before it and to itself.
        pairs += num_rows * request.start + num_rows * (num_rows + 1) // 2
        candidates += num_candidates
        candidate_pairs += num_candidates * (request.start + num_rows)
        retrievals += isinstance(request.task, Retrieval)
    return StepWork(
        len(step.requests),
        rows,
        pairs,
        candidates,
        candidate_pairs,
        retrievals,
        step.rows.num_missing,
        len(step.moves),
    )


def load_cost_profile(path: Path) -> CostProfile:
    """Reads a profile from a JSON file of its fields.

    Raises:
        ValueError: the file cannot be read, a field is missing, or a value is out of range.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostProfile)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"cost profile {path}: {error}") from error
