"""When to refill: after EMB has grown, as much as the host link has left, and not while it shrinks.

New pages are filled by demand misses too; the refill brings the hottest absent rows earlier, in the
background, so that no request waits for them.
"""

from __future__ import annotations

from block_manager.boundary import Boundary
from block_manager.embedding_cache import EmbeddingCache
from block_manager.refill import RefillThrottle, TrafficClass
from block_manager.row_plan import RefillPlan

_LEAST_ROWS = 32
"""Fewer are not worth a round trip; they are saved up for."""
_RETRY_SECONDS = 1.0
"""After a host tier failed, the next refill waits so long; requests find out for themselves."""


class RefillPlanner:
    """Plans one refill at a time."""

    def __init__(
        self, emb: EmbeddingCache, boundary: Boundary, throttle: RefillThrottle, row_bytes: int
    ) -> None:
        """`row_bytes` are those of one row on the host link."""
        self.throttle = throttle
        self._emb = emb
        self._boundary = boundary
        self.row_bytes = row_bytes
        self._not_before = 0.0
        self.is_suspended = False
        """Set from outside while nothing is to be loaded; what is under way comes to its end."""

    def is_wanted(self, now: float) -> bool:
        """Whether there may be rows to load and nothing but the link stands against it."""
        return (
            not self.is_suspended
            and self._emb.wants_refill
            and self._boundary.lag_pages >= 0
            and now >= self._not_before
            and self.throttle.is_open
        )

    def count_demand(self, num_rows: int, now: float) -> None:
        """A step waits for so many rows: they have the link first."""
        if num_rows:
            num_bytes = num_rows * self.row_bytes
            self.throttle.count_foreground(TrafficClass.DEMAND_MISS, num_bytes, now)

    def plan(self, now: float) -> RefillPlan | None:
        """The next refill, or None when there is nothing to load, no room for it, or no right."""
        if not self.is_wanted(now):
            return None
        rows = self.throttle.available(now) // self.row_bytes
        if rows < _LEAST_ROWS and rows < self.throttle.chunk_bytes // self.row_bytes:
            return None
        refill = self._emb.plan_refill(rows)
        if refill is not None:
            self.throttle.spend(len(refill) * self.row_bytes, now)
        return refill

    def settle(self, refilled: RefillPlan | None, failed: RefillPlan | None, now: float) -> None:
        """Takes over what became of the refill that was under way."""
        if refilled is not None:
            self._emb.commit_refill(refilled)
        if failed is not None:
            self._emb.abandon_refill(failed)
            self._not_before = now + _RETRY_SECONDS
