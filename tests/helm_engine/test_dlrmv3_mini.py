"""The model directories of the benchmarks, with a small catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.dlrmv3_mini import Variant, make_model_dir, mini_config
from helm_engine.datasets.returning_users import ReturningUsers, ReturningUsersConfig
from helm_engine.recommender import Recommender
from helm_engine.request import ReuseBlocked
from model_executor.checkpoint import model_version

NUM_ITEMS = 1280
HISTORY = 60


def bodies(variant: Variant) -> list[dict[str, Any]]:
    """Three visits of one user, ten events apart."""
    config = ReturningUsersConfig(
        num_users=1, num_items=NUM_ITEMS, first_history=40, max_history=HISTORY, num_candidates=24
    )
    found = []
    for visit in ReturningUsers(config).visits(3):
        history: dict[str, Any] = {"item_ids": visit.history.item_ids}
        candidates: dict[str, Any] = {"item_ids": visit.candidates.item_ids}
        body: dict[str, Any] = {"user": "u", "history": history, "candidates": candidates}
        if variant == "stu":
            history["timestamps"] = visit.history.timestamps
            history["actions"] = visit.history.actions
            history["category_id"] = visit.history.category_ids
            candidates["category_id"] = visit.candidates.category_ids
            body |= {"context": {"user_id": 7}, "request_time": visit.request_time}
        found.append(body)
    return found


@pytest.mark.parametrize("variant", ["abs", "stu"])
def test_a_returning_user_is_answered_and_reuses_what_the_model_allows(
    variant: Variant, tmp_path: Path
) -> None:
    config = mini_config(variant, HISTORY, NUM_ITEMS)
    recommender = Recommender(make_model_dir(tmp_path / "mini", config))
    answers = [recommender.recommend(body) for body in bodies(variant)]
    cached = [answer.usage.cached_tokens for answer in answers]
    blocked = [answer.usage.reuse_blocked for answer in answers]
    if variant == "abs":
        assert cached == [0, 32, 48]
    else:
        assert cached == [0, 0, 0]
        assert blocked == [ReuseBlocked.MODEL] * 3
    for answer in answers:
        scores = np.array([item.score for item in answer.data])
        assert len(scores) == 24
        assert np.isfinite(scores).all()
        # Random weights, but no constant: candidates can be told apart.
        assert scores.std() > 1e-3


def test_a_seed_gives_the_same_model_and_another_seed_another(tmp_path: Path) -> None:
    config = mini_config("abs", HISTORY, NUM_ITEMS)
    versions = [
        model_version(make_model_dir(tmp_path / name, config, seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert versions[0] == versions[1] != versions[2]
