"""The reference backend: gathers each context's blocks and applies the formula, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model_executor.attention.backend import PairBias
from model_executor.attention.formulas import silu_attention, softmax_attention
from model_executor.attention.rule import AttentionRule, candidate_mask, context_mask
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch, PagedSequence

PAIRS_PER_TILE = 1 << 23
"""Query-key pairs, heads counted, that are worked on at once (32 MiB of fp32): what keeps the
memory of long histories bounded."""


def query_tiles(num_rows: int, pairs_per_row: int) -> Iterator[slice]:
    """Slices of rows that stay within a tile."""
    height = max(1, PAIRS_PER_TILE // max(1, pairs_per_row))
    return (slice(first, min(first + height, num_rows)) for first in range(0, num_rows, height))


class TorchReferenceAttention:
    """Plain torch, one sequence at a time; the judge of every faster backend."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: PagedKV,
        layer: int,
        batch: PagedBatch,
        rule: AttentionRule,
        bias: PairBias | None = None,
    ) -> Tensor:
        """Attends a layer's queries: float [Q, H, dv]; see `AttentionBackend.attend`."""
        attended = v.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        for place, sequence in enumerate(batch.sequences):
            keys, values = kv.gather(layer, sequence.block_table, sequence.context_len)
            _attend_context(attended, q, keys, values, place, sequence, rule, bias)
            if sequence.num_candidates:
                own = slice(
                    sequence.first_candidate, sequence.first_candidate + sequence.num_candidates
                )
                keys, values = torch.cat([keys, k[own]]), torch.cat([values, v[own]])
                _attend_candidates(attended, q, keys, values, sequence, rule)
        return attended


def _attend_context(
    attended: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    place: int,
    sequence: PagedSequence,
    rule: AttentionRule,
    bias: PairBias | None,
) -> None:
    """Writes what the sequence's context queries read."""
    length = sequence.context_len
    first_position = length - sequence.num_queries
    key_positions = torch.arange(length, device=q.device)
    everything = slice(0, length)
    for tile in query_tiles(sequence.num_queries, q.shape[1] * length):
        rows = slice(sequence.first_query + tile.start, sequence.first_query + tile.stop)
        queries = slice(first_position + tile.start, first_position + tile.stop)
        allowed = context_mask(rule, key_positions[queries], key_positions)
        added = None if bias is None else bias(place, queries, everything)
        attended[rows] = _apply(rule, q[rows], keys, values, allowed, added)


def _attend_candidates(
    attended: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: PagedSequence,
    rule: AttentionRule,
) -> None:
    """Writes what the sequence's candidates read: the context, and their own groups."""
    length, number = sequence.context_len, sequence.num_candidates
    key_positions = torch.arange(length, device=q.device)
    places = torch.arange(number, device=q.device)
    among = candidate_mask(rule, places)
    for tile in query_tiles(number, q.shape[1] * (length + number)):
        first = sequence.first_candidate_query
        rows = slice(first + tile.start, first + tile.stop)
        behind = torch.full((tile.stop - tile.start,), length, device=q.device)
        allowed = torch.cat([context_mask(rule, behind, key_positions), among[tile]], dim=1)
        attended[rows] = _apply(rule, q[rows], keys, values, allowed, None)


def _apply(
    rule: AttentionRule, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None
) -> Tensor:
    if rule.weights == "softmax":
        return softmax_attention(q, k, v, allowed, rule.scale)
    return silu_attention(q, k, v, allowed, rule.normaliser, rule.scale, bias)
