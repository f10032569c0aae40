"""Requests that come at given times to an engine core in this process, in real or virtual time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from heapq import merge
from math import inf
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


class OpenLoop:
    """An engine core that lives on while things come to it from outside, at times of the clock."""

    def __init__(self, core: EngineCore, timer: Timer, audience: Audience) -> None:
        """Takes an idle engine, the clock that it reads, and who is told how requests end."""
        self.core = core
        self._timer = timer
        self._audience = audience
        self._wakes: float | None = None
        """At rest until then, or until something comes; None = it is about to look for work."""

    @property
    def next_at(self) -> float:
        """When it does something next, if nothing comes before; infinite = never."""
        return self._timer.now() if self._wakes is None else self._wakes

    def proceed(self) -> None:
        """The next thing that it does by itself, at `next_at`: a step, if there is work."""
        if self._wakes is not None:
            self._wake_up(self._wakes)
        self._go_on()

    def come_to(self, when: float) -> None:
        """Everything until something comes from outside, which ends a rest.

        A step that began before ends first, so the clock may show a later time then.
        """
        while self._timer.now() < when:
            if self._wakes is None:
                self._go_on()
            else:
                self._wake_up(min(self._wakes, when))
        if self._wakes is not None:
            self._wake_up(when)

    def add(self, request: Request, due: float) -> None:
        """A request that came then, at the latest now; see `come_to`."""
        request.arrival = due
        try:
            self.core.add_request(request)
        except HelmError as error:
            self._audience.refused(request, error)

    def finish(self, drain: bool = False) -> None:
        """Everything until all requests have ended; with `drain`, until all moves and refills have.

        Nothing may come any more.
        """
        while self.core.has_work or (drain and self.core.has_background_work):
            if self._wakes is None:
                self._go_on()
            else:
                self._wake_up(min(self._wakes, self._timer.now() + _BACKGROUND_SECONDS))
        if self._wakes is not None:
            self._wake_up(self._timer.now())

    def _go_on(self) -> None:
        """A step, if there is anything to do; a rest, if nothing is left."""
        core, timer = self.core, self._timer
        if core.has_work or core.has_background_work:
            for ended in core.step():
                self._audience.ended(ended, timer.now())
        if not core.has_work:
            rest_s = inf if core.control is None else _HEARTBEAT_SECONDS
            if core.has_background_work:
                rest_s = _BACKGROUND_SECONDS
            self._wakes = timer.now() + rest_s

    def _wake_up(self, when: float) -> None:
        self._timer.wait_until(when)
        self._wakes = None
        self.core.control_boundary()


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
    # Times of the clock from here on: a difference of two may miss what it was made of by a bit.
    begin, loop = timer.now(), OpenLoop(core, timer, audience)
    happening = ((when, act, None) for when, act in sorted(events, key=lambda one: one[0]))
    coming = ((when, None, made) for when, made in requests)
    for when, act, made in merge(happening, coming, key=lambda one: one[0]):
        due = begin + when
        loop.come_to(due)
        if act is not None:
            act()
        elif made is not None:
            loop.add(made(), due)
    loop.finish(drain)
