"""What a request brings, and the tokens it becomes; NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from model_executor.step import Int64Array


@dataclass(frozen=True, slots=True)
class Events:
    """Events of a history, oldest first, or candidates: parallel arrays of length n."""

    item_ids: Int64Array
    timestamps: Int64Array
    """Seconds; zeros where the model uses no times."""
    actions: Int64Array
    """Zeros where the model reads none."""
    features: Int64Array
    """Ids of the model's item features, in its order, [n, K]."""


@dataclass(frozen=True, slots=True)
class RequestFeatures:
    """All that a model may read of a request; every id is within its table."""

    history: Events
    """The events that the model reads."""
    candidates: Events
    """Empty when retrieving."""
    context: Int64Array
    """Ids of the contextual features, in the model's order."""
    request_time: int
    """Seconds."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A request as the engine works on it: L context tokens and C candidates."""

    rows: Int64Array
    """Row of the pool that each context token reads, or NO_ROW, [L]."""
    features: Int64Array
    """What else the model reads of each, [L, F]; the columns are the model's."""
    candidate_rows: Int64Array
    """Row of each candidate, [C]."""
    candidate_features: Int64Array
    """What else the model reads of each, [C, F]."""
    num_final: int
    """Leading tokens whose K and V depend on nothing but `rows` and `features` up to them; what
    follows may be computed for this request alone."""

    def hash_inputs(self) -> Int64Array:
        """Everything that the final tokens' K and V depend on, [num_final, 1 + F]."""
        return np.column_stack([self.rows, self.features])[: self.num_final]


class InputAssembler(Protocol):
    """Turns features into tokens as one model reads them."""

    def assemble(self, request: RequestFeatures) -> TokenSequence:
        """Tokens of a request."""
        ...
