"""One block of SASRec, less its attention.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, in the form that is common
in PyTorch (pmixer/SASRec.pytorch): queries are normalised and keys and values are not, the
residual is the normalised query, attention has an output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_executor.layers.hstu_layer import Projections
from model_executor.model_config import SASRecConfig


class SASRecBlock(nn.Module):
    """Attention's projections, then residual, norm and a feed-forward network with a residual."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.query = nn.Linear(dim, config.num_heads * config.dqk)
        self.key = nn.Linear(dim, config.num_heads * config.dqk)
        self.value = nn.Linear(dim, config.num_heads * config.dv)
        self.output = nn.Linear(config.num_heads * config.dv, dim)
        self.forward_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.expand = nn.Linear(dim, config.ffn_dim)
        self.contract = nn.Linear(config.ffn_dim, dim)

    def project(self, x: Tensor, picked: Tensor | None = None) -> Projections:
        """Projects rows [T, D]; u is the normalised query rows, which are the residual.

        Args:
            x: rows of the step.
            picked: rows that are queries, int64 [Q]; None = all.
        """
        normed: Tensor = self.attention_norm(x if picked is None else x[picked])
        by_head = (self.num_heads, -1)
        return Projections(
            u=normed,
            q=self.query(normed).unflatten(-1, by_head),
            k=self.key(x).unflatten(-1, by_head),
            v=self.value(x).unflatten(-1, by_head),
        )

    def close(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """Residual, then the feed-forward network: [Q, D]. x is not read again."""
        x = self.forward_norm(u + self.output(attended.flatten(-2)))
        forwarded: Tensor = self.contract(torch.relu(self.expand(x)))
        return x + forwarded
