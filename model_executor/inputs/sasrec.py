"""Tokens of SASRec: an event is its item, and its position says the rest."""

from __future__ import annotations

import numpy as np

from model_executor.inputs.features import RequestFeatures, TokenSequence


class SASRecInputs:
    """See `InputAssembler`."""

    def assemble(self, request: RequestFeatures) -> TokenSequence:
        """Tokens of a request."""
        items, candidates = request.history.item_ids, request.candidates.item_ids
        return TokenSequence(
            rows=items,
            features=np.empty((len(items), 0), dtype=np.int64),
            candidate_rows=candidates,
            candidate_features=np.empty((len(candidates), 0), dtype=np.int64),
            num_final=len(items),
        )
