"""Users who come back with a few new events: an endless stream of visits for cache benchmarks.

The events are those of `event_model`. A user's first history was gathered over the training
steps; with each visit the user sees `num_candidates` items, of which `new_events` join the history
that the next visit brings. The first visit falls into the first inference step, each further one
into the next, and all that follow into the last, when the whole catalogue has appeared. Every user
is on a clock of their own: the n-th visit of any user is on the same day, so the stream says in
which order users come, not how much time passes between them.

A user whose next history would exceed `max_history` is gone for good, and a new user, with an id
of their own, takes the seat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from helm_engine.datasets.event_model import (
    BASE_STEP,
    MAX_COUNT,
    MAX_ZIPF_EXPONENT,
    EventConfig,
    EventModel,
    Events,
    FloatArray,
    Int64Array,
    RatedItems,
    Stream,
    cumulated_zipf,
    random_generator,
)

__all__ = ["ReturningUsers", "ReturningUsersConfig", "Visit"]

_EVENTS_PER_FIRST_VISIT = 100  # the published mean
# Drawing many visits at once costs little more than drawing one; those never made are wasted.
_VISITS_PER_DRAW = 8
# The mean of the recency ranks times this is how many users can be recent: all but e**-16 of the
# law, whose tail is cut off there so that the list of them stays short.
_RECENCY_CUT = 16


@dataclass(frozen=True, kw_only=True)
class ReturningUsersConfig(EventConfig):
    """Sizes and switches.

    Raises:
        ValueError: a value is out of range; names the field and its limits.
    """

    num_items: int = 1_000_000
    timestamps: Literal["ones", "seconds"] = "seconds"
    num_users: int = 1000
    """Seats: users who may come at any time. User ids of seat s are s + a multiple of num_users."""
    user_zipf: float | None = None
    """Exponent of how often seats are chosen where no recent user returns; None = all alike. Ranks
    are spread over the seats at random."""
    first_history: int = 640
    """Mean length of the history at a user's first visit; at least 1, at most `max_history`."""
    first_history_sd: float = 0.0
    """Its spread between users, of a normal distribution."""
    new_events: int = 10
    """Events that join a user's history from one visit to the next."""
    max_history: int = 1024
    num_candidates: int = 256
    p_return: float = 0.8
    """Probability that the next visit is by a recent user, of recency rank k (1 = the latest to
    come) with probability proportional to (1 - 1 / recent_users)**k. Otherwise a seat is chosen
    among all, whether or not its user has come before."""
    recent_users: float = 64.0
    """Mean recency rank of those who return. A cache of the last C users is met by a returning
    one with probability 1 - (1 - 1 / recent_users)**C."""

    def limits(self) -> dict[str, tuple[float, float]]:
        """Returns the least and the largest value of every numeric field."""
        return super().limits() | {
            "num_users": (1, MAX_COUNT),
            "user_zipf": (0, MAX_ZIPF_EXPONENT),
            "max_history": (1, MAX_COUNT),
            "first_history": (1, self.max_history),
            "first_history_sd": (0, MAX_COUNT),
            "num_candidates": (1, MAX_COUNT),
            "new_events": (1, self.num_candidates),
            "p_return": (0, 1),
            "recent_users": (1, MAX_COUNT),
        }


@dataclass(frozen=True, eq=False, slots=True)
class Visit:
    """A user comes: the history so far, and the items to score."""

    user: int
    visit_index: int
    """How often the user came before."""
    history: Events
    """All events, oldest first: the history of the last visit and `num_new` more."""
    num_new: int
    """Events since the last visit; all of them when the user comes for the first time."""
    request_time: int
    """When the visit begins, in seconds, or 1; no event of the history is later."""
    candidates: RatedItems


class _User:
    """One user's events, drawn some visits ahead into arrays that are long enough from the start.

    Visits hold views: nothing that a visit shows is written again.
    """

    def __init__(self, model: EventModel, config: ReturningUsersConfig, user: int) -> None:
        self.user = user
        self._model = model
        self._config = config
        self._rng = random_generator(config.seed, Stream.EVENTS, user)
        self._time_rng = random_generator(config.seed, Stream.TIMES, user)
        self._taste = model.new_taste(self._rng)
        drawn = round(self._rng.normal(config.first_history, config.first_history_sd))
        self._first = min(max(drawn, 1), config.max_history)
        self._num_visits = 1 + (config.max_history - self._first) // config.new_events
        self._num_made = 0
        capacity = self._first + self._num_visits * config.new_events
        self._events = Events(
            item_ids=np.empty(capacity, np.int64),
            category_ids=np.empty(capacity, np.int64),
            ratings=np.empty(capacity, np.float64),
            actions=np.empty(capacity, np.int64),
            timestamps=np.empty(capacity, np.int64),
        )
        self._num_written = 0
        self._draw_first_history()

    @property
    def is_gone(self) -> bool:
        """Whether one more visit would exceed `max_history`."""
        return self._num_made == self._num_visits

    def next_visit(self) -> Visit:
        """Returns the next visit of a user who is not gone."""
        ahead = self._num_made % _VISITS_PER_DRAW
        if ahead == 0:
            self._draw_visits()
        config = self._config
        begin = ahead * config.num_candidates
        visit = Visit(
            user=self.user,
            visit_index=self._num_made,
            history=self._events.first(self._first + self._num_made * config.new_events),
            num_new=config.new_events if self._num_made else self._first,
            request_time=int(self._begins[ahead]),
            candidates=self._seen.take(slice(begin, begin + config.num_candidates)),
        )
        self._num_made += 1
        return visit

    def _draw_first_history(self) -> None:
        """Draws visits of about the published length, spread evenly over the training steps."""
        num_visits = math.ceil(self._first / _EVENTS_PER_FIRST_VISIT)
        bounds = np.linspace(0, self._first, num_visits + 1).astype(np.int64)
        lengths = bounds[1:] - bounds[:-1]
        last_step = self._config.num_train_steps - 1
        steps = np.linspace(BASE_STEP, last_step, num_visits).astype(np.int64)
        events = self._model.draw(self._rng, self._taste, steps, lengths)
        _, timestamps = self._model.times(self._time_rng, steps + 1, lengths)
        self._append(events, timestamps)

    def _draw_visits(self) -> None:
        """Draws the candidates of the next visits, and which of them join the history."""
        config = self._config
        num_visits = min(_VISITS_PER_DRAW, self._num_visits - self._num_made)
        numbers = config.num_train_steps + np.arange(self._num_made, self._num_made + num_visits)
        steps = np.minimum(numbers, config.num_steps - 1)
        lengths = np.full(num_visits, config.num_candidates)
        self._seen = self._model.draw(self._rng, self._taste, steps, lengths)

        places = np.arange(num_visits * config.num_candidates).reshape(num_visits, -1)
        joining = self._rng.permuted(places, axis=1)[:, : config.new_events]
        lengths = np.full(num_visits, config.new_events)
        self._begins, timestamps = self._model.times(self._time_rng, numbers + 1, lengths)
        self._append(self._seen.take(joining.ravel()), timestamps)

    def _append(self, items: RatedItems, timestamps: Int64Array) -> None:
        written = slice(self._num_written, self._num_written + len(items))
        self._events.item_ids[written] = items.item_ids
        self._events.category_ids[written] = items.category_ids
        self._events.ratings[written] = items.ratings
        self._events.actions[written] = items.actions
        self._events.timestamps[written] = timestamps
        self._num_written = written.stop


class ReturningUsers:
    """The stream of visits; a user's visits are a function of (config, user) alone."""

    def __init__(self, config: ReturningUsersConfig) -> None:
        self.config = config
        self._model = EventModel(config)
        self._seat_weights: FloatArray | None = None
        if config.user_zipf is not None:
            rng = random_generator(config.seed, Stream.USER_RANKS)
            self._seat_weights = cumulated_zipf(config.num_users, config.user_zipf, rng)

    def visits(self, num_visits: int | None = None) -> Iterator[Visit]:
        """Yields visits from the start of the stream, the same in every call.

        Memory grows with the users who have come and are not gone: about 40 bytes for an event of
        `max_history` and 200 for a candidate of a visit each.

        Args:
            num_visits: how many; None = without end.
        """
        return islice(self._visits(), num_visits)

    def _visits(self) -> Iterator[Visit]:
        rng = random_generator(self.config.seed, Stream.VISIT_ORDER)
        users: dict[int, _User] = {}  # by seat, those who are not gone
        next_ids: dict[int, int] = {}  # by seat that was left
        recent: list[int] = []  # seats of users who are not gone, the latest last
        most_recent = math.ceil(_RECENCY_CUT * self.config.recent_users)
        while True:
            seat = self._choose_seat(rng, recent)
            user = users.get(seat)
            if user is None:
                user = users[seat] = _User(self._model, self.config, next_ids.get(seat, seat))
            yield user.next_visit()
            if user.is_gone:
                del users[seat]
                next_ids[seat] = user.user + self.config.num_users
            else:
                recent.append(seat)
                del recent[:-most_recent]

    def _choose_seat(self, rng: np.random.Generator, recent: list[int]) -> int:
        """Chooses whose turn it is, and takes the seat out of the recent ones."""
        if recent and rng.random() < self.config.p_return:
            return recent.pop(-self._recency_rank(rng, len(recent)))
        if self._seat_weights is None:
            seat = int(rng.integers(self.config.num_users))
        else:
            draw = rng.random() * self._seat_weights[-1]
            seat = int(np.searchsorted(self._seat_weights, draw, side="right"))
        if seat in recent:
            recent.remove(seat)
        return seat

    def _recency_rank(self, rng: np.random.Generator, num_recent: int) -> int:
        """Draws from the geometric law, cut off at `num_recent`, by inverting its distribution."""
        stays = 1.0 - 1.0 / self.config.recent_users
        if stays == 0.0:
            return 1
        share = rng.random() * (1.0 - stays**num_recent)
        return min(1 + int(math.log1p(-share) / math.log(stays)), num_recent)
