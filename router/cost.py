"""What a request costs on every engine at once, in milliseconds.

A request is an amount of each kind of work, an engine a price for each, and a cost is their product
summed over the kinds: the terms of `model_executor.cost_profile.CostProfile`, for one request that
has a step to itself. The tenants are coupled: a token whose KV an engine holds is not computed
there, and its row is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from dataclasses import fields as fields_of
from math import inf

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NO_USER_TAG = 0
"""Of a request without a user."""


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Milliseconds for each kind of work on one engine; names are those of `CostProfile`."""

    step_ms: float
    """Of a step, whatever is in it."""
    request_ms: float
    """Of a request's part of a step, whatever is in it."""
    prefill_row_ms: float
    """Of one context token, attention apart."""
    attention_pair_ms: float
    """Of one query-key pair over all layers."""
    candidate_ms: float
    """Of scoring one candidate."""
    candidate_pair_ms: float
    """Of one pair of a candidate and a context token over all layers."""
    row_miss_ms: float
    """Of loading one row from the host tier."""
    round_trip_ms: float
    """Of loading any rows at all, beside those of each."""

    def __post_init__(self) -> None:
        """Checks that every cost is at least 0 and finite.

        Raises:
            ValueError: names the field.
        """
        for field in fields_of(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < inf:
                raise ValueError(f"{field.name}: must be at least 0 and finite, not {value}")

    def as_array(self) -> FloatArray:
        """The costs in the order of the fields, float64 [kinds]."""
        return np.array(astuple(self), dtype=np.float64)


NUM_KINDS = len(fields_of(EngineCosts))
"""Kinds of work."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request as the router sees it, without its content."""

    block_hashes: Sequence[bytes]
    """Of the full blocks that may be reused, oldest first; empty = no reuse."""
    block_tokens: int
    """Tokens of a block."""
    num_tokens: int
    """Of the context."""
    rows: Int64Array
    """Row of each context token, below 0 where it takes none, int64 [num_tokens]."""
    candidate_rows: Int64Array
    """Row of each candidate, likewise, int64 [candidates]."""
    user_tag: int = NO_USER_TAG
    """Of whom; only `consistent_hash` looks at it."""


def amounts_of_work(
    num_tokens: int, num_candidates: int, cached_tokens: Int64Array, rows_missing: Int64Array
) -> FloatArray:
    """How much of each kind of work a request is on every engine.

    Args:
        num_tokens: of the context.
        num_candidates: to be scored.
        cached_tokens: context tokens whose KV each engine holds, int64 [E].
        rows_missing: distinct rows that each engine would have to load, int64 [E].

    Returns:
        float64 [E, kinds], in the order of the fields of `EngineCosts`.
    """
    amounts = np.empty((len(cached_tokens), NUM_KINDS))
    amounts[:, 0] = 1.0
    amounts[:, 1] = 1.0
    amounts[:, 2] = num_tokens - cached_tokens
    # Token i attends to the tokens before it and to itself.
    all_pairs = num_tokens * (num_tokens + 1)
    amounts[:, 3] = (all_pairs - cached_tokens * (cached_tokens + 1)) // 2
    amounts[:, 4] = num_candidates
    amounts[:, 5] = num_candidates * num_tokens
    amounts[:, 6] = rows_missing
    amounts[:, 7] = rows_missing > 0
    return amounts


def price_ms(costs: FloatArray, amounts: FloatArray) -> FloatArray:
    """Milliseconds that a request takes on every engine once its turn has come: float64 [E].

    Args:
        costs: float64 [E, kinds], a row from `EngineCosts.as_array` for each engine.
        amounts: float64 [E, kinds], from `amounts_of_work`.
    """
    # Not einsum: it may sum engines in different orders, and equal engines must cost the same to
    # the last bit.
    prices: FloatArray = (costs * amounts).sum(axis=1)
    return prices
