"""What the cells of the controller benchmark come to: ratios, with their means over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]

HEADLINE = ("helm", "best_static", "best_schedule", "marginal", "hill_climb")
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""
_RUN = ("setting", "workload", "seed", "controller")
_BESTS = ("best_static", "best_schedule")
_LEAST_GAIN = 0.01
"""Where the best schedule gains less on the best static share, no share of it is told."""


def mean_and_interval(values: Sequence[float | None]) -> Record:
    """The mean over seeds and its 95 % interval by Student's t; None where there is nothing."""
    there = [one for one in values if one is not None]
    if not there:
        return {"mean": None, "interval": None, "seeds": 0}
    mean = float(np.mean(there))
    if len(there) == 1:
        return {"mean": mean, "interval": None, "seeds": 1}
    quantile = _T_95[len(there) - 2] if len(there) - 2 < len(_T_95) else 1.96
    reach = quantile * float(np.std(there, ddof=1)) / len(there) ** 0.5
    return {"mean": mean, "interval": [mean - reach, mean + reach], "seeds": len(there)}


def headline(cells: Sequence[Record], scale: int) -> Record:
    """Of each workload and setting, every controller against both yardsticks.

    Args:
        cells: of the benchmark.
        scale: of the runs that count.
    """
    mine = [one for one in cells if one["k"] == scale and one["controller"] in HEADLINE]
    by_run = {tuple(one[field] for field in _RUN): one for one in mine}
    places = list(dict.fromkeys((one["setting"], one["workload"]) for one in mine))
    names = [name for name in HEADLINE if any(one["controller"] == name for one in mine)]
    found: list[Record] = []
    by_seed: dict[str, dict[int, list[float]]] = {name: {} for name in names}
    for setting, workload in places:
        seeds = sorted({key[2] for key in by_run if key[:2] == (setting, workload)})
        for name in names:
            runs = [
                tuple(by_run[*place, one] for one in (name, *_BESTS))
                for place in ((setting, workload, seed) for seed in seeds)
                if (*place, name) in by_run
            ]
            for run, static, _ in runs:
                ratios = by_seed[name].setdefault(run["seed"], [])
                ratios.append(run["p99_ms"] / static["p99_ms"])
            found.append(
                {"setting": setting, "workload": workload, "controller": name, **_against(runs)}
            )
    overall = {
        name: mean_and_interval([_geometric(ratios) for ratios in by_seed[name].values()])
        for name in names
    }
    return {"k": scale, "cells": found, "p99_vs_best_static_all": overall}


def _against(runs: list[tuple[Record, ...]]) -> Record:
    def told(figure: Callable[..., float | None]) -> Record:
        return mean_and_interval([figure(*run) for run in runs])

    return {
        "p99_ms": told(lambda run, *_: run["p99_ms"]),
        "p99_vs_best_static": told(lambda run, static, _: run["p99_ms"] / static["p99_ms"]),
        "share_of_schedules_gain": told(_captured),
        "slo": told(lambda run, *_: run["slo"]),
        "throughput_vs_best_static": told(
            lambda run, static, _: run["throughput"] / static["throughput"]
        ),
        "fraction_gap": told(lambda run, *_: run["fraction_gap"]),
        "regret_ms": told(lambda run, *_: run["regret_ms"]),
        "moves": told(lambda run, *_: run["moves"]),
    }


def _captured(run: Record, static: Record, schedule: Record) -> float | None:
    """Of what the best schedule gains on the best static share, what this run gains."""
    gain = static["p99_ms"] - schedule["p99_ms"]
    if gain < _LEAST_GAIN * static["p99_ms"]:
        return None
    return float((static["p99_ms"] - run["p99_ms"]) / gain)


def _geometric(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def against_static(records: Sequence[Record], beside: str = "controller") -> list[Record]:
    """Of other sections: P99 over that of the section's `best_static`, means over seeds.

    Args:
        records: of one section, `best_static` among them.
        beside: a further field that tells records apart.
    """
    statics = {
        (one["setting"], one["workload"], one["seed"]): one["p99_ms"]
        for one in records
        if one["controller"] == "best_static"
    }
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for one in records:
        key = (one["setting"], one["workload"], one["controller"], one[beside])
        groups.setdefault(key, []).append(one)
    found = []
    for (setting, workload, name, other), mine in groups.items():
        ratios = [
            one["p99_ms"] / statics[one["setting"], one["workload"], one["seed"]] for one in mine
        ]
        found.append(
            {
                "setting": setting,
                "workload": workload,
                "controller": name,
                beside: other,
                "p99_vs_best_static": mean_and_interval(ratios),
                "slo": mean_and_interval([one["slo"] for one in mine]),
                "fraction_gap": mean_and_interval([one["fraction_gap"] for one in mine]),
            }
        )
    return found
