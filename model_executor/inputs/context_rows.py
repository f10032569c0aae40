"""Where the vectors of contextual features are: rows of the pool, or of small dense tables."""

from __future__ import annotations

import numpy as np

from model_executor.model_config import SMALL_TABLE_ROWS, ModelConfig
from model_executor.step import NO_ROW, Int64Array


class ContextRows:
    """Looks up the contextual features of one model."""

    def __init__(self, config: ModelConfig) -> None:
        first_rows = {table.name: table.first_row for table in config.row_tables}
        features = config.contextual_features
        self._pooled = np.array([one.num_rows > SMALL_TABLE_ROWS for one in features], dtype=bool)
        self._first_pooled = np.array(
            [first_rows.get(f"contextual.{one.name}", 0) for one in features], dtype=np.int64
        )
        sizes = [one.num_rows if one.num_rows <= SMALL_TABLE_ROWS else 0 for one in features]
        self._first_small = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        self._min_sequence_len = np.array(
            [one.min_sequence_len for one in features], dtype=np.int64
        )

    def pool_rows(self, context: Int64Array) -> Int64Array:
        """Rows of the pool, NO_ROW for features with a small table: [features]."""
        return np.where(self._pooled, self._first_pooled + context, NO_ROW)

    def small_rows(self, context: Int64Array) -> Int64Array:
        """Rows of the small tables laid behind one another, NO_ROW for pooled ones: [features]."""
        return np.where(self._pooled, NO_ROW, self._first_small + context)

    def counts(self, sequence_len: int) -> Int64Array:
        """1 for features that count for this many events and candidates, else 0: [features]."""
        return (sequence_len >= self._min_sequence_len).astype(np.int64)
