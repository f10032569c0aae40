"""SASRec once more: one user, plain NumPy in float64, loops and no cache.

Written from the formulas alone and sharing no code with the engine. Kang and McAuley,
"Self-Attentive Sequential Recommendation", 2018, in the form that is common in PyTorch: queries
are normalised, keys and values are not, and the residual is the normalised query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model_executor.model_config import SASRecConfig
from tests.reference.formulas import Array, Weights, head_columns
from tests.reference.request import Body, events_read, items_scored


@dataclass(frozen=True)
class ReferenceSASRec:
    """Weights by their names in `model.safetensors`, and the item table."""

    config: SASRecConfig
    weights: Weights
    item_table: Array

    def answer(self, body: Body) -> Array:
        """Scores of a request's candidates, or of all items: [C, 1]."""
        sent = body["history"]["item_ids"]
        user = self.rows([sent[place] for place in events_read(self.config, body)])[-1]
        return np.array([[self.item_table[i] @ user] for i in items_scored(self.config, body)])

    def rows(self, item_ids: list[int]) -> Array:
        """Every row after the final norm."""
        config = self.config
        x = np.stack(
            [
                math.sqrt(config.embedding_dim) * self.item_table[item]
                + self.weights["position_embedding"][place]
                for place, item in enumerate(item_ids)
            ]
        )
        for layer in range(config.num_layers):
            x = self._block(self.weights.below(f"layers.{layer}"), x)
        return self.weights.layer_norm("final_norm", x, config.layer_norm_eps)

    def _block(self, own: Weights, x: Array) -> Array:
        config = self.config
        heads, dqk, dv, eps = config.num_heads, config.dqk, config.dv, config.layer_norm_eps
        normed = own.layer_norm("attention_norm", x, eps)
        q, k, v = own.linear("query", normed), own.linear("key", x), own.linear("value", x)
        attended = np.zeros((len(x), heads * dv))
        for i in range(len(x)):
            for h in range(heads):
                scores = head_columns(k, h, dqk)[: i + 1] @ head_columns(q, h, dqk)[i]
                powers = np.exp((scores - scores.max()) / math.sqrt(dqk))
                weights = powers / powers.sum()
                head_columns(attended, h, dv)[i] = weights @ head_columns(v, h, dv)[: i + 1]
        x = own.layer_norm("forward_norm", normed + own.linear("output", attended), eps)
        return x + own.linear("contract", np.maximum(0.0, own.linear("expand", x)))
