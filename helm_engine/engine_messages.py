"""What the front and an engine core's process say to each other."""

from __future__ import annotations

from typing import cast

import msgspec

from block_manager.block_hash import BLOCK_HASH_BYTES, BlockHash
from helm_engine import exceptions
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import HelmError
from helm_engine.request import Request, RequestStatus, ReuseBlocked
from model_executor.inputs.features import TokenSequence
from model_executor.step import Float32Array, Int64Array, StepTimings


class AddRequest(msgspec.Struct, tag="add", frozen=True):
    """A request to run; times are of the system's monotonic clock, which processes share."""

    request_id: str
    rows: Int64Array
    features: Int64Array
    candidate_rows: Int64Array
    candidate_features: Int64Array
    num_final: int
    top_k: int
    excluded_ids: Int64Array
    block_hashes: bytes
    """One after the other."""
    user_tag: int
    arrival: float
    deadline: float
    priority: int
    reuse_hindrance: ReuseBlocked | None

    @classmethod
    def of(cls, request: Request) -> AddRequest:
        """What the engine needs to know of a request."""
        tokens = request.tokens
        return cls(
            request_id=request.request_id,
            rows=tokens.rows,
            features=tokens.features,
            candidate_rows=tokens.candidate_rows,
            candidate_features=tokens.candidate_features,
            num_final=tokens.num_final,
            top_k=request.top_k,
            excluded_ids=request.excluded_ids,
            block_hashes=b"".join(request.block_hashes),
            user_tag=request.user_tag,
            arrival=request.arrival,
            deadline=request.deadline,
            priority=request.priority,
            reuse_hindrance=request.reuse_hindrance,
        )

    def request(self) -> Request:
        """The request as the scheduler works on it."""
        size = BLOCK_HASH_BYTES
        hashes = [
            self.block_hashes[first : first + size]
            for first in range(0, len(self.block_hashes), size)
        ]
        return Request(
            request_id=self.request_id,
            tokens=TokenSequence(
                rows=self.rows,
                features=self.features,
                candidate_rows=self.candidate_rows,
                candidate_features=self.candidate_features,
                num_final=self.num_final,
            ),
            top_k=self.top_k,
            excluded_ids=self.excluded_ids,
            block_hashes=cast("list[BlockHash]", hashes),
            user_tag=self.user_tag,
            arrival=self.arrival,
            deadline=self.deadline,
            priority=self.priority,
            reuse_hindrance=self.reuse_hindrance,
        )


class WithdrawRequest(msgspec.Struct, tag="withdraw", frozen=True):
    """Nobody waits for this request any more."""

    request_id: str


class ForgetUser(msgspec.Struct, tag="forget", frozen=True):
    """Drop a user's KV."""

    call: int
    """Number that the answer repeats."""
    user_tag: int


class SetTarget(msgspec.Struct, tag="target", frozen=True):
    """Ask for another split of the pool."""

    call: int
    emb_fraction: float
    """Within 0..1."""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the process; requests that still run are dropped."""


ToCore = AddRequest | WithdrawRequest | ForgetUser | SetTarget | Stop


class RequestError(msgspec.Struct, frozen=True):
    """An error of `helm_engine.exceptions` on its way to the front."""

    kind: str
    message: str
    param: str | None

    @classmethod
    def of(cls, error: HelmError) -> RequestError:
        """The error's class, message and field."""
        return cls(type(error).__name__, str(error), error.param)

    def exception(self) -> HelmError:
        """The error again."""
        kind = getattr(exceptions, self.kind, HelmError)
        return cast("HelmError", kind(self.message, self.param))


class EndedRequest(msgspec.Struct, frozen=True):
    """A request that has ended, and what became of it."""

    request_id: str
    error: RequestError | None
    scores: Float32Array | None
    retrieved: tuple[Int64Array, Float32Array] | None
    cached_tokens: int
    rows_requested: int
    rows_resident: int
    first_scheduled: float | None
    finished_at: float
    load_ms: float
    prefill_ms: float
    score_ms: float
    own_ms: float

    @classmethod
    def of(cls, request: Request) -> EndedRequest:
        """What the front needs to know of an ended request."""
        return cls(
            request_id=request.request_id,
            error=None if request.error is None else RequestError.of(request.error),
            scores=request.scores,
            retrieved=request.retrieved,
            cached_tokens=request.cached_tokens,
            rows_requested=request.rows_requested,
            rows_resident=request.rows_resident,
            first_scheduled=request.first_scheduled,
            finished_at=request.finished_at,
            load_ms=request.timings_ms.load,
            prefill_ms=request.timings_ms.prefill,
            score_ms=request.timings_ms.score,
            own_ms=request.own_ms,
        )

    def complete(self, request: Request) -> None:
        """Writes the outcome into the front's own copy of the request."""
        request.error = None if self.error is None else self.error.exception()
        request.status = RequestStatus.FINISHED if self.error is None else RequestStatus.FAILED
        request.scores = self.scores
        request.retrieved = self.retrieved
        request.num_scored = request.num_candidates
        request.cached_tokens = self.cached_tokens
        request.rows_requested = self.rows_requested
        request.rows_resident = self.rows_resident
        request.first_scheduled = self.first_scheduled
        request.finished_at = self.finished_at
        request.timings_ms = StepTimings(self.load_ms, self.prefill_ms, self.score_ms)
        request.own_ms = self.own_ms


class CallDone(msgspec.Struct, frozen=True):
    """Answer to `ForgetUser` (blocks that were forgotten) or `SetTarget` (the share to come)."""

    call: int
    value: float


class CoreReport(msgspec.Struct, tag="report", frozen=True):
    """What happened since the last report; also sent now and then when nothing did."""

    stats: EngineStats
    ended: list[EndedRequest] = []
    calls_done: list[CallDone] = []


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """The process runs, though a step may take long: it comes from beside the step loop."""


FromCore = CoreReport | Beat
