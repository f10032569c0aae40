"""From a client's request to the tokens the engine works on; every limit is checked here."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from block_manager.block_hash import (
    NO_USER_TAG,
    BlockHash,
    hash_blocks,
    root_hash,
    user_digest,
    user_tag,
)
from helm_engine.config import RequestLimits
from helm_engine.exceptions import (
    InvalidRequestError,
    ModelNotFoundError,
    RequestTooLargeError,
)
from helm_engine.feature_reader import FeatureReader
from helm_engine.history_window import HistoryWindow, window_of
from helm_engine.protocol import Candidates, RecommendRequest
from helm_engine.request import Request, ReuseBlocked
from model_executor.capabilities import Capabilities
from model_executor.inputs.features import TokenSequence
from model_executor.inputs.registry import build_inputs
from model_executor.model_config import ModelConfig, RankingConfig, StuConfig
from model_executor.step import Int64Array

DEFAULT_RETRIEVED = 10


def new_user_key() -> bytes:
    """A key for the hashes of users, 32 random bytes; whoever lacks it learns nothing of them."""
    return secrets.token_bytes(32)


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
    excluded: npt.NDArray[np.bool_] | None
    """Candidates that must not be answered with, [candidates]; None = none of them."""
    task_names: tuple[str, ...] = ()
    """Of the scores' columns; none where items are scored by inner product."""
    rank_task: int = 0
    """Column that items are ranked by."""


class InputProcessor:
    """Validates requests against one model and its limits, and hashes their contexts."""

    def __init__(
        self,
        model: ModelConfig,
        capabilities: Capabilities,
        model_name: str,
        model_version: str,
        limits: RequestLimits,
        block_tokens: int,
        max_step_tokens: int,
        can_retrieve: bool,
        user_key: bytes,
    ) -> None:
        self._model = model
        self._capabilities = capabilities
        self._model_name = model_name
        self._model_version = model_version
        self._limits = limits
        self._block_tokens = block_tokens
        self._max_step_tokens = max_step_tokens
        self._can_retrieve = can_retrieve
        self._features = FeatureReader(model)
        self._inputs = build_inputs(model)
        self._user_key = user_key
        self._task_names = tuple(task.name for task in model.task_list)
        self._rank_task = model.rank_task if isinstance(model, RankingConfig) else 0

    def process(self, body: RecommendRequest, request_id: str, now: float) -> PreparedRequest:
        """Makes an engine request.

        Args:
            body: a request that fits the schema.
            request_id: unique among unfinished requests.
            now: the engine's clock, seconds.

        Raises:
            InvalidRequestError: names the field and its limit.
            RequestTooLargeError: likewise, where something is larger than can ever be served.
            ModelNotFoundError: another model is asked for.
        """
        if body.model is not None and body.model != self._model_name:
            raise ModelNotFoundError(
                f"model: {body.model!r} is not served here; {self._model_name!r} is", "model"
            )
        self._check_sizes(body)
        window = window_of(self._model, len(body.history.item_ids), body.history.start_index)
        tokens = self._inputs.assemble(self._features.read(body, window))
        self._check_step(tokens)
        candidate_ids = tokens.candidate_rows
        tokens, place = self._merge_duplicates(tokens)
        retrieving = body.candidates is None
        top_k = self._top_k(body)
        sent = body.history.item_ids
        excluded = np.unique(sent) if body.exclude_history else sent[:0]
        user = None if body.user is None else user_digest(body.user, self._user_key)
        request = Request(
            request_id=request_id,
            tokens=tokens,
            top_k=top_k if retrieving else 0,
            excluded_ids=excluded if retrieving else excluded[:0],
            block_hashes=self._hashes(user, tokens),
            user_tag=NO_USER_TAG if user is None else user_tag(user),
            arrival=now,
            deadline=float("inf") if body.deadline_ms is None else now + body.deadline_ms / 1e3,
            priority=body.priority,
            reuse_hindrance=self._reuse_hindrance(user, window, tokens),
        )
        return PreparedRequest(
            request=request,
            top_k=top_k,
            candidate_ids=candidate_ids,
            place_of_candidate=place,
            excluded=np.isin(candidate_ids, excluded) if len(excluded) else None,
            task_names=self._task_names,
            rank_task=self._rank_task,
        )

    def _check_sizes(self, body: RecommendRequest) -> None:
        number, limit = len(body.history.item_ids), self._limits.max_history_events
        if not number:
            raise InvalidRequestError(
                "history.item_ids: must hold at least one event", "history.item_ids"
            )
        if number > limit:
            raise RequestTooLargeError(
                f"history.item_ids: holds {number} events, the limit is {limit}",
                "history.item_ids",
            )
        self._check_candidates(body.candidates)

    def _check_candidates(self, candidates: Candidates | None) -> None:
        if candidates is None:
            if not self._can_retrieve:
                raise InvalidRequestError(
                    "candidates: required, this engine serves no retrieval", "candidates"
                )
            return
        number, limit = len(candidates.item_ids), self._limits.max_candidates
        if isinstance(self._model, StuConfig):
            limit = min(limit, self._model.max_candidates)
        if not 1 <= number <= limit:
            kind = RequestTooLargeError if number else InvalidRequestError
            raise kind(
                f"candidates.item_ids: holds {number} items, must hold 1 to {limit}",
                "candidates.item_ids",
            )

    def _check_step(self, tokens: TokenSequence) -> None:
        """A context that cannot be chunked must fit into one step."""
        number, limit = len(tokens.rows), self._max_step_tokens
        if not self._capabilities.chunkable.value and number > limit:
            raise RequestTooLargeError(
                f"history.item_ids: makes a context of {number} tokens; this model computes a "
                f"context in one step, whose limit is {limit} tokens (max_num_batched_tokens)",
                "history.item_ids",
            )

    def _merge_duplicates(self, tokens: TokenSequence) -> tuple[TokenSequence, Int64Array]:
        """Equal candidates become one, so that they are scored alike; and where each went.

        Candidates of a group read one another and stay as they are.
        """
        rows, features = tokens.candidate_rows, tokens.candidate_features
        if not len(rows) or self._model.candidate_group_size > 1:
            return tokens, np.arange(len(rows))
        # np.unique over columns does the same in five times the time.
        order = np.lexsort([*features.T, rows])
        in_order, with_features = rows[order], features[order]
        is_first = np.ones(len(rows), dtype=np.bool_)
        is_first[1:] = (in_order[1:] != in_order[:-1]) | np.any(
            with_features[1:] != with_features[:-1], axis=1
        )
        if is_first.all():
            return tokens, np.arange(len(rows))
        place = np.empty(len(rows), dtype=np.int64)
        place[order] = np.cumsum(is_first) - 1
        first = order[is_first]
        merged = replace(tokens, candidate_rows=rows[first], candidate_features=features[first])
        return merged, place

    def _top_k(self, body: RecommendRequest) -> int:
        limit = self._limits.max_top_k
        if body.top_k is None:
            if body.candidates is None:
                return min(DEFAULT_RETRIEVED, limit)
            return len(body.candidates.item_ids)
        if body.top_k > limit:
            raise InvalidRequestError(f"top_k: {body.top_k} is above the limit {limit}", "top_k")
        return body.top_k

    def _hashes(self, user: bytes | None, tokens: TokenSequence) -> list[BlockHash]:
        """Hashes of the full blocks whose K and V are final.

        They cover every input of their tokens. Where a context reads ahead, a prefix has no K and
        V of its own, and nothing is hashed.
        """
        if user is None or not self._capabilities.chunkable.value:
            return []
        root = root_hash(self._model_version, user)
        return hash_blocks(root, tokens.hash_inputs(), self._block_tokens)

    def user_tag(self, user: str) -> int:
        """What the engine knows a user's KV by."""
        return user_tag(user_digest(user, self._user_key))

    def _reuse_hindrance(
        self, user: bytes | None, window: HistoryWindow, tokens: TokenSequence
    ) -> ReuseBlocked | None:
        if user is None:
            return ReuseBlocked.NO_USER
        if not self._capabilities.cross_request_reuse.value:
            return ReuseBlocked.MODEL
        # Shorter contexts fill no block that could be reused.
        if window.begins_later and len(tokens.rows) > self._block_tokens:
            return ReuseBlocked.WINDOW_SHIFTED
        return None
