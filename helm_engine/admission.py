"""How many requests a front may hold: what comes beyond is refused before anything is parsed.

Parsing, checking and hashing a request takes the front far longer than refusing it. Were the queue
of the engine the only bound, a storm would keep the front busy with requests that are then refused,
and answers would wait behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from helm_engine.config import SchedulerConfig
from helm_engine.exceptions import QueueFullError


class Admission:
    """Counts the requests that a front holds, from the door to the answer."""

    def __init__(self, limit: int) -> None:
        """Takes the number of requests that may be held at once."""
        self.limit = limit
        self.num_held = 0

    @classmethod
    def to(cls, config: SchedulerConfig) -> Admission:
        """As many as may run and wait in the engine."""
        return cls(config.max_num_held)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds one request.

        Raises:
            QueueFullError: as many as may be are held.
        """
        if self.num_held >= self.limit:
            raise QueueFullError(
                f"the queue is full, the limit is {self.limit} requests that run or wait; "
                "try again later"
            )
        self.num_held += 1
        try:
            yield
        finally:
            self.num_held -= 1
