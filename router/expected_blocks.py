"""KV blocks that routed requests will leave behind, until the engines' events say so themselves.

Without them a user's second request, sent before the first one's events arrive, would find no
engine that holds anything and might go elsewhere. Rows are not expected: an engine need not keep a
row that it loaded.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from router.cost import Int64Array


class _Expected(NamedTuple):
    keys: Int64Array
    until: float


class ExpectedBlocks:
    """The last history that was routed to each engine, by the history's first block."""

    def __init__(self, keep_s: float) -> None:
        """Takes how long an expectation lasts, in seconds; 0 = there are none.

        Raises:
            ValueError: it is below 0.
        """
        if keep_s < 0.0:
            raise ValueError(f"keep_s: must be at least 0, not {keep_s}")
        self._keep_s = keep_s
        # A block's hash covers all before it, so histories that share one share the first.
        self._by_first: dict[int, dict[int, _Expected]] = {}
        self._oldest: deque[tuple[float, int, int]] = deque()

    def expect(self, slot: int, keys: Int64Array, now: float) -> None:
        """An engine was sent a history with these blocks, int64 [n] from `hash_keys`."""
        if self._keep_s and len(keys):
            first, until = int(keys[0]), now + self._keep_s
            self._by_first.setdefault(first, {})[slot] = _Expected(keys, until)
            self._oldest.append((until, first, slot))

    def withdraw(self, slot: int, keys: Int64Array) -> None:
        """The engine will not compute that history."""
        if len(keys):
            self._drop(int(keys[0]), slot)

    def forget(self, slot: int) -> None:
        """The slot's engine is gone."""
        for first in [first for first, slots in self._by_first.items() if slot in slots]:
            self._drop(first, slot)

    def extend(self, cached_blocks: Int64Array, keys: Int64Array, now: float) -> None:
        """Raises the cached blocks of each engine (int64 [E]) to those that are expected there."""
        self._drop_old(now)
        if not len(keys):
            return
        for slot, expected in self._by_first.get(int(keys[0]), {}).items():
            shared = min(len(keys), len(expected.keys))
            differs = keys[:shared] != expected.keys[:shared]
            same = int(differs.argmax()) if differs.any() else shared
            cached_blocks[slot] = max(int(cached_blocks[slot]), same)

    def _drop_old(self, now: float) -> None:
        while self._oldest and self._oldest[0][0] <= now:
            until, first, slot = self._oldest.popleft()
            expected = self._by_first.get(first, {}).get(slot)
            if expected is not None and expected.until <= until:
                self._drop(first, slot)

    def _drop(self, first: int, slot: int) -> None:
        slots = self._by_first.get(first, {})
        slots.pop(slot, None)
        if not slots:
            self._by_first.pop(first, None)
