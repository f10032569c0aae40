"""Visits of MovieLens-100K's users: real histories and times, retrievals on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, cycle

import numpy as np

from benchmarks.replay_ml100k import body_of
from benchmarks.returning_visits import NEW_EVENTS, Asked
from helm_engine.datasets.ml100k import HeldOutEvent, MovieLens100K


def movielens_visits(dataset: MovieLens100K, users: int, seed: int) -> Iterator[Asked]:
    """An endless stream: each of `users` seats comes once a round, in an order of its own.

    A user comes every ten events, in the order of their times, up to the last. Then another one
    takes the seat, under a name of its own, since the data set may come round again. Nobody is
    asked about twice at once, as there would be in the order of the data, where a user is there for
    one evening.
    """
    rng = np.random.default_rng(seed)
    names = (f"user-{number}" for number in count())
    newcomers = cycle(rng.permutation(dataset.num_users).tolist())
    # As if visits had gone on for ever: who stays longer is met more likely, anywhere in the stay.
    lengths = np.diff(dataset.user_offsets)
    seated = rng.choice(dataset.num_users, users, p=lengths / lengths.sum())
    seats = [
        _stay(dataset, user, next(names), int(rng.integers(lengths[user] // NEW_EVENTS)))
        for user in seated.tolist()
    ]
    while True:
        for seat in rng.permutation(users).tolist():
            asked = next(seats[seat], None)
            while asked is None:
                seats[seat] = _stay(dataset, next(newcomers), next(names))
                asked = next(seats[seat], None)
            yield asked


def _stay(dataset: MovieLens100K, user: int, name: str, first_visit: int = 0) -> Iterator[Asked]:
    """All visits of a user from one on; each asks for the next event at its time."""
    items, times = dataset.history(user)
    first = NEW_EVENTS * (1 + first_visit)
    for length in range(first, len(items), NEW_EVENTS):
        event = HeldOutEvent(
            user, items[:length], times[:length], int(items[length]), int(times[length])
        )
        yield Asked(
            returning=length > first,
            history=length,
            with_user=json.dumps(body_of(event, name)).encode(),
            without_user=json.dumps(body_of(event, None)).encode(),
        )
