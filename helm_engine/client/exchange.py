"""One call: attempts and waits, never beyond the deadline. It decides and does no I/O itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from helm_engine.client.backoff import backoff_seconds, retry_after_seconds
from helm_engine.client.body import RequestBody
from helm_engine.client.encoding import MEDIA_TYPES
from helm_engine.client.errors import ServerTimeoutError, error_of
from helm_engine.client.messages import Answer, Failure, Outcome, Pause, Send, Steps
from helm_engine.client.options import ClientOptions
from helm_engine.exceptions import DeadlineExceededError, HelmError

T = TypeVar("T")

MAX_RETRY_AFTER_SECONDS = 60.0
"""A server that asks for more is not there for this call; who has no deadline gets the error."""
_RETRIED_STATUSES = frozenset({429, 503})
_TIMER_TOLERANCE_SECONDS = 1e-3
"""A timer set to the deadline may fire a moment before it."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """What to ask, and how to read the answer."""

    method: str
    path: str
    read: Callable[[Answer], T]
    started: float
    """On the options' clock, before the body was encoded; deadlines count from here."""
    body: RequestBody | None = None
    request_id: str | None = None
    is_retried: bool = True


@dataclass(frozen=True, slots=True)
class _Limits:
    """Moments on the clock."""

    retry_until: float
    """No attempt starts from here on: the first deadline of the body."""
    answer_until: float
    """No answer is of use from here on: the last deadline."""
    max_retries: float


def exchange(call: Call[T], options: ClientOptions) -> Steps[T]:
    """The steps of a call.

    Raises:
        HelmError: of the last attempt, or `DeadlineExceededError` where the deadline cut it off.
    """
    limits = _limits(call, options)
    headers = _headers(call, options)
    last: HelmError | None = None
    for num_retries in itertools.count():
        now = options.clock.now()
        if now >= limits.retry_until:
            raise last or DeadlineExceededError("the deadline passed before the request was sent")
        outcome = yield Send(
            call.method,
            call.path,
            headers,
            None if call.body is None else call.body.encode(now - call.started),
            min(options.timeout, limits.answer_until - now),
        )
        if isinstance(outcome, Answer) and 200 <= outcome.status < 300:
            return call.read(outcome)
        last, may_retry, asked_wait = _judge(outcome)
        now = options.clock.now()
        if (
            isinstance(last, ServerTimeoutError)
            and now + _TIMER_TOLERANCE_SECONDS >= limits.answer_until
        ):
            raise DeadlineExceededError("the deadline passed before the answer came") from last
        wait = max(asked_wait, backoff_seconds(num_retries, options.jitter()))
        if not may_retry or num_retries >= limits.max_retries or now + wait >= limits.retry_until:
            raise last
        if math.isinf(limits.retry_until) and wait > MAX_RETRY_AFTER_SECONDS:
            raise last
        yield Pause(wait)
    raise AssertionError("counting ended")


def _limits(call: Call[T], options: ClientOptions) -> _Limits:
    first = math.inf if call.body is None else call.body.first_deadline
    last = math.inf if call.body is None else call.body.last_deadline
    max_retries: float = options.max_retries if call.is_retried else 0
    if max_retries and not math.isinf(first):
        max_retries = math.inf
    return _Limits(call.started + first, call.started + last, max_retries)


def _headers(call: Call[T], options: ClientOptions) -> dict[str, str]:
    headers = options.headers()
    if call.body is not None:
        headers["Content-Type"] = MEDIA_TYPES[call.body.encoding]
    if call.request_id is not None:
        headers["X-Request-Id"] = call.request_id
    return headers


def _judge(outcome: Outcome) -> tuple[HelmError, bool, float]:
    """The error of an attempt, whether another may help, and how long to wait at least."""
    assert outcome is not None, "an attempt ends with an answer or a failure"
    if isinstance(outcome, Failure):
        return outcome.error, outcome.may_retry, 0.0
    error = error_of(outcome)
    if outcome.status not in _RETRIED_STATUSES:
        return error, False, 0.0
    return error, True, retry_after_seconds(outcome.headers)
