"""The engine as a Python object, for offline use."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from block_manager.pool_layout import PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, ExecutorConfig
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import HelmError, RequestAbortedError
from helm_engine.input_processor import PreparedRequest
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import Recommendation, RecommendRequest, parse_request

RequestLike = RecommendRequest | Mapping[str, Any]


class Recommender:
    """Serves a model directory in this process, without a server; not thread-safe.

    Example:
        >>> recommender = Recommender("examples/models/hstu-ml-100k")
        >>> answer = recommender.recommend(
        ...     {"user": "u1", "history": {"item_ids": [1, 50], "timestamps": [10, 20]}}
        ... )
        >>> [item.item_id for item in answer.data]
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        pool_bytes: int | None = None,
        emb_fraction: float | None = None,
        device: str = "cpu",
    ) -> None:
        """Loads the model with the engine's defaults; see `from_config` for everything else.

        Args:
            model_dir: the model directory.
            pool_bytes: size of the page pool; default as in `EngineConfig`.
            emb_fraction: share of the pool for embedding rows, 0..1; likewise.
            device: `cpu`, `cuda` or `cuda:N`.

        Raises:
            ModelDirectoryError: the directory cannot be served.
            PoolTooSmallError: the pool cannot hold what one request may need.
            ValueError: an argument is outside its limits.
        """
        pool = PoolConfig()
        if pool_bytes is not None:
            pool = replace(pool, pool_bytes=pool_bytes)
        if emb_fraction is not None:
            pool = replace(pool, emb_fraction=emb_fraction)
        executor = ExecutorConfig(device=device)
        self._start(EngineConfig(Path(model_dir), pool=pool, executor=executor))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Recommender:
        """Loads a model with every setting given; raises as the constructor does."""
        recommender = cls.__new__(cls)
        recommender._start(config)
        return recommender

    def _start(self, config: EngineConfig) -> None:
        self.config = config
        self._clock = SystemClock()
        self.engine = load_engine(config, self._clock)

    def reset_prefix_cache(self) -> bool:
        """Forgets all reusable KV; False, and nothing done, while a stream is being answered."""
        return self.engine.core.scheduler.kv.pool.reset_prefix_cache()

    def recommend(self, request: RequestLike) -> Recommendation:
        """Answers one request.

        Raises:
            HelmError: what a client of the server would be told.
        """
        return self.recommend_batch([request])[0]

    def recommend_batch(self, requests: Iterable[RequestLike]) -> list[Recommendation]:
        """Answers requests together, in order.

        Raises:
            HelmError: the first error, after all requests have ended.
        """
        answers: list[Recommendation] = []
        first_error: HelmError | None = None
        for answer in self.stream(requests):
            if isinstance(answer, HelmError):
                first_error = first_error or answer
            else:
                answers.append(answer)
        if first_error is not None:
            raise first_error
        return answers

    def stream(self, requests: Iterable[object]) -> Iterator[Recommendation | HelmError]:
        """Answers requests as they come, in order, each with an answer or with its own error.

        Up to twice as many requests are read ahead as run at once, so that a long stream takes
        bounded memory. An error in place of a request comes out in its turn. Closed early, the
        stream withdraws what it has read.
        """
        limits = self.config.scheduler
        read_ahead = min(2 * limits.max_num_seqs, limits.max_num_waiting)
        in_flight: deque[PreparedRequest | HelmError] = deque()
        unread = iter(requests)
        exhausted = False
        try:
            while in_flight or not exhausted:
                while not exhausted and len(in_flight) < read_ahead:
                    try:
                        in_flight.append(self._submit(next(unread)))
                    except StopIteration:
                        exhausted = True
                while in_flight and self._has_ended(in_flight[0]):
                    yield self._answer(in_flight.popleft())
                if self.engine.core.has_work:
                    self.engine.core.step()
        finally:
            withdrawn = RequestAbortedError("the stream was closed")
            for entry in in_flight:
                if not isinstance(entry, HelmError):
                    self.engine.core.fail_request(entry.request, withdrawn)
            self.engine.core.run_until_idle()

    def _submit(self, raw: object) -> PreparedRequest | HelmError:
        if isinstance(raw, HelmError):
            return raw
        try:
            prepared = self.engine.processor.process(
                parse_request(raw), f"rec-{uuid.uuid4().hex}", self._clock.now()
            )
            self.engine.core.add_request(prepared.request)
        except HelmError as error:
            return error
        return prepared

    @staticmethod
    def _has_ended(entry: PreparedRequest | HelmError) -> bool:
        return isinstance(entry, HelmError) or entry.request.has_ended

    def _answer(self, entry: PreparedRequest | HelmError) -> Recommendation | HelmError:
        if isinstance(entry, HelmError):
            return entry
        if entry.request.error is not None:
            return entry.request.error
        try:
            return build_recommendation(entry, self.config.model_name)
        except HelmError as error:
            return error
