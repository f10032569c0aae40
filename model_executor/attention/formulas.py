"""Attention on contiguous tensors: the one place where the formulas are written in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def silu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    normaliser: int,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """HSTU: sum_j SiLU(scale q_i . k_j + bias_ij) / n * v_j over the allowed pairs; no softmax.

    Args:
        q: queries, float [..., n, H, dqk].
        k: keys, float [..., m, H, dqk].
        v: values, float [..., m, H, dv].
        allowed: which pairs attend, bool [..., n, m].
        normaliser: n, a constant of the model and never of the batch.
        scale: factor of q.k.
        bias: added to the score of every head, float [..., n, m].

    Returns:
        Float [..., n, H, dv].
    """
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k)
    if scale != 1.0:
        scores.mul_(scale)
    if bias is not None:
        scores.add_(bias.unsqueeze(-3))
    # The pairs are by far the largest tensor: written in place where no gradient needs them.
    weights = functional.silu(scores, inplace=not torch.is_grad_enabled())
    weights.masked_fill_(~allowed.unsqueeze(-3), 0.0)
    return torch.einsum("...hnm,...mhd->...nhd", weights, v) / normaliser


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """sum_j softmax_j(scale q_i . k_j) v_j over the allowed pairs, of which each row has one.

    Args:
        q: queries, float [..., n, H, dqk].
        k: keys, float [..., m, H, dqk].
        v: values, float [..., m, H, dv].
        allowed: which pairs attend, bool [..., n, m].
        scale: factor of q.k.

    Returns:
        Float [..., n, H, dv].
    """
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k).mul_(scale)
    scores.masked_fill_(~allowed.unsqueeze(-3), -torch.inf)
    weights = scores.float().softmax(dim=-1).to(v.dtype)
    return torch.einsum("...hnm,...mhd->...nhd", weights, v)
