"""What a synthetic user does in a visit: category, item, rating and time of every event.

The formulas are those of MLPerf Inference DLRMv3's generator; `synthetic` names the source and
says what differs. All of it is vectorised over the events of a visit or of many visits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

BASE_STEP = -1
LABEL_THRESHOLD = 3.5
FIRST_SECOND = 1_577_836_800  # 2020-01-01, so that times have the size that a server meets
STEP_S = 86_400
MEAN_GAP_S = 30  # between the events of a visit: one of short videos, say

_MAX_ALPHA = 500
MAX_COUNT = 2**31  # products of two counts stay within int64
_MAX_ZIPF_ITEMS = 2**27  # the tables of all categories together take 8 bytes per item: 1 GiB
MAX_ZIPF_EXPONENT = 10.0  # the first item has 99.9 % of the events


@dataclass(frozen=True, kw_only=True)
class EventConfig:
    """The catalogue and the laws of events, as published by default.

    Raises:
        ValueError: a value is out of range; names the field and its limits.
    """

    num_items: int = 1_000_000_000
    """Ids are 0..num_items - 1. A category owns num_items // num_categories consecutive ones; ids
    left over at the end never occur."""
    num_categories: int = 128
    categories_per_user: int = 4
    num_train_steps: int = 90
    num_inference_steps: int = 10
    item_zipf: float | None = None
    """Exponent of the popularity of items inside a category; None = uniform. Ranks are spread over
    the ids at random, so popular items are among those that appear late, too."""
    reinforced_by: Literal["visit", "event"] = "visit"
    """When the choice of a category makes it more likely: from the next visit on (published), or
    from the next event on (a Pólya urn)."""
    timestamps: Literal["ones", "seconds"] = "ones"
    """All event times are 1 (published), or whole seconds: a step is a day, and in it a visit is
    a session of about 30 seconds per event."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, (low, high) in self.limits().items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:  # NaN is refused, too
                raise ValueError(f"{field}: is {value}, expected {low:,} to {high:,}")
        for field, allowed in (
            ("reinforced_by", ("visit", "event")),
            ("timestamps", ("ones", "seconds")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: is {getattr(self, field)!r}, expected one of {allowed}")

    def limits(self) -> dict[str, tuple[float, float]]:
        """Returns the least and the largest value of every numeric field."""
        return {
            "num_items": (1, MAX_COUNT if self.item_zipf is None else _MAX_ZIPF_ITEMS),
            "num_categories": (1, self.num_items),
            "categories_per_user": (1, self.num_categories),
            "num_train_steps": (0, MAX_COUNT),
            "num_inference_steps": (0 if self.num_train_steps else 1, MAX_COUNT),
            "item_zipf": (0, MAX_ZIPF_EXPONENT),
            "seed": (0, 2**63 - 1),
        }

    @property
    def num_steps(self) -> int:
        """Training and inference steps; the base history is not counted."""
        return self.num_train_steps + self.num_inference_steps

    @property
    def items_per_category(self) -> int:
        """Items of every category: the category of an item is its id // items_per_category."""
        return self.num_items // self.num_categories


class Stream(IntEnum):
    """What random numbers are for: each purpose has its own, so that no switch moves the others."""

    PRESENCE = 0
    LENGTHS = 1
    QUALITY = 2
    EVENTS = 3
    TIMES = 4
    ITEM_RANKS = 5
    USER_RANKS = 6
    REQUEST_ORDER = 7
    VISIT_ORDER = 8


def random_generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Returns the generator of one purpose and key (a user, say), whatever others have drawn."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, *key))
    return np.random.Generator(np.random.Philox(sequence))


class HashedUniforms:
    """Uniform draws in [0, 1) that are looked up by number: no state, so any subset in any order.

    The hash is SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014.
    """

    def __init__(self, seed: int, stream: Stream) -> None:
        self._start = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)

    def __call__(self, numbers: Int64Array) -> FloatArray:
        """Returns the draws of the given numbers >= 0, float64 of their shape."""
        bits = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits += self._start
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def cumulated_zipf(size: int, exponent: float, rng: np.random.Generator) -> FloatArray:
    """Cumulated Zipf weights of 0..size - 1, whose popularity ranks are a random permutation.

    To draw from the first n, look up a uniform draw times the n-th value (`searchsorted`, right).
    """
    return np.cumsum((rng.permutation(size) + 1.0) ** -exponent)


@dataclass(frozen=True, eq=False, slots=True)
class RatedItems:
    """Items with what a user thinks of them, such as the candidates of a request."""

    item_ids: Int64Array
    """int64 [n]."""
    category_ids: Int64Array
    """int64 [n]."""
    ratings: FloatArray
    """1 to 5, seldom whole, float64 [n]."""

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def labels(self) -> BoolArray:
        """Whether the user likes the item: rating >= 3.5, bool [n]."""
        return self.ratings >= LABEL_THRESHOLD

    @property
    def actions(self) -> Int64Array:
        """One bit by the whole part of the rating, 1 << (rating - 1), int64 [n]."""
        return np.left_shift(1, self.ratings.astype(np.int64) - 1)

    def take(self, index: Int64Array | slice) -> RatedItems:
        """Returns the items at the given places."""
        return RatedItems(self.item_ids[index], self.category_ids[index], self.ratings[index])


@dataclass(frozen=True, eq=False, slots=True)
class Events:
    """Events of one user, oldest first."""

    item_ids: Int64Array
    """int64 [n]."""
    category_ids: Int64Array
    """int64 [n]."""
    ratings: FloatArray
    """float64 [n]."""
    actions: Int64Array
    """As in `RatedItems`, int64 [n]."""
    timestamps: Int64Array
    """Seconds since 1970, non-decreasing, or all 1; int64 [n]."""

    def __len__(self) -> int:
        return len(self.item_ids)

    def first(self, num_events: int) -> Events:
        """Returns the oldest events, as read-only views."""
        views = (
            self.item_ids[:num_events],
            self.category_ids[:num_events],
            self.ratings[:num_events],
            self.actions[:num_events],
            self.timestamps[:num_events],
        )
        for view in views:
            view.flags.writeable = False
        return Events(*views)


@dataclass(frozen=True, eq=False, slots=True)
class Taste:
    """A user's categories and how often each was chosen; drawing visits adds to the counts."""

    categories: Int64Array
    """Most liked first, int64 [categories_per_user]."""
    counts: Int64Array
    """int64 [categories_per_user]."""


def _drifting_values() -> FloatArray:
    """What a user thinks of a category: by tier, step mod 8 and notch, float64 [4, 8, 3].

    The published values are top - notch / 2 + cos((step + 2 notch) pi / 4) / 2; tier 0 is the
    quarter of the categories that the user likes most.
    """
    half = math.sqrt(0.5)
    cosines = np.array([1.0, half, 0.0, -half, -1.0, -half, 0.0, half])  # exact where it matters
    tops = np.array([4.5, 4.5, 3.5, 2.5])[:, None, None]
    phases, notches = np.arange(8)[:, None], np.arange(3)
    values: FloatArray = tops - notches / 2 + cosines[(phases + 2 * notches) % 8] / 2
    return values


_VALUES = _drifting_values()
# By tier: a uniform draw below the first bound takes notch 0, below the second 1, else 2.
_NOTCH_BOUNDS = np.array([[0.8, 1.0], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
# By a uniform draw times 20: the published shares of qualities 5 to 1 are whole twentieths.
_QUALITIES = np.repeat([5.0, 4.0, 3.0, 2.0, 1.0], [4, 5, 5, 4, 2])


class EventModel:
    """Draws what users do.

    A visit to step t draws, as published:

    - alpha, a whole number, uniform in 1..500;
    - the category of each event, with probabilities proportional to alpha / categories_per_user +
      the number of events that the user's earlier visits drew in the category;
    - items, uniformly or by Zipf weights, among the first max(t + 1, 1) / num_steps of the ids of
      the category: new items appear in every step;
    - ratings, the mean of what the user thinks of the category in this step and of the quality of
      the item, which is 5, 4, 3, 2 or 1 for good, with probabilities .2, .25, .25, .2, .1.
    """

    def __init__(self, config: EventConfig) -> None:
        self._config = config
        self._quality = HashedUniforms(config.seed, Stream.QUALITY)
        self._popularity: dict[int, FloatArray] = {}

    def new_taste(self, rng: np.random.Generator) -> Taste:
        """Draws the categories of a user; all counts are 0."""
        size = self._config.categories_per_user
        chosen = rng.choice(self._config.num_categories, size=size, replace=False)
        return Taste(chosen.astype(np.int64), np.zeros(size, np.int64))

    def draw(
        self, rng: np.random.Generator, taste: Taste, steps: Int64Array, lengths: Int64Array
    ) -> RatedItems:
        """Draws the events of a user's next visits.

        Args:
            rng: the user's generator.
            taste: its counts are raised by the events drawn.
            steps: step of each visit, -1 or later, int64 [visits].
            lengths: number of events of each visit, int64 [visits].

        Returns:
            The events of all visits, one visit after the other.
        """
        places = self._choose_places(rng, taste.counts, lengths)
        category_ids = taste.categories[places]
        item_ids = self._choose_items(rng, category_ids, taste, steps, lengths)
        ratings = self._rate(rng, item_ids, places, np.repeat(steps % 8, lengths))
        return RatedItems(item_ids, category_ids, ratings)

    def times(
        self, rng: np.random.Generator, days: Int64Array, lengths: Int64Array
    ) -> tuple[Int64Array, Int64Array]:
        """Draws when a user's next visits begin and when their events happen.

        Args:
            rng: the user's generator of times.
            days: day of each visit, 0 for the first, non-decreasing, int64 [visits].
            lengths: number of events of each visit, int64 [visits].

        Returns:
            Beginnings, int64 [visits], and times of events, int64 [sum of lengths],
            non-decreasing, none before its visit begins; in seconds, or all 1.
        """
        total = int(lengths.sum())
        if self._config.timestamps == "ones":
            return np.ones(len(days), np.int64), np.ones(total, np.int64)
        spans = np.minimum(lengths * MEAN_GAP_S, STEP_S)
        begins = (rng.random(len(days)) * (STEP_S - spans)).astype(np.int64)
        begins += FIRST_SECOND + days * STEP_S
        # Given how many events there are, the times of a Poisson process are sorted uniform draws.
        moments = (rng.random(total) * np.repeat(spans, lengths)).astype(np.int64)
        moments += np.repeat(begins, lengths)
        moments.sort()  # the visits lie on different days: only events within one change places
        return begins, moments

    def _choose_places(
        self, rng: np.random.Generator, counts: Int64Array, lengths: Int64Array
    ) -> Int64Array:
        """Draws the place in `Taste.categories` of each event's category."""
        uniforms = rng.random(int(lengths.sum()))
        alphas = rng.integers(1, _MAX_ALPHA, size=len(lengths), endpoint=True)
        ends = np.cumsum(lengths)
        places = np.empty(len(uniforms), np.int64)
        for alpha, begin, end in zip(alphas, ends - lengths, ends, strict=True):
            weights = alpha / len(counts) + counts
            if self._config.reinforced_by == "event":
                # A Pólya urn need not be played event by event: its draws are exchangeable, so by
                # de Finetti's theorem they are independent given their limiting shares, and
                # those are Dirichlet distributed with the weights that the urn starts with
                # (Blackwell and MacQueen 1973). Gamma draws are such shares but for their sum.
                weights = rng.standard_gamma(weights)
            bounds = np.cumsum(weights)
            chosen = np.searchsorted(bounds[:-1], uniforms[begin:end] * bounds[-1], side="right")
            places[begin:end] = chosen
            counts += np.bincount(chosen, minlength=len(counts))
        return places

    def _choose_items(
        self,
        rng: np.random.Generator,
        category_ids: Int64Array,
        taste: Taste,
        steps: Int64Array,
        lengths: Int64Array,
    ) -> Int64Array:
        size = self._config.items_per_category
        # At least one item: a category of a small catalogue may have fewer items than steps.
        appeared = size * np.maximum(steps + 1, 1) // self._config.num_steps
        appeared = np.repeat(np.clip(appeared, 1, size), lengths)
        uniforms = rng.random(len(category_ids))
        offsets = (uniforms * appeared).astype(np.int64)
        if self._config.item_zipf is not None:
            for category in taste.categories:
                mine = category_ids == category
                table = self._popularity_of(int(category), self._config.item_zipf)
                limits = table[appeared[mine] - 1]
                offsets[mine] = np.searchsorted(table, uniforms[mine] * limits, side="right")
        item_ids: Int64Array = category_ids * size + offsets
        return item_ids

    def _popularity_of(self, category: int, exponent: float) -> FloatArray:
        """Cumulated weights of a category's items in the order of their ids, kept once made."""
        table = self._popularity.get(category)
        if table is None:
            rng = random_generator(self._config.seed, Stream.ITEM_RANKS, category)
            table = cumulated_zipf(self._config.items_per_category, exponent, rng)
            self._popularity[category] = table
        return table

    def _rate(
        self,
        rng: np.random.Generator,
        item_ids: Int64Array,
        places: Int64Array,
        phases: Int64Array,
    ) -> FloatArray:
        tiers = places * 4 // self._config.categories_per_user
        draws = rng.random(len(places))
        bounds = _NOTCH_BOUNDS[tiers]
        notches = (draws >= bounds[:, 0]).astype(np.int64) + (draws >= bounds[:, 1])
        qualities = _QUALITIES[(self._quality(item_ids) * 20).astype(np.int64)]
        ratings: FloatArray = (_VALUES[tiers, phases, notches] + qualities) / 2
        return ratings
