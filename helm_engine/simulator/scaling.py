"""An engine that is k times smaller and sees the same requests: what `--scale k` means.

A page stands for k pages and a row for k rows. So the pool has 1/k of its pages; of the table only
one row in k is there, chosen by hash, and a request looks up those of its rows that are; a history
takes 1/k of its blocks. Every request is there in full: it is queued, batched, prefilled and scored
token by token, and prices are those of all its rows. Nothing else than the size of what the
engine's own code works on differs.

Rows are sampled in the manner of SHARDS (Waldspurger, Park, Garthwaite and Ahmad, FAST 2015): all
lookups of a chosen row are seen, and slots shrink with the rows. Users are not: of a hundred
regulars one in sixteen are six, too few to tell what share of them KV has room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from block_manager.block_hash import BlockHash
from block_manager.block_pool import BlockPool
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.kv_event_log import HashedTokens
from block_manager.page_value import PageValueEstimator, SamplingConfig
from block_manager.pool_layout import PoolLayout
from block_manager.reuse_distance import PageCosts
from helm_engine.simulator.workloads import Setting
from model_executor.cost_profile import CostProfile
from model_executor.step import NO_ROW

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

SCALES = (1, 2, 4, 8, 16, 32, 64)

_GOLDEN, _MASK = 0x9E3779B9, (1 << 32) - 1
"""Fibonacci hashing of 32 bits: multiples of the golden ratio are spread evenly."""
_GOLDEN_64, _MASK_64 = 0x9E3779B97F4A7C15, (1 << 64) - 1
"""Likewise of 64 bits; the multiplier is odd, so numbers stay distinct."""


def check_scale(scale: int) -> None:
    """Refuses what is no scale.

    Raises:
        ValueError: names the limit.
    """
    if scale not in SCALES:
        raise ValueError(
            f"scale: must be a power of two from {SCALES[0]} to {SCALES[-1]}, not {scale}"
        )


# ---------------------------------------------------------------- rows


def sampled_rows(setting: Setting, scale: int) -> tuple[Int32Array, int]:
    """Numbers one row in `scale`: the same ones for every seed.

    Items of one rank are alike in popularity whatever their category. Of each rank the same number
    of categories is chosen, by a hash of the rank: which of the few hottest rows are in the sample
    would else decide what it hits. Where there are no categories, the hash alone chooses.

    Returns:
        The number of each row, or NO_ROW, int32 [num_items]; how many are chosen.
    """
    return _sampled_rows(setting.num_items, setting.num_categories or 1, scale)


@lru_cache(maxsize=2)  # A trace and its engine need the same.
def _sampled_rows(num_items: int, num_categories: int, scale: int) -> tuple[Int32Array, int]:
    numbers, number = _number_rows(num_items, num_items // num_categories, scale)
    numbers.flags.writeable = False
    return numbers, number


@njit(nogil=True, cache=True)
def _number_rows(num_items: Any, category_size: Any, scale: Any) -> Any:
    numbers = np.full(num_items, NO_ROW, dtype=np.int32)
    number = 0
    for item in range(num_items):
        category, rank = item // category_size, item % category_size
        if (category + ((rank * _GOLDEN & _MASK) * scale >> 32)) % scale == 0:
            numbers[item] = number
            number += 1
    return numbers, number


# ---------------------------------------------------------------- histories


class CoarseHistory(list[BlockHash]):
    """Hashes of a history's blocks that stand for `scale` blocks each, and what was rounded.

    A history of n blocks takes (n + phase) // scale of them. Phases of users are spread evenly, so
    that all users together take 1 / scale of their blocks.
    """

    __slots__ = ("num_full", "num_pages", "person", "phase")

    person: int
    phase: int
    """0 .. scale - 1."""
    num_full: int
    """Full blocks of the history, not coarse."""
    num_pages: int
    """Coarse blocks that the history takes, with its last tokens."""


def coarse_hashes(
    longest: Int64Array, digests: Sequence[bytes], block_tokens: int, scale: int
) -> list[list[BlockHash]]:
    """Of the coarse blocks of each person's longest history: distinct, and of nothing else.

    A history only grows, so its blocks need no more than their numbers.

    Args:
        longest: tokens of the longest history of each person, int64 [people].
        digests: of each person, 16 bytes.
        block_tokens: of a block that is not coarse.
        scale: blocks that a coarse one stands for.
    """
    most = (longest // block_tokens + scale - 1) // scale
    return [
        _hashes_of_person(digest, blocks)
        for digest, blocks in zip(digests, most.tolist(), strict=True)
    ]


def _hashes_of_person(digest: bytes, number: int) -> list[BlockHash]:
    # The digest and the block's number would do; but tables look at a hash's last bytes only, as
    # if they were as random as all.
    begin = int.from_bytes(digest[-8:], "big")
    lasts = [(begin + block * _GOLDEN_64) & _MASK_64 for block in range(1, number + 1)]
    padded = digest + bytes(8)
    return [BlockHash(padded + last.to_bytes(8, "big")) for last in lasts]


def coarse_history(
    hashes: list[BlockHash], person: int, num_tokens: int, block_tokens: int, scale: int
) -> CoarseHistory:
    """The history of one visit.

    Args:
        hashes: of the coarse blocks of the person's longest history.
        person: who; phases of those who follow one another differ as much as they can.
        num_tokens: of the history.
        block_tokens: of a block that is not coarse.
        scale: blocks that a coarse one stands for.
    """
    phase = (person * _GOLDEN & _MASK) * scale >> 32
    full = num_tokens // block_tokens
    history = CoarseHistory(hashes[: (full + phase) // scale])
    history.person, history.phase, history.num_full = person, phase, full
    history.num_pages = (-(-num_tokens // block_tokens) + phase) // scale
    return history


class CoarseKV(KVCacheManager):
    """Histories in coarse blocks, of which requests are told in tokens of their own."""

    def __init__(self, pool: BlockPool, block_tokens: int, scale: int) -> None:
        """Takes an empty tenant; `block_tokens` are those of a block that is not coarse."""
        super().__init__(pool, block_tokens * scale)
        self._fine_tokens = block_tokens
        self._scale = scale
        self._full: dict[int, int] = {}
        """Full blocks, not coarse, that were reusable when a person last came."""
        self._kept = 1.0
        """Of the blocks of who came back last, those that were still there."""

    def allocate(
        self, request_id: str, hashes: Sequence[BlockHash], num_tokens: int, max_cached_tokens: int
    ) -> int | None:
        """See `KVCacheManager.allocate`."""
        history = cast(CoarseHistory, hashes)
        allocated = self.pool.allocate(history, history.num_pages)
        if allocated is None:
            return None
        self._held[request_id], found = allocated
        self._num_cached[request_id] = found
        blocks = self._reusable(history, found)
        return min(blocks, max_cached_tokens // self._fine_tokens) * self._fine_tokens

    def _reusable(self, history: CoarseHistory, found: int) -> int:
        """Blocks, not coarse, of which so many coarse ones were found."""
        full = self._full.get(history.person, 0)
        if not full:
            return 0
        pages = (full + history.phase) // self._scale
        if not pages:
            # Too short for a coarse block: it fares as who came back before it.
            return round(full * self._kept)
        self._kept = min(1.0, found / pages)
        if found < pages:
            self._full[history.person] = full = min(full, found * self._scale)
        return full

    def cache_blocks(
        self,
        request_id: str,
        hashes: Sequence[BlockHash],
        num_computed: int,
        user_tag: int,
        tokens: HashedTokens | None = None,
    ) -> None:
        """See `KVCacheManager.cache_blocks`; coarse blocks have no tokens to tell of."""
        history = cast(CoarseHistory, hashes)
        full = min(num_computed // self._fine_tokens, history.num_full)
        self._full[history.person] = max(full, self._full.get(history.person, 0))
        coarse_tokens = (full + history.phase) // self._scale * self.block_tokens
        super().cache_blocks(request_id, hashes, coarse_tokens, user_tag)


# ---------------------------------------------------------------- what pages are worth


class CoarsePageValues(PageValueEstimator):
    """What a page is worth that stands for `scale` pages; as many rows are looked at as in full."""

    def __init__(self, profile: CostProfile, layout: PoolLayout, num_rows: int, scale: int) -> None:
        """Takes the engine's own geometry, of `num_rows` sampled rows, and prices to match."""
        usual = SamplingConfig()
        super().__init__(
            layout.num_pages,
            layout.rows_per_page,
            layout.block_tokens,
            num_rows,
            PageCosts(profile.prefill_row_ms, profile.attention_pair_ms, profile.row_miss_ms),
            SamplingConfig(row_share=min(1.0, usual.row_share * scale)),
        )
        self._coarse_tokens = layout.block_tokens
        self._fine_tokens = layout.block_tokens // scale
        self._padding = np.full(layout.block_tokens, NO_ROW, dtype=np.int64)

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
        """See `PageValueEstimator.observe_request`."""
        history = cast(CoarseHistory, hashes)
        # The first coarse block begins `phase` blocks before the history does.
        before = history.phase * self._fine_tokens
        end = history.num_pages * self._coarse_tokens
        padded = np.concatenate([self._padding[:before], rows])[:end]
        super().observe_request(
            user_tag,
            hashes,
            padded,
            candidate_rows,
            slot_of_row,
            num_running,
            max_cached_tokens + before,
        )
