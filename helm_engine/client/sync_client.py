"""The client for threads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

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


class Client:
    """Asks one server; to be shared by threads, and closed at the end.

    Every method raises `HelmError` or the subclass that the server raised; `ServerConnectionError`
    (a `ConnectionError`) where the server cannot be reached, its subclass `ServerTimeoutError`
    where an attempt took longer than `timeout`, and `InvalidAnswerError` where something else than
    this server seems to have answered.

    Attempts that met 429, 503 or no answer at all are repeated: with `deadline_ms` as long as the
    deadline allows, otherwise `max_retries` times.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_MAX_RETRIES,
        encoding: Encoding = "json",
        http_client: httpx.Client | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], object] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Connects with the first call.

        Args:
            base_url: the server's root, without `/v1`.
            api_key: sent as a bearer token; None = `HELM_API_KEY` of the environment, if set.
            timeout: seconds of one attempt, up to the whole answer.
            max_retries: of a call without a deadline; 0 turns retries off for all calls.
            encoding: of bodies, "json" or "msgpack".
            http_client: for certificates, proxies and the like; it stays open at `close`.
            clock: tells how much of a deadline is left; None = the machine's.
            sleep: waits between attempts, in seconds.
            jitter: random numbers in [0, 1) for the waits.

        Raises:
            ValueError: names the argument.
        """
        self._options = ClientOptions(
            base_url, api_key, timeout, max_retries, encoding, clock or SystemClock(), jitter
        )
        self._session = Session(self._options)
        self._sleep = sleep
        self._owns_http = http_client is None
        self._http = http_client or httpx.Client(limits=CONNECTION_LIMITS)

    def recommend(
        self, *, request_id: str | None = None, **request: Unpack[RecommendParams]
    ) -> Recommendation:
        """Scores candidates, or retrieves the best items of the catalogue.

        Args:
            request_id: sent as `X-Request-Id`, for logs.
            **request: the fields of `RecommendRequest`; `deadline_ms` bounds the whole call.
        """
        return self._run(self._session.recommend(request, request_id))

    def recommend_many(
        self, requests: Sequence[RecommendRequest | RecommendParams]
    ) -> list[Recommendation | HelmError]:
        """Asks several requests at once, in one HTTP body.

        A request that failed has its error, not raised, in its place. Deadlines are those of the
        requests: nothing is repeated after the first of them, or waited for after the last.

        Returns:
            As many answers, in the order of the requests.
        """
        return self._run(self._session.recommend_many(requests))

    def models(self) -> list[ServedModel]:
        """What is served, and what of it can be reused and split."""
        return self._run(self._session.models())

    def info(self) -> dict[str, Any]:
        """The server's configuration and limits."""
        return self._run(self._session.info())

    def health(self) -> bool:
        """Whether the server can be reached and can answer requests; asked once."""
        return self._run(self._session.health())

    def forget(self, user: str) -> ForgottenUser:
        """Drops what the server keeps of a user."""
        return self._run(self._session.forget(user))

    def close(self) -> None:
        """Closes the connections."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                action = steps.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(action, Pause):
                self._sleep(action.seconds)
                outcome = None
            else:
                outcome = self._attempt(action)

    def _attempt(self, send: Send) -> Outcome:
        timeouts = AttemptTimeouts(send.seconds)
        request = self._http.build_request(
            send.method,
            self._options.base_url + send.path,
            headers=send.headers,
            content=send.content,
            extensions={"timeout": timeouts},
        )
        is_answered = False
        try:
            response = self._http.send(request, stream=True)
            is_answered = True
            content = bytearray()
            try:
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx limits the wait for each chunk, and a server could send them slowly.
                    if timeouts.is_over:
                        return timed_out(send)
            finally:
                response.close()
        except httpx.RequestError as error:
            return failure_of(error, send, is_answered)
        return Answer(response.status_code, response.headers, bytes(content))
