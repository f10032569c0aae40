"""HSTU of the `research` dialect: embedding step, layers over paged K and V, output norm.

Source of the maths: `HSTU` of meta-recsys/generative-recommenders
(research/modeling/sequential/hstu.py) with its learnable positional preprocessor and L2-norm
postprocessor. The item table is no part of this module: its rows live in the page pool.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model_executor.attention.backend import AttentionBackend
from model_executor.layers.hstu_layer import ResearchHSTULayer
from model_executor.layers.relative_bias import time_bucket_edges
from model_executor.model_config import ModelConfig
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch


class HSTU(nn.Module):
    """The dense weights of one `research` model."""

    time_edges: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # A constant of the model: a normaliser that follows the batch would change a user's
        # scores with their neighbours. Reference cases that did so set it themselves.
        self.normaliser = config.num_positions
        self.position_embedding = nn.Parameter(
            torch.empty(config.num_positions, config.embedding_dim)
        )
        self.layers = nn.ModuleList(ResearchHSTULayer(config) for _ in range(config.num_layers))
        edges = time_bucket_edges(config.num_time_buckets)
        self.register_buffer("time_edges", edges, persistent=False)

    def embed(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Layer input of item rows [..., D] at positions [...] (oldest event = 0): [..., D]."""
        scaled = rows * math.sqrt(self.config.embedding_dim)
        return scaled + self.position_embedding[positions]

    def encode(
        self, x: Tensor, batch: PagedBatch, kv: PagedKV, attention: AttentionBackend
    ) -> Tensor:
        """Runs the layers over a step's rows and leaves their K and V in the pages.

        Args:
            x: layer inputs, float [T, D].
            batch: which rows these are and which pages hold their histories.
            kv: K and V of the pool, written for the T rows and read for their histories.
            attention: the backend.

        Returns:
            Rows after the last layer, before the output norm: float [T, D].
        """
        buckets = attention.time_buckets(batch, self.time_edges)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ResearchHSTULayer)
            parts = layer.project(x)
            kv.append(index, parts.k, parts.v, batch.page_ids, batch.page_offsets)
            attended = attention.attend(
                parts.q, kv, index, batch, layer.bias, buckets, self.normaliser
            )
            x = layer.close(x, layer.gate(parts.u, attended))
        return x

    def normalise(self, rows: Tensor) -> Tensor:
        """Rows divided by max(eps, L2 norm): of users before scoring, and of items: [..., D]."""
        norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return rows / norm.clamp_min(self.config.l2_norm_eps)
