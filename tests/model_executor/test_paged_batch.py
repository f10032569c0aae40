"""The arrays of a step against the obvious way, request by request and row by row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_executor.paged_batch import build_paged_batch
from model_executor.step import CandidateScoring, ScheduledRequest

BLOCK_TOKENS = 3

shares = st.tuples(st.integers(0, 7), st.integers(0, 8), st.integers(0, 4)).filter(
    lambda share: share[0] + share[1] > 0
)
"""Rows in pages, rows to compute, candidates."""


def scheduled(place: int, start: int, num_rows: int, num_candidates: int) -> ScheduledRequest:
    end = start + num_rows
    task = CandidateScoring(
        np.arange(num_candidates), np.full((num_candidates, 2), 1000 * place, dtype=np.int64)
    )
    return ScheduledRequest(
        request_id=str(place),
        start=start,
        row_index=np.arange(num_rows),
        block_table=100 * place + np.arange(-(-end // BLOCK_TOKENS))[::-1],
        features=np.arange(2 * end).reshape(end, 2) + 100 * place,
        task=task if num_candidates else None,
    )


@given(st.lists(shares, min_size=1, max_size=4), st.booleans())
def test_arrays_of_a_step_are_those_of_its_rows(
    step: list[tuple[int, int, int]], in_sequence: bool
) -> None:
    requests = [scheduled(place, *share) for place, share in enumerate(step)]
    batch = build_paged_batch(requests, BLOCK_TOKENS, torch.device("cpu"), in_sequence)
    rows = [(one, row) for one in requests for row in range(one.start, one.start + one.num_rows)]
    behind = [
        (one, candidate)
        for one in requests
        if in_sequence and isinstance(one.task, CandidateScoring)
        for candidate in range(one.num_candidates)
    ]
    assert batch.num_context_rows == len(rows)
    ends = [one.start + one.num_rows for one, _ in behind]
    assert batch.positions.tolist() == [row for _, row in rows] + ends
    assert batch.page_ids.tolist() == [one.block_table[row // BLOCK_TOKENS] for one, row in rows]
    assert batch.page_offsets.tolist() == [row % BLOCK_TOKENS for _, row in rows]
    features = [one.features[row].tolist() for one, row in rows]
    for one, candidate in behind:
        assert isinstance(one.task, CandidateScoring)
        features.append(one.task.features[candidate].tolist())
    assert batch.features.tolist() == features
    for sequence, one in zip(batch.sequences, requests, strict=True):
        assert sequence.block_table.tolist() == one.block_table.tolist()
        assert (sequence.start, sequence.num_rows) == (one.start, one.num_rows)
        own = slice(sequence.first_row, sequence.first_row + sequence.num_rows)
        assert batch.positions[own].tolist() == [row for owner, row in rows if owner is one]
        number = one.num_candidates if in_sequence else 0
        assert sequence.num_candidates == number
        if number:
            first = [owner is one for owner, _ in behind].index(True)
            assert sequence.first_candidate == len(rows) + first
