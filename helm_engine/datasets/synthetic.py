"""A synthetic streaming workload with the formulas of MLPerf Inference DLRMv3.

The published workload is the default; beyond it there are Zipf items, Zipf users, whole seconds
as event times, and an urn that every event reinforces. A user's events are a function of
(config, user), in whatever order users are asked for.

Time goes in steps: a base history (step -1), training steps, then inference steps. A user who is
present in a step makes one visit: a request, whose events join the history that later steps see.
Between training and inference lies one evaluation visit; its events join no history, though they
count where categories are chosen.

Published generator (Apache-2.0), read for its formulas: github.com/meta-recsys/
generative-recommenders, generative_recommenders/dlrm_v3/streaming_synthetic_data.py, and its
reader, datasets/synthetic_streaming.py; github.com/mlcommons/inference has a copy of both under
recommendation/dlrm_v3. Where this one differs by default:

- The quality of an item is a hash of its id: a table for 1e9 items would take 8 GB.
- The drift of ratings has exact cosines; in the original, rounding decides on which side of the
  label some ratings of 3.5 fall.
- A visit to an inference step adds at most `num_candidates` events; the original fails there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from helm_engine.datasets.event_model import (
    BASE_STEP,
    MAX_COUNT,
    MAX_ZIPF_EXPONENT,
    EventConfig,
    EventModel,
    Events,
    FloatArray,
    HashedUniforms,
    Int64Array,
    RatedItems,
    Stream,
    random_generator,
)

__all__ = ["Request", "SyntheticConfig", "SyntheticWorkload", "UserEvents"]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(EventConfig):
    """Sizes and switches; the defaults are the benchmark's: the first 1 % of the published users.

    Raises:
        ValueError: a value is out of range; names the field and its limits.
    """

    num_users: int = 50_000
    user_zipf: float | None = None
    """Exponent of the users' probabilities of being present, which are scaled to
    `appearance_probability` and capped at 1; None = all alike. Ranks are spread over the ids at
    random."""
    appearance_probability: float = 0.7
    """Mean over users of the probability of being present in a step."""
    events_mean: float = 100.0
    """New events per visit: normal, rounded, at least `events_min`."""
    events_sd: float = 25.0
    events_min: int = 33
    num_candidates: int = 2048
    """Candidates in an inference step; a random part of them are the visit's new events."""
    num_train_candidates: int = 32
    """Candidates in a training step, a random part of the visit's new events, and in the
    evaluation."""

    def limits(self) -> dict[str, tuple[float, float]]:
        """Returns the least and the largest value of every numeric field."""
        return super().limits() | {
            "num_users": (1, MAX_COUNT),
            "user_zipf": (0, MAX_ZIPF_EXPONENT),
            "appearance_probability": (0, 1),
            "events_mean": (1, MAX_COUNT),
            "events_sd": (0, MAX_COUNT),
            "events_min": (1, MAX_COUNT),
            "num_candidates": (self.events_min, MAX_COUNT),
            "num_train_candidates": (1, self.events_min),
        }


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """One question: which of the candidates does the user like, given the history?"""

    user: int
    step: int
    request_time: int
    """When the visit begins, in seconds, or 1; no event of the history is later."""
    history: Events
    candidates: RatedItems
    """Their `labels` are the answer."""


@dataclass(frozen=True, eq=False, slots=True)
class _Visits:
    """A user's visits in order; the base history is the first."""

    steps: Int64Array
    evaluation: int
    """Which visit is the evaluation; its step is that of the first inference."""
    history_lengths: Int64Array
    """Number of events before each visit."""
    begins: Int64Array
    """When each visit begins."""
    candidate_places: list[Int64Array]
    """Where the candidates of each visit are among all that was drawn; none for the base."""


@dataclass(frozen=True, eq=False, slots=True)
class UserEvents:
    """All events of one user over all steps."""

    user: int
    categories: Int64Array
    """The user's categories, most liked first, int64 [categories_per_user]."""
    events: Events
    """The history after the last step; that of every step is a beginning of it."""
    steps: Int64Array
    """Step of each event, non-decreasing, int64 [len(events)]."""
    _visits: _Visits
    _drawn: RatedItems

    def history_length(self, step: int) -> int:
        """Returns how many events the history has when a step begins."""
        return int(np.searchsorted(self.steps, step))

    def history(self, step: int) -> Events:
        """Returns the events before a step, as read-only views."""
        return self.events.first(self.history_length(step))

    def request(self, step: int) -> Request:
        """Returns the request of a training or inference step.

        Raises:
            ValueError: the user makes none in this step.
        """
        found = np.flatnonzero(self._visits.steps == step)
        found = found[found != self._visits.evaluation]
        if step == BASE_STEP or len(found) == 0:
            raise ValueError(f"step: user {self.user} makes no request in step {step}")
        return self._request(int(found[0]))

    def evaluation(self) -> Request:
        """Returns the request between training and inference, which every user makes."""
        return self._request(self._visits.evaluation)

    def _request(self, visit: int) -> Request:
        visits = self._visits
        return Request(
            self.user,
            int(visits.steps[visit]),
            int(visits.begins[visit]),
            self.events.first(int(visits.history_lengths[visit])),
            self._drawn.take(visits.candidate_places[visit]),
        )


class SyntheticWorkload:
    """Users and their requests; keeps no events, so every call draws them anew."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self._model = EventModel(config)
        self._presence_draws = HashedUniforms(config.seed, Stream.PRESENCE)
        self._length_draws = HashedUniforms(config.seed, Stream.LENGTHS)
        self._presence: FloatArray | None = None
        if config.user_zipf is not None:
            by_rank = capped_zipf_probabilities(
                config.num_users, config.user_zipf, config.appearance_probability
            )
            self._presence = random_generator(config.seed, Stream.USER_RANKS).permutation(by_rank)

    def new_events(self, users: Int64Array, steps: Int64Array) -> Int64Array:
        """Returns how many events join the histories of users in steps.

        Args:
            users: int64 [users].
            steps: -1 (the base history) to num_steps - 1, int64 [steps].

        Returns:
            int64 [users, steps]; 0 where the user is not present, and only there.
        """
        config = self.config
        numbers = users[:, None] * (config.num_steps + 1) + steps + 1
        probability: float | FloatArray = config.appearance_probability
        if self._presence is not None:
            probability = self._presence[users][:, None]
        present = (self._presence_draws(numbers) < probability) | (steps == BASE_STEP)
        lengths = np.rint(config.events_mean + config.events_sd * self._normal_draws(numbers))
        # The events of an inference step are a part of its candidates.
        most = np.where(steps < config.num_train_steps, MAX_COUNT, config.num_candidates)
        joining: Int64Array = np.clip(lengths, config.events_min, most).astype(np.int64) * present
        return joining

    def _normal_draws(self, numbers: Int64Array) -> FloatArray:
        """Standard normal draws by number: Box and Muller's transform of two uniform ones."""
        radius = np.sqrt(-2.0 * np.log1p(-self._length_draws(2 * numbers)))
        draws: FloatArray = radius * np.cos(2.0 * math.pi * self._length_draws(2 * numbers + 1))
        return draws

    def user(self, user: int) -> UserEvents:
        """Draws all events of a user.

        Raises:
            ValueError: user is not in 0..num_users - 1.
        """
        config = self.config
        if not 0 <= user < config.num_users:
            raise ValueError(f"user: is {user}, expected 0 to {config.num_users - 1}")
        all_steps = np.arange(BASE_STEP, config.num_steps)
        joining = self.new_events(np.array([user]), all_steps)[0]
        steps, joining = all_steps[joining > 0], joining[joining > 0]
        evaluation = int(np.searchsorted(steps, config.num_train_steps))
        steps = np.insert(steps, evaluation, config.num_train_steps)
        joining = np.insert(joining, evaluation, 0)
        lengths = np.where(steps < config.num_train_steps, joining, config.num_candidates)
        lengths[evaluation] = config.num_train_candidates

        rng = random_generator(config.seed, Stream.EVENTS, user)
        taste = self._model.new_taste(rng)
        drawn = self._model.draw(rng, taste, steps, lengths)
        event_places, candidate_places = self._split(rng, steps, joining, lengths)
        time_rng = random_generator(config.seed, Stream.TIMES, user)
        begins, timestamps = self._model.times(time_rng, steps + 1, joining)

        items = drawn.take(event_places)
        events = Events(
            items.item_ids, items.category_ids, items.ratings, items.actions, timestamps
        )
        before = np.cumsum(joining) - joining
        visits = _Visits(steps, evaluation, before, begins, candidate_places)
        return UserEvents(user, taste.categories, events, np.repeat(steps, joining), visits, drawn)

    def _split(
        self, rng: np.random.Generator, steps: Int64Array, joining: Int64Array, lengths: Int64Array
    ) -> tuple[Int64Array, list[Int64Array]]:
        """Chooses what becomes history and what is a candidate, by visit.

        Before inference all that is drawn joins the history and a random part is asked about;
        from then on all is asked about and a random part joins the history.

        Returns:
            Places of the history, and places of the candidates of each visit, among all drawn.
        """
        history: list[Int64Array] = []
        candidates: list[Int64Array] = []
        begins = np.cumsum(lengths) - lengths
        for step, begin, num_joining, length in zip(steps, begins, joining, lengths, strict=True):
            everything = np.arange(begin, begin + length)
            shuffled = rng.permutation(everything)
            if step < self.config.num_train_steps:
                num_candidates = 0 if step == BASE_STEP else self.config.num_train_candidates
                history.append(everything)
                candidates.append(shuffled[:num_candidates])
            else:
                history.append(shuffled[:num_joining])
                candidates.append(everything)
        return np.concatenate(history), candidates

    def users_of(self, step: int) -> Int64Array:
        """Returns the users present in a step, in the shuffled order of their requests.

        Raises:
            ValueError: the step is not in 0..num_steps - 1.
        """
        if not 0 <= step < self.config.num_steps:
            raise ValueError(f"step: is {step}, expected 0 to {self.config.num_steps - 1}")
        joining = self.new_events(np.arange(self.config.num_users), np.array([step]))[:, 0]
        rng = random_generator(self.config.seed, Stream.REQUEST_ORDER, step)
        return rng.permutation(np.flatnonzero(joining))

    def requests(self, step: int) -> Iterator[Request]:
        """Yields the requests of a training or inference step.

        To replay many steps of few users, keep their `UserEvents` and ask those.
        """
        for user in self.users_of(step).tolist():
            yield self.user(user).request(step)


def capped_zipf_probabilities(size: int, exponent: float, mean: float) -> FloatArray:
    """Returns min(1, scale * rank**-exponent) for ranks 1..size, scaled to a mean; float64 [size].

    The cap flattens the law at its head: the more, the nearer the mean is to 1.
    """
    weights = np.arange(1.0, size + 1.0) ** -exponent
    tails = np.cumsum(weights[::-1])[::-1]
    # With k at the cap, the others share the rest; the least k where none of them exceeds 1 is
    # the one. The tolerance is for a mean of 1, where they exceed it by rounding.
    scales = (mean * size - np.arange(size)) / tails
    scale = scales[np.argmax(scales * weights <= 1.0 + 1e-9)]
    probabilities: FloatArray = np.minimum(1.0, scale * weights)
    return probabilities
