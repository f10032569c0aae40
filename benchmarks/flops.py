"""Useful floating-point operations of a request: unmasked pairs, projections and heads.

Embedding lookups, norms and activations are left out; they are a few percent. The last layer
counts what scoring reads: keys and values of all rows, queries of the rows that are outputs.
"""

from __future__ import annotations

from itertools import pairwise

from model_executor.model_config import (
    ModelConfig,
    NvidiaConfig,
    ResearchConfig,
    SASRecConfig,
    StuConfig,
)


def pair_flops(config: ModelConfig) -> int:
    """Of one query-key pair in one layer, over all heads: q.k and the weighted value."""
    return 2 * config.num_heads * (config.dqk + config.dv)


def request_flops(config: ModelConfig, context: int, cached: int, candidates: int) -> float:
    """Of a request whose first `cached` context tokens are reused.

    Args:
        config: an HSTU model whose attention is causal.
        context: tokens of the context.
        cached: those whose K and V are in pages; a retrieval always computes the last one.
        candidates: what is scored: rows that read the context and themselves where the model
            ranks, inner products with the last row where it retrieves.

    Raises:
        ValueError: the model is no HSTU.
    """
    if isinstance(config, SASRecConfig):
        raise ValueError("sasrec: its blocks are not counted here")
    new = context - cached
    user_rows, candidate_rows = (1, 0) if isinstance(config, ResearchConfig) else (0, candidates)
    heads_v, heads_qk = config.num_heads * config.dv, config.num_heads * config.dqk
    dim = config.embedding_dim
    causal_pairs = new * cached + new * (new + 1) // 2
    candidate_pairs = candidate_rows * (context + 1)
    output_width = 3 * heads_v if isinstance(config, StuConfig) else heads_v
    row = 2 * dim * 2 * (heads_v + heads_qk) + 2 * output_width * dim
    keys_and_values = 2 * dim * (heads_v + heads_qk)
    inner = config.num_layers - 1
    layers = (
        inner
        * (row * (new + candidate_rows) + pair_flops(config) * (causal_pairs + candidate_pairs))
        + keys_and_values * (new - user_rows)
        + row * (user_rows + candidate_rows)
        + pair_flops(config) * (user_rows * context + candidate_pairs)
    )
    return layers + _head_flops(config, new, candidates)


def _head_flops(config: ModelConfig, new: int, candidates: int) -> float:
    dim = config.embedding_dim
    if isinstance(config, ResearchConfig):
        return 2.0 * candidates * dim
    if isinstance(config, NvidiaConfig):
        widths = [dim, *config.prediction_head]
        return 2.0 * candidates * sum(a * b for a, b in pairwise(widths))
    if isinstance(config, StuConfig):
        hidden, table = config.preprocessor_hidden_dim, config.table_dim
        content = (table + dim) * hidden * (new + candidates)
        item = ((1 + len(config.features)) * table + dim) * config.item_hidden_dim
        head = (dim + len(config.tasks)) * config.head_hidden_dim
        return 2.0 * (content + candidates * (item + head + dim * (dim + 4)))
    return 0.0
