"""The serving benchmark over a few visits: what its cells and ratios are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.progress import Progress

from benchmarks.serving import p99_ratio, run_workload
from benchmarks.workloads import GENERATED, HEADLINE, MOVIELENS, movielens
from tests.benchmarks.invented_ratings import invented_ratings


def test_the_ratios_are_those_of_a_generated_workload() -> None:
    names = [workload.name for workload in GENERATED]
    assert HEADLINE in names
    assert MOVIELENS not in names
    assert len({*names}) == len(names)


def test_movielens_gives_a_cell_for_each_system_and_the_ratios_between_them() -> None:
    workload = replace(movielens(invented_ratings(num_users=40)), batches=4, segment=12)
    with Progress(disable=True) as progress:
        cells, ratios = run_workload(workload, [1, 2], "float32", True, progress)
    ours, plain = cells
    assert [(one["workload"], one["system"]) for one in cells] == [
        ("ml100k", "helm"),
        ("ml100k", "caches_off"),
    ]
    assert 0.0 < ours["cached_token_share"] < 1.0
    assert 0.9 < ours["row_hit_share"] <= 1.0  # There is room for all rows.
    assert plain["cached_token_share"] == plain["row_hit_share"] == 0.0
    assert 1.0 < ours["flop_ceiling"] == plain["flop_ceiling"]
    assert ratios["pairs_of_batches"] == 6
    assert ratios["open_loop_requests"] == 6
    for name in ("throughput_vs_batched", "p99_vs_batched"):
        low, high = ratios[f"{name}_95"]
        assert low <= ratios[name] <= high


def test_the_interval_of_p99_resamples_segments() -> None:
    theirs = np.random.default_rng(1).exponential(10.0, (12, 50))
    twice = [(2.0 * part).tolist() for part in theirs]
    ratio, interval = p99_ratio(twice, theirs.tolist())
    # The same segments are picked of both.
    assert [ratio, *interval] == pytest.approx([2.0] * 3)
