"""HSTU of the `research` dialect: scaled items and positions in, last row out.

Source of the maths: `HSTU` of meta-recsys/generative-recommenders
(research/modeling/sequential/hstu.py) with its learnable positional preprocessor and L2-norm
postprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model_executor.attention.backend import PairBias
from model_executor.attention.rule import AttentionRule
from model_executor.inputs.research import NEXT_TIME, TIME
from model_executor.layers.hstu_layer import ResearchHSTULayer
from model_executor.layers.relative_bias import RelativeBias, time_bucket_edges, time_buckets
from model_executor.model_config import ResearchConfig
from model_executor.models.sequence_model import RetrievalModel, l2_normalise
from model_executor.paged_batch import PagedBatch, PagedSequence, to_device

_BUCKETS_PER_TILE = 1 << 23
"""Pairs whose distances are held at once."""


class ResearchHSTU(RetrievalModel):
    """The dense weights of one `research` model."""

    config: ResearchConfig
    time_edges: Tensor

    def __init__(self, config: ResearchConfig) -> None:
        rule = AttentionRule(weights="silu", scale=1.0, normaliser=config.normaliser)
        layers = [ResearchHSTULayer(config) for _ in range(config.num_layers)]
        super().__init__(config, rule, list(layers))
        self.position_embedding = nn.Parameter(
            torch.empty(config.num_positions, config.embedding_dim)
        )
        edges = time_bucket_edges(config.num_time_buckets)
        self.register_buffer("time_edges", edges, persistent=False)

    def embed(self, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Layer inputs of a step's tokens: float [T, D]."""
        return self.place(rows, batch.positions)

    def place(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Layer input of item rows [..., D] at positions [...] (oldest event = 0): [..., D]."""
        scaled = rows * math.sqrt(self.config.embedding_dim)
        return scaled + self.position_embedding[positions]

    def pair_bias(self, batch: PagedBatch) -> Callable[[int], PairBias | None]:
        """Relative position and time bias; time buckets are computed once for all layers."""
        buckets = [self._buckets(sequence) for sequence in batch.sequences]

        def of_layer(index: int) -> PairBias:
            layer = self.layers[index]
            assert isinstance(layer, ResearchHSTULayer)
            return _LayerBias(layer.bias, batch, buckets)

        return of_layer

    def _buckets(self, sequence: PagedSequence) -> Tensor:
        """Time bucket of every pair, int16 [num_rows, context_len]."""
        device = self.time_edges.device
        keys = to_device(sequence.features[:, TIME], device)
        queries = to_device(sequence.features[sequence.start :, NEXT_TIME], device)
        height = max(1, _BUCKETS_PER_TILE // len(keys))
        tiles = [time_buckets(tile, keys, self.time_edges) for tile in queries.split(height)]
        return torch.cat(tiles)

    def normalise_user(self, rows: Tensor) -> Tensor:
        """Rows divided by max(eps, L2 norm): [..., D]."""
        return l2_normalise(rows, self.config.l2_norm_eps)

    def normalise_item(self, rows: Tensor) -> Tensor:
        """Rows divided by max(eps, L2 norm): [..., D]."""
        return l2_normalise(rows, self.config.l2_norm_eps)


@dataclass(frozen=True, slots=True)
class _LayerBias:
    """The bias of one layer over a step's sequences."""

    table: RelativeBias
    batch: PagedBatch
    buckets: list[Tensor]

    @property
    def position_weight(self) -> Tensor:
        """See `TabledBias.position_weight`."""
        return self.table.position_weight

    @property
    def time_weight(self) -> Tensor:
        """See `TabledBias.time_weight`."""
        return self.table.time_weight

    def __call__(self, sequence: int, queries: slice, keys: slice) -> Tensor:
        """Bias of a tile: float [n, m]."""
        start = self.batch.sequences[sequence].start
        rows = slice(queries.start - start, queries.stop - start)
        buckets = self.buckets[sequence][rows, keys]
        positions = torch.arange(queries.start, queries.stop, device=buckets.device)
        bias: Tensor = self.table(positions, buckets, keys.start)
        return bias
