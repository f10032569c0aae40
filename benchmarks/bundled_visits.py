"""Returning users of the bundled model: invented histories that grow by a few events a visit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MODEL_DIR = Path(__file__).resolve().parents[1] / "examples" / "models" / "hstu-ml-100k"
NUM_ITEMS = 1682
MAX_EVENTS = 200
_FIRST_EVENTS = (20, 120)
_NEW_EVENTS = (1, 10)
_START = 900_000_000


class BundledUser:
    """The user of one seat; when the model's window is full, a new user takes the seat."""

    def __init__(self, seat: int, rng: np.random.Generator) -> None:
        self._seat = seat
        self._rng = rng
        self._generation = 0
        self._items: list[int] = []
        self._times: list[int] = []

    @property
    def name(self) -> str:
        """Id in requests."""
        return f"user-{self._seat}-{self._generation}"

    def visit(self) -> dict[str, Any]:
        """Body of the next visit: the history so far and the events since the last visit."""
        number = int(self._rng.integers(*(_NEW_EVENTS if self._items else _FIRST_EVENTS)))
        if len(self._items) + number > MAX_EVENTS:
            self._generation += 1
            self._items, self._times = [], []
        last = self._times[-1] if self._times else _START
        gaps = self._rng.integers(0, 5000, number)
        self._items += self._rng.integers(1, NUM_ITEMS + 1, number).tolist()
        self._times += (last + np.cumsum(gaps)).tolist()
        history = {"item_ids": list(self._items), "timestamps": list(self._times)}
        return {"user": self.name, "history": history}

    def candidates(self, number: int) -> dict[str, list[int]]:
        """Items to score, `number` different ones."""
        return {"item_ids": (1 + self._rng.permutation(NUM_ITEMS)[:number]).tolist()}
