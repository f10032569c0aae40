"""How much of a step's token budget one request gets."""

from __future__ import annotations

from typing import NamedTuple

from helm_engine.request import Request
from model_executor.capabilities import StepRules
from model_executor.step import Int64Array


class StepShare(NamedTuple):
    """What one request gets of a step."""

    request: Request
    start: int
    num_rows: int
    num_candidates: int

    @property
    def num_tokens(self) -> int:
        """What it takes of the budget."""
        return self.num_rows + self.num_candidates

    @property
    def row_ids(self) -> list[Int64Array]:
        """Pool rows of the share, NO_ROW where a token takes none: context, then candidates."""
        tokens, first = self.request.tokens, self.request.num_scored
        rows = tokens.rows[self.start : self.start + self.num_rows]
        return [rows, tokens.candidate_rows[first : first + self.num_candidates]]

    @property
    def is_last(self) -> bool:
        """Whether the request is finished with it."""
        request = self.request
        reaches_end = self.start + self.num_rows == request.num_tokens
        return reaches_end and request.num_scored + self.num_candidates == request.num_candidates


def share_of(request: Request, budget: int, rules: StepRules) -> StepShare | None:
    """What a running request gets of a budget; None when that would bring it nothing."""
    length = request.num_tokens
    start = min(request.num_computed, length - rules.recomputes_last_row)
    num_rows = min(length - start, budget)
    reaches_end = start + num_rows == length
    if not reaches_end and not rules.chunkable:
        return None  # It is first in line for a whole step's budget in time.
    num_candidates = 0
    if reaches_end:
        remaining = request.num_candidates - request.num_scored
        num_candidates = min(remaining, budget - num_rows)
        if num_candidates < remaining:
            num_candidates -= num_candidates % rules.microbatch_unit
    if request.num_computed == length and not request.is_retrieval and num_candidates == 0:
        return None  # Recomputing the last row alone would bring nothing.
    return StepShare(request, start, num_rows, num_candidates)
