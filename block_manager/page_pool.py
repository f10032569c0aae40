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
    def committed(self) -> float:
        """The EMB share of the pages, as it is now."""
        return self._num_emb_pages / len(self._owner)

    def check_integrity(self, kv: PageHolder, emb: PageHolder) -> None:
        """Every page has one owner, the owner knows it, and each tenant's books add up.

        Raises:
            IntegrityError: names what contradicts what.
        """
        for tenant, holder in ((Tenant.KV, kv), (Tenant.EMB, emb)):
            if not np.array_equal(self.pages_of(tenant), holder.page_ids()):
                raise IntegrityError(f"{tenant.name}: its pages differ from those the pool gave it")
            holder.check_integrity()
