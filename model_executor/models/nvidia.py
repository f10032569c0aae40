"""HSTU of the `nvidia` dialect: a ranking model with absolute positions and an MLP head.

Source of the maths: NVIDIA/recsys-examples, HSTU block (preprocessor, positional encoder,
postprocessor) and the MLP of its ranking model.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from model_executor.attention.rule import AttentionRule
from model_executor.inputs.nvidia import SMALL_ROW
from model_executor.layers.hstu_layer import NvidiaHSTULayer
from model_executor.model_config import SMALL_TABLE_ROWS, NvidiaConfig
from model_executor.models.sequence_model import RankingModel, l2_normalise
from model_executor.paged_batch import PagedBatch, to_device


class NvidiaHSTU(RankingModel):
    """The dense weights of one `nvidia` model."""

    config: NvidiaConfig

    def __init__(self, config: NvidiaConfig) -> None:
        rule = AttentionRule(
            weights="silu",
            scale=1.0 / math.sqrt(config.dqk),
            normaliser=config.normaliser,
            num_open_rows=config.num_contextual_tokens,
            group_size=config.target_group_size,
        )
        layers = [NvidiaHSTULayer(config) for _ in range(config.num_layers)]
        super().__init__(config, rule, list(layers))
        self.position_embedding = nn.Parameter(
            torch.empty(config.num_position_buckets, config.embedding_dim)
        )
        # Actions first, then the contextual features whose tables are small: see SMALL_ROW.
        sizes = {} if config.action is None else {"table_action": config.action.num_rows}
        for feature in config.contextual:
            if feature.num_rows <= SMALL_TABLE_ROWS:
                sizes[f"table_contextual_{feature.name}"] = feature.num_rows
        # An ordered dict, because the tables of a plain one would be sorted by name.
        self.small_tables = nn.ParameterDict(
            OrderedDict(
                (name, nn.Parameter(torch.empty(rows, config.embedding_dim)))
                for name, rows in sizes.items()
            )
        )
        self.head = prediction_head(config.embedding_dim, config.prediction_head)

    def embed(self, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Layer inputs of a step's tokens: float [T, D]."""
        tokens = rows
        if len(self.small_tables):
            small = to_device(batch.features[:, SMALL_ROW], rows.device).unsqueeze(1)
            tables = torch.cat(list(self.small_tables.values()))
            tokens = torch.where(small < 0, rows, tables[small.squeeze(1).clamp_min(0)])
        positions = batch.positions.clamp_max(self.config.num_position_buckets - 1)
        return tokens * math.sqrt(self.config.embedding_dim) + self.position_embedding[positions]

    def score(self, encoded: Tensor, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Logits of a step's candidates, float32 [C, tasks]."""
        logits: Tensor = self.head(self.normalise_candidate(encoded))
        return logits.float()

    def normalise_candidate(self, encoded: Tensor) -> Tensor:
        """Candidate rows divided by max(eps, L2 norm): [C, D]."""
        return l2_normalise(encoded, self.config.l2_norm_eps)


def prediction_head(in_dim: int, widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, width in zip([in_dim, *widths], widths, strict=False):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
