"""The reference backend: gathers each history's blocks and applies the formula, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from model_executor.attention.silu_attention import silu_attention
from model_executor.layers.relative_bias import RelativeBias, time_buckets
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch


class TorchReferenceAttention:
    """Plain torch, one sequence at a time; the judge of every faster backend."""

    def time_buckets(self, batch: PagedBatch, edges: Tensor) -> tuple[Tensor, ...]:
        """Time bucket of every pair, one int64 [num_rows, context_len] per sequence."""
        return tuple(time_buckets(s.query_times, s.key_times, edges) for s in batch.sequences)

    def attend(
        self,
        q: Tensor,
        kv: PagedKV,
        layer: int,
        batch: PagedBatch,
        bias: RelativeBias,
        buckets: tuple[Tensor, ...],
        normaliser: int,
    ) -> Tensor:
        """Attends queries [T, H, dqk] to the pages of their sequences: float [T, H, dv]."""
        attended = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[-1])
        for sequence, sequence_buckets in zip(batch.sequences, buckets, strict=True):
            rows = slice(sequence.first_row, sequence.first_row + sequence.num_rows)
            k, v = kv.gather(layer, sequence.block_table, sequence.context_len)
            key_positions = torch.arange(sequence.context_len, device=q.device)
            query_positions = batch.positions[rows]
            attended[rows] = silu_attention(
                q[rows],
                k,
                v,
                bias(query_positions, key_positions, sequence_buckets),
                key_positions <= query_positions.unsqueeze(1),
                normaliser,
            )
        return attended
