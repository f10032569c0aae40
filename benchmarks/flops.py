"""Useful floating-point operations of a request: unmasked pairs, projections and heads.

Embedding lookups, norms and activations are left out; they are a few percent. The last layer
counts what scoring reads: keys and values of all rows, queries of the rows that are outputs.
"""

from __future__ import annotations

from itertools import pairwise

from model_executor.model_config import ModelConfig, NvidiaConfig, StuConfig


def pair_flops(config: ModelConfig) -> int:
    """Of one query-key pair in one layer, over all heads: q.k and the weighted value."""
    return 2 * config.num_heads * (config.dqk + config.dv)


def request_flops(config: ModelConfig, context: int, cached: int, candidates: int) -> float:
    """Of a request whose first `cached` context tokens are reused.

    Args:
        config: a ranking model, whose attention is causal and whose candidates read the context.
        context: tokens of the context.
        cached: those whose K and V are in pages.
        candidates: rows that read the context and themselves.
    """
    new = context - cached
    heads_v, heads_qk = config.num_heads * config.dv, config.num_heads * config.dqk
    dim = config.embedding_dim
    causal_pairs = new * cached + new * (new + 1) // 2
    candidate_pairs = candidates * (context + 1)
    output_width = 3 * heads_v if isinstance(config, StuConfig) else heads_v
    row = 2 * dim * 2 * (heads_v + heads_qk) + 2 * output_width * dim
    keys_and_values = 2 * dim * (heads_v + heads_qk)
    inner = config.num_layers - 1
    layers = (
        inner * (row * (new + candidates) + pair_flops(config) * (causal_pairs + candidate_pairs))
        + keys_and_values * new
        + row * candidates
        + pair_flops(config) * candidate_pairs
    )
    return layers + _perceptron_flops(config, new, candidates)


def _perceptron_flops(config: ModelConfig, new: int, candidates: int) -> float:
    dim = config.embedding_dim
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
