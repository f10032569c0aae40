"""The HSTU attention formula on contiguous tensors: the one place where it is written in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def silu_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, allowed: Tensor, normaliser: int
) -> Tensor:
    """sum_j SiLU(q_i . k_j + bias_ij) / n * v_j over the allowed pairs; no softmax, no scaling.

    Args:
        q: queries, float [..., n, H, dqk].
        k: keys, float [..., m, H, dqk].
        v: values, float [..., m, H, dv].
        bias: added to the score of every head, float [..., n, m].
        allowed: which pairs attend, bool [..., n, m].
        normaliser: n, a constant of the model and never of the batch.

    Returns:
        Float [..., n, H, dv].
    """
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k).add_(bias.unsqueeze(-3))
    # The pairs are by far the largest tensor: written in place where no gradient needs them.
    weights = functional.silu(scores, inplace=not torch.is_grad_enabled())
    weights.masked_fill_(~allowed.unsqueeze(-3), 0.0)
    return torch.einsum("...hnm,...mhd->...nhd", weights, v) / normaliser
