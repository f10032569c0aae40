"""What an operator decides about the allocation controller."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

SHORTEST_PERIOD_S = 0.25
LONGEST_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Who moves the boundary, how often it is asked, and within which bounds."""

    name: str | None = None
    """As `make_controller` knows it; None = the split stays where it is put."""
    period_s: float = 0.5
    """Seconds from one query of the policy to the next, 0.25 to 5."""
    slo_ms: float = 80.0
    """A request that takes longer violates the service level; the default is what MLPerf's DLRMv3
    grants to ranking 2,048 candidates."""
    slew_per_s: float = 0.3
    """Share of the pool by which the target may change in a second, the same for every adaptive
    controller."""
    least_share: float = 0.1
    """EMB's share of the pages goes no lower."""
    largest_share: float = 0.9
    """Nor higher."""
    decision_log: Path | None = None
    """File that gets a line of JSON for each query of the policy."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        if not SHORTEST_PERIOD_S <= self.period_s <= LONGEST_PERIOD_S:
            raise ValueError(
                f"control_period: must be within {SHORTEST_PERIOD_S:g}..{LONGEST_PERIOD_S:g} "
                f"seconds, not {self.period_s}"
            )
        if not 0.0 < self.slo_ms < inf:
            raise ValueError(f"slo_ms: must be above 0 and finite, not {self.slo_ms}")
        if not 0.0 < self.slew_per_s < inf:
            raise ValueError(f"slew_per_s: must be above 0 and finite, not {self.slew_per_s}")
        if not 0.0 <= self.least_share <= self.largest_share <= 1.0:
            raise ValueError(
                "least_share: must be within 0..largest_share and that within 0..1, not "
                f"{self.least_share} and {self.largest_share}"
            )
