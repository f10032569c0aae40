"""Requests in the order of a key, any of which can be taken out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import itemgetter

from helm_engine.request import Request

QueueKey = tuple[float, ...]
"""Smaller comes first. No two requests may share one: it ends with the number of arrival."""

_key_of = itemgetter(0)


class RequestQueue:
    """A sorted list: queues are bounded, and moving a thousand pointers costs next to nothing."""

    def __init__(self) -> None:
        self._entries: list[tuple[QueueKey, Request]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[QueueKey, Request]]:
        return iter(self._entries)

    @property
    def first(self) -> tuple[QueueKey, Request] | None:
        """The request that comes first, with its key."""
        return self._entries[0] if self._entries else None

    def add(self, key: QueueKey, request: Request) -> None:
        """Puts a request in its place."""
        insort(self._entries, (key, request), key=_key_of)

    def remove(self, key: QueueKey) -> None:
        """Takes the request with this key out, if it is there."""
        place = bisect_left(self._entries, key, key=_key_of)
        if place < len(self._entries) and self._entries[place][0] == key:
            del self._entries[place]
