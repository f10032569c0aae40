"""Events of the setting `production`: rows are reused as often as published traces say.

The figures are Meta's, of one batch of its 2022 synthetic data set of embedding lookups, whose
reuse is that of training its production ads models (facebookresearch/dlrm_datasets, MIT licence,
README and embedding_bag/2022/locality_stats.txt; 16 batches agree to the third digit): how many
lookups go to rows that the batch reads once, twice, three or four times, and so on. Its 131,072
samples look up 1.405 billion rows of 788 tables, 10,700 a sample; 110 million rows are met at all.

A row that is looked up at a rate of x per batch is met a Poisson number of times. So the published
shares are those of a mixture of Poisson laws, and the mixture that explains them best says which
share of the lookups goes to rows of which rate (Richardson 1972, Lucy 1974). The catalogue consists
of these classes of rows. It has many times fewer rows than the tables, and a batch in proportion
fewer lookups: how often a row is reused stays.

Nothing is published of what the rows of one sample have in common; draws are independent. With a
drift of d, rank r at time t is item (r - d t) mod the number of items.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from helm_engine.simulator.events.law import Asked, Drawn, Int64Array, uniform
from helm_engine.simulator.workloads import Regime

FloatArray = npt.NDArray[np.float64]

USES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, math.inf)
"""Bins of how often a row is met: above USES[i], up to USES[i + 1]."""
LOOKUP_SHARES = (
    0.027, 0.023, 0.040, 0.068, 0.105, 0.120, 0.099, 0.070, 0.059, 0.054, 0.040, 0.072, 0.064,
    0.047, 0.021, 0.017, 0.076,
)  # fmt: skip
"""Published: of all lookups, those of rows in each bin; the sum is 1.002 by rounding."""
ROW_SHARES = (
    0.342, 0.144, 0.149, 0.138, 0.112, 0.068, 0.029, 0.010, 0.004, 0.002, 0.001, 0.001, 0.000,
    0.000, 0.000, 0.000, 0.000,
)  # fmt: skip
"""Published: of all rows that are met, those in each bin. Nothing is fitted to it."""
USES_PER_ROW = 12.7
"""Published: lookups for each row that is met. Nothing is fitted to it."""

_RATES = 2.0 ** np.arange(-2.75, 17.0, 0.5)
"""Lookups per batch, none at the edge of a bin. Rows of lower rates hardly count; nothing is known
of higher ones."""
_ROUNDS = 3000
_ALMOST_NORMAL = 400.0
"""From this rate on a Poisson law is taken for a normal one."""


class RowClasses(NamedTuple):
    """Rows that are alike, the most popular first."""

    lookup_shares: FloatArray
    """Of all lookups, float64 [classes]; the sum is 1."""
    row_shares: FloatArray
    """Of all rows, float64 [classes]; the sum is 1."""
    lookups_per_row: float
    """Of a batch, for each row of the catalogue."""


def fit_row_classes() -> RowClasses:
    """The classes of rows that explain the published shares of lookups."""
    published = np.array(LOOKUP_SHARES) / sum(LOOKUP_SHARES)
    # A lookup goes to a row that is met by the others a Poisson number of times, and by itself.
    explains = np.array(
        [[_at_most(most - 1, rate) for rate in _RATES] for most in USES[1:]]
    )  # [bins, rates]
    explains = np.diff(explains, axis=0, prepend=0.0)
    shares = np.full(len(_RATES), 1.0 / len(_RATES))
    for _ in range(_ROUNDS):
        shares *= explains.T @ (published / (explains @ shares))
    rows = shares / _RATES
    return RowClasses(shares[::-1], rows[::-1] / rows.sum(), 1.0 / float(rows.sum()))


def _at_most(number: float, rate: float) -> float:
    """Probability that a Poisson number of this rate is at most so large."""
    if number == math.inf:
        return 1.0
    if rate > _ALMOST_NORMAL:
        return 0.5 * math.erfc((rate - number - 0.5) / math.sqrt(2.0 * rate))
    numbers = np.arange(int(number) + 1)
    logs_of_factorials = np.cumsum(np.log(np.maximum(numbers, 1)))
    return float(np.exp(numbers * math.log(rate) - rate - logs_of_factorials).sum())


class ProductionLaw:
    """See `EventLaw`; every visit brings as many new events as its regime says."""

    def __init__(self, num_items: int, regimes: list[Regime]) -> None:
        """Scales the classes to a catalogue of so many rows, at least one for each class."""
        classes = fit_row_classes()
        ends = np.rint(np.cumsum(classes.row_shares) * num_items).astype(np.int64)
        least = np.arange(len(ends)) + 1
        self._row_bounds = np.concatenate([[0], np.maximum(ends, least)]).astype(np.int64)
        self._num_items = num_items
        self._lookup_ends = np.cumsum(classes.lookup_shares)
        self._new_events = np.array([one.new_events for one in regimes], dtype=np.int64)

    def new_events(self, regimes: Int64Array, rng: np.random.Generator) -> Int64Array:
        """See `EventLaw.new_events`."""
        events: Int64Array = self._new_events[regimes]
        return events

    def draw(self, asked: Asked, rng: np.random.Generator, keys: tuple[int, int]) -> Drawn:
        """See `EventLaw.draw`."""
        first_drift = asked.drift[asked.first_visits]
        return Drawn(
            self._draw(asked.first_bounds, first_drift, keys[0]),
            self._draw(asked.shown_bounds, asked.drift, keys[1]),
        )

    def _draw(self, bounds: Int64Array, drift: Int64Array, key: int) -> Int64Array:
        items: Int64Array = _draw(
            bounds, drift, self._lookup_ends, self._row_bounds, self._num_items, np.uint64(key)
        )
        return items


@njit(nogil=True, cache=True)
def _draw(
    bounds: Any, drift: Any, lookup_ends: Any, row_bounds: Any, num_items: Any, key: Any
) -> Any:
    items = np.empty(bounds[-1], dtype=np.int64)
    last = len(lookup_ends) - 1
    for bag in range(len(drift)):
        for number in range(bounds[bag], bounds[bag + 1]):
            found = np.searchsorted(lookup_ends, uniform(2 * number, key), side="right")
            begin, end = row_bounds[min(found, last)], row_bounds[min(found, last) + 1]
            rank = begin + np.int64(uniform(2 * number + 1, key) * (end - begin))
            items[number] = (rank - drift[bag]) % num_items
    return items
