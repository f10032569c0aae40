"""Requests that come at given times to an engine core in this process, in real or virtual time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from helm_engine.clock import VirtualClock
from helm_engine.engine_core import EngineCore
from helm_engine.exceptions import HelmError
from helm_engine.request import Request

_BACKGROUND_SECONDS = 0.001
"""As in the core's own process: without requests, pages and rows move in steps this far apart."""

_HEARTBEAT_SECONDS = 0.2
"""As there: at rest a controller is asked this often."""


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


class Audience(Protocol):
    """Who is told what became of requests."""

    def ended(self, request: Request, now: float) -> None:
        """A request has finished or failed."""
        ...

    def refused(self, request: Request, error: HelmError) -> None:
        """The engine did not take a request."""
        ...


def offer(
    core: EngineCore,
    timer: Timer,
    requests: Iterable[tuple[float, Callable[[], Request]]],
    audience: Audience,
    events: Sequence[tuple[float, Callable[[], object]]] = (),
    drain: bool = False,
) -> None:
    """Runs requests open-loop: each is added when it is due, whatever the engine is doing.

    Args:
        core: an idle engine.
        timer: the clock that the core reads.
        requests: seconds after the start, ascending, and what makes the request then; its arrival
            is set to when it is due.
        audience: is told what becomes of them.
        events: seconds after the start, and what to do then; between two steps.
        drain: whether moves and refills are waited for too.
    """
    begin = timer.now()
    # Times of the clock from here on: a difference of two may miss what it was made of by a bit.
    coming = iter(requests)
    due = next(coming, None)
    happening = deque((begin + when, act) for when, act in sorted(events, key=lambda one: one[0]))
    while due is not None or happening or core.has_work or (drain and core.has_background_work):
        while happening and happening[0][0] <= timer.now():
            happening.popleft()[1]()
        while due is not None and begin + due[0] <= timer.now():
            request = due[1]()
            request.arrival = begin + due[0]
            try:
                core.add_request(request)
            except HelmError as error:
                audience.refused(request, error)
            due = next(coming, None)
        if core.has_work or core.has_background_work:
            for ended in core.step():
                audience.ended(ended, timer.now())
        if not core.has_work:
            wake = [] if due is None else [begin + due[0]]
            if happening:
                wake.append(happening[0][0])
            if core.has_background_work:
                wake.append(timer.now() + _BACKGROUND_SECONDS)
            if core.control is not None and wake:
                wake.append(timer.now() + _HEARTBEAT_SECONDS)
            timer.wait_until(min(wake, default=0.0))
            core.control_boundary()
