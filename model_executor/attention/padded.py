"""Attention over steps of a fixed shape: what a captured graph may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from model_executor.attention.formulas import silu_attention, softmax_attention
from model_executor.attention.rule import AttentionRule, candidate_mask, context_mask
from model_executor.page_arena import PagedKV

if TYPE_CHECKING:
    from model_executor.padded_step import PaddedInputs, StepBucket

MAX_PAIRS = 1 << 23
"""Query-key pairs, heads counted, of a bucket that torch computes at once (32 MiB of fp32). Longer
steps are bound by arithmetic: there is nothing that a graph could spare them."""


class PaddedAttention(Protocol):
    """Reads lengths and block tables on the device; shapes follow from the bucket alone."""

    def takes(self, bucket: StepBucket, block_tokens: int, num_heads: int) -> bool:
        """Whether steps of a bucket are worth it."""
        ...

    def attend_padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: PagedKV,
        layer: int,
        inputs: PaddedInputs,
        rule: AttentionRule,
    ) -> Tensor:
        """Attends all rows of a bucket: float [T, H, dv].

        Args:
            q: queries, float [T, H, dqk], context rows of all sequences first.
            k: keys, likewise.
            v: values, float [T, H, dv].
            kv: pages; K and V of the context rows are there already.
            layer: which layer's pages to read.
            inputs: which rows these are.
            rule: the model's.
        """
        ...


class TorchPaddedAttention:
    """Gathers the bucket's blocks and masks what is behind a context's end."""

    def takes(self, bucket: StepBucket, block_tokens: int, num_heads: int) -> bool:
        """See `PaddedAttention.takes`."""
        keys = bucket.blocks * block_tokens + bucket.candidates
        return num_heads * bucket.num_tokens * keys <= MAX_PAIRS

    def attend_padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: PagedKV,
        layer: int,
        inputs: PaddedInputs,
        rule: AttentionRule,
    ) -> Tensor:
        """See `PaddedAttention.attend_padded`."""
        number, rows, candidates, _ = inputs.bucket
        keys, values, exists = _context(kv, layer, inputs)
        places = torch.arange(keys.shape[1], device=q.device)
        by_sequence = (number, -1)
        parts = []
        if rows:
            allowed = context_mask(rule, inputs.positions.reshape(-1), places)
            allowed = allowed.unflatten(0, by_sequence) & exists
            queries = q[: number * rows].unflatten(0, by_sequence)
            parts.append(_apply(rule, queries, keys, values, allowed).flatten(0, 1))
        if candidates:
            own_q, own_k, own_v = (
                part[number * rows :].unflatten(0, by_sequence) for part in (q, k, v)
            )
            behind = context_mask(rule, inputs.context_lens, places).unsqueeze(1) & exists
            among = candidate_mask(rule, torch.arange(candidates, device=q.device))
            allowed = torch.cat(
                [behind.expand(-1, candidates, -1), among.expand(number, -1, -1)], dim=2
            )
            keys, values = torch.cat([keys, own_k], dim=1), torch.cat([values, own_v], dim=1)
            parts.append(_apply(rule, own_q, keys, values, allowed).flatten(0, 1))
        return torch.cat(parts)


def _context(kv: PagedKV, layer: int, inputs: PaddedInputs) -> tuple[Tensor, Tensor, Tensor]:
    """K and V of each context, [sequences, keys, H, ...], and which keys exist, bool [., 1, .].

    What is behind a context's end reads as zeros: pages that were never written may hold NaN, and
    NaN times a weight of 0 is NaN.
    """
    tables = inputs.block_tables
    num_tokens = tables.numel() * kv.k.shape[2]
    keys, values = (
        part.unflatten(0, (len(tables), -1))
        for part in kv.gather(layer, tables.reshape(-1), num_tokens)
    )
    places = torch.arange(keys.shape[1], device=keys.device)
    exists = places.unsqueeze(0) < inputs.context_lens.unsqueeze(1)
    is_behind = ~exists.unsqueeze(2).unsqueeze(3)
    keys, values = keys.masked_fill(is_behind, 0.0), values.masked_fill(is_behind, 0.0)
    return keys, values, exists.unsqueeze(1)


def _apply(rule: AttentionRule, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    if rule.weights == "softmax":
        return softmax_attention(q, k, v, allowed, rule.scale)
    return silu_attention(q, k, v, allowed, rule.normaliser, rule.scale)
