"""The `nvidia` HSTU once more: one user, plain NumPy in float64, loops and no cache.

Written from the formulas alone and sharing no code with the engine. Formulas: the HSTU block of
the ranking example in NVIDIA/recsys-examples; columns of `uvqk` lie as in its fused layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model_executor.model_config import NvidiaConfig
from tests.reference.formulas import (
    Array,
    Weights,
    columns,
    head_columns,
    l2_normalise,
    silu,
)
from tests.reference.request import Body, events_read, items_scored


@dataclass(frozen=True)
class ReferenceNvidia:
    """Weights by their names in `model.safetensors`, tables by theirs in `tables.safetensors`."""

    config: NvidiaConfig
    weights: Weights
    tables: Mapping[str, Array]

    def answer(self, body: Body) -> Array:
        """Logits of a request's candidates: [C, tasks]."""
        return self.logits(self.candidate_rows(body))

    def candidate_rows(self, body: Body) -> Array:
        """Candidates after the layers: [C, D]."""
        config, history = self.config, body["history"]
        items = self.tables["item_embedding"]
        tokens = [
            self._contextual_table(feature.name)[body["context"][feature.name]]
            for feature in config.contextual
        ]
        for place in events_read(config, body):
            tokens.append(items[history["item_ids"][place]])
            if config.action is not None:
                actions = self.weights["small_tables.table_action"]
                tokens.append(actions[history["actions"][place]])
        length = len(tokens)
        tokens += [items[item] for item in items_scored(config, body)]
        # Candidates all stand at the place behind the history, and places end with the table.
        last = min(length, config.num_position_buckets - 1)
        x = np.stack(
            [
                math.sqrt(config.embedding_dim) * token
                + self.weights["position_embedding"][min(i, last)]
                for i, token in enumerate(tokens)
            ]
        )
        for layer in range(config.num_layers):
            x = self.layer(layer, x, len(config.contextual), length)
        return x[length:]

    def _contextual_table(self, name: str) -> Array:
        if f"contextual.{name}" in self.tables:
            return self.tables[f"contextual.{name}"]
        return self.weights[f"small_tables.table_contextual_{name}"]

    def layer(self, index: int, x: Array, num_contextual: int, length: int) -> Array:
        """One layer over contextual rows, history and, from row `length` on, candidates."""
        config, own = self.config, self.weights.below(f"layers.{index}")
        heads, dim, eps = config.num_heads, config.dqk, config.layer_norm_eps
        z = silu(own.layer_norm("input_norm", x, eps) @ own["uvqk"] + own["uvqk_bias"])
        u, v, q, k = columns(z, [heads * dim] * 4)
        attended = np.zeros((len(x), heads * dim))
        for i in range(len(x)):
            read = [j for j in range(len(x)) if self._reads(i, j, num_contextual, length)]
            for h in range(heads):
                scores = head_columns(k, h, dim)[read] @ head_columns(q, h, dim)[i]
                weights = silu(scores / math.sqrt(dim)) / config.scaling_seqlen
                head_columns(attended, h, dim)[i] = weights @ head_columns(v, h, dim)[read]
        gated = u * own.layer_norm("output_norm", attended, eps)
        return gated @ own["output_weight"] + x

    def _reads(self, i: int, j: int, num_contextual: int, length: int) -> bool:
        """Whether row i attends to row j."""
        if i < num_contextual:
            return j < length
        if i < length:
            return j <= i
        group = self.config.target_group_size
        same_group = j >= length and (j - length) // group == (i - length) // group
        return j < length or (same_group and j <= i)

    def logits(self, rows: Array) -> Array:
        """The head over candidates after the layers: [C, tasks]."""
        x = l2_normalise(rows, self.config.l2_norm_eps)
        last = 2 * (len(self.config.prediction_head) - 1)
        for place in range(0, last, 2):
            x = np.maximum(0.0, self.weights.linear(f"head.{place}", x))
        return self.weights.linear(f"head.{last}", x)
