"""What the link to the host tier carries: bytes by class, and how much of it refill may take.

Three classes share one link, in this order: a demand miss, which a running request waits for; KV
onboarding; refill, which nobody waits for. Refill gets what the others leave:
`min(cap, link - foreground - margin)` bytes a second, and nothing while demand misses come in
faster than a mark. Time is always an argument, so that all of it works in virtual time too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum


class TrafficClass(IntEnum):
    """Why bytes come from the host; what is smaller goes first."""

    DEMAND_MISS = 0
    KV_ONBOARDING = 1
    REFILL = 2


class HostTraffic:
    """Bytes and failures by class since the engine started."""

    def __init__(self) -> None:
        self._bytes = [0] * len(TrafficClass)
        self._failures = [0] * len(TrafficClass)

    def count(self, traffic: TrafficClass, num_bytes: int) -> None:
        """Counts bytes that came."""
        self._bytes[traffic] += num_bytes

    def count_failure(self, traffic: TrafficClass) -> None:
        """Counts a read whose rows could not be had."""
        self._failures[traffic] += 1

    def num_bytes(self, traffic: TrafficClass) -> int:
        """Bytes of a class."""
        return self._bytes[traffic]

    def num_failures(self, traffic: TrafficClass) -> int:
        """Failed reads of a class."""
        return self._failures[traffic]


@dataclass(frozen=True, slots=True)
class RefillConfig:
    """How much of the link refill may take; all in bytes, and bytes a second."""

    cap_bytes_per_s: float = float(64 << 20)
    """Refill takes no more, however idle the link is: half of what 1 Gbit/s carries."""
    link_bytes_per_s: float = math.inf
    """What the link carries; infinite = unknown, the cap alone decides."""
    margin_bytes_per_s: float = 0.0
    """Left free besides what the foreground takes, for what it will take next."""
    mark_bytes_per_s: float = math.inf
    """Refill rests while demand misses bring in more than this."""
    burst_bytes: int = 256 << 10
    """What is read in one go: the most that may be saved up, and that a demand miss waits for."""
    decay_s: float = 0.25
    """Time constant of the estimates: a burst of misses is forgotten to 1/e after this long."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        if not 0.0 <= self.cap_bytes_per_s < math.inf:
            raise ValueError(
                f"cap_bytes_per_s: must be at least 0 and finite, not {self.cap_bytes_per_s}"
            )
        for name in ("link_bytes_per_s", "decay_s"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: must be above 0, not {getattr(self, name)}")
        if not 0.0 <= self.margin_bytes_per_s < math.inf:
            raise ValueError(
                f"margin_bytes_per_s: must be at least 0 and finite, not {self.margin_bytes_per_s}"
            )
        if not self.mark_bytes_per_s >= 0.0:
            raise ValueError(f"mark_bytes_per_s: must be at least 0, not {self.mark_bytes_per_s}")
        if self.burst_bytes < 1:
            raise ValueError(f"burst_bytes: must be at least 1, not {self.burst_bytes}")


class RefillThrottle:
    """A token bucket whose rate is what the foreground leaves of the link.

    The foreground is estimated by an exponentially weighted average: after n bytes the estimate
    rises by n / decay, and it falls by exp(-t / decay) in t seconds. Between two events the rate
    is therefore a known function of time, and tokens are its exact integral: how often the
    throttle is asked does not matter.
    """

    def __init__(self, config: RefillConfig | None = None, now: float = 0.0) -> None:
        """Starts with an empty bucket and no foreground; `now` in seconds."""
        self._config = config or RefillConfig()
        self._now = now
        self._tokens = 0.0
        self._demand = 0.0
        self._onboarding = 0.0

    @property
    def is_open(self) -> bool:
        """Whether refill may ever load anything."""
        return self._config.cap_bytes_per_s > 0.0

    @property
    def burst_bytes(self) -> int:
        """The most that `available` ever says, but for debts that it has to work off."""
        return self._config.burst_bytes

    def count_foreground(self, traffic: TrafficClass, num_bytes: int, now: float) -> None:
        """Takes note of bytes that a request waited for.

        Raises:
            ValueError: the class is `REFILL`.
        """
        self._advance(now)
        if traffic is TrafficClass.DEMAND_MISS:
            self._demand += num_bytes / self._config.decay_s
        elif traffic is TrafficClass.KV_ONBOARDING:
            self._onboarding += num_bytes / self._config.decay_s
        else:
            raise ValueError("traffic: refill is no foreground")

    def foreground(self, now: float) -> float:
        """Estimated bytes a second of demand misses and KV onboarding together."""
        self._advance(now)
        return self._demand + self._onboarding

    def rate(self, now: float) -> float:
        """Bytes a second that refill gains at this moment."""
        self._advance(now)
        config = self._config
        if self._demand > config.mark_bytes_per_s:
            return 0.0
        left = config.link_bytes_per_s - config.margin_bytes_per_s - self.foreground(now)
        return max(0.0, min(config.cap_bytes_per_s, left))

    def available(self, now: float) -> int:
        """Bytes that refill may ask for now; one chunk at most.

        None while demand misses are above the mark, whatever has been saved up before.
        """
        self._advance(now)
        if self._demand > self._config.mark_bytes_per_s:
            return 0
        return max(0, int(self._tokens))

    def spend(self, num_bytes: int, now: float) -> None:
        """Takes bytes that refill asked for; what exceeds the allowance is a debt."""
        self._advance(now)
        self._tokens -= num_bytes

    def _advance(self, now: float) -> None:
        """Moves time forward; a clock that goes back stands still."""
        elapsed = now - self._now
        if elapsed <= 0.0:
            return
        gained = self._gain(elapsed)
        self._tokens = min(float(self._config.burst_bytes), self._tokens + gained)
        decayed = math.exp(-elapsed / self._config.decay_s)
        self._demand *= decayed
        self._onboarding *= decayed
        self._now = now

    def _gain(self, elapsed: float) -> float:
        """Tokens of the next `elapsed` seconds: the integral of the rate, without foreground.

        The rate is zero until `begins`, then rises as the foreground decays, until the cap holds.
        """
        config = self._config
        free = config.link_bytes_per_s - config.margin_bytes_per_s
        busy = self._demand + self._onboarding
        rests = self._falls_to(self._demand, config.mark_bytes_per_s)
        begins = min(elapsed, max(rests, self._falls_to(busy, free)))
        capped = min(elapsed, max(begins, self._falls_to(busy, free - config.cap_bytes_per_s)))
        gain = config.cap_bytes_per_s * (elapsed - capped)
        if capped > begins:
            decay = config.decay_s
            used = busy * decay * (math.exp(-begins / decay) - math.exp(-capped / decay))
            gain += free * (capped - begins) - used
        return max(0.0, gain)

    def _falls_to(self, estimate: float, level: float) -> float:
        """Seconds until a decaying estimate is at or below a level; infinite = never."""
        if estimate <= level:
            return 0.0
        if level <= 0.0:
            return math.inf
        return self._config.decay_s * math.log(estimate / level)
