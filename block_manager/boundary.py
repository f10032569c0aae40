"""The movable boundary between both tenants: what is wanted, what is true, and the bounded way.

Giving is lazy: only pages that are free or hold nothing but reusable content change hands, and a
page in flight is waited for. So a move fails no request and never takes longer than its step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from block_manager.block_pool import BlockPool
from block_manager.embedding_tenant import ClassMove, EmbeddingTenant
from block_manager.page_pool import PageIds, PagePool, Tenant
from block_manager.pool_layout import PoolLayout

_NO_PAGES = np.empty(0, dtype=np.int64)

MOST_STEPS = 64
"""Steps with nothing in the way that a move across the whole pool takes at most, by default."""


def default_pages_per_step(num_pages: int) -> int:
    """Pages that may change hands between two steps, unless an operator says otherwise."""
    return -(-num_pages // MOST_STEPS)


@dataclass(frozen=True, slots=True)
class PageMove:
    """What changed hands between two steps, and the copies to be made before anything else."""

    page_ids: PageIds = field(default_factory=lambda: _NO_PAGES)
    """int64 [n]."""
    to: Tenant = Tenant.KV
    rows: tuple[ClassMove, ...] = ()
    """In this order."""

    def __len__(self) -> int:
        """Pages."""
        return len(self.page_ids)


_NOTHING = PageMove()


class Boundary:
    """Moves pages between the tenants of one pool, a bounded number at a time."""

    def __init__(
        self,
        pool: PagePool,
        kv: BlockPool,
        emb: EmbeddingTenant,
        layout: PoolLayout,
        max_pages_per_step: int | None = None,
    ) -> None:
        """The split that the pool has is the one that is wanted.

        Raises:
            ValueError: `max_pages_per_step` is below 1.
        """
        if max_pages_per_step is None:
            max_pages_per_step = default_pages_per_step(pool.num_pages)
        if max_pages_per_step < 1:
            raise ValueError(f"max_pages_per_step: must be at least 1, not {max_pages_per_step}")
        self.max_pages_per_step = max_pages_per_step
        self._pool = pool
        self._kv = kv
        self._emb = emb
        self._layout = layout
        self._target = pool.committed
        self._target_pages = pool.num_emb_pages
        self.num_moved_pages = 0
        """Since the start, in both directions."""
        self.num_moved_rows = 0
        """Rows that were copied to another slot because their page left."""

    @property
    def target(self) -> float:
        """The EMB share of the pages that was asked for, 0..1; floors may forbid to reach it."""
        return self._target

    @property
    def committed(self) -> float:
        """The EMB share of the pages, as it is now."""
        return self._pool.committed

    @property
    def reachable(self) -> float:
        """The share that floors leave of the target, 0..1: what `committed` ends at."""
        return self._target_pages / self._pool.num_pages

    @property
    def lag_pages(self) -> int:
        """Pages that EMB has yet to get; below 0: to give."""
        return self._target_pages - self._pool.num_emb_pages

    def set_target(self, emb_fraction: float) -> float:
        """Asks for a split; pages follow step by step.

        Args:
            emb_fraction: the EMB share of the pages.

        Returns:
            The share that will be reached: KV keeps the blocks of one longest history.

        Raises:
            ValueError: not within 0..1.
        """
        if not 0.0 <= emb_fraction <= 1.0:
            raise ValueError(f"emb_fraction: must be within 0..1, not {emb_fraction}")
        self._target = emb_fraction
        self._target_pages = self._layout.emb_pages_of(emb_fraction)
        return self.reachable

    def step(self) -> PageMove:
        """Moves what can be moved now, `max_pages_per_step` pages at most; between two steps.

        Raises:
            IntegrityError: a step's row plan is open.
        """
        self._emb.observe_step()
        lag = self.lag_pages
        if not lag:
            return self._at_rest()
        limit = min(abs(lag), self.max_pages_per_step)
        rows: list[ClassMove] = []
        if lag > 0:
            page_ids, to = self._kv.shrink(limit), Tenant.EMB
            if len(page_ids):
                self._emb.grow(page_ids)
        else:
            (page_ids, rows), to = self._emb.shrink(limit), Tenant.KV
            self._kv.grow(page_ids)
        self._pool.hand_over(page_ids, to)
        self.num_moved_pages += len(page_ids)
        self.num_moved_rows += sum(len(move.rows) for move in rows)
        return PageMove(page_ids, to, tuple(rows))

    def _at_rest(self) -> PageMove:
        """Pages change hands between the classes of EMB only."""
        rows = self._emb.rebalance(self.max_pages_per_step)
        self.num_moved_rows += sum(len(move.rows) for move in rows)
        return PageMove(rows=tuple(rows)) if rows else _NOTHING
