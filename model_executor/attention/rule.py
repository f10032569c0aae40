"""Which rows attend to which, and how scores become weights: constants of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """Context rows are causal; candidates read the whole context and, causally, their group."""

    weights: Literal["silu", "softmax"]
    scale: float
    """Factor of q.k."""
    normaliser: int = 1
    """n, which divides SiLU weights: a constant of the model and never of the batch."""
    num_open_rows: int = 0
    """First rows of a context that read all of it; such a context comes as one chunk."""
    window: int = 0
    """A row reads at most this many rows before it, itself apart; 0 = all. Open rows count as
    one row."""
    group_size: int = 1
    """Candidates attend within groups of this many, in their order."""


def context_mask(rule: AttentionRule, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Which context rows a row attends to.

    Args:
        rule: the model's.
        query_positions: int64 [n]; a candidate's is the context's length.
        key_positions: int64 [m].

    Returns:
        Bool [n, m].
    """
    # Open rows share one place, so that the row behind them is one step away from all of them.
    shift = max(0, rule.num_open_rows - 1)
    query_places = (query_positions - shift).clamp_min(0).unsqueeze(1)
    key_places = (key_positions - shift).clamp_min(0).unsqueeze(0)
    allowed = key_positions.unsqueeze(0) <= query_positions.unsqueeze(1)
    if rule.window:
        allowed &= query_places - key_places <= rule.window
    if rule.num_open_rows:
        allowed |= (query_positions < rule.num_open_rows).unsqueeze(1)
    return allowed


def candidate_mask(rule: AttentionRule, places: Tensor) -> Tensor:
    """Which candidates a candidate attends to: bool [c, c].

    Args:
        rule: the model's.
        places: place of each among the candidates of its micro-batch, int64 [c]; micro-batches
            begin with a group.
    """
    groups = places // rule.group_size
    same = groups.unsqueeze(1) == groups.unsqueeze(0)
    return same & (places.unsqueeze(0) <= places.unsqueeze(1))
