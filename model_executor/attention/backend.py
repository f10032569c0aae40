"""What an attention backend must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from model_executor.attention.rule import AttentionRule
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model and its pool ask of a backend; some backends refuse some of it at start."""

    rule: AttentionRule
    num_heads: int
    dqk: int
    dv: int
    dtype: torch.dtype
    candidates_in_sequence: bool
    """Candidates are rows of a step."""
    block_tokens: int
    page_bytes: int
    fp8_kv: bool = False
    """K and V are stored as float8."""


class PairBias(Protocol):
    """What is added to the score of each query-key pair, the same for all heads."""

    def __call__(self, sequence: int, queries: slice, keys: slice) -> Tensor:
        """Bias of a tile of one sequence: float [n, m].

        Args:
            sequence: place in the batch.
            queries: which context rows, by their position in the context.
            keys: which context rows, likewise.
        """
        ...


@runtime_checkable
class TabledBias(PairBias, Protocol):
    """A bias of two parts, by position and by time bucket, that a kernel can add itself."""

    @property
    def position_weight(self) -> Tensor:
        """Float [2 N - 1]: entry j - i + N - 1 of query row i and key row j."""
        ...

    @property
    def time_weight(self) -> Tensor:
        """Float [time buckets]."""
        ...

    @property
    def buckets(self) -> Sequence[Tensor]:
        """Time bucket of each pair of each sequence, int16 [num_rows, context_len]."""
        ...


class AttentionBackend(Protocol):
    """Attention of a step's rows over their paged contexts and among candidates."""

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
        """Attends a layer's queries: float [Q, H, dv], in the order of q.

        Args:
            q: queries, float [Q, H, dqk], laid out as the batch's sequences say.
            k: keys of the step's own rows, float [T, H, dqk].
            v: values of the step's own rows, float [T, H, dv].
            kv: pages; those of the step's context rows hold their K and V already.
            layer: which layer's pages to read.
            batch: which rows these are.
            rule: the model's.
            bias: added to scores of context rows; a model with candidate rows has none.
        """
        ...
