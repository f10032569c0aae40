"""A workload that runs in a moment, and what a device may cost."""

from __future__ import annotations

from typing import Any

from helm_engine.simulator.workloads import Regime, Setting, Workload
from model_executor.cost_profile import CostProfile

PROFILE = CostProfile(
    device="invented",
    source="round numbers for tests",
    step_ms=1.0,
    prefill_row_ms=0.01,
    attention_pair_ms=0.0,
    candidate_ms=0.001,
    retrieval_ms=0.1,
    row_miss_ms=0.02,
)

SETTING: dict[str, Any] = {
    "name": "small",
    "data": "dlrmv3",
    "profile": "cpu-slow-redis",
    "requests_per_s": 40.0,
    "slo_ms": 20.0,
    "num_users": 200,
    "num_items": 6000,
    "num_categories": 6,
    "categories_per_user": 2,
    "max_history": 200,
    "row_bytes": 64,
    "kv_bytes_per_token": 256,
    "pool_bytes": 4 << 20,
    "block_tokens": 8,
}

REGIME: dict[str, Any] = {
    "name": "first",
    "seconds": 20.0,
    "hot_user_share": 0.7,
    "hot_users": 20,
    "history_mean": 100,
    "history_sd": 30.0,
    "new_events": 4,
    "candidates": 30,
    "item_zipf": 1.0,
}


def setting(**changes: Any) -> Setting:
    return Setting(**(SETTING | changes))


def regime(**changes: Any) -> Regime:
    return Regime(**(REGIME | changes))


def workload(*regimes: Regime, warm_up_s: float = 5.0, **changes: Any) -> Workload:
    return Workload(
        name="small",
        description="for tests",
        setting=setting(**changes),
        warm_up_s=warm_up_s,
        regimes=list(regimes or (regime(),)),
    )
