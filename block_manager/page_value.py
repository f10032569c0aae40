"""What one page more, or one less, would save each tenant: milliseconds per second.

The tenants are coupled: a history that is reused needs no rows, so what KV saves includes the rows
that EMB does not hold, and what EMB saves is counted on the rows that the steps look up with KV as
it is. Everything runs on the scheduler's thread, so a hashed share of users and rows is looked at,
and memory is bounded by the pool and the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from block_manager.block_hash import BlockHash
from block_manager.decayed_seconds import DecayedSeconds
from block_manager.miniature_cache import MiniatureCaches
from block_manager.reuse_distance import KVReuseCurve, PageCosts
from block_manager.spatial_sampling import SpatialSample

_STEPS_PER_TENANT = 8
"""One page is told from the next by the mean over a step of an eighth of the tenant's pages."""
_STEPS_PER_POOL = 128
"""A tenant of few pages takes larger steps."""
_LEAST_MOVES_PER_STEP = 4
"""Moves by less than a quarter of a step are not followed by the miniatures."""


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How much is looked at, and for how long it counts."""

    user_share: float = 1.0
    """Of the users, for the KV tenant: a visit costs little, and few users come at the boundary."""
    row_share: float = 0.03125
    """Of the rows, for the EMB tenant."""
    window_s: float = 60.0
    """Seconds after which an observation counts 1 / e. A move of the boundary needs none of it
    for KV; it makes EMB forget by itself."""
    seed: int = 0


class TenantValue(NamedTuple):
    """Milliseconds saved per second."""

    more: float = 0.0
    """By one page more."""
    less: float = 0.0
    """By the page that one less would take away."""
    num_samples: float = 0.0
    """Observations behind it, decayed: returning visits at the boundary, or row lookups."""


class PageValue(NamedTuple):
    """What a page is worth to each tenant."""

    kv: TenantValue = TenantValue()
    emb: TenantValue = TenantValue()


class PageValueEstimator:
    """Watches admitted requests and steps of one engine."""

    def __init__(
        self,
        num_pages: int,
        rows_per_page: int,
        block_tokens: int,
        num_rows: int,
        costs: PageCosts,
        config: SamplingConfig,
    ) -> None:
        """Takes the geometry of the pool, the table's rows and the costs of what is spared.

        Raises:
            ValueError: a share or the window is out of range.
        """
        self._num_pages = num_pages
        self._page_ms = rows_per_page * costs.row_miss_ms
        users = SpatialSample(config.user_share, config.seed)
        rows = SpatialSample(config.row_share, config.seed)
        most_pages = num_pages + self._step(num_pages)
        self._kv = KVReuseCurve(most_pages, block_tokens, num_rows, costs, users)
        self._emb = MiniatureCaches(most_pages, rows_per_page, num_rows, rows)
        self._kv_time = DecayedSeconds(config.window_s)
        self._emb_time = DecayedSeconds(config.window_s)
        self._emb_pages = 0
        self._priced_at = 0
        """KV pages when `latest` was worked out."""
        self.latest = PageValue()
        """At the split of the last step, and then not older than a 64th of the window."""

    def set_capacity(self, kv_pages: int, emb_pages: int) -> None:
        """Takes the pages that each tenant has now; KV's with the null block.

        The miniatures of EMB follow once it has moved by a part of a step: they need no less.
        """
        self._kv.num_pages = kv_pages
        if emb_pages == self._emb_pages:
            return
        step = self._step(emb_pages)
        if abs(emb_pages - self._emb_pages) * _LEAST_MOVES_PER_STEP >= step:
            self._emb_pages = emb_pages
            self._emb_time.forget(self._emb.resize(emb_pages, step))

    def _step(self, pages: int) -> int:
        """Pages of one step at this size of a tenant."""
        return max(1, pages // _STEPS_PER_TENANT, self._num_pages // _STEPS_PER_POOL)

    def observe_request(
        self,
        user_tag: int,
        hashes: Sequence[BlockHash],
        rows: npt.NDArray[np.int64],
        candidate_rows: npt.NDArray[np.int64],
        slot_of_row: npt.NDArray[np.int32],
        num_running: int,
        max_cached_tokens: int,
    ) -> None:
        """Takes a request that is admitted now; see `KVReuseCurve.observe`."""
        self._kv.observe(
            user_tag, hashes, rows, candidate_rows, slot_of_row, num_running, max_cached_tokens
        )

    def observe_step(
        self, row_ids: npt.NDArray[np.int64], times: npt.NDArray[np.int64], now: float
    ) -> None:
        """Takes the distinct rows of a step (int64 [n]), and how often it uses each."""
        self._emb.observe(row_ids, times)
        pages = self._kv.num_pages
        if self._fade(now) or pages != self._priced_at:
            self.latest, self._priced_at = self._value(now), pages

    def _fade(self, now: float) -> bool:
        """Whether so much time has passed that sums were to fade."""
        factor = self._kv_time.advance(now)
        if factor is None:
            return False
        self._emb_time.advance(now)  # They tick together.
        self._kv.fade(factor)
        self._emb.fade(factor)
        return True

    def estimate(self, now: float) -> PageValue:
        """What one page more or less is worth at the present split.

        KV's curve holds for every split, so it follows the boundary at once.
        """
        self._fade(now)
        return self._value(now)

    def _value(self, now: float) -> PageValue:
        saved = self._kv.around(self._step(self._kv.num_pages))
        gains = self._emb.gains()
        # What a sum is multiplied by to be a rate.
        kv = self._kv_time.rate(1.0, now)
        emb = self._emb_time.rate(self._page_ms, now)
        return PageValue(
            TenantValue(saved.more * kv, saved.less * kv, saved.num_samples),
            TenantValue(gains.more * emb, gains.less * emb, self._emb.num_samples),
        )
