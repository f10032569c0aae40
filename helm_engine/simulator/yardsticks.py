"""What would have been best, known afterwards: yardsticks for controllers, by name.

`best_static` is the share with the least P99 among static ones, `best_schedule` the best of a
family of schedules under the slew limit of controllers, `oracle` the cheapest share of each window,
which no boundary could follow. Each looks at the very requests that a controller is measured on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from helm_engine.simulator.hindsight import Case, Effort, p99_ms, p99_of, served_ms
from helm_engine.simulator.oracle import window_costs
from helm_engine.simulator.schedule import Schedule, ScheduleFamily, constant
from helm_engine.simulator.simulation import FloatArray

_STEP = 0.02
_FIRST_SHARE, _LAST_SHARE = 0.12, 0.015
"""Steps of the search in shares, from the first to the last."""
_FIRST_S = 10.0
"""The first step in leads and spans, seconds; a quarter of the ramp where that is more."""
_VERIFIED = 3
"""Schedules of the search that are measured at the scale of the result."""


def best_static(case: Case, effort: Effort) -> Schedule:
    """The static share with the least P99.

    At the scale of the search every `coarse_step`th share of the grid is run. Those that come
    within the tolerance are measured at the scale of the result, then the neighbours on the grid
    of the best one, until both neighbours of the best are known to be worse.
    """
    coarse = case.grid(effort.coarse_step)
    rough = {share: case.static_p99(share, effort.search_scale) for share in coarse}
    limit = min(rough.values()) * (1.0 + effort.tolerance)
    close = sorted((one for one in coarse if rough[one] <= limit), key=rough.__getitem__)
    grid, scale = case.grid(), effort.scale
    found = {share: case.static_p99(share, scale) for share in close[: effort.most_verified]}
    if effort.search_scale == scale:
        found = dict(rough)
    while True:
        best = min(found, key=found.__getitem__)
        place = grid.index(best)
        beside = [share for share in grid[max(0, place - 1) : place + 2] if share not in found]
        if not beside:
            return constant(best)
        found |= {share: case.static_p99(share, scale) for share in beside}


def best_schedule(case: Case, effort: Effort) -> Schedule:
    """The schedule with the least P99 that a search finds; never worse than the best static one.

    The search begins with the best static share, with the best share of each kind of regime by P99
    and by milliseconds of service, and half-way between; it goes on coordinate by coordinate from
    the best of them, with smaller steps where none of them helps. What was best is measured at the
    scale of the result beside the best static share.
    """
    static = best_static(case, effort)
    family = ScheduleFamily(case.workload)
    if family.num_kinds == 1:
        return static  # Constants are all that the family has.
    search = _Search(case, family, effort)
    for vector in _beginnings(case, family, static.knots[0][1], effort):
        search.cost(vector)
    search.descend()
    candidates = [family.schedule(vector) for vector in search.best(_VERIFIED)]
    measured = {static: p99_of(case.run(static, effort.scale))}
    for schedule in candidates:
        measured[schedule] = p99_of(case.run(schedule, effort.scale))
    return min(measured, key=measured.__getitem__)


def oracle(case: Case, effort: Effort) -> Schedule:
    """The cheapest share of every window; not under the slew limit, and not to be run."""
    return window_costs(case, effort).cheapest()


Yardstick = Callable[[Case, Effort], Schedule]

YARDSTICKS: dict[str, Yardstick] = {
    "best_static": best_static,
    "best_schedule": best_schedule,
    "oracle": oracle,
}


def find_yardstick(name: str, case: Case, effort: Effort) -> Schedule:
    """What would have been best, in the sense of a yardstick.

    Raises:
        ValueError: the name is unknown; lists those that are known.
    """
    if name not in YARDSTICKS:
        raise ValueError(f"yardstick: {name!r} is unknown (known: {', '.join(YARDSTICKS)})")
    return YARDSTICKS[name](case, effort)


class _Search:
    """A pattern search (Hooke and Jeeves 1961) over the vectors of a family, within a budget."""

    def __init__(self, case: Case, family: ScheduleFamily, effort: Effort) -> None:
        self._case = case
        self._family = family
        self._scale = effort.search_scale
        self._left = effort.evaluations
        self._costs: dict[tuple[float, ...], float] = {}

    def cost(self, vector: FloatArray) -> float:
        """P99 at the scale of the search; infinite once the budget is spent."""
        config = self._case.config
        vector = self._family.clipped(vector, config.least_share, config.largest_share)
        key = tuple(vector.round(6).tolist())
        if key not in self._costs:
            if self._left <= 0:
                return float("inf")
            self._left -= 1
            schedule = self._family.schedule(np.array(key))
            self._costs[key] = p99_of(self._case.run(schedule, self._scale))
        return self._costs[key]

    def best(self, number: int) -> list[FloatArray]:
        """So many vectors, the best first."""
        ordered = sorted(self._costs, key=self._costs.__getitem__)
        return [np.array(key) for key in ordered[:number]]

    def descend(self) -> None:
        """From the best so far, a coordinate at a time, until steps are small or nothing is left.

        A coordinate that helped goes on in its direction; one that helps in neither direction is
        halved.
        """
        kinds, ramps = self._family.num_kinds, self._family.ramps
        moves = [max(_FIRST_S, ramp / 4.0) for ramp in ramps for _ in ("lead", "span")]
        steps = np.array([_FIRST_SHARE] * kinds + moves)
        while self._left > 0 and steps[:kinds].max() >= _LAST_SHARE:
            for place in range(len(steps)):
                (current,) = self.best(1)
                before = self.cost(current)
                step = np.zeros(len(steps))
                step[place] = steps[place]
                if self.cost(current + step) < before:
                    continue
                if self.cost(current - step) < before:
                    steps[place] *= -1.0
                else:
                    steps[place] /= 2.0


def _beginnings(
    case: Case, family: ScheduleFamily, static: float, effort: Effort
) -> list[FloatArray]:
    """Where the search begins, from static runs at its scale."""
    coarse = case.grid(effort.coarse_step)
    trace = case.trace(effort.search_scale)
    runs = [case.run(constant(share), effort.search_scale) for share in coarse]
    kinds = np.array(family.kind_of)[trace.regimes]
    counted = trace.arrivals >= case.workload.warm_up_s
    by_p99, by_service = [], []
    for kind in range(family.num_kinds):
        mine = counted & (kinds == kind)
        by_p99.append(coarse[int(np.argmin([p99_ms(one.latencies_ms[mine]) for one in runs]))])
        by_service.append(
            coarse[int(np.argmin([np.nanmean(served_ms(one)[mine]) for one in runs]))]
        )
    flat = [static] * family.num_kinds
    middle = [(static + one) / 2.0 for one in by_service]
    ways = (False, True) if any(family.ramps) else (False,)
    return [
        family.vector(flat, follows_ramps=False),
        *(
            family.vector(shares, follows)
            for shares in (by_service, middle, by_p99)
            for follows in ways
        ),
    ]
