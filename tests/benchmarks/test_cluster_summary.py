"""What cells of the cluster benchmark come to, on figures that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cluster_summary import along, by_policy, papers_table


def cell(policy: str, seed: int, p99_ms: float, **changes: Any) -> dict[str, Any]:
    usual = {"workload": "w", "k": 16, "engines": 32, "routers": 1, "staleness_s": 0.1}
    figures = {"p50_ms": 1.0, "slo": 1.0, "kv_hit": 0.5, "emb_hit": 0.5, "load_spread": 1.0}
    return {**usual, **figures, "policy": policy, "seed": seed, "p99_ms": p99_ms, **changes}


CELLS = [
    cell("joint", 1, 100.0), cell("joint", 2, 200.0),
    cell("kv", 1, 150.0), cell("kv", 2, 200.0),
    cell("least_load", 1, 400.0), cell("least_load", 2, 400.0),
    cell("kv", 1, 1.0, k=1),
]  # fmt: skip


def test_ratios_are_those_of_equal_seeds_and_scales() -> None:
    found = {(one["k"], one["policy"]): one for one in by_policy(CELLS)}
    assert found[16, "joint"]["p99_ms"]["mean"] == 150.0
    assert found[16, "kv"]["p99_vs_joint"]["mean"] == pytest.approx((1.5 + 1.0) / 2)
    assert found[16, "least_load"]["p99_vs_joint"]["mean"] == pytest.approx((4.0 + 2.0) / 2)
    assert found[1, "kv"]["p99_vs_joint"]["mean"] is None


def test_a_sweep_has_the_usual_run_at_its_place() -> None:
    late = [cell("joint", 1, 300.0, staleness_s=10.0), cell("joint", 1, 90.0, staleness_s=0.0)]
    found = along(late, CELLS, "staleness_s")
    assert [(one["policy"], one["staleness_s"]) for one in found] == [
        ("joint", 0.0), ("joint", 0.1), ("joint", 10.0),
    ]  # fmt: skip
    assert [one["p99_vs_usual"]["mean"] for one in found] == pytest.approx([0.9, 1.0, 3.0])


def test_the_papers_table_is_against_the_best_static_split_and_least_load() -> None:
    static = [cell("least_load", 1, 800.0), cell("joint", 1, 200.0)]
    found = {(one["split"], one["policy"]): one for one in papers_table(CELLS, static)}
    ratios = {key: one["p99_vs_best_static_least_load"]["mean"] for key, one in found.items()}
    assert ratios == {
        ("best static", "least_load"): 1.0,
        ("best static", "joint"): 0.25,
        ("controller", "joint"): 0.125,
        ("controller", "least_load"): 0.5,
    }
