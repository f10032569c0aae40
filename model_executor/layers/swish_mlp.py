"""The small perceptrons of DLRMv3.

Source of the maths: meta-recsys/generative-recommenders, modules/ (SwishLayerNorm and the MLPs of
preprocessor, item side and multitask head).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SwishLayerNorm(nn.LayerNorm):
    """x * sigmoid(LN(x))."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies it over the last dimension: [..., D]."""
        return x * torch.sigmoid(super().forward(x))


def embedding_mlp(in_dim: int, hidden_dim: int, out_dim: int, eps: float) -> nn.Sequential:
    """Linear, SwishLayerNorm, Linear, LayerNorm."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        SwishLayerNorm(hidden_dim, eps=eps),
        nn.Linear(hidden_dim, out_dim),
        nn.LayerNorm(out_dim, eps=eps),
    )


def prediction_mlp(in_dim: int, hidden_dim: int, num_tasks: int, eps: float) -> nn.Sequential:
    """Linear, SwishLayerNorm, Linear: one output per task."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        SwishLayerNorm(hidden_dim, eps=eps),
        nn.Linear(hidden_dim, num_tasks),
    )
