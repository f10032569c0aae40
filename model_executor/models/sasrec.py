"""SASRec: softmax attention over items and absolute positions.

Source of the maths: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018; see
`layers/sasrec_block.py` for the form of its blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model_executor.attention.rule import AttentionRule
from model_executor.layers.sasrec_block import SASRecBlock
from model_executor.model_config import SASRecConfig
from model_executor.models.sequence_model import RetrievalModel
from model_executor.paged_batch import PagedBatch


class SASRec(RetrievalModel):
    """The dense weights of one SASRec model."""

    config: SASRecConfig

    def __init__(self, config: SASRecConfig) -> None:
        rule = AttentionRule(weights="softmax", scale=1.0 / math.sqrt(config.dqk))
        blocks = [SASRecBlock(config) for _ in range(config.num_layers)]
        super().__init__(config, rule, list(blocks))
        self.position_embedding = nn.Parameter(
            torch.empty(config.max_sequence_len, config.embedding_dim)
        )
        self.final_norm = nn.LayerNorm(config.embedding_dim, eps=config.layer_norm_eps)

    def embed(self, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Layer inputs of a step's tokens (oldest event = position 0): float [T, D]."""
        scaled = rows * math.sqrt(self.config.embedding_dim)
        return scaled + self.position_embedding[batch.positions]

    def normalise_user(self, rows: Tensor) -> Tensor:
        """The final norm: [..., D]."""
        normed: Tensor = self.final_norm(rows)
        return normed

    def normalise_item(self, rows: Tensor) -> Tensor:
        """Items are scored as they are: [..., D]."""
        return rows
