"""HSTU of the `stu` dialect: DLRMv3, a multi-task ranking model.

Source of the maths: meta-recsys/generative-recommenders, modules/dlrm_hstu.py with its contextual
preprocessor, action encoder, positional encoder, time-feature postprocessor and multitask module.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model_executor.attention.rule import AttentionRule
from model_executor.inputs.stu import (
    ACTION,
    CONTEXT,
    CONTEXT_ROW,
    FIRST_ITEM_FEATURE,
    POSITION,
    QUERY_TIME,
    TIME_BUCKET,
    VOID,
)
from model_executor.layers.hstu_layer import StuHSTULayer
from model_executor.layers.swish_mlp import embedding_mlp, prediction_mlp
from model_executor.model_config import SMALL_TABLE_ROWS, FeatureTable, StuConfig
from model_executor.models.sequence_model import RankingModel
from model_executor.paged_batch import PagedBatch, to_device
from model_executor.step import NO_ROW, Int64Array

_TIME_FEATURES = 4
_PI = 3.14
"""As the reference has it, and as its weights were trained with."""


class StuHSTU(RankingModel):
    """The dense weights of one `stu` model."""

    config: StuConfig

    def __init__(self, config: StuConfig) -> None:
        rule = AttentionRule(
            weights="silu",
            scale=config.attention_scale or 1.0 / math.sqrt(config.dqk),
            normaliser=config.normaliser,
            num_open_rows=config.num_contextual_tokens if config.contextual_rows_see_history else 0,
            window=config.max_attention_window,
        )
        layers = [StuHSTULayer(config) for _ in range(config.num_layers)]
        super().__init__(config, rule, list(layers))
        dim, table_dim, eps = config.embedding_dim, config.table_dim, config.mlp_norm_eps
        hidden = config.preprocessor_hidden_dim
        action_width = config.num_action_bits * config.action_dim
        self.content_mlp = embedding_mlp(table_dim, hidden, dim, eps)
        self.action_mlp = embedding_mlp(action_width, hidden, dim, eps)
        self.action_table = nn.Parameter(torch.empty(config.num_action_bits, config.action_dim))
        self.target_action = nn.Parameter(torch.empty(1, action_width))
        self.feature_tables = _tables(config.features, table_dim)
        if config.features:
            self.feature_mlp = embedding_mlp(len(config.features) * table_dim, hidden, dim, eps)
        if config.contextual:
            number = len(config.contextual)
            self.contextual_weight = nn.Parameter(torch.empty(number, table_dim, dim))
            self.contextual_bias = nn.Parameter(torch.empty(number, dim))
        small = [one for one in config.contextual if one.num_rows <= SMALL_TABLE_ROWS]
        self.contextual_tables = _tables(small, table_dim)
        self.position_embedding = nn.Parameter(torch.empty(config.num_positions, dim))
        self.time_embedding = nn.Parameter(torch.empty(config.num_time_buckets + 1, dim))
        self.time_combiner = nn.Linear(dim + _TIME_FEATURES, dim)
        self.user_norm = nn.LayerNorm(dim, eps=eps)
        item_width = (1 + len(config.features)) * table_dim
        self.item_mlp = embedding_mlp(item_width, config.item_hidden_dim, dim, eps)
        self.head = prediction_mlp(dim, config.head_hidden_dim, len(config.tasks), eps)
        self.register_buffer(
            "binary_tasks",
            # On no meta device: constants are in no file.
            torch.tensor([task.kind == "binary" for task in config.tasks], device="cpu"),
            persistent=False,
        )

    def embed(self, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Layer inputs of a step's tokens: float [T, D]."""
        features, device = batch.features, rows.device
        contextual = np.flatnonzero(features[:, CONTEXT] != NO_ROW)
        tokens = self._event_tokens(rows, features)
        if len(contextual):
            places = to_device(contextual, device)
            tokens[places] = self._contextual_tokens(rows[places], features[contextual])
        positions = to_device(features[:, POSITION], device)
        buckets = to_device(features[:, TIME_BUCKET], device)
        placed = self.position_embedding[positions] + self.time_embedding[buckets]
        return tokens * math.sqrt(self.config.embedding_dim) + placed

    def _event_tokens(self, rows: Tensor, features: Int64Array) -> Tensor:
        """Item, action and item features of each token; contextual ones are overwritten."""
        tokens: Tensor = self.content_mlp(rows)
        tokens = tokens + self._action_tokens(features[:, ACTION], rows.device)
        if self.config.features:
            distinct, place = np.unique(
                features[:, FIRST_ITEM_FEATURE:], axis=0, return_inverse=True
            )
            vectors = self.feature_mlp(self._feature_vectors(distinct, rows.device))
            tokens += vectors[to_device(place.reshape(-1), rows.device)]
        return tokens

    def _action_tokens(self, actions: Int64Array, device: torch.device) -> Tensor:
        """Distinct bit masks are few, so each passes the MLP once: float [T, D]."""
        distinct, place = np.unique(actions, return_inverse=True)
        bits = (distinct[:, None] >> np.arange(self.config.num_action_bits)) & 1
        chosen = to_device(bits, device).to(self.action_table.dtype).unsqueeze(-1)
        vectors = (chosen * self.action_table).flatten(1)
        is_target = to_device(distinct == NO_ROW, device).unsqueeze(1)
        encoded: Tensor = self.action_mlp(torch.where(is_target, self.target_action, vectors))
        return encoded[to_device(place, device)]

    def _feature_vectors(self, ids: Int64Array, device: torch.device) -> Tensor:
        """Vectors of the item features side by side, [n, K * table_dim]."""
        columns = to_device(ids, device).unbind(1)
        tables = self.feature_tables.values()
        return torch.cat([table[ids] for table, ids in zip(tables, columns, strict=True)], dim=1)

    def _contextual_tokens(self, rows: Tensor, features: Int64Array) -> Tensor:
        """Each contextual vector through the matrix of its feature, [n, D]."""
        device, context_rows = rows.device, features[:, CONTEXT_ROW]
        vectors = rows
        if len(self.contextual_tables):
            tables = torch.cat(list(self.contextual_tables.values()))
            small = to_device(np.maximum(context_rows, 0), device)
            pooled = to_device(context_rows < 0, device).unsqueeze(1)
            vectors = torch.where(pooled, rows, tables[small])
        void = to_device(context_rows == VOID, device).unsqueeze(1)
        vectors = vectors.masked_fill(void, 0.0)
        mapped = rows.new_empty(len(rows), self.config.embedding_dim)
        for feature in range(len(self.config.contextual)):
            own = to_device(np.flatnonzero(features[:, CONTEXT] == feature), device)
            mapped[own] = vectors[own] @ self.contextual_weight[feature]
        return mapped + self.contextual_bias[to_device(features[:, CONTEXT], device)]

    def score(self, encoded: Tensor, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Probabilities of binary tasks, raw values of the others, float32 [C, tasks]."""
        logits = self.logits(self.user_side(encoded, batch), self.item_side(rows, batch)).float()
        binary = self.get_buffer("binary_tasks")
        return torch.where(binary, torch.sigmoid(logits), logits)

    def user_side(self, encoded: Tensor, batch: PagedBatch) -> Tensor:
        """Candidate rows combined with the time of the request, [C, D]."""
        times = batch.features[batch.num_context_rows :, QUERY_TIME]
        angles = to_device(_time_features(times), encoded.device).to(encoded.dtype)
        combined: Tensor = self.user_norm(self.time_combiner(torch.cat([encoded, angles], dim=1)))
        return combined

    def item_side(self, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Candidates' item vectors and features, [C, D]."""
        ids = batch.features[batch.num_context_rows :, FIRST_ITEM_FEATURE:]
        if self.config.features:
            rows = torch.cat([rows, self._feature_vectors(ids, rows.device)], dim=1)
        encoded: Tensor = self.item_mlp(rows)
        return encoded

    def logits(self, user: Tensor, item: Tensor) -> Tensor:
        """The multitask head over both sides' product, [C, tasks]."""
        predicted: Tensor = self.head(user * item)
        return predicted


def _tables(features: Sequence[FeatureTable], dim: int) -> nn.ParameterDict:
    """Small tables in the order of their features; from a plain dict they would be sorted."""
    return nn.ParameterDict(
        OrderedDict(
            (f"table_{one.name}", nn.Parameter(torch.empty(one.num_rows, dim))) for one in features
        )
    )


def _time_features(seconds: Int64Array) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Cos and sin of the hour of the day, then of the day of the week: float32 [n, 4]."""
    # The reference reads times as fp32; from there on whole numbers, so that a time shortly
    # before the hour is not rounded into the next one.
    rounded = seconds.astype(np.float32).astype(np.int64)
    angles = []
    for unit, period in ((3600, 24), (86_400, 7)):
        within = rounded // unit % period
        angles.append((2 * _PI * within / period).astype(np.float32))
    columns = [function(angle) for angle in angles for function in (np.cos, np.sin)]
    return np.stack(columns, axis=1)
