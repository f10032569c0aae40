"""What both clients need of httpx: the time limits of an attempt, and what its errors mean."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import httpx

from helm_engine.client.errors import ServerConnectionError, ServerTimeoutError
from helm_engine.client.messages import Failure, Send

CONNECTION_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
"""A new connection takes as long as a small request, so many are kept for busy callers."""
_CONNECT_SECONDS = 5.0
"""A server that is there accepts at once."""
_LEAST_SECONDS = 1e-3
"""A socket takes a limit of 0 for "do not wait at all"."""
_PHASES = ("connect", "read", "write", "pool")


class AttemptTimeouts(Mapping[str, float]):
    """httpx limits each phase of a request for itself; these limits are what the attempt has left.

    httpx looks a limit up when the phase starts.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def __getitem__(self, phase: str) -> float:
        if phase not in _PHASES:
            raise KeyError(phase)
        left = max(_LEAST_SECONDS, self._end - time.monotonic())
        # Half of the attempt, so that a connection that is not accepted can be tried again.
        return min(left, _CONNECT_SECONDS, self._seconds / 2) if phase == "connect" else left

    def __iter__(self) -> Iterator[str]:
        return iter(_PHASES)

    def __len__(self) -> int:
        return len(_PHASES)

    @property
    def is_over(self) -> bool:
        """Whether the attempt has had its time."""
        return time.monotonic() >= self._end


def timed_out(send: Send) -> Failure:
    """The end of an attempt that took too long."""
    message = f"no answer within {send.seconds:.3g} s"
    return Failure(ServerTimeoutError(message), may_retry=False)


def failure_of(error: httpx.RequestError, send: Send, is_answered: bool) -> Failure:
    """What an error of httpx means.

    Args:
        error: raised by an attempt.
        send: the attempt.
        is_answered: the head of an answer had come.
    """
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        return timed_out(send)
    if isinstance(error, httpx.TimeoutException):
        return Failure(ServerTimeoutError(f"cannot connect in time: {error!r}"), may_retry=True)
    what = "the connection broke within the answer" if is_answered else "cannot reach the server"
    failure = ServerConnectionError(f"{what}: {str(error) or type(error).__name__}")
    failure.__cause__ = error
    return Failure(failure, may_retry=not is_answered)
