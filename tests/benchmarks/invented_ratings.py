"""Ratings with the form of MovieLens-100K, whose own may not be passed on."""

from __future__ import annotations

import numpy as np

from helm_engine.datasets.ml100k import NUM_ITEMS, MovieLens100K


def invented_ratings(num_users: int, seed: int = 0) -> MovieLens100K:
    """Users with 20 to 250 events each, some of them in one second."""
    rng = np.random.default_rng(seed)
    parts = []
    for user in range(1, num_users + 1):
        number = int(rng.integers(20, 251))
        items = rng.choice(NUM_ITEMS, number, replace=False) + 1
        times = 900_000_000 + np.cumsum(rng.choice([0, 7, 60, 90_000], number))
        parts.append(np.stack([np.full(number, user), items, np.full(number, 3), times], axis=1))
    return MovieLens100K.from_rows(np.concatenate(parts))
