"""From a client's request to the arrays the engine works on; every limit is checked here."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_digest
from helm_engine.config import RequestLimits
from helm_engine.exceptions import InvalidRequestError, ModelNotFoundError
from helm_engine.protocol import Candidates, History, RecommendRequest
from helm_engine.request import Request, ReuseBlocked
from model_executor.model_config import ModelConfig
from model_executor.step import Int64Array

DEFAULT_RETRIEVED = 10


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """An engine request, and what only the answer needs."""

    request: Request
    top_k: int
    """Items to answer with."""
    candidate_ids: Int64Array
    """As sent, duplicates included; empty when retrieving."""
    place_of_candidate: Int64Array
    """Where each one's score stands among the distinct candidates of the engine request."""
    excluded: npt.NDArray[np.bool_]
    """Candidates that must not be answered with."""


class InputProcessor:
    """Validates requests against one model and its limits, and hashes their histories."""

    def __init__(
        self,
        model: ModelConfig,
        model_name: str,
        model_version: str,
        limits: RequestLimits,
        block_tokens: int,
        can_retrieve: bool,
    ) -> None:
        self._model = model
        self._model_name = model_name
        self._model_version = model_version
        self._limits = limits
        self._block_tokens = block_tokens
        self._can_retrieve = can_retrieve
        # Chains are compared within this process alone, so no one else needs the key.
        self._user_key = secrets.token_bytes(32)

    def process(self, body: RecommendRequest, request_id: str, now: float) -> PreparedRequest:
        """Makes an engine request.

        Args:
            body: a request that fits the schema.
            request_id: unique among unfinished requests.
            now: the engine's clock, seconds.

        Raises:
            InvalidRequestError: names the field and its limit.
            ModelNotFoundError: another model is asked for.
        """
        if body.model is not None and body.model != self._model_name:
            raise ModelNotFoundError(
                f"model: {body.model!r} is not served here; {self._model_name!r} is", "model"
            )
        if body.context:
            raise InvalidRequestError("context: this model takes no contextual features", "context")
        sent_ids, times = self._history(body.history, body.request_time)
        top_k = self._top_k(body)
        candidate_ids = self._candidates(body.candidates)
        distinct, place = np.unique(candidate_ids, return_inverse=True)
        kept = min(len(sent_ids), self._model.max_sequence_len)
        item_ids, event_times = sent_ids[-kept:], times[-kept - 1 :]
        excluded = sent_ids if body.exclude_history else sent_ids[:0]
        retrieving = body.candidates is None
        request = Request(
            request_id=request_id,
            item_ids=item_ids,
            event_times=event_times,
            candidate_ids=distinct,
            top_k=top_k if retrieving else 0,
            excluded_ids=np.unique(excluded) if retrieving else excluded[:0],
            block_hashes=self._hashes(body.user, item_ids, event_times),
            arrival=now,
            deadline=float("inf") if body.deadline_ms is None else now + body.deadline_ms / 1e3,
            priority=body.priority,
            reuse_hindrance=self._reuse_hindrance(body, kept),
        )
        return PreparedRequest(
            request=request,
            top_k=top_k,
            candidate_ids=candidate_ids,
            place_of_candidate=place,
            excluded=np.isin(candidate_ids, excluded),
        )

    def _history(self, history: History, request_time: int | None) -> tuple[Int64Array, Int64Array]:
        """Item ids [n], and their times followed by the request's [n + 1]."""
        limit = self._limits.max_history_events
        if not history.item_ids:
            raise InvalidRequestError(
                "history.item_ids: must hold at least one event", "history.item_ids"
            )
        if len(history.item_ids) > limit:
            raise InvalidRequestError(
                f"history.item_ids: holds {len(history.item_ids)} events, the limit is {limit}",
                "history.item_ids",
            )
        _check_lengths("history", history.lengths())
        item_ids = self._known_items("history.item_ids", history.item_ids)
        if history.timestamps is None:
            raise InvalidRequestError(
                "history.timestamps: required, this model uses times", "history.timestamps"
            )
        times = np.array(history.timestamps, dtype=np.int64)
        backwards = np.flatnonzero(times[1:] < times[:-1])
        if len(backwards):
            place = f"history.timestamps[{backwards[0] + 1}]"
            raise InvalidRequestError(
                f"{place}: is earlier than the event before it; events go oldest first", place
            )
        asked_at = int(times[-1]) if request_time is None else request_time
        if asked_at < times[-1]:
            raise InvalidRequestError(
                f"request_time: {asked_at} is before the last event at {times[-1]}",
                "request_time",
            )
        return item_ids, np.append(times, asked_at)

    def _candidates(self, candidates: Candidates | None) -> Int64Array:
        if candidates is None:
            if not self._can_retrieve:
                raise InvalidRequestError(
                    "candidates: required, this engine serves no retrieval", "candidates"
                )
            return np.empty(0, dtype=np.int64)
        number, limit = len(candidates.item_ids), self._limits.max_candidates
        if not 1 <= number <= limit:
            raise InvalidRequestError(
                f"candidates.item_ids: holds {number} items, must hold 1 to {limit}",
                "candidates.item_ids",
            )
        _check_lengths("candidates", candidates.lengths())
        return self._known_items("candidates.item_ids", candidates.item_ids)

    def _known_items(self, field: str, sent: list[int]) -> Int64Array:
        item_ids = np.array(sent, dtype=np.int64)
        unknown = np.flatnonzero((item_ids < 1) | (item_ids > self._model.num_items))
        if len(unknown):
            place = f"{field}[{unknown[0]}]"
            raise InvalidRequestError(
                f"{place}: unknown item {item_ids[unknown[0]]}; "
                f"this model knows 1 to {self._model.num_items}",
                place,
            )
        return item_ids

    def _top_k(self, body: RecommendRequest) -> int:
        limit = self._limits.max_top_k
        if body.top_k is None:
            if body.candidates is None:
                return min(DEFAULT_RETRIEVED, limit)
            return len(body.candidates.item_ids)
        if body.top_k > limit:
            raise InvalidRequestError(f"top_k: {body.top_k} is above the limit {limit}", "top_k")
        return body.top_k

    def _hashes(
        self, user: str | None, item_ids: Int64Array, event_times: Int64Array
    ) -> list[BlockHash]:
        """Hashes of the full blocks whose rows are final.

        A row's K and V depend on the time of the event after it, so the last row, which is
        followed by the request and not by an event, is final only when the next event is known.
        """
        if user is None:
            return []
        root = root_hash(self._model_version, user_digest(user, self._user_key))
        features = np.stack([item_ids, event_times[:-1], event_times[1:]], axis=1)
        return hash_blocks(root, features[:-1], self._block_tokens)

    def _reuse_hindrance(self, body: RecommendRequest, kept: int) -> ReuseBlocked | None:
        if body.user is None:
            return ReuseBlocked.NO_USER
        shifted = body.history.start_index or kept < len(body.history.item_ids)
        if shifted and kept > self._block_tokens:  # Shorter ones fill no block to be reused.
            return ReuseBlocked.WINDOW_SHIFTED
        return None


def _check_lengths(group: str, lengths: dict[str, int]) -> None:
    expected = lengths["item_ids"]
    for name, length in lengths.items():
        if length != expected:
            field = f"{group}.{name}"
            raise InvalidRequestError(
                f"{field}: has {length} values, {group}.item_ids has {expected}", field
            )
