"""K, V and rows in eight bits, through the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helm_engine.config import ExecutorConfig
from helm_engine.recommender import Recommender
from helm_engine.sample_request import sample_request
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model

EIGHT_BITS: list[dict[str, str]] = [
    {"row_dtype": "int8"},
    {"row_dtype": "fp8"},
    {"kv_cache_dtype": "fp8"},
    {"row_dtype": "int8", "kv_cache_dtype": "fp8"},
]


def scores(
    path: Path, max_num_batched_tokens: int, **executor: Any
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[int]]:
    """Scores of all items for two users who return with longer histories, and tokens reused."""
    config = replace(
        toy_engine_config(path, max_num_batched_tokens=max_num_batched_tokens, num_pages=40),
        executor=ExecutorConfig(attention_backend="torch", **executor),
    )
    found, reused = [], []
    with Recommender.from_config(config) as recommender:
        model = recommender.engine.served.model_config
        first, rng = model.first_item_id, np.random.default_rng(0)
        items = (first + rng.integers(0, 60, (2, 24))).tolist()
        candidates = list(range(first, first + 60))
        for length in (9, 24):
            bodies = [
                {"user": f"u{user}", "request_time": 100}
                | sample_request(model, ids[:length], list(range(length)), candidates)
                for user, ids in enumerate(items)
            ]
            for answer in recommender.recommend_batch(bodies):
                by_item = {one.item_id: one.score for one in answer.data}
                found.append([by_item[item] for item in candidates])
                reused.append(answer.usage.cached_tokens)
    return np.array(found), reused


@pytest.mark.parametrize("eight_bits", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_scores_are_near_and_the_same_with_and_without_reuse(
    tmp_path: Path, dialect: str, eight_bits: dict[str, str]
) -> None:
    path = write_toy_model(tmp_path, toy_config(dialect))
    exact, _ = scores(path, 200)
    rough, reused = scores(path, 200, **eight_bits)
    # Far more than a rounding error would be a mistake; the figures are those of a benchmark.
    assert np.abs(rough - exact).max() <= 0.15 * np.abs(exact).max()
    assert np.abs(rough - exact).max() > 1e-5
    if dialect != "nvidia":  # Its contextual rows need a whole history in one step.
        chunked, _ = scores(path, 70, **eight_bits)
        np.testing.assert_allclose(chunked, rough, rtol=1e-5, atol=1e-5)
    if dialect in ("research", "sasrec"):
        assert min(reused[2:]) > 0


def test_a_pool_of_so_many_bytes_holds_more(tmp_path: Path) -> None:
    path = write_toy_model(tmp_path, toy_config("research", embedding_dim=64))
    layouts = []
    for rows, kv in (("auto", "auto"), ("int8", "auto"), ("auto", "fp8")):
        config = toy_engine_config(path, block_tokens=16, num_pages=60)
        executor = ExecutorConfig(attention_backend="torch", row_dtype=rows, kv_cache_dtype=kv)
        with Recommender.from_config(replace(config, executor=executor)) as recommender:
            layouts.append(recommender.engine.served.layout)
    plain, int8, fp8 = layouts
    assert (plain.row_bytes, int8.row_bytes) == (256, 68)
    assert int8.rows_per_page > 3 * plain.rows_per_page
    assert (plain.page_bytes, fp8.page_bytes) == (3840, 1024)


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ({"row_dtype": "int4"}, "row_dtype: must be one of auto, int8, fp8, not 'int4'"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: must be one of auto, fp8, not 'int8'"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "cpu"}, "'cpu' attention reads no fp8"),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, executor: dict[str, str], message: str
) -> None:
    path = write_toy_model(tmp_path, toy_config())
    with pytest.raises(ValueError, match=message):
        config = replace(toy_engine_config(path), executor=ExecutorConfig(**executor))  # type: ignore[arg-type]
        Recommender.from_config(config)
