"""A request inside the engine: validated arrays, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

import numpy as np

from block_manager.block_hash import NO_USER_TAG, BlockHash
from helm_engine.exceptions import HelmError
from model_executor.inputs.features import TokenSequence
from model_executor.step import Float32Array, Int64Array, StepTimings

_NO_TIMINGS = StepTimings(0.0, 0.0, 0.0)


class ReuseBlocked(StrEnum):
    """Why a request's history could not meet cached KV."""

    NO_USER = "no_user"
    """The request names no user, and KV is never shared between users."""
    WINDOW_SHIFTED = "window_shifted"
    """Older events are missing or were cut, so every position moved; only a window that begins
    at the same event would have met its KV again."""
    MODEL = "model"
    """The model's K and V depend on more than a history's beginning; `/v1/models` says why."""


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()
    FAILED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler works on. The first group never changes after construction."""

    request_id: str
    tokens: TokenSequence
    """Context and candidates as the model reads them; without candidates items are retrieved."""
    top_k: int
    """Items to retrieve; not used for candidates."""
    excluded_ids: Int64Array
    """Distinct items that must not be retrieved."""
    block_hashes: list[BlockHash]
    """Of the full blocks whose K and V are final; empty = nothing may be reused."""
    arrival: float
    """Engine clock, seconds."""
    deadline: float = float("inf")
    """Engine clock, seconds."""
    priority: int = 0
    """Lower runs first."""
    user_tag: int = NO_USER_TAG
    """Of whom; see `block_manager.block_hash.user_tag`."""
    reuse_hindrance: ReuseBlocked | None = None
    """Reported when no KV was reused."""
    num_tokens: int = field(init=False)
    """Tokens of the context."""
    num_candidates: int = field(init=False)
    """Candidates to score."""

    status: RequestStatus = RequestStatus.WAITING
    num_computed: int = 0
    """Context tokens whose K and V are in pages."""
    num_scored: int = 0
    """Candidates scored so far."""
    cached_tokens: int = 0
    rows_requested: int = 0
    rows_resident: int = 0
    scores: Float32Array | None = None
    """Of the candidates scored so far, [candidates, tasks]."""
    retrieved: tuple[Int64Array, Float32Array] | None = None
    first_scheduled: float | None = None
    finished_at: float = 0.0
    timings_ms: StepTimings = _NO_TIMINGS
    own_ms: float = 0.0
    """Its part of its steps' time, by its part of their tokens: over all requests these add up to
    the time that the engine was busy."""
    error: HelmError | None = None

    def __post_init__(self) -> None:
        """Counts once what a scheduler asks for many times in a step."""
        self.num_tokens = len(self.tokens.rows)
        self.num_candidates = len(self.tokens.candidate_rows)

    @property
    def is_retrieval(self) -> bool:
        """Whether the whole catalogue is scored."""
        return self.num_candidates == 0

    def take_scores(self, scores: Float32Array) -> None:
        """Takes over the scores of the next candidates, [n, tasks]; kept, if they are all."""
        if len(scores) == self.num_candidates:
            self.scores, self.num_scored = scores, len(scores)
            return
        if self.scores is None:
            self.scores = np.zeros((self.num_candidates, scores.shape[1]), dtype=np.float32)
        self.scores[self.num_scored : self.num_scored + len(scores)] = scores
        self.num_scored += len(scores)

    @property
    def is_done(self) -> bool:
        """Whether everything that was asked for is computed."""
        if self.is_retrieval:
            return self.retrieved is not None
        return self.num_scored == self.num_candidates

    @property
    def has_ended(self) -> bool:
        """Whether the request has finished or failed."""
        return self.status in (RequestStatus.FINISHED, RequestStatus.FAILED)

    @property
    def reuse_blocked(self) -> ReuseBlocked | None:
        """Why no KV was reused, if there is a reason beyond a cache that never held it."""
        return None if self.cached_tokens else self.reuse_hindrance

    def add_timings(self, step: StepTimings) -> None:
        """Counts a step's phases as this request's too: it waited for all of them."""
        spent = self.timings_ms
        if spent is _NO_TIMINGS:
            self.timings_ms = step  # As for nearly all: they take one step.
            return
        self.timings_ms = StepTimings(
            spent.load + step.load, spent.prefill + step.prefill, spent.score + step.score
        )
