"""HSTU layers less their attention, one class for each dialect.

Sources of the maths: Zhai et al., "Actions Speak Louder than Words", 2024, and the code of
meta-recsys/generative-recommenders (`SequentialTransductionUnitJagged` in research/modeling/
sequential/hstu.py for `research`, `STULayer` in modules/stu.py for `stu`) and of
NVIDIA/recsys-examples (hstu layers, for `nvidia`). They differ in norms, biases, activations and
in how a layer ends; the columns of `uvqk` always are [u | v | q | k], heads side by side in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model_executor.layers.relative_bias import RelativeBias
from model_executor.model_config import ModelConfig, NvidiaConfig, ResearchConfig, StuConfig


@dataclass(frozen=True, slots=True)
class Projections:
    """What a layer computes of its input rows before attention: T rows, Q of them queries."""

    u: Tensor
    """What the layer's end needs of the query rows, [Q, ...]."""
    v: Tensor
    """Values, [T, H, dv]."""
    q: Tensor
    """Queries, [Q, H, dqk]."""
    k: Tensor
    """Keys, [T, H, dqk]."""


class HSTULayer(nn.Module):
    """What the dialects share: one projection to u, v, q and k.

    Leading dimensions are free, so training runs it over padded batches and serving over the
    jagged rows of a step.
    """

    activated: ClassVar[str] = "uvqk"
    """Parts that SiLU is applied to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.eps = config.layer_norm_eps
        qk_width = config.num_heads * config.dqk
        self.v_width = config.num_heads * config.dv
        self.widths = (self.v_width, self.v_width, qk_width, qk_width)
        self.uvqk = nn.Parameter(torch.empty(config.embedding_dim, sum(self.widths)))
        self.uvqk_bias: nn.Parameter | None = None

    def normalise(self, x: Tensor) -> Tensor:
        """The norm before the projection: [..., D]."""
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps)

    def project(self, x: Tensor, picked: Tensor | None = None) -> Projections:
        """Projects rows [..., D] to u, v, q and k.

        Args:
            x: rows of the step.
            picked: rows that are queries, int64 [Q]; None = all.
        """
        normed = self.normalise(x)
        if picked is None:
            z = normed @ self.uvqk
            if self.uvqk_bias is not None:
                z += self.uvqk_bias
            if self.activated == "uvqk":
                z = functional.silu(z)
                u, v, q, k = z.split(self.widths, dim=-1)
            else:
                u, v, q, k = z.split(self.widths, dim=-1)
                u = functional.silu(u)
        else:
            queries = normed[picked]
            u, q = self._part(queries, "u"), self._part(queries, "q")
            v, k = self._part(normed, "v"), self._part(normed, "k")
        by_head = (self.num_heads, -1)
        return Projections(
            u=u, v=v.unflatten(-1, by_head), q=q.unflatten(-1, by_head), k=k.unflatten(-1, by_head)
        )

    def _part(self, normed: Tensor, name: str) -> Tensor:
        place = "uvqk".index(name)
        first = sum(self.widths[:place])
        columns = slice(first, first + self.widths[place])
        z = normed @ self.uvqk[:, columns]
        if self.uvqk_bias is not None:
            z += self.uvqk_bias[columns]
        return functional.silu(z) if name in self.activated else z


class ResearchHSTULayer(HSTULayer):
    """Norms without weights, no projection bias, SiLU on all four parts, relative bias."""

    def __init__(self, config: ResearchConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(self.v_width, config.embedding_dim)
        self.bias = RelativeBias(config.num_positions, config.num_time_buckets)

    def gate(self, u: Tensor, attended: Tensor) -> Tensor:
        """Normalises what attention gave, [..., H, dv], and gates it with u: [..., H * dv]."""
        flat = attended.flatten(-2)
        return u * functional.layer_norm(flat, flat.shape[-1:], eps=self.eps)

    def close(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """Gate, output projection and residual: [..., D]."""
        projected: Tensor = self.output(self.gate(u, attended))
        return projected + x


class NvidiaHSTULayer(HSTULayer):
    """Norms with weights, projection bias, SiLU on all four parts, no output bias."""

    def __init__(self, config: NvidiaConfig) -> None:
        super().__init__(config)
        self.uvqk_bias = nn.Parameter(torch.empty(sum(self.widths)))
        self.input_norm = nn.LayerNorm(config.embedding_dim, eps=self.eps)
        self.output_norm = nn.LayerNorm(self.v_width, eps=self.eps)
        self.output_weight = nn.Parameter(torch.empty(self.v_width, config.embedding_dim))

    def normalise(self, x: Tensor) -> Tensor:
        """The norm before the projection: [..., D]."""
        normed: Tensor = self.input_norm(x)
        return normed

    def close(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """Gate, output projection and residual: [..., D]."""
        gated: Tensor = u * self.output_norm(attended.flatten(-2))
        return x + gated @ self.output_weight


class StuHSTULayer(HSTULayer):
    """SiLU on u alone; the output reads u, what attention gave, and the gate of both."""

    activated: ClassVar[str] = "u"

    def __init__(self, config: StuConfig) -> None:
        super().__init__(config)
        self.group_norm = config.group_norm
        self.uvqk_bias = nn.Parameter(torch.empty(sum(self.widths)))
        self.input_norm = nn.LayerNorm(config.embedding_dim, eps=self.eps)
        norm_width = self.num_heads if config.group_norm else self.v_width
        self.output_norm_weight = nn.Parameter(torch.empty(norm_width))
        self.output_norm_bias = nn.Parameter(torch.empty(norm_width))
        self.output_weight = nn.Parameter(torch.empty(3 * self.v_width, config.embedding_dim))

    def normalise(self, x: Tensor) -> Tensor:
        """The norm before the projection: [..., D]."""
        normed: Tensor = self.input_norm(x)
        return normed

    def close(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """Gate, output projection and residual: [..., D]."""
        flat = attended.flatten(-2)
        gated = u * self._output_norm(attended)
        return x + torch.cat([u, flat, gated], dim=-1) @ self.output_weight

    def _output_norm(self, attended: Tensor) -> Tensor:
        """Norm over all heads' columns, or over each head with one weight and bias per head."""
        weight, bias = self.output_norm_weight, self.output_norm_bias
        if not self.group_norm:
            flat = attended.flatten(-2)
            return functional.layer_norm(flat, flat.shape[-1:], weight, bias, self.eps)
        normed = functional.layer_norm(attended, attended.shape[-1:], eps=self.eps)
        return (normed * weight.unsqueeze(-1) + bias.unsqueeze(-1)).flatten(-2)
