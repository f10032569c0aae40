"""The client for coroutines."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import anyio
import httpx

from helm_engine.client.answers import ForgottenUser, ServedModel
from helm_engine.client.attempt import CONNECTION_LIMITS, AttemptTimeouts, failure_of, timed_out
from helm_engine.client.encoding import Encoding
from helm_engine.client.messages import Answer, Outcome, Pause, Send, Steps
from helm_engine.client.options import (
    DEFAULT_BASE_URL,
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    ClientOptions,
)
from helm_engine.client.params import RecommendParams
from helm_engine.client.session import Session
from helm_engine.clock import Clock, SystemClock
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Recommendation, RecommendRequest

T = TypeVar("T")


class AsyncClient:
    """`Client` for coroutines: the same arguments, methods, answers and errors."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_MAX_RETRIES,
        encoding: Encoding = "json",
        http_client: httpx.AsyncClient | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Connects with the first call; the arguments are those of `Client`.

        Raises:
            ValueError: names the argument.
        """
        self._options = ClientOptions(
            base_url, api_key, timeout, max_retries, encoding, clock or SystemClock(), jitter
        )
        self._session = Session(self._options)
        self._sleep = sleep
        self._owns_http = http_client is None
        self._http = http_client or httpx.AsyncClient(limits=CONNECTION_LIMITS)

    async def recommend(
        self, *, request_id: str | None = None, **request: Unpack[RecommendParams]
    ) -> Recommendation:
        """See `Client.recommend`."""
        return await self._run(self._session.recommend(request, request_id))

    async def recommend_many(
        self, requests: Sequence[RecommendRequest | RecommendParams]
    ) -> list[Recommendation | HelmError]:
        """See `Client.recommend_many`."""
        return await self._run(self._session.recommend_many(requests))

    async def models(self) -> list[ServedModel]:
        """See `Client.models`."""
        return await self._run(self._session.models())

    async def info(self) -> dict[str, Any]:
        """See `Client.info`."""
        return await self._run(self._session.info())

    async def health(self) -> bool:
        """See `Client.health`."""
        return await self._run(self._session.health())

    async def forget(self, user: str) -> ForgottenUser:
        """See `Client.forget`."""
        return await self._run(self._session.forget(user))

    async def close(self) -> None:
        """Closes the connections."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                action = steps.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(action, Pause):
                await self._sleep(action.seconds)
                outcome = None
            else:
                outcome = await self._attempt(action)

    async def _attempt(self, send: Send) -> Outcome:
        request = self._http.build_request(
            send.method,
            self._options.base_url + send.path,
            headers=send.headers,
            content=send.content,
            extensions={"timeout": AttemptTimeouts(send.seconds)},
        )
        is_answered = False
        try:
            with anyio.fail_after(send.seconds):
                response = await self._http.send(request, stream=True)
                is_answered = True
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
        except TimeoutError:
            return timed_out(send)
        except httpx.RequestError as error:
            return failure_of(error, send, is_answered)
        return Answer(response.status_code, response.headers, content)
