"""Steps of a fixed shape: their inputs at fixed addresses, and the layers over them.

A step that fits a bucket is laid out in it with padding that computes what is there already:
a sequence too few repeats the first one, a row or candidate too few repeats the last one. Repeated
rows write the K and V of the row that they repeat to its place, so padding needs no page of its own
and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model_executor.attention.padded import PaddedAttention
from model_executor.models.sequence_model import Layer, SequenceModel
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import to_device
from model_executor.step import Int64Array, ScheduledRequest


class StepBucket(NamedTuple):
    """The most that a step of one shape holds."""

    sequences: int
    rows: int
    """Context rows to compute of each sequence; 0 = all are cached."""
    candidates: int
    """Of each sequence; 0 where candidates are no rows."""
    blocks: int
    """Of each sequence's context."""

    @property
    def num_tokens(self) -> int:
        """Rows and candidates of all sequences."""
        return self.sequences * (self.rows + self.candidates)

    def fits(self, requests: Sequence[ScheduledRequest], candidates_in_sequence: bool) -> bool:
        """Whether a step can be laid out in it."""
        if len(requests) > self.sequences:
            return False
        return all(
            0 < len(one.block_table) <= self.blocks
            and bool(one.num_rows) == bool(self.rows)
            and one.num_rows <= self.rows
            and (not candidates_in_sequence or one.num_candidates <= self.candidates)
            for one in requests
        )


class PaddedInputs:
    """What the layers read of a step: tensors that are filled anew and never replaced."""

    def __init__(
        self, bucket: StepBucket, width: int, block_tokens: int, like: Tensor, in_sequence: bool
    ) -> None:
        """Allocates them on the device and in the dtype of `like`, for rows of this width."""
        number, rows = bucket.sequences, bucket.sequences * bucket.rows
        self.bucket = bucket
        self._block_tokens = block_tokens
        self._in_sequence = in_sequence
        self.x = like.new_zeros(bucket.num_tokens, width)
        """Layer inputs, context rows of all sequences first: float [T, D]."""
        sizes = [number * bucket.blocks, number, rows, rows, rows, bucket.num_tokens]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=like.device)
        tables, lengths, positions, page_ids, page_offsets, source = self._numbers.split(sizes)
        self.block_tables = tables.view(number, bucket.blocks)
        """Pages of each context, int64 [sequences, blocks]; those behind its end are any pages."""
        self.context_lens = lengths
        """Rows of each context, the step's among them, int64 [sequences]; at least 1."""
        self.positions = positions.view(number, bucket.rows)
        """Row of each context row within its context, int64 [sequences, rows]."""
        self.page_ids = page_ids
        self.page_offsets = page_offsets
        """Where K and V of each context row go, int64 [sequences * rows] each."""
        self._source = source
        self.context_lens.fill_(1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.x.nbytes + self._numbers.nbytes

    def fill(self, x: Tensor, requests: Sequence[ScheduledRequest]) -> Int64Array:
        """Lays out a step that fits.

        Args:
            x: layer inputs of its tokens as a `PagedBatch` has them, float [n, D].
            requests: the step's.

        Returns:
            Where in the bucket its last context rows are, one of each request if it has any, and
            then its candidates, int64.
        """
        numbers, picked = self._lay_out(requests)
        self._numbers.copy_(to_device(numbers, self._numbers.device))
        torch.index_select(x, 0, self._source, out=self.x)
        return picked

    def _lay_out(self, requests: Sequence[ScheduledRequest]) -> tuple[Int64Array, Int64Array]:
        bucket = self.bucket
        number = bucket.sequences
        tables = np.empty((number, bucket.blocks), dtype=np.int64)
        lengths = np.empty(number, dtype=np.int64)
        positions, page_ids, offsets, row_source = np.empty((4, number, bucket.rows), np.int64)
        candidate_source = np.empty((number, bucket.candidates), dtype=np.int64)
        row_places, candidate_places = np.arange(bucket.rows), np.arange(bucket.candidates)
        first_row, first_candidate = 0, sum(one.num_rows for one in requests)
        last_rows, candidates = [], []
        for place, one in enumerate(requests):
            table, num_rows = one.block_table, one.num_rows
            num_candidates = one.num_candidates if self._in_sequence else 0
            tables[place] = table[0]
            tables[place, : len(table)] = table
            lengths[place] = one.start + num_rows
            kept = np.minimum(row_places, max(0, num_rows - 1))
            positions[place] = one.start + kept
            page_ids[place] = table[positions[place] // self._block_tokens]
            offsets[place] = positions[place] % self._block_tokens
            row_source[place] = first_row + kept
            # Where a sequence has none they repeat the step's first row; nobody reads them.
            repeated = np.minimum(candidate_places, num_candidates - 1)
            candidate_source[place] = first_candidate + repeated if num_candidates else 0
            if num_rows:
                last_rows.append(place * bucket.rows + num_rows - 1)
            first = number * bucket.rows + place * bucket.candidates
            candidates.append(np.arange(first, first + num_candidates))
            first_row += num_rows
            first_candidate += num_candidates
        arrays = (tables, lengths, positions, page_ids, offsets, row_source, candidate_source)
        for array in arrays:
            array[len(requests) :] = array[0]
        picked = np.concatenate([np.array(last_rows, dtype=np.int64), *candidates])
        return np.concatenate([array.reshape(-1) for array in arrays]), picked


def encode_padded(
    model: SequenceModel, inputs: PaddedInputs, kv: PagedKV, attention: PaddedAttention
) -> Tensor:
    """Runs a model's layers over a bucket, and leaves context rows' K and V in the pages.

    All that it reads lies at fixed addresses and no shape depends on what is there, so that it can
    be captured once and replayed. For models without pair bias.

    Returns:
        Every row after the last layer, float [T, D].
    """
    x, num_rows = inputs.x, inputs.bucket.sequences * inputs.bucket.rows
    for index in range(len(model.layers)):
        layer: Layer = model.layers[index]  # type: ignore[assignment]
        parts = layer.project(x)
        if num_rows:
            k, v = parts.k[:num_rows], parts.v[:num_rows]
            kv.append(index, k, v, inputs.page_ids, inputs.page_offsets)
        attended = attention.attend_padded(parts.q, parts.k, parts.v, kv, index, inputs, model.rule)
        x = layer.close(x, parts.u, attended)
    return x
