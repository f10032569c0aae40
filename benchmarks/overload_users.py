"""The users of the overload benchmark: each seat's visits to come, made ahead of need."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

import msgspec
import numpy as np

from benchmarks.bundled_visits import BundledUser
from benchmarks.returning_visits import returning_visits

_LEAST_AHEAD = 16
_HISTORY = 640
_RETURNS = 8
_CANDIDATES = 200


def mini_stream(seats: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Seats and bodies of the small DLRMv3's returning users, without end."""
    for asked in returning_visits("abs", _HISTORY, _RETURNS, seats, seed):
        user: str = msgspec.json.decode(asked.with_user)["user"]
        yield int(user.removeprefix("user-")) % seats, asked.with_user


def bundled_stream(seats: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Seats and bodies of the bundled model's invented users, without end."""
    rng = np.random.default_rng(seed)
    users = [BundledUser(seat, rng) for seat in range(seats)]
    while True:
        for seat, user in enumerate(users):
            body = {**user.visit(), "candidates": user.candidates(_CANDIDATES)}
            yield seat, msgspec.json.encode(body)


class Seats:
    """Visits that have not been answered yet, by seat, in their order."""

    def __init__(self, stream: Iterator[tuple[int, bytes]], seats: int) -> None:
        self._stream = stream
        self._coming: list[deque[bytes]] = [deque() for _ in range(seats)]

    def coming(self) -> list[list[bytes]]:
        """Some visits of every seat."""
        while min(map(len, self._coming)) < _LEAST_AHEAD:
            seat, body = next(self._stream)
            self._coming[seat].append(body)
        return [list(visits) for visits in self._coming]

    def answered(self, counts: Counter[int]) -> None:
        """These many visits of each seat are over."""
        for seat, number in counts.items():
            for _ in range(min(number, len(self._coming[seat]))):
                self._coming[seat].popleft()

    def take_all(self) -> list[bytes]:
        """The next visit of every seat, which is then over."""
        self.coming()
        return [visits.popleft() for visits in self._coming]
