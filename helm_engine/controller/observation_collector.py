"""Watches one engine for its controller: arrivals, ended requests, and the scheduler's totals.

Each request costs a constant; quantiles and the worth of pages are worked out only when a policy
is asked. Time is always an argument, so that all of it works in virtual time too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from block_manager.block_hash import NO_USER_TAG
from block_manager.page_value import PageValue
from helm_engine.controller.decayed_window import decayed_window
from helm_engine.controller.observation import Observation
from helm_engine.controller.observation_sums import (
    NUM_MEANS,
    add_arrival,
    add_ended,
    add_steps,
    read_sums,
)
from helm_engine.exceptions import RequestAbortedError
from helm_engine.request import Request, RequestStatus
from helm_engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """Seconds after which something counts 1 / e, and what bounds the memory."""

    mean_s: float = 5.0
    """Latencies, hit rates and all other means; the paper's controller is asked as often."""
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


class ObservationCollector:
    """Gathers what an `Observation` says; single-threaded, as the engine is."""

    def __init__(
        self, scheduler: Scheduler, slo_ms: float, now: float, windows: WindowConfig | None = None
    ) -> None:
        """Begins with nothing seen; `now` in seconds of the engine's clock."""
        self._windows = windows or WindowConfig()
        self._scheduler = scheduler
        self._slo_ms = slo_ms
        self._means = decayed_window(self._windows.mean_s, NUM_MEANS, now)
        self._arrivals = decayed_window(self._windows.arrivals_s, 1, now)
        self._long_arrivals = decayed_window(self._windows.long_arrivals_s, 1, now)
        self._last_visit: OrderedDict[int, float] = OrderedDict()
        self._last_ended = now
        self._totals = self._read_totals()

    def observe_arrival(self, at: float) -> None:
        """A request came, whatever becomes of it."""
        add_arrival(self._arrivals, self._long_arrivals, at)

    def observe_ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests have ended; those that were withdrawn say nothing and do not count."""
        for request in requests:
            if isinstance(request.error, RequestAbortedError):
                continue
            arrival, began = request.arrival, request.first_scheduled
            latency_ms = (now - arrival) * 1e3
            add_ended(
                self._means,
                now,
                latency_ms,
                latency_ms if began is None else (began - arrival) * 1e3,
                request.num_tokens,
                request.status is RequestStatus.FAILED or latency_ms > self._slo_ms,
                self._is_hot(request.user_tag, arrival),
            )
            self._last_ended = now

    def _is_hot(self, user_tag: int, at: float) -> bool:
        """Whether a user came before, not long ago; remembers that they came now."""
        if user_tag == NO_USER_TAG:
            return False
        before = self._last_visit.pop(user_tag, None)
        self._last_visit[user_tag] = at
        if len(self._last_visit) > self._windows.max_users:
            self._last_visit.popitem(last=False)
        return before is not None and at - before <= self._windows.hot_s

    def _read_totals(self) -> tuple[int, int, int, int]:
        stats = self._scheduler.stats
        return stats.prefix_queries, stats.prefix_hits, stats.row_queries, stats.row_hits

    def observe_steps(self, now: float) -> None:
        """Takes over what the scheduler has counted since the last call."""
        before, self._totals = self._totals, self._read_totals()
        add_steps(self._means, now, before, self._totals)

    def observe(self, now: float) -> Observation:
        """The engine as of now."""
        self.observe_steps(now)
        scheduler = self._scheduler
        boundary, emb, watched = scheduler.boundary, scheduler.emb, scheduler.page_values
        committed = boundary.committed
        kv_worth, emb_worth = _NOTHING_KNOWN if watched is None else watched.estimate(now)
        (
            hot_user_share,
            kv_hit_rate,
            emb_hit_rate,
            mean_history_tokens,
            slo_violation_rate,
            p99_over_slo,
            arrival_rate,
            arrival_jump,
            arrival_jump_sigmas,
            missed_rows_per_s,
            queue_delay_ms,
            num_requests,
            p50_over_slo,
            p90_over_slo,
            p95_over_slo,
            mean_latency_ms,
        ) = read_sums(self._means, self._arrivals, self._long_arrivals, now, self._slo_ms)
        return Observation(
            now=now,
            hot_user_share=hot_user_share,
            kv_hit_rate=kv_hit_rate,
            emb_hit_rate=emb_hit_rate,
            mean_history_tokens=mean_history_tokens,
            slo_violation_rate=slo_violation_rate,
            emb_fraction=committed,
            p99_over_slo=p99_over_slo,
            kv_page_gain_ms=kv_worth.more,
            kv_page_loss_ms=kv_worth.less,
            emb_page_gain_ms=emb_worth.more,
            emb_page_loss_ms=emb_worth.less,
            arrival_rate=arrival_rate,
            arrival_jump=arrival_jump,
            arrival_jump_sigmas=arrival_jump_sigmas,
            foreground_bytes_per_s=missed_rows_per_s * scheduler.refills.row_bytes,
            queue_delay_ms=queue_delay_ms,
            refill_backlog=1.0 - emb.usage if emb.wants_refill else 0.0,
            target_lag=boundary.target - committed,
            age_s=now - self._last_ended,
            num_requests=num_requests,
            kv_samples=kv_worth.num_samples,
            emb_samples=emb_worth.num_samples,
            num_pages=scheduler.pool.num_pages,
            p50_over_slo=p50_over_slo,
            p90_over_slo=p90_over_slo,
            p95_over_slo=p95_over_slo,
            mean_latency_ms=mean_latency_ms,
            slo_ms=self._slo_ms,
        )
