"""What a policy sees of an engine: one frozen record, and the same as a normalised vector."""

from __future__ import annotations

from math import isfinite

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import astuple

HALF_SAMPLES = 100.0
"""So many samples make a confidence of one half in the vector."""


# A struct is built in a tenth of the time of a frozen dataclass, and one is built for each query.
class Observation(msgspec.Struct, frozen=True, gc=False):
    """An engine as of one moment; what is a mean fades, see `WindowConfig`.

    The seven after the clock are the state of the HELM paper's controller (Yu, Han and Zhou, arXiv
    2605.04450), as far as it is known.
    """

    now: float = 0.0
    """Engine clock, seconds."""
    hot_user_share: float = 0.0
    """Of the ended requests, those whose user had come shortly before, 0..1."""
    kv_hit_rate: float = 0.0
    """Of the context tokens of admitted requests, those whose K and V were reused, 0..1."""
    emb_hit_rate: float = 0.0
    """Of the distinct rows of steps, those that were in the pool, 0..1."""
    mean_history_tokens: float = 0.0
    """Context tokens of an ended request."""
    slo_violation_rate: float = 0.0
    """Of the ended requests, those that failed or took longer than the service level, 0..1."""
    emb_fraction: float = 0.0
    """The committed split: EMB's share of the pages, 0..1."""
    p99_over_slo: float = 0.0
    """99th percentile of the latency, in service levels. A request that failed counts with the time
    it had waited."""

    kv_page_gain_ms: float = 0.0
    """Milliseconds per second that one KV page more would save; 0 without a cost profile."""
    kv_page_loss_ms: float = 0.0
    """What one KV page less would cost, likewise."""
    emb_page_gain_ms: float = 0.0
    emb_page_loss_ms: float = 0.0
    arrival_rate: float = 0.0
    """Requests that came per second, lately."""
    arrival_jump: float = 1.0
    """That rate over the one of a longer time; 1 = no jump."""
    arrival_jump_sigmas: float = 0.0
    """The same in standard deviations of a Poisson process of the longer time's rate."""
    foreground_bytes_per_s: float = 0.0
    """Bytes of rows that steps had to wait for, per second."""
    load_busy: float = 0.0
    """Share of the time that steps spent on loading and copying rows, 0..1."""
    prefill_busy: float = 0.0
    """The share that they spent on computing contexts."""
    score_busy: float = 0.0
    """And on scoring."""
    queue_delay_ms: float = 0.0
    """From arrival to the first step, mean of ended requests."""
    refill_backlog: float = 0.0
    """Share of EMB's slots that refill has yet to fill, 0..1."""
    target_lag: float = 0.0
    """Target less committed split: what has yet to move, -1..1."""

    age_s: float = 0.0
    """Seconds since the last request ended."""
    num_requests: float = 0.0
    """Ended requests behind the means, faded."""
    kv_samples: float = 0.0
    """Returning visits behind the worth of KV pages, faded."""
    emb_samples: float = 0.0
    """Row lookups behind the worth of EMB pages, faded."""

    num_pages: float = 1.0
    """Pages of the pool; makes the worth of a page comparable between pools."""
    p50_over_slo: float = 0.0
    """Other quantiles of the latency, likewise in service levels."""
    p90_over_slo: float = 0.0
    p95_over_slo: float = 0.0
    mean_latency_ms: float = 0.0
    """From arrival to end."""
    slo_ms: float = 1.0
    """The service level."""

    @property
    def is_finite(self) -> bool:
        """Whether every field is a number."""
        # One that is none makes the sum none.
        return isfinite(sum(astuple(self)))

    @property
    def p99_ms(self) -> float:
        """99th percentile of the latency."""
        return self.p99_over_slo * self.slo_ms

    def vector(self) -> npt.NDArray[np.float32]:
        """The fields in the order of `FEATURES`, float32 [len(FEATURES)], each within -1..1.

        Shares are as they are. A level is cut off at four service levels, a rate is the logarithm
        to base 2 of 1 + rate (over 16, of bytes over 40), a number of samples n is n / (n + 100).
        The worth of a page times the pages of the pool, in seconds per second, is squashed by
        x / (1 + x), so that neither the size of the pool nor that of a page matters. The balances
        compare what one tenant would gain with what the other would lose (`balance`).
        """
        # Here, since whoever only names a field or a policy does without numba.
        from helm_engine.controller.observation_features import features_of

        # All of one type: another mixture of integers would be compiled anew.
        features: npt.NDArray[np.float32] = features_of(tuple(map(float, astuple(self))))
        return features


FEATURES = (
    "hot_user_share",
    "kv_hit_rate",
    "emb_hit_rate",
    "log_history_tokens",
    "slo_violation_rate",
    "emb_fraction",
    "p99",
    "kv_page_gain",
    "kv_page_loss",
    "emb_page_gain",
    "emb_page_loss",
    "balance_to_kv",
    "balance_to_emb",
    "log_arrival_rate",
    "log_arrival_jump",
    "arrival_jump_sigmas",
    "log_foreground_bytes",
    "load_busy",
    "prefill_busy",
    "score_busy",
    "queue_delay",
    "refill_backlog",
    "target_lag",
    "age",
    "request_confidence",
    "kv_confidence",
    "emb_confidence",
)
"""What stands where in `Observation.vector`."""

WORTH_FEATURES = (
    "kv_page_gain",
    "kv_page_loss",
    "emb_page_gain",
    "emb_page_loss",
    "balance_to_kv",
    "balance_to_emb",
    "kv_confidence",
    "emb_confidence",
)
"""Those that are 0 in an engine that does not know the milliseconds of its device."""


def balance(gain: float, loss: float) -> float:
    """What one tenant gains against what the other loses: -1..1, 0 where both are nothing."""
    both = gain + loss
    return (gain - loss) / both if both > 0.0 else 0.0
