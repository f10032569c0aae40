"""The history rows of one step, as tensors: what a model's layers and its attention read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_executor.step import Int64Array, ScheduledRequest


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """One request's chunk: rows start .. start + num_rows - 1 of its history."""

    first_row: int
    """Where the chunk begins among the step's rows."""
    num_rows: int
    start: int
    """Rows already in pages: the chunk attends to these and, causally, to itself."""
    block_table: Tensor
    """Page of each block of rows 0 .. start + num_rows - 1, int64 [blocks]."""
    query_times: Tensor
    """Seconds, int64 [num_rows]: of row i that of event i + 1, of the last row the request's."""
    key_times: Tensor
    """Seconds of events 0 .. start + num_rows - 1, int64 [start + num_rows]."""

    @property
    def context_len(self) -> int:
        """Rows that the chunk's last row attends to, itself included."""
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Jagged rows of all chunks of a step, T in all; no padding between them."""

    positions: Tensor
    """Row of each token within its history, int64 [T]."""
    page_ids: Tensor
    """Page that takes each token's K and V, int64 [T]."""
    page_offsets: Tensor
    """Token's place inside that page's block, int64 [T]."""
    sequences: tuple[PagedSequence, ...]


def to_device(array: Int64Array, device: torch.device) -> Tensor:
    """An index array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def build_paged_batch(
    requests: Sequence[ScheduledRequest], block_tokens: int, device: torch.device
) -> PagedBatch:
    """Lays the chunks of a step behind one another."""
    sequences, positions, page_ids = [], [], []
    first_row = 0
    for request in requests:
        rows = np.arange(request.start, request.start + request.num_rows)
        positions.append(rows)
        page_ids.append(request.block_table[rows // block_tokens])
        times = to_device(request.event_times, device)
        sequences.append(
            PagedSequence(
                first_row=first_row,
                num_rows=request.num_rows,
                start=request.start,
                block_table=to_device(request.block_table, device),
                query_times=times[request.start + 1 :],
                key_times=times[:-1],
            )
        )
        first_row += request.num_rows
    flat = np.concatenate(positions)
    return PagedBatch(
        positions=to_device(flat, device),
        page_ids=to_device(np.concatenate(page_ids), device),
        page_offsets=to_device(flat % block_tokens, device),
        sequences=tuple(sequences),
    )
