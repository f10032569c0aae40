"""Watches one engine for its controller: arrivals, ended requests, and the scheduler's totals.

Each request costs a constant; quantiles are worked out only when a policy is asked, and the worth
of pages is what the last steps left. Time is always an argument, so that all of it works in virtual
time too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from block_manager.block_hash import NO_USER_TAG
from block_manager.page_value import PageValue
from helm_engine.controller.observation import Observation
from helm_engine.controller.observation_sums import (
    add_arrival,
    add_ended,
    observation_sums,
    observe,
)
from helm_engine.exceptions import RequestAbortedError
from helm_engine.request import Request, RequestStatus
from helm_engine.scheduler import Scheduler, SchedulerStats


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """Seconds after which something counts 1 / e, and what bounds the memory."""

    mean_s: float = 2.5
    """Latencies, hit rates and all other means: a burst is on its way in as many seconds."""
    arrivals_s: float = 2.0
    """The arrival rate of now."""
    long_arrivals_s: float = 30.0
    """The one that it is compared with."""
    hot_s: float = 60.0
    """A user who came before within this long is hot; a plain limit."""
    max_users: int = 1 << 16
    """Users who are remembered; of more, those who came last."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: a value is not above 0; names it.
        """
        for name, value in zip(self.__dataclass_fields__, astuple(self), strict=True):
            if not value > 0:
                raise ValueError(f"{name}: must be above 0, not {value}")


_NOTHING_KNOWN = PageValue()


def _totals_of(stats: SchedulerStats) -> tuple[float, ...]:
    """In the order of `observation_sums`, and of one type: a kernel is made for each mixture."""
    return (
        float(stats.prefix_queries),
        float(stats.prefix_hits),
        float(stats.row_queries),
        float(stats.row_hits),
        stats.load_ms,
        stats.prefill_ms,
        stats.score_ms,
    )


class ObservationCollector:
    """Gathers what an `Observation` says; single-threaded, as the engine is."""

    def __init__(
        self, scheduler: Scheduler, slo_ms: float, now: float, windows: WindowConfig | None = None
    ) -> None:
        """Begins with nothing seen; `now` in seconds of the engine's clock."""
        self._windows = one = windows or WindowConfig()
        self._scheduler = scheduler
        self._stats = stats = scheduler.stats
        self._boundary, self._emb = scheduler.boundary, scheduler.emb
        self._sums = observation_sums(
            slo_ms,
            scheduler.refills.row_bytes,
            scheduler.pool.num_pages,
            _totals_of(stats),
            (one.mean_s, one.arrivals_s, one.long_arrivals_s),
            now,
        )
        self._last_visit: OrderedDict[int, float] = OrderedDict()

    def observe_arrival(self, at: float) -> None:
        """A request came, whatever becomes of it."""
        add_arrival(self._sums, at)

    def observe_ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests have ended; those that were withdrawn say nothing and do not count."""
        for request in requests:
            if isinstance(request.error, RequestAbortedError):
                continue
            arrival, began = request.arrival, request.first_scheduled
            add_ended(
                self._sums,
                now,
                arrival,
                now if began is None else began,
                len(request.tokens.rows),
                request.status is RequestStatus.FAILED,
                self._is_hot(request.user_tag, arrival),
            )

    def _is_hot(self, user_tag: int, at: float) -> bool:
        """Whether a user came before, not long ago; remembers that they came now."""
        if user_tag == NO_USER_TAG:
            return False
        before = self._last_visit.pop(user_tag, None)
        self._last_visit[user_tag] = at
        if len(self._last_visit) > self._windows.max_users:
            self._last_visit.popitem(last=False)
        return before is not None and at - before <= self._windows.hot_s

    def observe(self, now: float) -> Observation:
        """The engine as of now; the worth of pages as the last steps left it."""
        stats, boundary, emb = self._stats, self._boundary, self._emb
        watched = self._scheduler.page_values
        kv_worth, emb_worth = _NOTHING_KNOWN if watched is None else watched.latest
        return Observation(
            *observe(
                self._sums,
                now,
                _totals_of(stats),
                boundary.committed,
                boundary.target,
                1.0 - emb.usage if emb.wants_refill else 0.0,
                *kv_worth,
                *emb_worth,
            )
        )
