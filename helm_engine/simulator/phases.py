"""Phases of a trace that nobody wrote regimes for: stretches that are cheapest at other splits.

Time is cut into stretches of equal length. The cheapest static share of each is known from runs of
static splits; shares are parted into two kinds, low and high, where that leaves the least squared
distance to each kind's mean (Otsu's criterion, weighted with requests). Neighbours of one kind are
one phase.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from helm_engine.simulator.oracle import WINDOW_S, WindowCosts
from helm_engine.simulator.recording import Stretch
from helm_engine.simulator.simulation import FloatArray

_STRETCHES = 24
_SHORTEST_S = 4 * WINDOW_S
"""Shorter stretches have too few requests to tell what is cheap."""
_LEAST_APART = 0.06
"""Kinds whose mean shares are nearer are one."""


def phases_of(costs: WindowCosts, arrivals: FloatArray, begin: float, end: float) -> list[Stretch]:
    """Cuts a stretch of time.

    Args:
        costs: of warm static splits, by window; one window at least.
        arrivals: seconds, ascending, float64 [n].
        begin: seconds; no window begins before.
        end: seconds.
    """
    number = int(np.clip((end - begin) // _SHORTEST_S, 1, _STRETCHES))
    bounds = np.linspace(begin, end, number + 1)
    stretch_of = np.searchsorted(bounds[1:-1], costs.begins, side="right")
    requests = requests_of(costs, arrivals)
    spent = costs.cost_ms * requests
    weights = np.bincount(stretch_of, requests, number).astype(np.float64)
    by_stretch = np.array([np.bincount(stretch_of, one, number) for one in spent])
    cheapest = costs.shares[by_stretch.argmin(axis=0)]
    kinds = _two_kinds(cheapest, weights)
    phases: list[Stretch] = []
    place = 0
    for kind, group in groupby(kinds.tolist()):
        first, place = place, place + len(list(group))
        name = f"phase {len(phases) + 1}"
        phases.append(Stretch(name, float(bounds[place] - bounds[first]), kind))
    return phases


def requests_of(costs: WindowCosts, arrivals: FloatArray) -> FloatArray:
    """Requests that came in each window, float64 [windows]."""
    first = np.searchsorted(arrivals, costs.begins)
    last = np.searchsorted(arrivals, costs.begins + WINDOW_S)
    return (last - first).astype(np.float64)


def _two_kinds(shares: FloatArray, weights: FloatArray) -> np.ndarray:
    """0 or 1 for each stretch; all 0 where the two would be alike. Empty stretches join below."""
    best, kinds = np.inf, np.zeros(len(shares), dtype=np.int64)
    for bound in np.unique(shares)[1:]:
        high = shares >= bound
        parts = [(shares[one], weights[one]) for one in (~high, high)]
        if any(not weight.sum() for _, weight in parts):
            continue
        means = [float(np.average(share, weights=weight)) for share, weight in parts]
        away = sum(
            float((weight * (share - mean) ** 2).sum())
            for (share, weight), mean in zip(parts, means, strict=True)
        )
        if away < best and means[1] - means[0] >= _LEAST_APART:
            best, kinds = away, high.astype(np.int64)
    return kinds
