"""The largest steps that an engine's settings allow, for measuring what a step takes.

No scheduler plans them: pages are those of one longest history, which all requests of a step read
and write, and every row comes from the host into staging. What they compute means nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from block_manager.row_plan import NOWHERE, RowPlan
from helm_engine.input_processor import InputProcessor
from helm_engine.protocol import parse_request
from helm_engine.request import Request
from helm_engine.sample_request import sample_request
from helm_engine.served_model import ServedModel
from model_executor.capabilities import StepRules
from model_executor.model_config import StuConfig
from model_executor.step import (
    NO_ROW,
    CandidateScoring,
    Int64Array,
    Retrieval,
    ScheduledRequest,
    SchedulerOutput,
)


class _Share(NamedTuple):
    """A request's part of a step: the last rows of its context, and candidates."""

    request: Request
    num_rows: int


def largest_steps(
    served: ServedModel, processor: InputProcessor, rules: StepRules
) -> list[SchedulerOutput]:
    """Steps of which one takes the most memory that any step takes.

    The first computes as many rows as a step may, at the ends of longest histories. The second
    scores as many candidates behind one. The third has as many requests as may run at once, which
    search the whole catalogue where the engine does that.
    """
    maker = _StepMaker(served, processor, rules)
    return [maker.longest_chunk(), maker.most_candidates(), maker.most_requests()]


class _StepMaker:
    def __init__(self, served: ServedModel, processor: InputProcessor, rules: StepRules) -> None:
        config, model = served.config, served.model_config
        self._model = model
        self._processor = processor
        self._rules = rules
        self._retrieves = served.can_retrieve
        self._block_tokens = served.layout.block_tokens
        self._budget = config.scheduler.max_num_batched_tokens
        self._max_seqs = config.scheduler.max_num_seqs
        self._max_top_k = min(config.limits.max_top_k, model.num_items)
        self._own_rows = int(rules.recomputes_last_row)
        events = min(model.max_sequence_len, config.limits.max_history_events)
        if not rules.chunkable:
            room = self._budget - rules.microbatch_unit - model.num_contextual_tokens
            events = min(events, max(1, room // model.tokens_per_event))
        self._num_events = events
        most = min(config.limits.max_candidates, self._budget - self._own_rows)
        if isinstance(model, StuConfig):
            most = min(most, model.max_candidates)
        unit = rules.microbatch_unit
        self._max_candidates = max(unit, most // unit * unit)

    def longest_chunk(self) -> SchedulerOutput:
        """As many rows as fit, and what little may be scored beside them."""
        shares: list[_Share] = []
        left = self._budget
        unit = self._rules.microbatch_unit
        while left > unit and len(shares) < self._max_seqs:
            request = self._request(unit)
            num_rows = min(request.num_tokens, left - unit)
            if num_rows < request.num_tokens and not self._rules.chunkable:
                break
            shares.append(_Share(request, num_rows))
            left -= num_rows + unit
        return self._step(shares)

    def most_candidates(self) -> SchedulerOutput:
        """As many candidates as fit."""
        shares: list[_Share] = []
        left = self._budget - self._own_rows
        unit = self._rules.microbatch_unit
        while left >= unit and len(shares) < self._max_seqs:
            request = self._request(min(self._max_candidates, left // unit * unit))
            shares.append(_Share(request, self._own_rows))
            left -= request.num_candidates + self._own_rows
        return self._step(shares)

    def most_requests(self) -> SchedulerOutput:
        """As many requests as may run at once."""
        num_candidates = 0 if self._retrieves else self._rules.microbatch_unit
        request = self._request(num_candidates)
        # Where contexts come whole, only those that are computed can be so many.
        least = self._own_rows + num_candidates
        number = max(1, min(self._max_seqs, self._budget // max(1, least)))
        num_rows = self._own_rows
        if self._rules.chunkable:
            num_rows = min(request.num_tokens, self._budget // number - num_candidates)
        return self._step([_Share(request, num_rows)] * number)

    def _request(self, num_candidates: int) -> Request:
        """A longest history, and candidates; none = retrieval. Items differ as long as they can."""
        first, number = self._model.first_item_id, self._model.num_items
        items = (first + np.arange(self._num_events + num_candidates) % number).tolist()
        history, candidates = items[: self._num_events], items[self._num_events :]
        body = sample_request(
            self._model, history, list(range(self._num_events)), candidates or None
        )
        body["top_k"] = num_candidates or self._max_top_k
        return self._processor.process(parse_request(body), "largest", 0.0).request

    def _step(self, shares: list[_Share]) -> SchedulerOutput:
        taken = [_rows_of(share) for share in shares]
        rows = np.concatenate(taken)
        row_ids, places = np.unique(rows[rows != NO_ROW], return_inverse=True)
        index = np.full(len(rows), NO_ROW)
        index[rows != NO_ROW] = places
        ends = np.cumsum([len(one) for one in taken])
        number = len(row_ids)
        return SchedulerOutput(
            tuple(
                self._scheduled(f"largest-{place}", share, index[end - len(one) : end])
                for place, (share, one, end) in enumerate(zip(shares, taken, ends, strict=True))
            ),
            RowPlan(
                row_ids=row_ids,
                resident=np.zeros(number, dtype=np.bool_),
                slots=np.full(number, NOWHERE),
                staging=np.arange(number),
                num_missing=number,
            ),
        )

    def _scheduled(self, name: str, share: _Share, row_index: Int64Array) -> ScheduledRequest:
        request, num_rows = share
        blocks = -(-request.num_tokens // self._block_tokens)
        return ScheduledRequest(
            request_id=name,
            start=request.num_tokens - num_rows,
            row_index=row_index[:num_rows],
            block_table=np.arange(1, 1 + blocks),
            features=request.tokens.features,
            task=Retrieval(request.top_k, request.excluded_ids)
            if request.is_retrieval
            else CandidateScoring(row_index[num_rows:], request.tokens.candidate_features),
        )


def _rows_of(share: _Share) -> Int64Array:
    request, num_rows = share
    first = request.num_tokens - num_rows
    return np.concatenate([request.tokens.rows[first:], request.tokens.candidate_rows])
