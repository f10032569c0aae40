"""Which tenant owns which page of the pool."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from block_manager.exceptions import IntegrityError
from block_manager.pool_layout import PoolLayout

PageIds = npt.NDArray[np.int64]


class Tenant(IntEnum):
    """The two owners a page can have."""

    KV = 0
    EMB = 1


class PageHolder(Protocol):
    """A tenant as the pool's self-check sees it."""

    def page_ids(self) -> PageIds:
        """Pages the tenant believes it owns, int64, ascending."""
        ...

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if the tenant's own books contradict each other."""
        ...


class PagePool:
    """Pages and owners. Page 0 is KV's for good: it is the null block."""

    def __init__(self, layout: PoolLayout) -> None:
        self._owner = np.full(layout.num_pages, Tenant.KV, dtype=np.int8)
        self._owner[layout.num_kv_pages :] = Tenant.EMB
        self._num_emb_pages = layout.num_emb_pages

    def pages_of(self, tenant: Tenant) -> PageIds:
        """Pages of a tenant, int64, ascending."""
        return np.flatnonzero(self._owner == tenant)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self._owner)

    @property
    def num_emb_pages(self) -> int:
        """Pages of the EMB tenant."""
        return self._num_emb_pages

    def hand_over(self, page_ids: PageIds, to: Tenant) -> None:
        """Pages (int64 [n]) change hands: the other tenant has given them up.

        Raises:
            IntegrityError: a page is not the other tenant's, or is the null block.
        """
        # Bounded by hand: an index below 0 would name a page at the end.
        is_wrong = (page_ids < 1) | (self._owner[page_ids] == to)
        for page in page_ids[is_wrong][:1]:
            raise IntegrityError(f"page {page} cannot be handed over to {to.name}")
        self._owner[page_ids] = to
        self._num_emb_pages += len(page_ids) if to is Tenant.EMB else -len(page_ids)

    @property
    def committed(self) -> float:
        """The EMB share of the pages, as it is now."""
        return self._num_emb_pages / len(self._owner)

    def check_integrity(self, kv: PageHolder, emb: PageHolder) -> None:
        """Every page has one owner, the owner knows it, and each tenant's books add up.

        Raises:
            IntegrityError: names what contradicts what.
        """
        if int(np.count_nonzero(self._owner == Tenant.EMB)) != self._num_emb_pages:
            raise IntegrityError("EMB: its pages are miscounted")
        for tenant, holder in ((Tenant.KV, kv), (Tenant.EMB, emb)):
            if not np.array_equal(self.pages_of(tenant), holder.page_ids()):
                raise IntegrityError(f"{tenant.name}: its pages differ from those the pool gave it")
            holder.check_integrity()
