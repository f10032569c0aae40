"""The rows of one step, as tensors: what a model's layers and its attention read.

Context rows of all requests come first, request after request, then the candidates of all
requests. There is no padding between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from model_executor.step import CandidateScoring, Int64Array, ScheduledRequest


class PagedSequence(NamedTuple):
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
                one._replace(
                    first_query=place if last_rows else 0,
                    num_queries=1 if last_rows else 0,
                    first_candidate_query=one.first_candidate + shift,
                )
            )
        candidates = np.arange(self.num_context_rows, len(self.features))
        picked = np.concatenate([np.array(ends[:num_ends], dtype=np.int64), candidates])
        return replace(self, sequences=tuple(sequences)), to_device(picked, self.positions.device)


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor of the same type; on a CPU it may be the array's memory itself."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # Pinned, or the host would wait for the copy; torch keeps the memory until it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def begin_to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, in pinned memory, to be read when the device is done; or on a CPU itself.

    The host does not wait here: one wait at the end of a step is enough for all of its copies.
    """
    return tensor.to("cpu", non_blocking=True)


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
    features, candidate_features = [], []
    shares: list[tuple[int, int, int, int]] = []
    for request in requests:
        num_candidates = 0
        if candidates_in_sequence and isinstance(request.task, CandidateScoring):
            num_candidates = request.num_candidates
            candidate_features.append(request.task.features)
        if request.num_rows:
            features.append(request.features[request.start :])
        shares.append((request.start, request.num_rows, num_candidates, len(request.block_table)))
    tables = np.concatenate([request.block_table for request in requests])
    numbers, num_rows, num_context_rows = _lay_out(np.array(shares), tables, block_tokens)
    # One array, and so one copy to the device.
    sizes = [num_rows, num_context_rows, num_context_rows, *(share[3] for share in shares)]
    # Not `Tensor.split`: a detour through Python that takes as long again.
    positions, page_ids, page_offsets, *block_tables = torch.split_with_sizes(
        to_device(numbers, device), sizes
    )
    return PagedBatch(
        num_context_rows=num_context_rows,
        positions=positions,
        features=np.concatenate([*features, *candidate_features] or [requests[0].features[:0]]),
        page_ids=page_ids,
        page_offsets=page_offsets,
        sequences=_sequences(requests, shares, block_tables, num_context_rows),
    )


def _sequences(
    requests: Sequence[ScheduledRequest],
    shares: list[tuple[int, int, int, int]],
    block_tables: list[Tensor],
    num_context_rows: int,
) -> tuple[PagedSequence, ...]:
    """The requests' places among the rows; all context rows are queries."""
    sequences, first_row, first_candidate = [], 0, num_context_rows
    for request, share, table in zip(requests, shares, block_tables, strict=True):
        start, num_rows, num_candidates, _ = share
        sequences.append(
            PagedSequence(
                first_row=first_row,
                num_rows=num_rows,
                start=start,
                first_candidate=first_candidate,
                num_candidates=num_candidates,
                first_query=first_row,
                num_queries=num_rows,
                first_candidate_query=first_candidate,
                block_table=table,
                features=request.features,
            )
        )
        first_row += num_rows
        first_candidate += num_candidates
    return tuple(sequences)


@njit(nogil=True, cache=True)
def _lay_out(shares: Any, tables: Any, block_tokens: Any) -> Any:
    """Numbers of a batch behind one another: int64 [T + 2 * T_c + blocks].

    Args:
        shares: start, context rows, candidates, blocks of each request, int64 [requests, 4].
        tables: block tables of all requests, int64 [blocks].
        block_tokens: rows of a block.

    Returns:
        Positions [T], pages [T_c] and page offsets [T_c] of `PagedBatch`, then the tables; T; T_c.
    """
    num_context_rows = shares[:, 1].sum()
    num_rows = num_context_rows + shares[:, 2].sum()
    numbers = np.empty(num_rows + 2 * num_context_rows + len(tables), dtype=np.int64)
    row, candidate, first_block = 0, num_context_rows, 0
    for place in range(len(shares)):
        start, end = shares[place, 0], shares[place, 0] + shares[place, 1]
        for position in range(start, end):
            numbers[row] = position
            numbers[num_rows + row] = tables[first_block + position // block_tokens]
            numbers[num_rows + num_context_rows + row] = position % block_tokens
            row += 1
        numbers[candidate : candidate + shares[place, 2]] = end
        candidate += shares[place, 2]
        first_block += shares[place, 3]
    numbers[num_rows + 2 * num_context_rows :] = tables
    return numbers, num_rows, num_context_rows
