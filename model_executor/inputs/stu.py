"""Tokens of the `stu` dialect: contextual features, then events that count from the newest.

Source of the scheme: meta-recsys/generative-recommenders, modules/dlrm_hstu.py and the positional
encoder; time buckets are capped by their table, as in its Triton kernel.
"""

from __future__ import annotations

import numpy as np

from model_executor.inputs.context_rows import ContextRows
from model_executor.inputs.features import Events, RequestFeatures, TokenSequence
from model_executor.model_config import StuConfig
from model_executor.step import NO_ROW, Int64Array

POSITION, TIME_BUCKET, ACTION, CONTEXT, CONTEXT_ROW, QUERY_TIME, FIRST_ITEM_FEATURE = range(7)
"""Columns: rows of the position and time tables; bit mask, NO_ROW where there is none; place of
the contextual feature or NO_ROW; its row in the small tables, NO_ROW where it is pooled, VOID
where its vector counts as zeros; seconds of the request, of candidates only; item features."""

VOID = -2
"""In place of a small table's row: the vector counts as zeros."""

SECONDS_PER_UNIT = np.float32(60.0)


def time_buckets(age_seconds: Int64Array, largest: int) -> Int64Array:
    """floor(sqrt(max(1e-6, age) / 60)), at most `largest`, in fp32 as the reference: int64 [n]."""
    units = np.maximum(age_seconds.astype(np.float32), np.float32(1e-6)) / SECONDS_PER_UNIT
    return np.minimum(np.sqrt(units).astype(np.int64), largest)


class StuInputs:
    """See `InputAssembler`."""

    def __init__(self, config: StuConfig) -> None:
        self._config = config
        self._context = ContextRows(config)
        self._num_columns = FIRST_ITEM_FEATURE + len(config.item_features)

    def assemble(self, request: RequestFeatures) -> TokenSequence:
        """Tokens of a request."""
        num_events = len(request.history.item_ids)
        num_candidates = len(request.candidates.item_ids)
        num_contextual = self._config.num_contextual_tokens
        length = num_contextual + num_events
        history = self._columns(request.history)
        # The newest event is one place above the candidates, whose place is that of the first
        # row behind the contextual ones.
        from_newest = length - np.arange(num_contextual, length) + num_contextual
        history[:, POSITION] = self._capped(from_newest)
        history[:, TIME_BUCKET] = self._buckets(request.request_time - request.history.timestamps)
        history[:, ACTION] = request.history.actions
        candidates = self._columns(request.candidates)
        candidates[:, POSITION] = self._capped(np.array(num_contextual))
        candidates[:, QUERY_TIME] = request.request_time
        context_rows, context = self._contextual(request, num_events + num_candidates)
        return TokenSequence(
            rows=np.concatenate([context_rows, request.history.item_ids]),
            features=np.concatenate([context, history]),
            candidate_rows=request.candidates.item_ids,
            candidate_features=candidates,
            num_final=length,
        )

    def _columns(self, events: Events) -> Int64Array:
        columns = np.zeros((len(events.item_ids), self._num_columns), dtype=np.int64)
        columns[:, ACTION : CONTEXT_ROW + 1] = NO_ROW
        columns[:, FIRST_ITEM_FEATURE:] = events.features
        return columns

    def _contextual(
        self, request: RequestFeatures, sequence_len: int
    ) -> tuple[Int64Array, Int64Array]:
        """Pool rows and columns of the contextual tokens; their time counts as 0."""
        number = self._config.num_contextual_tokens
        columns = np.zeros((number, self._num_columns), dtype=np.int64)
        columns[:, POSITION] = self._capped(np.arange(number))
        columns[:, TIME_BUCKET] = self._buckets(
            np.full(number, request.request_time, dtype=np.int64)
        )
        columns[:, ACTION] = NO_ROW
        columns[:, CONTEXT] = np.arange(number)
        counts = self._context.counts(sequence_len) == 1
        small_rows = self._context.small_rows(request.context)
        columns[:, CONTEXT_ROW] = np.where(counts, small_rows, VOID)
        return np.where(counts, self._context.pool_rows(request.context), NO_ROW), columns

    def _capped(self, positions: Int64Array) -> Int64Array:
        return np.minimum(positions, self._config.num_positions - 1)

    def _buckets(self, ages: Int64Array) -> Int64Array:
        return time_buckets(ages, self._config.num_time_buckets)
