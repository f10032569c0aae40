"""The bundled model against a reference that shares no code with the engine."""

from __future__ import annotations

import numpy as np
import pytest

from helm_engine.recommender import Recommender
from tests.e2e.running_server import BUNDLED_MODEL
from tests.toy_models import read_reference


@pytest.mark.parametrize("length", [1, 17, 200, 260])
def test_retrieval_over_the_catalogue_is_that_of_the_reference(length: int) -> None:
    rng = np.random.default_rng(length)
    items = rng.integers(1, 1683, length).tolist()
    times = np.sort(rng.integers(0, 10**8, length)).tolist()
    asked_at = times[-1] + 3600
    recommender = Recommender(BUNDLED_MODEL)
    answer = recommender.recommend(
        {
            "history": {"item_ids": items, "timestamps": times},
            "request_time": asked_at,
            "top_k": 1682,
        }
    )
    want = read_reference(BUNDLED_MODEL).scores(items[-200:], [*times[-200:], asked_at])
    got = np.array([item.score for item in answer.data])
    places = np.array([item.item_id for item in answer.data]) - 1
    assert sorted(places.tolist()) == list(range(1682))
    np.testing.assert_allclose(got, want[places], atol=1e-5)
    assert (np.diff(got) <= 0).all()
