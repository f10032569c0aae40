"""The engine as a Python object, for offline use."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from block_manager.pool_layout import PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import GPU_MEMORY_UTILIZATION, EngineConfig, ExecutorConfig
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import HelmError, RequestAbortedError
from helm_engine.input_processor import PreparedRequest
from helm_engine.output_processor import build_recommendation
from helm_engine.protocol import Recommendation, RecommendRequest, parse_request

RequestLike = RecommendRequest | Mapping[str, Any]
K = TypeVar("K")


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
            pool_bytes: size of the page pool; default as in `EngineConfig`, and on a GPU what
                nine tenths of its memory leave beside weights and the largest step.
            emb_fraction: share of the pool for embedding rows, 0..1; likewise.
            device: `cpu`, `cuda`, `cuda:N` or `auto`.

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
        utilization = GPU_MEMORY_UTILIZATION if pool_bytes is None else None
        executor = ExecutorConfig(device=device, gpu_memory_utilization=utilization)
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

    def close(self) -> None:
        """Ends the threads beside the engine; nothing may be asked after it."""
        self.engine.close()

    def __enter__(self) -> Self:
        """Closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset_prefix_cache(self) -> bool:
        """Forgets all reusable KV; False, and nothing done, while a stream is being answered."""
        return self.engine.core.scheduler.kv.pool.reset_prefix_cache()

    def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool; pages move between the steps to come.

        Args:
            emb_fraction: the share of the pages for embedding rows, 0..1.

        Returns:
            The share that will be reached; floors may forbid the one that was asked for.

        Raises:
            ValueError: not within 0..1.
            ControllerActiveError: a controller decides on the split.
        """
        return self.engine.core.set_target(emb_fraction)

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
        unread = enumerate(requests)
        num_answered = 0
        ended: dict[int, Recommendation | HelmError] = {}
        num_read = 0

        def next_request() -> tuple[int, object] | None:
            nonlocal num_read
            if num_read - num_answered >= read_ahead:
                return None
            numbered = next(unread, None)
            num_read += numbered is not None
            return numbered

        with closing(self.answer_as_ended(next_request)) as answers:
            for number, answer in answers:
                ended[number] = answer
                while num_answered in ended:
                    # Counted first: the reader may close the stream while it has the answer.
                    num_answered += 1
                    yield ended.pop(num_answered - 1)

    def answer_as_ended(
        self, next_request: Callable[[], tuple[K, object] | None]
    ) -> Generator[tuple[K, Recommendation | HelmError], None, None]:
        """Answers requests in the order in which they end, each under the key it came with.

        No more requests are in flight than run at once, so none is refused for a full queue, and
        one that is handed over when another has ended is scheduled in the very next step.

        Args:
            next_request: hands over the next request, or an error in its place, with its key;
                None = there is none before another one has ended. It is asked whenever there is
                room; None while nothing is in flight ends the iteration. Closed early, the
                iteration withdraws what is in flight.
        """
        in_flight: list[tuple[K, PreparedRequest]] = []
        try:
            while True:
                while len(in_flight) < self.config.scheduler.max_num_seqs:
                    handed = next_request()
                    if handed is None:
                        break
                    key, raw = handed
                    entry = self._submit(raw)
                    if isinstance(entry, HelmError):
                        yield key, entry
                    else:
                        in_flight.append((key, entry))
                if not in_flight:
                    return
                self.engine.core.step()
                ended = [one for one in in_flight if one[1].request.has_ended]
                in_flight = [one for one in in_flight if not one[1].request.has_ended]
                for key, prepared in ended:
                    yield key, self._answer(prepared)
        finally:
            withdrawn = RequestAbortedError("the stream was closed")
            for _, prepared in in_flight:
                self.engine.core.fail_request(prepared.request, withdrawn)
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

    def _answer(self, prepared: PreparedRequest) -> Recommendation | HelmError:
        if prepared.request.error is not None:
            return prepared.request.error
        try:
            return build_recommendation(prepared, self.config.model_name)
        except HelmError as error:
            return error
