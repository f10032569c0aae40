"""The `stu` HSTU once more: one user, plain NumPy in float64, loops and no cache.

Written from the formulas alone and sharing no code with the engine. Formulas:
meta-recsys/generative-recommenders, modules/stu.py and modules/dlrm_hstu.py; time buckets end with
their table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model_executor.model_config import StuConfig
from tests.reference.formulas import (
    Array,
    Weights,
    columns,
    head_columns,
    sigmoid,
    silu,
    standardise,
)
from tests.reference.request import Body, events_read, items_scored, time_of_request

PI = 3.14
"""As the original has it."""


@dataclass(frozen=True)
class ReferenceStu:
    """Weights by their names in `model.safetensors`, tables by theirs in `tables.safetensors`."""

    config: StuConfig
    weights: Weights
    tables: Mapping[str, Array]

    def answer(self, body: Body) -> Array:
        """Scores of a request's candidates: probabilities of binary tasks, else raw: [C, tasks]."""
        logits = self.logits(body)
        for column, task in enumerate(self.config.tasks):
            if task.kind == "binary":
                logits[:, column] = sigmoid(logits[:, column])
        return logits

    def logits(self, body: Body) -> Array:
        """Outputs of the head: [C, tasks]."""
        both = self.user_side(body) * self.item_side(body)
        hidden = self._swish_norm("head.1", self.weights.linear("head.0", both))
        return self.weights.linear("head.2", hidden)

    def _swish_norm(self, name: str, x: Array) -> Array:
        return x * sigmoid(self.weights.layer_norm(name, x, self.config.mlp_norm_eps))

    def _mlp(self, name: str, x: Array) -> Array:
        """Linear, swish norm, linear, layer norm."""
        hidden = self._swish_norm(f"{name}.1", self.weights.linear(f"{name}.0", x))
        return self.weights.layer_norm(
            f"{name}.3", self.weights.linear(f"{name}.2", hidden), self.config.mlp_norm_eps
        )

    # ---------------------------------------------------------------- tokens

    def candidate_rows(self, body: Body) -> Array:
        """Candidates after the layers: [C, D]."""
        config, asked_at = self.config, time_of_request(body)
        read, candidates = events_read(config, body), items_scored(config, body)
        num_contextual = len(config.contextual)
        length = num_contextual + len(read)
        tokens, ages = [], []
        for place in range(num_contextual):
            tokens.append(self._contextual_token(place, body, len(read) + len(candidates)))
            ages.append(asked_at)
        for place in read:
            tokens.append(self._event_token(body["history"], place, is_candidate=False))
            ages.append(asked_at - body["history"]["timestamps"][place])
        for place in range(len(candidates)):
            tokens.append(self._event_token(body["candidates"], place, is_candidate=True))
            ages.append(0)
        x = np.stack(
            [
                math.sqrt(config.embedding_dim) * token
                + self.weights["position_embedding"][self._position(i, length)]
                + self.weights["time_embedding"][self._bucket(age)]
                for i, (token, age) in enumerate(zip(tokens, ages, strict=True))
            ]
        )
        for layer in range(config.num_layers):
            x = self.layer(layer, x, length)
        return x[length:]

    def _contextual_token(self, place: int, body: Body, sequence_len: int) -> Array:
        feature = self.config.contextual[place]
        if f"contextual.{feature.name}" in self.tables:
            table = self.tables[f"contextual.{feature.name}"]
        else:
            table = self.weights[f"contextual_tables.table_{feature.name}"]
        vector = table[body["context"][feature.name]]
        if sequence_len < feature.min_sequence_len:
            vector = np.zeros_like(vector)
        weight, bias = self.weights["contextual_weight"], self.weights["contextual_bias"]
        token: Array = vector @ weight[place] + bias[place]
        return token

    def _event_token(self, events: Body, place: int, is_candidate: bool) -> Array:
        item = self.tables["item_embedding"][events["item_ids"][place]]
        token: Array = self._mlp("content_mlp", item[None])[0]
        if is_candidate:
            action = self.weights["target_action"][0]
        else:
            action = self._action_vector(events["actions"][place])
        token += self._mlp("action_mlp", action[None])[0]
        if self.config.features:
            token += self._mlp("feature_mlp", self._feature_vector(events, place)[None])[0]
        return token

    def _action_vector(self, mask: int) -> Array:
        """Each bit's vector where the bit is set, else zeros, side by side."""
        vectors = [
            vector if mask >> bit & 1 else np.zeros_like(vector)
            for bit, vector in enumerate(self.weights["action_table"])
        ]
        return np.concatenate(vectors)

    def _feature_vector(self, events: Body, place: int) -> Array:
        return np.concatenate(
            [
                self.weights[f"feature_tables.table_{feature.name}"][events[feature.name][place]]
                for feature in self.config.features
            ]
        )

    def _position(self, i: int, length: int) -> int:
        """Contextual rows from 0 on; the rest counts from the candidates backwards."""
        num_contextual = len(self.config.contextual)
        position = i if i < num_contextual else max(0, length - i) + num_contextual
        return min(position, self.config.num_positions - 1)

    def _bucket(self, age: int) -> int:
        return min(int(math.sqrt(max(1e-6, age) / 60)), self.config.num_time_buckets)

    # ---------------------------------------------------------------- layers

    def layer(self, index: int, x: Array, length: int) -> Array:
        """One layer over contextual rows, history and, from row `length` on, candidates."""
        config, own = self.config, self.weights.below(f"layers.{index}")
        heads, dqk, dv, eps = config.num_heads, config.dqk, config.dv, config.layer_norm_eps
        scale = config.attention_scale or 1.0 / math.sqrt(dqk)
        n = config.max_sequence_len + config.max_candidates + len(config.contextual)
        z = own.layer_norm("input_norm", x, eps) @ own["uvqk"] + own["uvqk_bias"]
        u, v, q, k = columns(z, [heads * dv, heads * dv, heads * dqk, heads * dqk])
        u = silu(u)
        attended = np.zeros((len(x), heads * dv))
        for i in range(len(x)):
            read = [j for j in range(len(x)) if self._reads(i, j, length)]
            for h in range(heads):
                scores = head_columns(k, h, dqk)[read] @ head_columns(q, h, dqk)[i]
                weights = silu(scale * scores) / n
                head_columns(attended, h, dv)[i] = weights @ head_columns(v, h, dv)[read]
        gated = u * self._output_norm(own, attended)
        return np.concatenate([u, attended, gated], axis=1) @ own["output_weight"] + x

    def _reads(self, i: int, j: int, length: int) -> bool:
        """Whether row i attends to row j.

        Rows have places in time: candidates share the one behind the history, and contextual rows
        that see the history share the first.
        """
        num_open = len(self.config.contextual) if self.config.contextual_rows_see_history else 0
        shared = max(0, num_open - 1)
        place_i, place_j = (max(0, min(row, length) - shared) for row in (i, j))
        if i < num_open:
            return j < length
        if i != j and place_j >= place_i:
            return False
        window = self.config.max_attention_window
        return window == 0 or place_i - place_j <= window

    def _output_norm(self, own: Weights, attended: Array) -> Array:
        config = self.config
        weight, bias = own["output_norm_weight"], own["output_norm_bias"]
        if not config.group_norm:
            return standardise(attended, config.layer_norm_eps) * weight + bias
        normed = [
            standardise(head_columns(attended, h, config.dv), config.layer_norm_eps) * weight[h]
            + bias[h]
            for h in range(config.num_heads)
        ]
        return np.concatenate(normed, axis=1)

    # ---------------------------------------------------------------- both sides of the head

    def user_side(self, body: Body) -> Array:
        """Candidates after the layers, combined with the request's time: [C, D]."""
        rows = self.candidate_rows(body)
        seconds = float(np.float32(time_of_request(body)))  # The original reads times as fp32.
        hour = 2 * PI * (math.floor(seconds / 3600) % 24) / 24
        day = 2 * PI * (math.floor(seconds / 86_400) % 7) / 7
        angles = [math.cos(hour), math.sin(hour), math.cos(day), math.sin(day)]
        combined = np.concatenate([rows, np.tile(angles, (len(rows), 1))], axis=1)
        return self.weights.layer_norm(
            "user_norm", self.weights.linear("time_combiner", combined), self.config.mlp_norm_eps
        )

    def item_side(self, body: Body) -> Array:
        """Candidates' vectors, item first: [C, D]."""
        sides = []
        for place, item in enumerate(body["candidates"]["item_ids"]):
            side = self.tables["item_embedding"][item]
            if self.config.features:
                side = np.concatenate([side, self._feature_vector(body["candidates"], place)])
            sides.append(side)
        return self._mlp("item_mlp", np.stack(sides))
