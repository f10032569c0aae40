"""Real held-out events through a running server: served figures are the offline ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helm_engine.datasets.ml100k import DatasetError, load_ml100k
from tests.e2e.running_server import REPOSITORY


def test_served_figures_equal_the_offline_ones_while_both_tenants_evict(tmp_path: Path) -> None:
    try:
        load_ml100k()
    except DatasetError as error:
        pytest.skip(f"MovieLens-100K cannot be had: {error}")
    result = tmp_path / "replay.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/replay_ml100k.py", "--json", str(result)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(result.read_text())
    assert figures["test_requests"] == 943
    for name, least in (("hr10", 0.17), ("ndcg10", 0.085)):
        assert figures["served"][name] >= least
        assert figures["served"][name] == pytest.approx(figures["offline"][name], abs=1e-9)
        assert figures["served"][name] == pytest.approx(
            figures["offline_over_all_users"][name], abs=1e-9
        )
    assert figures["offline"]["max_score_diff"] <= 1e-5
    assert 0.0 < figures["usage"]["cached_token_share"] < 1.0
    assert 0.0 < figures["usage"]["row_hit_share"] < 1.0
    assert figures["pool"]["emb_cache_usage"] == 1.0
