"""One HSTU layer of the `research` dialect, less its attention.

The maths follows `SequentialTransductionUnitJagged` of meta-recsys/generative-recommenders
(research/modeling/sequential/hstu.py) and Zhai et al., "Actions Speak Louder than Words", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from model_executor.layers.relative_bias import RelativeBias
from model_executor.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Projections:
    """What a layer computes of its input rows before attention; T rows, H heads."""

    u: Tensor
    """Gate, [T, H * dv]."""
    v: Tensor
    """Values, [T, H, dv]."""
    q: Tensor
    """Queries, [T, H, dqk]."""
    k: Tensor
    """Keys, [T, H, dqk]."""


class ResearchHSTULayer(nn.Module):
    """Projection with SiLU on all four parts, then gate, output projection and residual.

    Leading dimensions are free, so training runs it over padded batches and serving over the
    jagged rows of a step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dqk = config.dqk
        self.dv = config.dv
        self.eps = config.layer_norm_eps
        qk_width = config.num_heads * config.dqk
        v_width = config.num_heads * config.dv
        self.widths = (v_width, v_width, qk_width, qk_width)
        self.uvqk = nn.Parameter(torch.empty(config.embedding_dim, sum(self.widths)))
        self.output = nn.Linear(v_width, config.embedding_dim)
        self.bias = RelativeBias(config.num_positions, config.num_time_buckets)

    def project(self, x: Tensor) -> Projections:
        """Projects rows [..., D] to u, v, q and k; heads are slices of each block."""
        normed = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        u, v, q, k = functional.silu(normed @ self.uvqk).split(self.widths, dim=-1)
        return Projections(
            u=u,
            v=v.unflatten(-1, (self.num_heads, self.dv)),
            q=q.unflatten(-1, (self.num_heads, self.dqk)),
            k=k.unflatten(-1, (self.num_heads, self.dqk)),
        )

    def gate(self, u: Tensor, attended: Tensor) -> Tensor:
        """Normalises what attention gave, [..., H, dv], and gates it with u: [..., H * dv]."""
        flat = attended.flatten(-2)
        return u * functional.layer_norm(flat, flat.shape[-1:], eps=self.eps)

    def close(self, x: Tensor, gated: Tensor) -> Tensor:
        """Output projection and residual: [..., D]."""
        projected: Tensor = self.output(gated)
        return projected + x
