"""A burst that this machine can serve: passers-by give way to regulars and come back, in minutes.

The regimes are those of the simulator's `burst`, shorter, over a pool and a catalogue that are
smaller in proportion, so that the stated link fills the pool within a fraction of a regime.
Requests are drawn once and recorded; whoever is measured gets the same bytes at the same times.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.returning_visits import model_dir
from helm_engine.config import SchedulerConfig
from helm_engine.simulator.trace import Trace, make_trace
from helm_engine.simulator.workloads import (
    Regime,
    Setting,
    Workload,
    as_json,
    load_setting,
    load_workload,
)

HISTORY = 3072
"""Events that the model reads; nobody has more."""
NUM_ITEMS = 1 << 18
POOL_BYTES = 64 << 20
REQUESTS_PER_S = 10.0
REGULARS = 6
CATALOGUE_SHARE = 0.5
"""What passers-by browse: 67 MB of rows, the whole pool."""
SLO_MS = 150.0
ROUND_TRIP_MS = 1.0
LINK_BYTES_PER_S = 12.5e6
"""100 Mbit/s, as the profile `cpu-slow-redis` has it."""
SCHEDULER = SchedulerConfig(max_num_batched_tokens=4096)
RAMP_S = 2.0
BROWSING_LOAD, BURST_LOAD = 0.6, 1.45
"""Chosen in the simulator, with five seeds: the best static split keeps the SLO for nine of ten
requests, splits on either side of it are worse, and a boundary that follows the regimes gains."""


def served_model() -> Path:
    """The model directory that is served; made when it is not there."""
    return model_dir("abs", HISTORY, NUM_ITEMS)


def setting() -> Setting:
    """The simulator's `dlrmv3`, smaller."""
    return msgspec.structs.replace(
        load_setting("dlrmv3"),
        name="real burst",
        requests_per_s=REQUESTS_PER_S,
        slo_ms=SLO_MS,
        num_items=NUM_ITEMS,
        max_history=HISTORY,
        pool_bytes=POOL_BYTES,
    )


def workload(regime_s: float, warm_up_s: float, regimes: int = 4) -> Workload:
    """Passers-by and regulars in turns.

    Args:
        regime_s: how long each regime lasts.
        warm_up_s: passers-by before that, who are not counted.
        regimes: how many there are.
    """
    browsing, burst, *_ = load_workload("burst").regimes
    browsing = msgspec.structs.replace(
        browsing, seconds=regime_s, load=BROWSING_LOAD, catalogue_share=CATALOGUE_SHARE
    )
    burst = msgspec.structs.replace(
        burst,
        seconds=regime_s,
        ramp_s=RAMP_S,
        load=BURST_LOAD,
        hot_users=REGULARS,
        history_sd=250.0,
    )
    turns: list[Regime] = []
    for place in range(regimes):
        # The first regime has nothing to come up from.
        own = burst if place % 2 else browsing
        ramp_s = RAMP_S if place else 0.0
        turns.append(
            msgspec.structs.replace(own, name=f"{own.name} {place // 2 + 1}", ramp_s=ramp_s)
        )
    return Workload(
        name="real burst",
        description="the simulator's burst at the size of this machine",
        setting=setting(),
        warm_up_s=warm_up_s,
        regimes=turns,
    )


@dataclass(frozen=True)
class Recording:
    """The requests of one seed."""

    trace: Trace
    """What they were drawn as: the simulator runs these."""

    @cached_property
    def bodies(self) -> list[bytes]:
        """JSON of each request, in the order in which they come."""
        return [
            json.dumps(body_of(self.trace, number)).encode() for number in range(len(self.trace))
        ]

    @property
    def warm_up_s(self) -> float:
        """Requests that come earlier are not counted."""
        return self.trace.workload.warm_up_s

    @property
    def digest(self) -> str:
        """SHA-256 of all times and bodies: who has the same was asked the same."""
        found = hashlib.sha256(self.trace.arrivals.tobytes())
        for body in self.bodies:
            found.update(body)
        return found.hexdigest()


def body_of(trace: Trace, number: int) -> dict[str, Any]:
    """A request as a client sends it."""
    tokens = trace.tokens(number)
    return {
        "user": f"user-{trace.people[number]}",
        "history": {"item_ids": tokens.rows.tolist()},
        "candidates": {"item_ids": tokens.candidate_rows.tolist()},
    }


def record(workload: Workload, seed: int) -> Recording:
    """Draws a workload's requests."""
    return Recording(make_trace(workload, seed))


def describe(workload: Workload) -> dict[str, Any]:
    """What was asked of whom, for a result file."""
    return {
        "workload": as_json(workload),
        "round_trip_ms": ROUND_TRIP_MS,
        "link_bytes_per_s": LINK_BYTES_PER_S,
        "max_num_batched_tokens": SCHEDULER.max_num_batched_tokens,
    }
