"""What each stretch of time would have cost under every static split, and how far off a run was.

Costs are milliseconds of the device for each request, row loads, prefill and scores, of those that
came in a window; so a queue that a bad split left behind burdens the window it came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from helm_engine.simulator.hindsight import Case, Effort, served_ms
from helm_engine.simulator.schedule import Schedule, constant
from helm_engine.simulator.simulation import FloatArray, Result

WINDOW_S = 5.0
GOOD = 0.01
"""A share is as good as the cheapest if it costs so much more at most."""
_SAMPLES = 10
"""Moments of a window at which the split is looked at."""
_FINE = 0.005
"""Between shares that were run, costs are interpolated with this step."""


@dataclass(frozen=True, slots=True)
class WindowCosts:
    """Costs of warm static splits, by window."""

    begins: FloatArray
    """Seconds after the start, float64 [windows]; windows in which nobody came are left out."""
    shares: FloatArray
    """EMB shares that were reached, ascending, float64 [shares]."""
    cost_ms: FloatArray
    """For each request, float64 [shares, windows]."""

    def cheapest(self) -> Schedule:
        """The cheapest share of each window, from its beginning to the next one's."""
        knots = []
        ends = np.append(self.begins[1:], self.begins[-1] + WINDOW_S)
        best = self.shares[self.cost_ms.argmin(axis=0)]
        for begin, end, share in zip(
            self.begins.tolist(), ends.tolist(), best.tolist(), strict=True
        ):
            knots += [(begin, share), (end - 1e-6, share)]
        return Schedule(tuple(knots))

    def fraction_gap(self, result: Result) -> float:
        """Distance of the committed share to the nearest one within 1 % of the least cost; mean."""
        fine = np.arange(self.shares[0], self.shares[-1] + _FINE / 2, _FINE)
        fine = np.union1d(fine.clip(None, self.shares[-1]), self.shares)
        moments = (np.arange(_SAMPLES) + 0.5) * WINDOW_S / _SAMPLES
        gaps = []
        for begin, costs in zip(self.begins.tolist(), self.cost_ms.T, strict=True):
            cost = np.interp(fine, self.shares, costs)
            good = fine[cost <= (1.0 + GOOD) * cost.min()]
            here = committed_at(result, begin + moments)
            gaps.append(np.abs(here[:, None] - good).min(axis=1).mean())
        return float(np.mean(gaps))

    def regret_ms(self, result: Result) -> float:
        """What the run cost for each request beyond the least; the mean over windows."""
        mine = cost_by_window(result.trace.arrivals, served_ms(result), self.begins)
        return float(np.nanmean(mine - self.cost_ms.min(axis=0)))


def window_costs(case: Case, effort: Effort) -> WindowCosts:
    """Runs every `coarse_step`th static share at the scale of the search."""
    workload, scale = case.workload, effort.search_scale
    coarse = case.grid(effort.coarse_step)
    runs = [case.run(constant(share), scale) for share in coarse]
    arrivals = case.trace(scale).arrivals
    begins = np.arange(workload.warm_up_s, workload.ends[-1], WINDOW_S)
    costs = np.array([cost_by_window(arrivals, served_ms(one), begins) for one in runs])
    somebody = ~np.isnan(costs).any(axis=0)
    shares = np.array([case.reached(share, scale) for share in coarse])
    return WindowCosts(begins[somebody], shares, costs[:, somebody])


def cost_by_window(arrivals: FloatArray, service_ms: FloatArray, begins: FloatArray) -> FloatArray:
    """Milliseconds for each request that came in a window, float64 [windows].

    Requests that failed (NaN) do not count; NaN = there was no other.
    """
    first = np.searchsorted(arrivals, begins)
    last = np.searchsorted(arrivals, begins + WINDOW_S)
    spent = np.concatenate([[0.0], np.nancumsum(service_ms)])
    number = np.concatenate([[0], np.cumsum(~np.isnan(service_ms))])
    with np.errstate(invalid="ignore"):
        return np.asarray((spent[last] - spent[first]) / (number[last] - number[first]))


def committed_at(result: Result, seconds: FloatArray) -> FloatArray:
    """EMB's share of the pages as the step before each moment found it, float64 [moments]."""
    steps = result.steps
    place = np.searchsorted(steps["began_s"], seconds, side="right") - 1
    return np.asarray(steps["emb_pages"][place.clip(0)] / result.num_pages)
