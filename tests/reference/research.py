"""The `research` HSTU once more: one user, plain NumPy in float64, loops and no cache.

Written from the formulas alone and sharing no code with the engine, so that agreement means
something. Formulas: meta-recsys/generative-recommenders, research/modeling/sequential/hstu.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model_executor.model_config import ResearchConfig
from tests.reference.formulas import (
    Array,
    Weights,
    columns,
    head_columns,
    l2_normalise,
    silu,
    standardise,
)
from tests.reference.request import Body, events_read, items_scored, time_of_request


def _bucket(seconds: int, num_buckets: int) -> int:
    return min(num_buckets, math.floor(math.log(max(1, abs(seconds))) / 0.301))


@dataclass(frozen=True)
class ReferenceHSTU:
    """Weights by their names in `model.safetensors`, and the item table."""

    config: ResearchConfig
    weights: Mapping[str, Array]
    item_table: Array

    def answer(self, body: Body) -> Array:
        """Scores of a request's candidates, or of all items: [C, 1]."""
        read = events_read(self.config, body)
        items = [body["history"]["item_ids"][place] for place in read]
        times = [body["history"]["timestamps"][place] for place in read]
        by_item = self.scores(items, [*times, time_of_request(body)])
        return np.array([[by_item[item - 1]] for item in items_scored(self.config, body)])

    def scores(self, item_ids: list[int], times: list[int]) -> Array:
        """Score of every item 1..num_items after this history; see `rows`."""
        items = l2_normalise(self.item_table[1:], self.config.l2_norm_eps)
        scores: Array = items @ self.rows(item_ids, times)[-1]
        return scores

    def rows(self, item_ids: list[int], times: list[int]) -> Array:
        """Every row after the output norm; `times` ends with the request's time."""
        config = self.config
        x = np.stack(
            [
                math.sqrt(config.embedding_dim) * self.item_table[item]
                + self.weights["position_embedding"][place]
                for place, item in enumerate(item_ids)
            ]
        )
        for layer in range(config.num_layers):
            x = self._layer(Weights(self.weights, f"layers.{layer}."), x, times)
        return l2_normalise(x, config.l2_norm_eps)

    def _layer(self, own: Weights, x: Array, times: list[int]) -> Array:
        config = self.config
        heads, dqk, dv, eps = config.num_heads, config.dqk, config.dv, config.layer_norm_eps
        n = config.max_sequence_len + config.max_output_len
        z = silu(standardise(x, eps) @ own["uvqk"])
        u, v, q, k = columns(z, [heads * dv, heads * dv, heads * dqk, heads * dqk])
        attended = np.zeros((len(x), heads * dv))
        for i in range(len(x)):
            bias = np.array([self._bias(own, i, j, times) for j in range(i + 1)])
            for h in range(heads):
                scores = head_columns(k, h, dqk)[: i + 1] @ head_columns(q, h, dqk)[i] + bias
                weights = silu(scores) / n
                head_columns(attended, h, dv)[i] = weights @ head_columns(v, h, dv)[: i + 1]
        return own.linear("output", u * standardise(attended, eps)) + x

    def _bias(self, own: Weights, i: int, j: int, times: list[int]) -> float:
        """By distance, and by the time from event j to the event after event i."""
        bucket = _bucket(times[i + 1] - times[j], self.config.num_time_buckets)
        n = self.config.max_sequence_len + self.config.max_output_len
        by_position = own["bias.position_weight"][(j - i) + n - 1]
        return float(by_position + own["bias.time_weight"][bucket])
