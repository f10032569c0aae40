"""HSTU over padded batches in plain PyTorch: what training runs, and the figures to be served.

It composes the layers that serving runs, but knows nothing of pages, caches or batching of
requests: what it scores offline is what the engine must score online.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from helm_engine.datasets.ml100k import HeldOutEvent, Int64Array, MovieLens100K, Split
from model_executor.attention.formulas import silu_attention
from model_executor.checkpoint import load_config, load_dense_weights, map_tables
from model_executor.layers.hstu_layer import ResearchHSTULayer
from model_executor.layers.relative_bias import time_buckets
from model_executor.models.research import ResearchHSTU

INIT_STD = 0.02
_SCORING_BATCH = 32


@dataclass(frozen=True, slots=True)
class Metrics:
    """Means over users of a leave-one-out split, all items ranked."""

    hr10: float
    """Share of users whose target is among the first 10."""
    ndcg10: float
    """1 / log2(1 + rank) where the rank is at most 10, else 0."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Histories, right-padded to the longest, L events."""

    item_ids: Tensor
    """int64 [B, L], 0 at padding."""
    timestamps: Tensor
    """Seconds, int64 [B, L + 1]: of event i at i, and of the request after the last event."""
    lengths: Tensor
    """Events of each history, int64 [B]."""


def initialise(model: ResearchHSTU) -> Tensor:
    """Fills a new model as the reference does, and returns an item table for it.

    Source: meta-recsys/generative-recommenders, research/modeling (hstu.py, initialization.py,
    input_features_preprocessors.py). Draws from torch's global generator.

    Returns:
        float32 [num_items + 1, D], row 0 (padding) zero.
    """
    config = model.config
    positional_std = math.sqrt(1.0 / config.embedding_dim)
    nn.init.trunc_normal_(
        model.position_embedding, std=positional_std, a=-2 * positional_std, b=2 * positional_std
    )
    for layer in _layers(model):
        nn.init.normal_(layer.uvqk, std=INIT_STD)
        nn.init.xavier_uniform_(layer.output.weight)
        nn.init.zeros_(layer.output.bias)
        nn.init.normal_(layer.bias.position_weight, std=INIT_STD)
        nn.init.normal_(layer.bias.time_weight, std=INIT_STD)
    items = torch.empty(config.num_items + 1, config.embedding_dim)
    nn.init.trunc_normal_(items, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
    items[0] = 0.0
    return items


def load_whole(directory: Path) -> tuple[ResearchHSTU, Tensor]:
    """Dense weights and the whole item table of a model directory, on the CPU.

    Serving never does this with a table; training and offline figures may.
    """
    config = load_config(directory)
    (table,) = map_tables(directory, config)
    model = load_dense_weights(directory, config, torch.device("cpu"))
    assert isinstance(model, ResearchHSTU)
    return model, torch.from_numpy(np.array(table))


def padded_forward(
    model: ResearchHSTU,
    item_rows: Tensor,
    timestamps: Tensor,
    lengths: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Runs the model over right-padded histories.

    Args:
        model: dense weights.
        item_rows: rows of the item table, float [B, L, D]; L at most max_sequence_len.
        timestamps: seconds, int64 [B, L + 1]: of event i at i; the entry after a history's last
            event is the time of the request, or in training of the event to predict.
        lengths: events of each history, int64 [B].
        dropout: probability, on layer inputs of the first layer and on gated rows of every layer.

    Returns:
        L2-normalised output rows, float [B, L, D]; row i predicts event i + 1. Rows at padding
        mean nothing.
    """
    positions = torch.arange(item_rows.shape[1], device=item_rows.device)
    present = positions < lengths.unsqueeze(1)
    allowed = (positions <= positions.unsqueeze(1)) & present.unsqueeze(1)
    buckets = time_buckets(timestamps[:, 1:], timestamps[:, :-1], model.time_edges)
    x = functional.dropout(model.place(item_rows, positions), dropout, training=dropout > 0.0)
    x = x * present.unsqueeze(-1)
    for layer in _layers(model):
        parts = layer.project(x)
        bias = layer.bias(positions, buckets)
        n = model.config.num_positions
        attended = silu_attention(parts.q, parts.k, parts.v, allowed, n, bias=bias)
        gated = functional.dropout(layer.gate(parts.u, attended), dropout, training=dropout > 0.0)
        x = layer.output(gated) + x
    return model.normalise_user(x)


def _layers(model: ResearchHSTU) -> list[ResearchHSTULayer]:
    return [layer for layer in model.layers if isinstance(layer, ResearchHSTULayer)]


def pad_histories(
    item_ids: Sequence[Int64Array], timestamps: Sequence[Int64Array], request_times: Sequence[int]
) -> PaddedBatch:
    """Right-pads histories; see `PaddedBatch`.

    Args:
        item_ids: of each history, oldest first, int64 [n_i].
        timestamps: of the same events, seconds, int64 [n_i].
        request_times: seconds, one per history.
    """
    lengths = [len(items) for items in item_ids]
    items = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    times = np.zeros((len(lengths), max(lengths) + 1), dtype=np.int64)
    for row, length in enumerate(lengths):
        items[row, :length] = item_ids[row]
        times[row, :length] = timestamps[row]
        times[row, length:] = request_times[row]
    return PaddedBatch(
        torch.from_numpy(items), torch.from_numpy(times), torch.tensor(lengths, dtype=torch.int64)
    )


@torch.no_grad()
def score_histories(
    model: ResearchHSTU,
    item_table: Tensor,
    item_ids: Sequence[Int64Array],
    timestamps: Sequence[Int64Array],
    request_times: Sequence[int],
) -> Tensor:
    """Scores every item for every history: dot products of L2-normalised vectors.

    Args:
        model: dense weights.
        item_table: float32 [num_items + 1, D]; row 0 is padding.
        item_ids: of each history, oldest first, int64 [n_i]; of more than max_sequence_len events
            the newest are read.
        timestamps: of the same events, seconds, int64 [n_i].
        request_times: when the recommendation is asked for, seconds, one per history.

    Returns:
        float32 [B, num_items]; column j scores item j + 1. Seen items are scored like any other.
    """
    newest = slice(-model.config.max_sequence_len, None)
    items_transposed = model.normalise_item(item_table[1:]).T
    scores = torch.empty(len(item_ids), model.config.num_items)
    by_length = sorted(range(len(item_ids)), key=lambda row: len(item_ids[row]))
    for start in range(0, len(by_length), _SCORING_BATCH):
        rows = by_length[start : start + _SCORING_BATCH]
        batch = pad_histories(
            [item_ids[row][newest] for row in rows],
            [timestamps[row][newest] for row in rows],
            [request_times[row] for row in rows],
        )
        outputs = padded_forward(model, item_table[batch.item_ids], batch.timestamps, batch.lengths)
        last = outputs[torch.arange(len(rows)), batch.lengths - 1]
        scores[rows] = last @ items_transposed
    return scores


def evaluate(
    model: ResearchHSTU,
    item_table: Tensor,
    dataset: MovieLens100K,
    split: Split,
    *,
    remove_seen: bool = True,
) -> Metrics:
    """Leave-one-out figures over all users, every item of the catalogue ranked.

    The request's time is the held-out event's own. A rank is 1 + the number of items with a
    strictly higher score.

    Args:
        model: dense weights.
        item_table: float32 [num_items + 1, D]; row 0 is padding.
        dataset: the data.
        split: "validation" or "test".
        remove_seen: drop all items of the history from the ranking, those that the model no
            longer reads included.
    """
    events = dataset.held_out(split)
    scores = score_events(model, item_table, events)
    return metrics_of_ranks(ranks_of_targets(scores, events, remove_seen=remove_seen))


def score_events(model: ResearchHSTU, item_table: Tensor, events: Sequence[HeldOutEvent]) -> Tensor:
    """Scores of every item just before held-out events: float32 [B, num_items]."""
    return score_histories(
        model,
        item_table,
        [event.item_ids for event in events],
        [event.timestamps for event in events],
        [event.request_time for event in events],
    )


def ranks_of_targets(
    scores: Tensor, events: Sequence[HeldOutEvent], *, remove_seen: bool = True
) -> Tensor:
    """Ranks of the events' targets, int64 [B], 1 is best; `scores`, [B, num_items], stay as is."""
    ranked = scores.clone()
    if remove_seen:
        for row, event in enumerate(events):
            ranked[row, torch.from_numpy(event.item_ids - 1)] = -torch.inf
    targets = torch.tensor([[event.target_item - 1] for event in events])
    return 1 + (ranked > ranked.gather(1, targets)).sum(dim=1)


def metrics_of_ranks(ranks: Tensor) -> Metrics:
    """Hit rate and NDCG at 10 of targets' ranks, int64 [users], 1 is best."""
    hits = ranks <= 10
    gains = torch.where(hits, 1.0 / torch.log2(1.0 + ranks.double()), 0.0)
    return Metrics(hr10=float(hits.double().mean()), ndcg10=float(gains.mean()))
