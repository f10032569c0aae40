"""Useful operations of a request, counted one product at a time."""

from __future__ import annotations

import pytest

from benchmarks.flops import request_flops
from model_executor.model_config import ModelConfig, NvidiaConfig, ResearchConfig
from tests.toy_models import toy_config


def counted(config: ModelConfig, context: int, cached: int, candidates: int) -> int:
    """Multiplications and additions, row by row and pair by pair."""
    assert isinstance(config, NvidiaConfig)
    dim, width = config.embedding_dim, config.num_heads * config.dqk
    total = 0
    for layer in range(config.num_layers):
        is_last = layer == config.num_layers - 1
        for row in range(cached, context + candidates):
            is_candidate = row >= context
            total += 2 * 2 * dim * width  # k and v
            if is_last and not is_candidate:
                continue
            total += 2 * 2 * dim * width + 2 * width * dim  # u, q and the output projection
            keys = context + 1 if is_candidate else row + 1
            total += keys * 2 * 2 * width  # q.k and the weighted value
    inputs = dim
    for outputs in config.prediction_head:
        total += candidates * 2 * inputs * outputs
        inputs = outputs
    return total


@pytest.mark.parametrize(("context", "cached", "candidates"), [(9, 0, 4), (9, 6, 4), (9, 9, 1)])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_flops_of_a_request(context: int, cached: int, candidates: int, num_layers: int) -> None:
    config = toy_config("nvidia", num_layers=num_layers)
    want = counted(config, context, cached, candidates)
    assert request_flops(config, context, cached, candidates) == want


def counted_for_a_retrieval(config: ModelConfig, context: int, cached: int, items: int) -> int:
    """The same for a model whose last row is multiplied with items."""
    assert isinstance(config, ResearchConfig)
    dim, heads = config.embedding_dim, config.num_heads
    total = 0
    for layer in range(config.num_layers):
        for row in range(cached, context):
            total += 2 * dim * heads * (config.dqk + config.dv)  # k and v
            if layer == config.num_layers - 1 and row < context - 1:
                continue
            total += 2 * dim * heads * (config.dqk + config.dv)  # q and u
            total += (row + 1) * heads * (2 * config.dqk + 2 * config.dv)
            total += 2 * heads * config.dv * dim  # the output projection
    return total + items * 2 * dim


@pytest.mark.parametrize(("context", "cached"), [(1, 0), (9, 0), (9, 6), (9, 8)])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_flops_of_a_retrieval(context: int, cached: int, num_layers: int) -> None:
    config = toy_config("research", num_layers=num_layers)
    want = counted_for_a_retrieval(config, context, cached, 60)
    assert request_flops(config, context, cached, 60) == want


def test_flops_of_another_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match="sasrec"):
        request_flops(toy_config("sasrec"), 9, 0, 4)
