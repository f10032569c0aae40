"""Whose turn it is on the link to the host: the order of traffic classes, and nothing else.

Who moves rows asks, begins a chunk only when it may, and says when it is done. A chunk that has
begun is never called back, so a class waits for the rest of one chunk of a lesser class at most.
"""

from __future__ import annotations

from block_manager.refill import TrafficClass


class LinkOrder:
    """Counts who wants the link and who has it; knows no threads, devices or bytes."""

    def __init__(self) -> None:
        self._wanted = [0] * len(TrafficClass)
        self._num_refill_chunks = 0

    def ask(self, traffic: TrafficClass) -> None:
        """Work of a class has come up; from now on no lesser class begins a chunk."""
        self._wanted[traffic] += 1

    def done(self, traffic: TrafficClass) -> None:
        """Work that was asked for is over: nothing of it is still to be copied."""
        assert self._wanted[traffic], f"{traffic.name} asked for nothing"
        self._wanted[traffic] -= 1

    def may_begin(self, traffic: TrafficClass) -> bool:
        """Whether a chunk of a class may begin now.

        None while a class before it has work. Of refill there is one chunk on its way at a time:
        a second one would stand before whatever comes up next.
        """
        if any(self._wanted[:traffic]):
            return False
        return traffic is not TrafficClass.REFILL or not self._num_refill_chunks

    def begin_refill_chunk(self) -> None:
        """A chunk of refill is on its way; it may begin."""
        assert self.may_begin(TrafficClass.REFILL), "it is not the turn of refill"
        self._num_refill_chunks += 1

    def end_refill_chunk(self) -> None:
        """That chunk is on the device, or failed."""
        assert self._num_refill_chunks, "no chunk of refill is on its way"
        self._num_refill_chunks -= 1

    @property
    def is_refilling(self) -> bool:
        """Whether a chunk of refill is on its way."""
        return bool(self._num_refill_chunks)
