"""The arguments of a request, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Required, TypedDict

from helm_engine.protocol import Candidates, History


class RecommendParams(TypedDict, total=False):
    """Fields of `helm_engine.protocol.RecommendRequest`, which says what they mean.

    All but `fields`: the client reads whole answers.

    Arrays are sequences of integers or one-dimensional NumPy arrays of any integer dtype. None is
    as good as absent. Only the server checks them: it knows the model. `fields` is missing: a
    `Recommendation` is whole.
    """

    model: str | None
    user: str | None
    history: Required[History | Mapping[str, object]]
    candidates: Candidates | Mapping[str, object] | None
    context: Mapping[str, object] | None
    request_time: int | None
    top_k: int | None
    exclude_history: bool
    deadline_ms: float | None
    priority: int
