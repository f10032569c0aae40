"""Events of the setting `ml100k`: MovieLens-100K's, multiplied by themselves.

MovieLens-100K has 943 users with 106 events each, far too few of both. It is scaled up as Belletti
et al. 2019 ("Scalable Realistic Recommendation Datasets through Fractal Expansions", arXiv
1901.08910) propose, by a Kronecker product: theirs with a small likeness of the data, here with the
data themselves. An item is a pair (a, b) of real items: item b of copy a of the catalogue,
1,682 squared in all. A person is a pair of real users: who has walked through a copy as the one
walked through the catalogue goes on to the copy that the other went on to. So

- an event's a, and its b, are as popular as these real items are;
- within a copy a person has liked together what a real user liked together, in the same order,
  and has been to copies that a real user liked together, in the same order;
- how many events a visit brings varies as the ratings of a user within 60 seconds do, around the
  mean that the regime states.

A history is so long as the regime says. Where the second user's events end, those of a user of
similar taste go on: all users stand in a ring, each beside the most similar (cosine of the items)
that was left. A person begins with an event of that ring, and of all events of first users, drawn
at random; therefore long histories are met more often, as when visits had gone on for ever.

A request's candidates are the events that will join the history, and others by popularity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from helm_engine.datasets.ml100k import NUM_ITEMS, MovieLens100K
from helm_engine.simulator.events.law import Asked, Drawn, Int64Array, uniform
from helm_engine.simulator.workloads import Regime

_VISIT_SECONDS = 60


class MovieLensLaw:
    """See `EventLaw`."""

    def __init__(self, dataset: MovieLens100K, regimes: list[Regime]) -> None:
        """Arranges the users in their ring."""
        self._items = dataset.item_ids - 1  # From 0 on.
        self._offsets = dataset.user_offsets
        self._user_of_event = np.repeat(np.arange(dataset.num_users), np.diff(self._offsets))
        events_of = np.split(np.arange(dataset.num_events), self._offsets[1:-1])
        self._ring = self._items[np.concatenate([events_of[one] for one in ring_of(dataset)])]
        self._visit_sizes = visit_sizes(dataset)
        self._new_events = np.array([one.new_events for one in regimes], dtype=np.int64)
        self._candidates = np.array([one.candidates for one in regimes], dtype=np.int64)

    def new_events(self, regimes: Int64Array, rng: np.random.Generator) -> Int64Array:
        """See `EventLaw.new_events`."""
        real = rng.choice(self._visit_sizes, len(regimes)) / self._visit_sizes.mean()
        scaled = np.rint(real * self._new_events[regimes]).astype(np.int64)
        events: Int64Array = np.clip(scaled, 1, self._candidates[regimes])
        return events

    def draw(self, asked: Asked, rng: np.random.Generator, keys: tuple[int, int]) -> Drawn:
        """See `EventLaw.draw`."""
        first_event = rng.integers(len(self._items), size=asked.num_people)
        user = self._user_of_event[first_event]
        places = [
            self._offsets[user],
            np.diff(self._offsets)[user],
            first_event - self._offsets[user],
            rng.integers(len(self._ring), size=asked.num_people),
        ]
        people = np.stack(places, axis=1)
        firsts = asked.first_visits
        nothing = np.zeros(len(firsts), dtype=np.int64)
        length = asked.lengths[firsts]
        begun = asked.people[firsts], nothing, length, asked.first_bounds
        shown = asked.people, asked.lengths, asked.new_events, asked.shown_bounds
        return Drawn(
            _draw(*begun, people, self._items, self._ring, np.uint64(keys[0])),
            _draw(*shown, people, self._items, self._ring, np.uint64(keys[1])),
        )


def ring_of(dataset: MovieLens100K) -> Int64Array:
    """All users, each followed by the most similar of those that are left: int64 [users]."""
    likes = np.zeros((dataset.num_users, NUM_ITEMS), dtype=np.float32)
    users = np.repeat(np.arange(dataset.num_users), np.diff(dataset.user_offsets))
    likes[users, dataset.item_ids - 1] = 1.0
    likes /= np.linalg.norm(likes, axis=1, keepdims=True)
    similar = likes @ likes.T
    ring = np.zeros(dataset.num_users, dtype=np.int64)
    for place in range(1, len(ring)):
        similar[:, ring[place - 1]] = -1.0
        ring[place] = similar[ring[place - 1]].argmax()
    return ring


def visit_sizes(dataset: MovieLens100K) -> Int64Array:
    """Events of every visit: those of a user within 60 seconds of the visit's first, int64 [m].

    NVIDIA's recsys-examples cut a log into requests like this.
    """
    sizes: list[int] = []
    for user in range(dataset.num_users):
        _, times = dataset.history(user)
        begin = 0
        while begin < len(times):
            end = int(np.searchsorted(times, times[begin] + _VISIT_SECONDS, side="right"))
            sizes.append(end - begin)
            begin = end
    return np.array(sizes, dtype=np.int64)


@njit(nogil=True, cache=True)
def _draw(
    bag_people: Any, begins: Any, followed: Any, bounds: Any, people: Any, items: Any, ring: Any,
    key: Any,
) -> Any:  # fmt: skip
    """Items of all bags: first those of the person's sequence from `begins` on, then by popularity.

    Args:
        bag_people: whose each bag is, int64 [bags].
        begins: place in the person's sequence, int64 [bags].
        followed: so many are taken from it, int64 [bags].
        bounds: where each bag begins, and the last ends, int64 [bags + 1].
        people: where the first user's events begin, how many they are, with which of them the
            person begins, and with which of the ring, int64 [people, 4].
        items: of all real events by user and time, int64 [events].
        ring: the same, by users as they stand in the ring.
        key: of the draws.
    """
    drawn = np.empty(bounds[-1], dtype=np.int64)
    for bag in range(len(bag_people)):
        offset, number, first, ring_first = people[bag_people[bag]]
        for place in range(bounds[bag], bounds[bag + 1]):
            if place - bounds[bag] < followed[bag]:
                step = first + begins[bag] + place - bounds[bag]
                copy = ring[(ring_first + step // number) % len(ring)]
                item = items[offset + step % number]
            else:
                copy = items[np.int64(uniform(2 * place, key) * len(items))]
                item = items[np.int64(uniform(2 * place + 1, key) * len(items))]
            drawn[place] = copy * NUM_ITEMS + item
    return drawn
