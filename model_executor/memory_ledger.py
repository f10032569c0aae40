"""What one step may add to what stays on the device."""

from __future__ import annotations

from model_executor.attention.torch_reference import PAIRS_PER_TILE
from model_executor.model_config import (
    SMALL_TABLE_ROWS,
    ModelConfig,
    NvidiaConfig,
    ResearchConfig,
    SASRecConfig,
    StuConfig,
)
from model_executor.models.heads import SCORES_PER_PASS

_PAIR_BYTES = 32
"""Of one query-key pair, heads apart: distance, bucket, two biases and their sum, mask."""


def activation_bound(
    config: ModelConfig, max_tokens: int, max_seqs: int, retrieves: bool, element_bytes: int
) -> int:
    """Bytes of activations that one step holds at most with the reference backend.

    Args:
        config: the model.
        max_tokens: context rows and candidates of a step.
        max_seqs: requests of a step.
        retrieves: whether there is a retrieval head.
        element_bytes: bytes of one number.
    """
    heads_v, heads_qk = config.num_heads * config.dv, config.num_heads * config.dqk
    projected = 2 * (heads_v + heads_qk)
    # Rows read, scaled, summed, normalised, projected twice, attended, gated, and what replaces x.
    row = 7 * config.embedding_dim + 2 * projected + 4 * heads_v + _perceptron_elements(config)
    longest = config.max_context_tokens
    keys = longest + (max_tokens if config.candidates_in_sequence else 0)
    gathered = 2 * keys * (heads_qk + heads_v)
    pairs = max_tokens * keys
    tile = min(pairs, max(keys, PAIRS_PER_TILE // config.num_heads))
    # Scores and biases of a tile, or the distances of a tile of buckets, which knows no heads.
    attention = max(
        tile * (_PAIR_BYTES + 3 * config.num_heads * max(4, element_bytes)),
        min(pairs, PAIRS_PER_TILE) * _PAIR_BYTES,
    )
    buckets = 2 * max_tokens * longest if isinstance(config, ResearchConfig) else 0
    users_scored = max(1, min(max_seqs, SCORES_PER_PASS // config.num_items))
    retrieval = 2 * 4 * users_scored * config.num_items if retrieves else 0
    elements = max_tokens * row + 2 * gathered + _small_table_elements(config)
    return element_bytes * elements + attention + 2 * buckets + retrieval


def _perceptron_elements(config: ModelConfig) -> int:
    """Numbers that the perceptrons before and behind the layers take per row."""
    if isinstance(config, StuConfig):
        widest = max(config.preprocessor_hidden_dim, config.item_hidden_dim, config.head_hidden_dim)
        return 4 * widest + (2 + len(config.features)) * config.table_dim + 4 * config.embedding_dim
    if isinstance(config, NvidiaConfig):
        return 2 * max(config.prediction_head) + 2 * config.embedding_dim
    if isinstance(config, SASRecConfig):
        return 2 * config.ffn_dim + 4 * config.embedding_dim
    return 0


def _small_table_elements(config: ModelConfig) -> int:
    """Numbers of the small tables, which are laid end to end in each step that reads them."""
    rows = config.num_actions if isinstance(config, NvidiaConfig) else 0
    for feature in config.contextual_features:
        rows += feature.num_rows if feature.num_rows <= SMALL_TABLE_ROWS else 0
    return rows * config.row_dim
