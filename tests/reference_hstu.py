"""The `research` HSTU once more: one user, plain NumPy in float64, loops and no cache.

Written from the formulas alone and sharing no code with the engine, so that agreement means
something. Formulas: meta-recsys/generative-recommenders, research/modeling/sequential/hstu.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_executor.model_config import ResearchConfig

Array = npt.NDArray[np.float64]


def _silu(x: Array) -> Array:
    result: Array = x / (1.0 + np.exp(-x))
    return result


def _layer_norm(x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return result


def _bucket(seconds: int, num_buckets: int) -> int:
    return min(num_buckets, math.floor(math.log(max(1, abs(seconds))) / 0.301))


@dataclass(frozen=True)
class ReferenceHSTU:
    """Weights by their names in `model.safetensors`, and the item table."""

    config: ResearchConfig
    weights: Mapping[str, Array]
    item_table: Array

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
            x = self._layer(layer, x, times)
        norms = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), config.l2_norm_eps)
        result: Array = x / norms
        return result

    def scores(self, item_ids: list[int], times: list[int]) -> Array:
        """Score of every item 1..num_items after this history."""
        items = self.item_table[1:]
        norms = np.maximum(np.linalg.norm(items, axis=1, keepdims=True), self.config.l2_norm_eps)
        scores: Array = (items / norms) @ self.rows(item_ids, times)[-1]
        return scores

    def _layer(self, index: int, x: Array, times: list[int]) -> Array:
        config = self.config
        heads, dqk, dv = config.num_heads, config.dqk, config.dv
        eps = config.layer_norm_eps
        own = {
            name.removeprefix(f"layers.{index}."): weight
            for name, weight in self.weights.items()
            if name.startswith(f"layers.{index}.")
        }
        z = _silu(_layer_norm(x, eps) @ own["uvqk"])
        u, v = z[:, : heads * dv], z[:, heads * dv : 2 * heads * dv]
        q = z[:, 2 * heads * dv : 2 * heads * dv + heads * dqk]
        k = z[:, 2 * heads * dv + heads * dqk :]
        attended = np.zeros((len(x), heads * dv))
        for i in range(len(x)):
            for j in range(i + 1):
                bucket = _bucket(times[i + 1] - times[j], config.num_time_buckets)
                bias = own["bias.time_weight"][bucket]
                bias += own["bias.position_weight"][(j - i) + config.num_positions - 1]
                for h in range(heads):
                    score = q[i, h * dqk : (h + 1) * dqk] @ k[j, h * dqk : (h + 1) * dqk] + bias
                    weight = score / (1.0 + math.exp(-score)) / config.num_positions
                    attended[i, h * dv : (h + 1) * dv] += weight * v[j, h * dv : (h + 1) * dv]
        gated = u * _layer_norm(attended, eps)
        result: Array = gated @ own["output.weight"].T + own["output.bias"] + x
        return result
