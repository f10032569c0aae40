"""The reference backend: gathers each history's blocks and applies the formula, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model_executor.attention.silu_attention import silu_attention
from model_executor.layers.relative_bias import RelativeBias, time_buckets
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch

PAIRS_PER_TILE = 1 << 23
"""Query-key pairs, heads counted, that are worked on at once (32 MiB of fp32): what keeps the
memory of long histories bounded."""


def _tiles(num_rows: int, pairs_per_row: int) -> Iterator[slice]:
    """Slices of rows that stay within a tile."""
    height = max(1, PAIRS_PER_TILE // pairs_per_row)
    return (slice(first, min(first + height, num_rows)) for first in range(0, num_rows, height))


class TorchReferenceAttention:
    """Plain torch, one sequence at a time; the judge of every faster backend."""

    def time_buckets(self, batch: PagedBatch, edges: Tensor) -> tuple[Tensor, ...]:
        """Time bucket of every pair, one int16 [num_rows, context_len] per sequence."""
        return tuple(
            torch.cat(
                [
                    time_buckets(sequence.query_times[rows], sequence.key_times, edges)
                    for rows in _tiles(sequence.num_rows, sequence.context_len)
                ]
            )
            for sequence in batch.sequences
        )

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
        num_heads = q.shape[1]
        attended = q.new_empty(q.shape[0], num_heads, kv.v.shape[-1])
        for sequence, sequence_buckets in zip(batch.sequences, buckets, strict=True):
            k, v = kv.gather(layer, sequence.block_table, sequence.context_len)
            key_positions = torch.arange(sequence.context_len, device=q.device)
            for tile in _tiles(sequence.num_rows, num_heads * sequence.context_len):
                rows = slice(sequence.first_row + tile.start, sequence.first_row + tile.stop)
                positions = batch.positions[rows]
                attended[rows] = silu_attention(
                    q[rows],
                    k,
                    v,
                    bias(positions, sequence_buckets[tile]),
                    key_positions <= positions.unsqueeze(1),
                    normaliser,
                )
        return attended
