"""One topic's batches: their numbers, their bytes, and the last of them for those who missed any.

The frames are those of vLLM 0.32's `ZmqEventPublisher` (distributed/kv_events.py): topic, number,
payload. No sockets here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from math import inf, nextafter

import msgspec

from block_manager.events import NO_SEQUENCE, SEQUENCE_BYTES, KVEventBatch, RowEventBatch

Frames = tuple[bytes, bytes, bytes]
"""Topic, number, payload."""


def _number(value: int) -> bytes:
    return value.to_bytes(SEQUENCE_BYTES, "big", signed=True)


END_OF_ANSWER: Frames = (b"", _number(NO_SEQUENCE), b"")


class EventStream:
    """Counts and keeps the batches of one topic."""

    def __init__(self, topic: str, buffer_batches: int) -> None:
        """Takes the topic, and how many of the last batches are kept."""
        self._topic = topic.encode()
        self._next = 0
        self._last_ts = 0.0
        self._kept: deque[Frames] = deque(maxlen=buffer_batches)
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def num_batches(self) -> int:
        """Batches so far; the next one has this number."""
        return self._next

    def add(self, batch: KVEventBatch | RowEventBatch) -> Frames:
        """Gives a batch its number.

        Its time is moved on where it is not after the time of the batch before: by its time a
        subscriber knows one batch from another.
        """
        self._last_ts = batch.ts = max(batch.ts, nextafter(self._last_ts, inf))
        frames = (self._topic, _number(self._next), self._encode(batch))
        self._kept.append(frames)
        self._next += 1
        return frames

    def since(self, first: int) -> Iterator[Frames]:
        """The batches from a number on, as far back as they are kept."""
        oldest = self._next - len(self._kept)
        for place in range(max(0, first - oldest), len(self._kept)):
            yield self._kept[place]

    def snapshot(self, batches: Sequence[KVEventBatch | RowEventBatch]) -> Iterator[Frames]:
        """Batches that tell all that is there after the last one that was published.

        They bear its number and its time; both say that nothing was published yet by -1 and 0.
        """
        for batch in batches:
            batch.ts = self._last_ts
            yield self._topic, _number(self._next - 1), self._encode(batch)
