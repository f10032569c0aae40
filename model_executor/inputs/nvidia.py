"""Tokens of the `nvidia` dialect: contextual features, then item and action of each event.

Source of the scheme: NVIDIA/recsys-examples, the HSTU preprocessor of its ranking example.
"""

from __future__ import annotations

import numpy as np

from model_executor.inputs.context_rows import ContextRows
from model_executor.inputs.features import RequestFeatures, TokenSequence
from model_executor.model_config import NvidiaConfig
from model_executor.step import NO_ROW

SMALL_ROW = 0
"""Column: row of the small tables (actions first, then contextual ones) that is the token's
vector; NO_ROW where it is a row of the pool."""


class NvidiaInputs:
    """See `InputAssembler`."""

    def __init__(self, config: NvidiaConfig) -> None:
        self._config = config
        self._context = ContextRows(config)

    def assemble(self, request: RequestFeatures) -> TokenSequence:
        """Tokens of a request."""
        history, per_event = request.history, self._config.tokens_per_event
        num_contextual = self._config.num_contextual_tokens
        length = num_contextual + per_event * len(history.item_ids)
        rows = np.full(length, NO_ROW, dtype=np.int64)
        small = np.full((length, 1), NO_ROW, dtype=np.int64)
        rows[num_contextual::per_event] = history.item_ids
        if per_event == 2:
            small[num_contextual + 1 :: 2, SMALL_ROW] = history.actions
        if num_contextual:
            rows[:num_contextual] = self._context.pool_rows(request.context)
            small_rows = self._context.small_rows(request.context)
            behind_actions = np.where(
                small_rows == NO_ROW, NO_ROW, small_rows + self._config.num_actions
            )
            small[:num_contextual, SMALL_ROW] = behind_actions
        candidates = request.candidates.item_ids
        return TokenSequence(
            rows=rows,
            features=small,
            candidate_rows=candidates,
            candidate_features=np.full((len(candidates), 1), NO_ROW, dtype=np.int64),
            num_final=length,
        )
