"""Requests that come at given times to an engine core in this process, in real or virtual time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from helm_engine.clock import VirtualClock
from helm_engine.engine_core import EngineCore
from helm_engine.engine_messages import AddRequest
from helm_engine.exceptions import HelmError
from helm_engine.request import Request
from model_executor.step import Float32Array

_BACKGROUND_SECONDS = 0.001
"""As in the core's own process: without requests, pages and rows move in steps this far apart."""


class Timer(Protocol):
    """Where time comes from, and how it passes while there is nothing to do."""

    def now(self) -> float:
        """Seconds."""
        ...

    def wait_until(self, when: float) -> None:
        """Returns at that time, or at once if it has passed."""
        ...


class RealTimer:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds."""
        return time.monotonic()

    def wait_until(self, when: float) -> None:
        """Sleeps."""
        time.sleep(max(0.0, when - time.monotonic()))


class VirtualTimer:
    """A clock that is moved on."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def now(self) -> float:
        """Seconds."""
        return self._clock.now()

    def wait_until(self, when: float) -> None:
        """Moves the clock on."""
        self._clock.advance(max(0.0, when - self._clock.now()))


@dataclass(slots=True)
class Outcome:
    """What became of timed requests."""

    latencies_ms: list[float] = field(default_factory=list)
    """From the time each was due to its end, in the order in which they ended."""
    due: list[float] = field(default_factory=list)
    """When each of those was due, in seconds after the start."""
    failures: int = 0
    scores: dict[str, Float32Array] = field(default_factory=dict)
    """By request id."""

    def take(
        self, request: Request, due_at: float, due: float, now: float, keep_scores: bool
    ) -> None:
        """Counts an ended request."""
        if request.error is not None:
            self.failures += 1
            return
        self.due.append(due)
        self.latencies_ms.append((now - due_at) * 1e3)
        if keep_scores and request.scores is not None:
            self.scores[request.request_id] = request.scores


def offer(
    core: EngineCore,
    timer: Timer,
    requests: Sequence[tuple[float, AddRequest]],
    events: Sequence[tuple[float, Callable[[], object]]] = (),
    keep_scores: bool = False,
) -> Outcome:
    """Runs requests open-loop: each is added when it is due, whatever the engine is doing.

    Args:
        core: an idle engine.
        timer: the clock that the core reads.
        requests: seconds after the start, ascending, and the request.
        events: seconds after the start, and what to do then; between two steps.
        keep_scores: whether the outcome gets the scores.
    """
    begin = timer.now()
    # Times of the clock from here on: a difference of two may miss what it was made of by a bit.
    coming = deque((begin + when, when, message) for when, message in requests)
    happening = deque((begin + when, act) for when, act in sorted(events, key=lambda one: one[0]))
    due: dict[str, tuple[float, float]] = {}
    outcome = Outcome()
    while coming or happening or core.has_work:
        while happening and happening[0][0] <= timer.now():
            happening.popleft()[1]()
        while coming and coming[0][0] <= timer.now():
            at, when, message = coming.popleft()
            request = message.request()
            request.arrival = at
            due[request.request_id] = at, when
            try:
                core.add_request(request)
            except HelmError:
                outcome.failures += 1
        if core.has_work or core.has_background_work:
            for ended in core.step():
                outcome.take(ended, *due.pop(ended.request_id), timer.now(), keep_scores)
        if not core.has_work:
            next_due = [queue[0][0] for queue in (coming, happening) if queue]
            if core.has_background_work:
                next_due.append(timer.now() + _BACKGROUND_SECONDS)
            timer.wait_until(min(next_due, default=0.0))
    return outcome
