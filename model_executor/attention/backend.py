"""What an attention backend must do."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from model_executor.layers.relative_bias import RelativeBias
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch


class AttentionBackend(Protocol):
    """Causal HSTU attention of a step's rows over their paged histories."""

    def time_buckets(self, batch: PagedBatch, edges: Tensor) -> tuple[Tensor, ...]:
        """Time bucket of every pair, one int16 [num_rows, context_len] per sequence.

        Computed once per step: buckets are the same for all layers.
        """
        ...

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
        """Attends queries [T, H, dqk] to the pages of their sequences: float [T, H, dv].

        K and V of the step's own rows are already in the pages.
        """
        ...
