"""What one page more would save: the running estimate against brute force, and what it costs.

Users of Zipf popularity come back to a catalogue of Zipf popularity (`datasets/returning_users.py`)
and are served by the real scheduler in virtual time. Each cell is a split of the pool: the same
trace is replayed with some pages more or less for one tenant while the other is left as it is and
lives on, and the difference of all milliseconds, for each page and second, is held against the mean
of the estimates while nothing was changed. The pages added and taken are an eighth of the tenant's.

The cost of the estimate is what it adds to the scheduler's own time, on the same steps, in turns.

    python benchmarks/page_value.py --json benchmarks/results/page_value.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
from rich.progress import track

from benchmarks.priced_replay import Replay, TracedVisit, traced_visits
from benchmarks.report import benchmark_parser, write_result
from block_manager.page_value import SamplingConfig
from helm_engine.datasets.returning_users import ReturningUsersConfig
from model_executor.cost_profile import CostProfile

WINDOW_S = 5.0
SHARES = (1.0, 1 / 4, 1 / 16)
STEPS_PER_TENANT = 8

PROFILES = {
    "fast_tier": CostProfile(
        device="invented",
        source="the ratios of an H100 with its tables in host memory, a tenth of its speed",
        step_ms=2.0,
        prefill_row_ms=0.01,
        attention_pair_ms=1.6e-5,
        candidate_ms=1e-6,
        retrieval_ms=1.0,
        row_miss_ms=0.003,
    ),
    "slow_tier": CostProfile(
        device="invented",
        source="the same with a parameter server, whose rows cost as much as computing a token",
        step_ms=2.0,
        prefill_row_ms=0.01,
        attention_pair_ms=1.6e-5,
        candidate_ms=1e-6,
        retrieval_ms=1.0,
        row_miss_ms=0.012,
    ),
}
"""Milliseconds; what counts is their proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A population, and how long it is watched."""

    users: int
    items: int
    warm_visits: int
    visits: int
    splits: dict[str, tuple[int, int]]
    """Pages of KV and of EMB, by name."""
    visits_per_s: float = 200.0
    history: int = 200
    max_history: int = 480
    candidates: int = 64

    def trace(self, seed: int) -> list[TracedVisit]:
        """Visits to warm up, then those that are measured."""
        config = ReturningUsersConfig(
            num_users=self.users,
            num_items=self.items,
            num_categories=20,
            item_zipf=1.0,
            user_zipf=0.8,
            first_history=self.history,
            first_history_sd=0.4 * (self.max_history - self.history),
            new_events=10,
            max_history=self.max_history,
            num_candidates=self.candidates,
            p_return=0.6,
            recent_users=self.users / 10,
            seed=seed,
        )
        return traced_visits(config, self.warm_visits + self.visits, self.visits_per_s)


FULL = Size(
    users=3000,
    items=60_000,
    warm_visits=6000,
    visits=12_000,
    splits={
        "middle": (6000, 384),
        "small_kv": (1500, 384),
        "large_kv": (18_000, 384),
        "small_emb": (6000, 96),
        "large_emb": (6000, 1024),
    },
)
QUICK = Size(
    users=600,
    items=20_000,
    warm_visits=1500,
    visits=2000,
    splits={"middle": (1500, 150), "small_kv": (500, 150)},
)
LONG = Size(
    users=100,
    items=400_000,
    warm_visits=400,
    visits=1200,
    splits={"middle": (20_000, 2048)},
    visits_per_s=20.0,
    history=3600,
    max_history=4096,
    candidates=256,
)
"""Histories that are long enough to weigh on the scheduler, to see what the estimate adds there."""


def brute_force(
    size: Size, trace: Sequence[TracedVisit], profile: CostProfile, split: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Milliseconds that a page more and a page less are worth per second, by replay."""
    warm = size.warm_visits

    def cost(kv_pages: int, emb_pages: int) -> float:
        replay = Replay(kv_pages, emb_pages, size.items, profile)
        replay.play(trace[:warm])
        return replay.play(trace[warm:])

    seconds = trace[-1].arrival - trace[warm].arrival
    kv, emb = split
    now = cost(kv, emb)
    values = {}
    for tenant, pages in (("kv", kv), ("emb", emb)):
        step = pages // STEPS_PER_TENANT
        sizes = [(kv + step, emb), (kv - step, emb)]
        if tenant == "emb":
            sizes = [(kv, emb + step), (kv, emb - step)]
        more, less = (cost(*changed) for changed in sizes)
        values[tenant] = {
            "more": (now - more) / step / seconds,
            "less": (less - now) / step / seconds,
        }
    return values


def estimates(
    size: Size,
    trace: Sequence[TracedVisit],
    profile: CostProfile,
    split: tuple[int, int],
    samplings: Sequence[SamplingConfig],
) -> list[dict[str, dict[str, float]]]:
    """Mean estimates over the measured visits, for each sampling."""
    replay = Replay(*split, size.items, profile, samplings)
    replay.play(trace[: size.warm_visits])
    replay.panel.estimates.clear()
    replay.play(trace[size.warm_visits :])
    names = ("more", "less", "samples")
    return [
        {
            tenant: dict(zip(names, values, strict=True))
            for tenant, values in zip(("kv", "emb"), one, strict=True)
        }
        for one in replay.panel.means().tolist()
    ]


def cell(size: Size, seed: int, profile_name: str, split_name: str) -> list[dict[str, Any]]:
    """One split: a line for each sampling and tenant."""
    trace, split, profile = size.trace(seed), size.splits[split_name], PROFILES[profile_name]
    default = SamplingConfig(window_s=WINDOW_S, seed=seed)
    samplings = [SamplingConfig(share, share, WINDOW_S, seed) for share in SHARES]
    truth = brute_force(size, trace, profile, split)
    lines = []
    for sampling, found in zip(
        [*samplings, default],
        estimates(size, trace, profile, split, [*samplings, default]),
        strict=True,
    ):
        for tenant in ("kv", "emb"):
            more, less = truth[tenant]["more"], truth[tenant]["less"]
            guess = found[tenant]
            lines.append(
                {
                    "split": split_name,
                    "kv_pages": split[0],
                    "emb_pages": split[1],
                    "profile": profile_name,
                    "seed": seed,
                    "tenant": tenant,
                    "user_share": sampling.user_share,
                    "row_share": sampling.row_share,
                    "is_default": sampling is default,
                    "brute_force_ms": [more, less],
                    "estimate_ms": [guess["more"], guess["less"]],
                    "error": (guess["more"] + guess["less"]) / (more + less) - 1.0,
                    "error_more": guess["more"] / more - 1.0,
                    "error_less": guess["less"] / less - 1.0,
                    "samples": guess["samples"],
                }
            )
    return lines


# ---------------------------------------------------------------- what it costs


class Stopwatch:
    """Processor time within a scheduler's own methods: others may use the machine too."""

    def __init__(self, replay: Replay) -> None:
        self.seconds = 0.0
        for name in ("schedule", "update"):
            setattr(replay.scheduler, name, self._timed(getattr(replay.scheduler, name)))

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.thread_time()
            result = inner(*args)
            self.seconds += time.thread_time() - started
            return result

        return call


def overhead(
    shape: str, size: Size, seed: int, samplings: Sequence[SamplingConfig]
) -> list[dict[str, Any]]:
    """What each sampling adds to the scheduler's time: engines take turns, some visits each."""
    trace, split = size.trace(seed), size.splits["middle"]
    profile = PROFILES["fast_tier"]
    replays = [Replay(*split, size.items, profile)]
    replays += [Replay(*split, size.items, profile, [one]) for one in samplings]
    for replay in replays:
        if replay.panel.estimators:
            replay.scheduler.page_values = replay.panel.estimators[0]
        replay.play(trace[: size.warm_visits])
    watches = [Stopwatch(replay) for replay in replays]
    turns: list[list[float]] = []
    turn = size.visits // 40
    for first in range(size.warm_visits, len(trace) - turn + 1, turn):
        for watch, replay in zip(watches, replays, strict=True):
            watch.seconds = 0.0
            replay.play(trace[first : first + turn])
        turns.append([watch.seconds for watch in watches])
    spent = np.array(turns)
    added = spent[:, 1:] / spent[:, :1] - 1.0
    return [
        {
            "shape": shape,
            "user_share": one.user_share,
            "row_share": one.row_share,
            "is_default": one == SamplingConfig(),
            "added": float(np.median(added[:, place])),
            "added_quartiles": np.quantile(added[:, place], [0.25, 0.75]).tolist(),
            "added_us_per_visit": float(np.median(spent[:, 1 + place] - spent[:, 0]) / turn * 1e6),
            "scheduler_us_per_visit": float(np.median(spent[:, 0]) / turn * 1e6),
        }
        for place, one in enumerate(samplings)
    ]


def main() -> None:
    """Measures all splits, then the cost."""
    arguments = benchmark_parser(__doc__).parse_args()
    size = QUICK if arguments.quick else FULL
    cells = []
    wanted = [
        (seed, profile, split)
        for seed in arguments.seeds
        for profile, splits in (("slow_tier", size.splits), ("fast_tier", ["middle"]))
        for split in splits
    ]
    for seed, profile, split in track(wanted, description="splits"):
        cells += cell(size, seed, profile, split)
    samplings = [*(SamplingConfig(share, share) for share in SHARES), SamplingConfig()]
    shapes = {"short": size, "long": LONG}
    costs = [
        line
        for shape, one in shapes.items()
        for line in overhead(shape, one, arguments.seeds[0], samplings)
    ]
    figures = {"window_s": WINDOW_S, "overhead": costs, "cells": cells}
    write_result(arguments.json, figures, arguments.seeds)


if __name__ == "__main__":
    main()
