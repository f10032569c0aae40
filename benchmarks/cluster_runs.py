"""Runs of the cluster benchmark: each task is one part of one workload and seed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.cluster import (
    ClusterModel,
    simulate_cluster,
    spread_fractions,
)
from helm_engine.simulator.cluster_result import ClusterResult
from helm_engine.simulator.cluster_workload import cluster_workload
from helm_engine.simulator.figures import figures
from helm_engine.simulator.hindsight import p99_of
from helm_engine.simulator.simulation import EngineModel
from helm_engine.simulator.trace import Trace, make_trace
from helm_engine.simulator.workloads import builtin_or_file, load_workload
from model_executor.cost_profile import load_cost_profile

Record = dict[str, Any]

POLICIES = ("joint", "kv", "emb", "least_load", "consistent_hash", "round_robin")
CONTROLLER = "helm"
PACE = 8.0
"""Regimes take so many times less time than they are written for, as 32 engines see as many times
more requests; ramps, too."""
WARM_UP_S = 40.0
"""Until every pool is full, whatever the pace."""
REGIMES = 3
"""From one kind to another and back; what comes after them are repetitions."""
STALENESS_S = 0.1
STALENESSES_S = (0.0, 0.3, 1.0, 3.0, 10.0)
"""Beside the usual one."""
ROUTERS = (2, 4)
"""Beside one."""
MIDDLE, WIDTH = 0.5, 0.8
"""EMB shares at the start are spread evenly over 0.1 to 0.9."""
QUANTILES = (0.1, 0.5, 0.9)
"""Of what the router expected over what it was."""
SEARCHED = tuple(place / 10 for place in range(1, 10))
"""Static shares among which the best one is looked for..."""
SEARCH_ENGINES_SHARE = 8
"""...on a cluster so many times smaller: `least_load` makes all engines alike."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one process works on at a time."""

    part: str
    workload: str
    seed: int
    engines: int
    scale: int
    pace: float
    warm_up_s: float
    quick: bool

    def __str__(self) -> str:
        return f"{self.part}, {self.workload}, seed {self.seed}"


@dataclass(slots=True)
class Found:
    """What a task measured: records by section, and how fast."""

    sections: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    requests_per_s: list[float] = field(default_factory=list)
    """Simulated ones for each second of processor time, of each run."""


class Runs:
    """Runs of one workload and seed over many engines."""

    def __init__(self, task: Task, engines: int) -> None:
        """Draws the requests."""
        self.task, self.engines = task, engines
        written = load_workload(task.workload)
        once = msgspec.structs.replace(written, regimes=written.regimes[:REGIMES])
        workload = msgspec.structs.replace(
            cluster_workload(once, engines, task.pace), warm_up_s=task.warm_up_s
        )
        profile = workload.resolved_setting.profile
        self.trace: Trace = make_trace(workload, task.seed, scale=task.scale)
        self._engine = EngineModel(
            workload.resolved_setting,
            load_cost_profile(builtin_or_file("profiles", profile, "profile")),
            scale=task.scale,
        )
        self.requests_per_s: list[float] = []

    def controlled(self, policy: str, **changes: Any) -> ClusterResult:
        """Engines that begin at different splits, with a controller live on each."""
        engine = replace(self._engine, controller=ControllerConfig(name=CONTROLLER))
        return self._run(engine, spread_fractions(self.engines, MIDDLE, WIDTH), policy, **changes)

    def static(self, policy: str, share: float) -> ClusterResult:
        """Engines that stay at one split."""
        return self._run(self._engine, (share,) * self.engines, policy)

    def _run(
        self,
        engine: EngineModel,
        fractions: tuple[float, ...],
        policy: str,
        routers: int = 1,
        staleness_s: float = STALENESS_S,
    ) -> ClusterResult:
        model = ClusterModel(engine, fractions, policy, routers, staleness_s, self.task.seed)
        began = time.process_time()
        result = simulate_cluster(self.trace, model)
        self.requests_per_s.append(len(self.trace) / (time.process_time() - began))
        return result

    def cell(
        self,
        policy: str,
        found: ClusterResult,
        routers: int = 1,
        staleness_s: float = STALENESS_S,
    ) -> Record:
        """A run as the result file has it."""
        told = figures(found.result)
        return {
            "workload": self.task.workload,
            "policy": policy,
            "seed": self.task.seed,
            "k": self.task.scale,
            "engines": self.engines,
            "routers": routers,
            "staleness_s": staleness_s,
            "p50_ms": told.p50_ms,
            "p99_ms": told.p99_ms,
            "slo": told.slo_share,
            "kv_hit": told.kv_hit_rate,
            "emb_hit": told.emb_hit_rate,
            "load_spread": found.load_spread,
        }


def run_task(task: Task) -> Found:
    """Measures what a task asks for."""
    found = Found()
    runs = Runs(task, task.engines)
    for section, record in _PARTS[task.part](runs):
        found.sections[section].append(record)
    found.requests_per_s = runs.requests_per_s
    return found


def _policies(runs: Runs) -> Iterator[tuple[str, Record]]:
    """Every policy, and how busy the engines were and where their boundaries came to stand."""
    for policy in POLICIES:
        result = runs.controlled(policy)
        yield "cells", runs.cell(policy, result)
        yield "engines", _engines(runs, policy, result)


def _engines(runs: Runs, policy: str, found: ClusterResult) -> Record:
    """What became of each engine."""
    pages = found.result.num_pages
    return {
        "workload": runs.task.workload,
        "policy": policy,
        "seed": runs.task.seed,
        "k": runs.task.scale,
        "failed": figures(found.result).failed,
        "predicted_over_actual": np.quantile(found.predicted_over_actual, QUANTILES).tolist(),
        "emb_fraction_at_end": [
            round(float(steps["emb_pages"][-1]) / pages, 3) for steps in found.steps_of
        ],
        "busy": [round(one, 3) for one in found.busy.tolist()],
    }


def _staleness(runs: Runs) -> Iterator[tuple[str, Record]]:
    """How old may be what the router knows?"""
    for staleness_s in STALENESSES_S[-1:] if runs.task.quick else STALENESSES_S:
        result = runs.controlled("joint", staleness_s=staleness_s)
        yield "staleness", runs.cell("joint", result, staleness_s=staleness_s)


def _routers(runs: Runs) -> Iterator[tuple[str, Record]]:
    """Routers that do not see each other's requests."""
    for routers in ROUTERS[-1:] if runs.task.quick else ROUTERS:
        result = runs.controlled("joint", routers=routers)
        yield "routers", runs.cell("joint", result, routers=routers)


def _paper(runs: Runs) -> Iterator[tuple[str, Record]]:
    """The best static split, known afterwards, under both policies."""
    task = runs.task
    smaller = Runs(task, max(1, task.engines // SEARCH_ENGINES_SHARE))
    shares = SEARCHED[1::3] if task.quick else SEARCHED
    p99_ms = [p99_of(smaller.static("least_load", share).result) for share in shares]
    del smaller
    best = shares[p99_ms.index(min(p99_ms))]
    yield (
        "best_static",
        {
            "workload": task.workload,
            "seed": task.seed,
            "k": task.scale,
            "engines": max(1, task.engines // SEARCH_ENGINES_SHARE),
            "shares": list(shares),
            "p99_ms": p99_ms,
            "best": best,
        },
    )
    for policy in ("least_load", "joint"):
        result = runs.static(policy, best)
        yield "static", runs.cell(policy, result) | {"emb_fraction": best}


_PARTS = {
    "policies": _policies,
    "staleness": _staleness,
    "routers": _routers,
    "paper": _paper,
}
PARTS = tuple(_PARTS)
