"""Splits of the pool over time that are known beforehand, under the slew limit of controllers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from helm_engine.simulator.simulation import FloatArray, Split
from helm_engine.simulator.workloads import Regime, Workload

_TICK_S = 0.1
"""A target that moves is set anew so often."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """EMB shares that are wanted, and the way between them."""

    knots: tuple[Split, ...]
    """Seconds after the start, ascending, and the share wanted then, 0..1; in between it is on the
    straight line, before the first and after the last as there."""

    def wanted(self, seconds: FloatArray) -> FloatArray:
        """Shares at some moments, float64 of the same shape; no limit is looked at."""
        when, shares = np.array(self.knots).T
        return np.asarray(np.interp(seconds, when, shares), dtype=np.float64)

    def targets(self, start: float, slew_per_s: float, seconds: float) -> list[Split]:
        """What to ask the boundary for, and when; never faster than the limit allows.

        Args:
            start: share of EMB at the beginning.
            slew_per_s: share of the pool by which the target may change in a second.
            seconds: until when.
        """
        times = np.arange(1, int(seconds / _TICK_S) + 1, dtype=np.float64) * _TICK_S
        found: list[Split] = []
        target, most = start, slew_per_s * _TICK_S
        for when, wanted in zip(times.tolist(), self.wanted(times).tolist(), strict=True):
            if wanted != target:
                target += max(-most, min(most, wanted - target))
                found.append((when, target))
        return found


def constant(share: float) -> Schedule:
    """One share all the time."""
    return Schedule(((0.0, share),))


class Change(NamedTuple):
    """A change from regimes of one kind to those of another."""

    before: int
    after: int


class ScheduleFamily:
    """Schedules of a workload: a share for each kind of regime, and when to move between kinds.

    Regimes are of one kind where only name, length and ramp differ. Every change from one kind to
    another has a lead (seconds from the regime's beginning to that of the move, which may be below
    0) and a span (seconds that the move takes, as far as the slew limit allows less). So a schedule
    is a vector, float64 [kinds + 2 * changes]: shares, then a lead and a span for each change.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        kinds: dict[Regime, int] = {}
        self.kind_of = [kinds.setdefault(_kind(one), len(kinds)) for one in workload.regimes]
        """Of each regime."""
        self.num_kinds = len(kinds)
        self._places: dict[Change, int] = {}
        self.ramps: list[float] = []
        """Seconds of the longest ramp of each change."""
        for before, after, regime in self._steps():
            if before == after:
                continue
            place = self._places.setdefault(Change(before, after), len(self._places))
            if place == len(self.ramps):
                self.ramps.append(0.0)
            self.ramps[place] = max(self.ramps[place], regime.ramp_s)

    def _steps(self) -> list[tuple[int, int, Regime]]:
        kinds, regimes = self.kind_of, self._workload.regimes
        return list(zip(kinds[:-1], kinds[1:], regimes[1:], strict=True))

    def vector(self, shares: list[float], follows_ramps: bool) -> FloatArray:
        """Shares of the kinds, and moves that begin with the regime.

        Args:
            shares: of each kind.
            follows_ramps: whether a move takes as long as the ramp, or as little as it can.
        """
        moves = [number for ramp in self.ramps for number in (0.0, ramp if follows_ramps else 0.0)]
        return np.array([*shares, *moves])

    def clipped(self, vector: FloatArray, least: float, largest: float) -> FloatArray:
        """The nearest vector with shares within the bounds and spans of at least 0."""
        found = vector.copy()
        found[: self.num_kinds] = found[: self.num_kinds].clip(least, largest)
        found[self.num_kinds + 1 :: 2] = found[self.num_kinds + 1 :: 2].clip(0.0)
        return found

    def schedule(self, vector: FloatArray) -> Schedule:
        """What a vector stands for; a move that would begin before the last one ended waits."""
        numbers = vector.tolist()
        shares, moves = numbers[: self.num_kinds], numbers[self.num_kinds :]
        knots = [(0.0, shares[self.kind_of[0]])]
        for (before, after, _), begin in zip(self._steps(), self._workload.ends, strict=False):
            if before == after:
                continue
            place = self._places[Change(before, after)]
            lead, span = moves[2 * place : 2 * place + 2]
            when = max(begin + lead, knots[-1][0] + _TICK_S)
            knots += [(when, shares[before]), (when + max(span, _TICK_S), shares[after])]
        return Schedule(tuple(knots))


def _kind(regime: Regime) -> Regime:
    """The regime without what does not make it another kind."""
    return msgspec.structs.replace(regime, name="kind", seconds=1.0, ramp_s=0.0)
