"""The rows of one step, as tensors: what a model's layers and its attention read.

Context rows of all requests come first, request after request, then the candidates of all
requests. There is no padding between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_executor.step import CandidateScoring, Int64Array, ScheduledRequest


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """One request's share: context rows start .. start + num_rows - 1, then candidates.

    All rows bring keys and values; queries are the last `num_queries` context rows and all
    candidates, so that a last layer need not compute rows that nobody reads.
    """

    first_row: int
    """Where the context rows begin among the step's rows (of k and v)."""
    num_rows: int
    start: int
    """Rows already in pages."""
    first_candidate: int
    """Where the candidates begin among the step's rows (of k and v)."""
    num_candidates: int
    first_query: int
    """Where the context rows that are queries begin among the rows of q."""
    num_queries: int
    first_candidate_query: int
    """Where the candidates begin among the rows of q."""
    block_table: Tensor
    """Page of each block of rows 0 .. start + num_rows - 1, int64 [blocks]."""
    features: Int64Array
    """What the model reads of rows 0 .. start + num_rows - 1, [context_len, F], on the host."""

    @property
    def context_len(self) -> int:
        """Context rows that a candidate reads."""
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PagedBatch:
    """Rows of a step, T in all, T_c of them context rows."""

    num_context_rows: int
    positions: Tensor
    """Row of each token within its sequence, int64 [T]; candidates all follow the last."""
    features: Int64Array
    """What the model reads of each token, [T, F], on the host."""
    page_ids: Tensor
    """Page that takes each context row's K and V, int64 [T_c]."""
    page_offsets: Tensor
    """Row's place inside that page's block, int64 [T_c]."""
    sequences: tuple[PagedSequence, ...]

    def narrow(self, last_rows: bool) -> tuple[PagedBatch, Tensor]:
        """The batch of a last layer: queries are candidates and, if asked for, last context rows.

        Returns:
            The batch and which of the T rows its queries are, int64 [queries]: one row of each
            sequence first (its last context row), then all candidates.
        """
        sequences, ends = [], []
        num_ends = len(self.sequences) if last_rows else 0
        for place, one in enumerate(self.sequences):
            ends.append(one.first_row + one.num_rows - 1)
            shift = num_ends - self.num_context_rows
            sequences.append(
                replace(
                    one,
                    first_query=place if last_rows else 0,
                    num_queries=1 if last_rows else 0,
                    first_candidate_query=one.first_candidate + shift,
                )
            )
        candidates = np.arange(self.num_context_rows, len(self.features))
        picked = np.concatenate([np.array(ends[:num_ends], dtype=np.int64), candidates])
        return replace(self, sequences=tuple(sequences)), to_device(picked, self.positions.device)


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor of the same type."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def build_paged_batch(
    requests: Sequence[ScheduledRequest],
    block_tokens: int,
    device: torch.device,
    candidates_in_sequence: bool = False,
) -> PagedBatch:
    """Lays the rows of a step behind one another.

    Args:
        requests: the step's.
        block_tokens: rows of a block.
        device: where the tensors go.
        candidates_in_sequence: whether candidates are rows of the step.
    """
    num_context_rows = sum(request.num_rows for request in requests)
    sequences, positions, page_ids, features = [], [], [], []
    candidate_positions, candidate_features = [], []
    first_row, first_candidate = 0, num_context_rows
    for request in requests:
        end = request.start + request.num_rows
        rows = np.arange(request.start, end)
        positions.append(rows)
        page_ids.append(request.block_table[rows // block_tokens])
        features.append(request.features[request.start :])
        num_candidates = 0
        if candidates_in_sequence and isinstance(request.task, CandidateScoring):
            num_candidates = request.num_candidates
            candidate_positions.append(np.full(num_candidates, end))
            candidate_features.append(request.task.features)
        sequences.append(
            PagedSequence(
                first_row=first_row,
                num_rows=request.num_rows,
                start=request.start,
                first_candidate=first_candidate,
                num_candidates=num_candidates,
                first_query=first_row,
                num_queries=request.num_rows,
                first_candidate_query=first_candidate,
                block_table=to_device(request.block_table, device),
                features=request.features,
            )
        )
        first_row += request.num_rows
        first_candidate += num_candidates
    rows = np.concatenate(positions)
    return PagedBatch(
        num_context_rows=num_context_rows,
        positions=to_device(np.concatenate([rows, *candidate_positions]), device),
        features=np.concatenate([*features, *candidate_features]),
        page_ids=to_device(np.concatenate(page_ids), device),
        page_offsets=to_device(rows % block_tokens, device),
        sequences=tuple(sequences),
    )
