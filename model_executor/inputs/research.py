"""Tokens of the `research` dialect: an event is one token with its own time and the next one's."""

from __future__ import annotations

import numpy as np

from model_executor.inputs.features import RequestFeatures, TokenSequence

TIME, NEXT_TIME = range(2)
"""Columns: seconds of the event, and of the event after it; after the last comes the request."""


class ResearchInputs:
    """See `InputAssembler`."""

    def assemble(self, request: RequestFeatures) -> TokenSequence:
        """Tokens of a request."""
        times = np.append(request.history.timestamps, request.request_time)
        candidates = request.candidates.item_ids
        return TokenSequence(
            rows=request.history.item_ids,
            features=np.column_stack([times[:-1], times[1:]]),
            candidate_rows=candidates,
            candidate_features=np.zeros((len(candidates), 2), dtype=np.int64),
            # The last row reads the request's time, which is no event's: final only when the
            # next event is known.
            num_final=len(times) - 2,
        )
