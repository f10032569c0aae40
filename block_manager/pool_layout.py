"""How one allocation is cut into pages and staging: sizes only, all in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

PAGE_ALIGNMENT = 256
"""Pages begin at multiples of this: what CUDA allocations and vector loads like."""


class PoolTooSmallError(ValueError):
    """The pool cannot hold what any one request may need; the message gives the bytes needed."""


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """What an operator decides about the pool."""

    pool_bytes: int = 64 << 20
    """Bytes of the one allocation: pages and staging."""
    emb_fraction: float = 0.25
    """Share of the pages that the EMB tenant holds, 0..1; floors of both tenants apply."""
    block_tokens: int = 16
    """Tokens of one KV block; a page holds one block."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        if self.pool_bytes < 1:
            raise ValueError(f"pool_bytes: must be at least 1, not {self.pool_bytes}")
        if not 0.0 <= self.emb_fraction <= 1.0:
            raise ValueError(f"emb_fraction: must be within 0..1, not {self.emb_fraction}")
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens: must be at least 1, not {self.block_tokens}")


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """The pool's geometry. Pages come first, staging rows after the last page."""

    page_bytes: int
    num_pages: int
    num_emb_pages: int
    min_kv_pages: int
    """The null block and the blocks of one longest history: what KV keeps at any split."""
    block_tokens: int
    row_bytes: int
    rows_per_page: int
    staging_rows: int
    """Rows of the running step that were not admitted have room here."""

    @property
    def staging_bytes(self) -> int:
        """Bytes behind the last page."""
        return self.staging_rows * self.row_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the allocation."""
        return self.num_pages * self.page_bytes + self.staging_bytes

    @property
    def num_kv_pages(self) -> int:
        """Pages of the KV tenant, the null block among them."""
        return self.num_pages - self.num_emb_pages

    def emb_pages_of(self, emb_fraction: float) -> int:
        """Pages that EMB gets when this share of the pages (0..1) is asked for."""
        # 0.29 of 100 pages are 29, though the product of the floats is a little less.
        return min(int(emb_fraction * self.num_pages + 1e-9), self.num_pages - self.min_kv_pages)

    @property
    def page_tail_bytes(self) -> int:
        """Bytes of a page that a row page leaves unused at its tail."""
        return self.page_bytes - self.rows_per_page * self.row_bytes


def plan_layout(
    config: PoolConfig,
    /,
    *,
    kv_bytes_per_token: int,
    row_bytes: int,
    max_context_tokens: int,
    staging_rows: int,
) -> PoolLayout:
    """Cuts the pool.

    The KV floor is the null block and the blocks of one longest history, so that any admitted
    request can finish; rows always have staging, so the EMB floor is nothing.

    Raises:
        PoolTooSmallError: below the staging and the KV floor; the message gives the bytes needed.
    """
    page_bytes = _page_bytes(config.block_tokens * kv_bytes_per_token, row_bytes)
    staging_bytes = staging_rows * row_bytes
    kv_floor = _kv_floor(max_context_tokens, config.block_tokens)
    needed = staging_bytes + kv_floor * page_bytes
    if config.pool_bytes < needed:
        raise PoolTooSmallError(
            f"pool_bytes: {config.pool_bytes} is too small; this model needs at least {needed} "
            f"({kv_floor} pages of {page_bytes} for one context of {max_context_tokens} tokens, "
            f"{staging_bytes} for staging)"
        )
    layout = PoolLayout(
        page_bytes=page_bytes,
        num_pages=(config.pool_bytes - staging_bytes) // page_bytes,
        num_emb_pages=0,
        min_kv_pages=kv_floor,
        block_tokens=config.block_tokens,
        row_bytes=row_bytes,
        rows_per_page=page_bytes // row_bytes,
        staging_rows=staging_rows,
    )
    return replace(layout, num_emb_pages=layout.emb_pages_of(config.emb_fraction))


def smallest_pool(
    config: PoolConfig,
    /,
    *,
    kv_bytes_per_token: int,
    row_bytes: int,
    max_context_tokens: int,
    staging_rows: int,
) -> PoolConfig:
    """The same pool with as few bytes as `plan_layout` accepts."""
    page_bytes = _page_bytes(config.block_tokens * kv_bytes_per_token, row_bytes)
    kv_floor = _kv_floor(max_context_tokens, config.block_tokens)
    return replace(config, pool_bytes=staging_rows * row_bytes + kv_floor * page_bytes)


def _page_bytes(block_bytes: int, row_bytes: int) -> int:
    return -(-max(block_bytes, row_bytes) // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _kv_floor(max_context_tokens: int, block_tokens: int) -> int:
    """The null block and the blocks of one longest history."""
    return 1 + -(-max_context_tokens // block_tokens)
