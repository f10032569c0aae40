"""Watches one engine for its controller: arrivals, ended requests, and the scheduler's totals.

Each request costs a constant; quantiles and the worth of pages are worked out only when a policy
is asked. Time is always an argument, so that all of it works in virtual time too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import sqrt

from block_manager.block_hash import NO_USER_TAG
from block_manager.page_value import PageValue
from helm_engine.controller.decayed_window import DecayedHistogram, DecayedWindow
from helm_engine.controller.observation import Observation
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


# Places in the window of means; plain numbers, since members of an enum are slow to look up.
_REQUESTS, _VIOLATIONS, _LATENCY_MS, _QUEUE_MS, _TOKENS, _HOT = range(6)
_PREFIX_QUERIES, _PREFIX_HITS, _ROW_QUERIES, _ROW_HITS = range(6, 10)
_NUM_SUMS = 10


class ObservationCollector:
    """Gathers what an `Observation` says; single-threaded, as the engine is."""

    def __init__(
        self, scheduler: Scheduler, slo_ms: float, now: float, windows: WindowConfig | None = None
    ) -> None:
        """Begins with nothing seen; `now` in seconds of the engine's clock."""
        self._windows = windows or WindowConfig()
        self._scheduler = scheduler
        self._slo_ms = slo_ms
        self._latencies = DecayedHistogram()
        self._means = DecayedWindow(self._windows.mean_s, _NUM_SUMS, now, self._latencies)
        self._arrivals = DecayedWindow(self._windows.arrivals_s, 1, now)
        self._long_arrivals = DecayedWindow(self._windows.long_arrivals_s, 1, now)
        self._last_visit: OrderedDict[int, float] = OrderedDict()
        self._last_ended = now
        self._totals = self._read_totals()

    def observe_arrival(self, at: float) -> None:
        """A request came, whatever becomes of it."""
        for window in (self._arrivals, self._long_arrivals):
            window.sums[0] += window.weight(at)

    def observe_ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests have ended; those that were withdrawn say nothing and do not count."""
        means = self._means
        weight = means.weight(now)
        for request in requests:
            if isinstance(request.error, RequestAbortedError):
                continue
            latency_ms = (now - request.arrival) * 1e3
            is_late = request.status is RequestStatus.FAILED or latency_ms > self._slo_ms
            began = now if request.first_scheduled is None else request.first_scheduled
            sums = means.sums
            sums[_REQUESTS] += weight
            sums[_VIOLATIONS] += weight * is_late
            sums[_LATENCY_MS] += weight * latency_ms
            sums[_QUEUE_MS] += weight * (began - request.arrival) * 1e3
            sums[_TOKENS] += weight * request.num_tokens
            sums[_HOT] += weight * self._is_hot(request.user_tag, request.arrival)
            self._latencies.add(latency_ms, weight)
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
        totals = self._read_totals()
        weight = self._means.weight(now)
        for place, (after, before) in enumerate(
            zip(totals, self._totals, strict=True), _PREFIX_QUERIES
        ):
            self._means.sums[place] += weight * (after - before)
        self._totals = totals

    def observe(self, now: float) -> Observation:
        """The engine as of now."""
        self.observe_steps(now)
        scheduler = self._scheduler
        boundary, emb = scheduler.boundary, scheduler.emb
        sums = self._means.read(now)
        requests = sums[_REQUESTS]
        missed = sums[_ROW_QUERIES] - sums[_ROW_HITS]
        seconds = self._means.seconds(now)
        rate, jump, sigmas = self._arrival_rate(now)
        watched = scheduler.page_values
        value = PageValue() if watched is None else watched.estimate(now)
        p50, p90, p95, p99 = map(self._latencies.quantile, (0.5, 0.9, 0.95, 0.99))
        return Observation(
            now=now,
            hot_user_share=_ratio(sums[_HOT], requests),
            kv_hit_rate=_ratio(sums[_PREFIX_HITS], sums[_PREFIX_QUERIES]),
            emb_hit_rate=_ratio(sums[_ROW_HITS], sums[_ROW_QUERIES]),
            mean_history_tokens=_ratio(sums[_TOKENS], requests),
            slo_violation_rate=_ratio(sums[_VIOLATIONS], requests),
            emb_fraction=boundary.committed,
            p50_over_slo=p50 / self._slo_ms,
            p90_over_slo=p90 / self._slo_ms,
            p95_over_slo=p95 / self._slo_ms,
            p99_over_slo=p99 / self._slo_ms,
            kv_page_gain_ms=value.kv.more,
            kv_page_loss_ms=value.kv.less,
            emb_page_gain_ms=value.emb.more,
            emb_page_loss_ms=value.emb.less,
            arrival_rate=rate,
            arrival_jump=jump,
            arrival_jump_sigmas=sigmas,
            foreground_bytes_per_s=_ratio(missed * scheduler.refills.row_bytes, seconds),
            queue_delay_ms=_ratio(sums[_QUEUE_MS], requests),
            refill_backlog=1.0 - emb.usage if emb.wants_refill else 0.0,
            target_lag=boundary.target - boundary.committed,
            age_s=now - self._last_ended,
            num_requests=requests,
            kv_samples=value.kv.num_samples,
            emb_samples=value.emb.num_samples,
            num_pages=scheduler.pool.num_pages,
            mean_latency_ms=_ratio(sums[_LATENCY_MS], requests),
            slo_ms=self._slo_ms,
        )

    def _arrival_rate(self, now: float) -> tuple[float, float, float]:
        """Rate of now, over the long one, and how unlikely that is.

        A faded sum of a Poisson process of rate r has the mean r w and the variance r w / 2: twice
        the sum behaves as a Poisson number n. The square root of n + 3/8 has the variance 1/4
        whatever n is (Anscombe, Biometrika 1948), so the figure means the same at every rate.
        """
        short, long = self._arrivals, self._long_arrivals
        rate = _ratio(short.read(now)[0], short.seconds(now))
        usual = _ratio(long.read(now)[0], long.seconds(now))
        seen, expected = (2.0 * short.window_s * one + 0.375 for one in (rate, usual))
        sigmas = 2.0 * (sqrt(seen) - sqrt(expected))
        return rate, _ratio(rate, usual) if usual else 1.0, sigmas


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0
