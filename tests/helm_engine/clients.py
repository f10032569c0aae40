"""Clients: users whose histories grow, and the requests that are made with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from model_executor.model_config import ModelConfig

START = 1_700_000_000
"""Seconds at which histories begin."""


class Client:
    """One user's events, oldest first; every array is sent, whether the model reads it or not."""

    def __init__(
        self, config: ModelConfig, seed: int = 0, *, user: str | None = "ada", num_events: int = 0
    ) -> None:
        self.config = config
        self.rng = np.random.default_rng(seed)
        self.user = user
        self._sizes = {feature.name: feature.num_rows for feature in config.item_features}
        names = ["item_ids", "timestamps", "actions", *self._sizes]
        self.events: dict[str, list[int]] = {name: [] for name in names}
        self.context: dict[str, int] = {}
        for feature in config.contextual_features:
            self.context[feature.name] = int(self.rng.integers(feature.num_rows))
        self.grow(num_events)

    def __len__(self) -> int:
        return len(self.events["item_ids"])

    def random_value(self, name: str) -> int:
        """Any value that the model knows."""
        if name == "item_ids":
            first, size = self.config.first_item_id, self.config.num_items
        else:
            first, size = 0, self._sizes.get(name, max(2, self.config.num_actions))
        return first + int(self.rng.integers(size))

    def insert(self, place: int, seconds: int) -> None:
        """A random event before the one that stands at `place`."""
        for name, values in self.events.items():
            value = seconds if name == "timestamps" else self.random_value(name)
            values.insert(place, value)

    def insert_late(self, place: int) -> None:
        """A random event that happened when the one at `place` did, and became known only now."""
        self.insert(place, self.events["timestamps"][place])

    def grow(self, number: int) -> None:
        """Further events, some of them at the same time."""
        for _ in range(number):
            last = self.events["timestamps"][-1] if len(self) else START
            self.insert(len(self), last + int(self.rng.choice([0, 1, 50, 500, 4000])))

    def change(self, name: str, place: int) -> None:
        """Gives one event another value; its time becomes that of the event behind it."""
        values = self.events[name]
        if name == "timestamps":
            values[place] = [*values, values[-1] + 120][place + 1]
        else:
            before = values[place]
            while values[place] == before:
                values[place] = self.random_value(name)

    def change_context(self, name: str) -> None:
        """Gives a contextual feature another value."""
        sizes = {feature.name: feature.num_rows for feature in self.config.contextual_features}
        self.context[name] = (self.context[name] + 1) % sizes[name]

    def candidates(self, number: int) -> dict[str, list[int]]:
        """Random candidates; the last one repeats the first."""
        sent = {
            name: [self.random_value(name) for _ in range(number)]
            for name in ["item_ids", *self._sizes]
        }
        for values in sent.values():
            values[-1] = values[0]
        return sent

    def different_candidates(self, number: int) -> dict[str, list[int]]:
        """The first items, with random features."""
        first = self.config.first_item_id
        return {**self.candidates(number), "item_ids": list(range(first, first + number))}

    def request(
        self,
        candidates: dict[str, list[int]] | None,
        *,
        length: int | None = None,
        start_index: int = 0,
        **fields: Any,
    ) -> dict[str, Any]:
        """A body with the first `length` events, less those before `start_index`.

        Without candidates every item is retrieved.
        """
        sent = {name: values[start_index:length] for name, values in self.events.items()}
        body: dict[str, Any] = {
            "user": self.user,
            "history": {**sent, "start_index": start_index},
            "candidates": candidates,
        }
        if candidates is None:
            body["top_k"] = self.config.num_items
        if self.context:
            body["context"] = dict(self.context)
        return {**body, **fields}
