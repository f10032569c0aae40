"""How much longer engines take than their costs say, learned from what comes back.

Predictions for an engine are multiplied by its factor. It follows the measured ratios slowly, so
that one slow request is not a slow engine, and without news it fades to what is usual among the
engines: one that is new, or that nobody dares to use any more, is taken for an ordinary one.
"""

from __future__ import annotations

from math import log

import numpy as np

from router.cost import FloatArray

MAX_FACTOR = 8.0
"""Beyond it, or below its inverse, a ratio says more about a stray request than about speed."""
_NEWS_WEIGHT = 0.05
"""Of one request: the last twenty count."""
_FADE_S = 30.0
"""Seconds without news after which a third is left of what sets an engine apart."""


class Calibration:
    """A factor for each engine slot."""

    def __init__(self) -> None:
        # Logarithms: twice as fast and twice as slow cancel out.
        self._logs = np.zeros(0)
        self._heard_at = np.zeros(0)

    def forget(self, slot: int) -> None:
        """Makes a slot's engine an ordinary one; the slot may be new."""
        new = slot + 1 - len(self._logs)
        if new > 0:
            self._logs = np.append(self._logs, np.zeros(new))
            self._heard_at = np.append(self._heard_at, np.full(new, -np.inf))
        self._heard_at[slot] = -np.inf

    def factors(self, now: float) -> FloatArray:
        """What predictions are to be multiplied by: float64 [E]."""
        factors: FloatArray = np.exp(self._faded(now))
        return factors

    def learn(self, slot: int, ratio: float, now: float) -> None:
        """Takes in that a request took `ratio` times as long as the engine's costs say."""
        faded = self._faded(now)[slot]
        heard = log(min(max(ratio, 1.0 / MAX_FACTOR), MAX_FACTOR))
        self._logs[slot] = faded + _NEWS_WEIGHT * (heard - faded)
        self._heard_at[slot] = now

    def _faded(self, now: float) -> FloatArray:
        is_known = self._heard_at > -np.inf
        usual = self._logs[is_known].mean() if is_known.any() else 0.0
        left = np.exp((self._heard_at - now) / _FADE_S)
        faded: FloatArray = usual + (self._logs - usual) * left
        return faded
