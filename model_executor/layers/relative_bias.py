"""Relative position and time bias of the `research` dialect.

Source of the formula: `RelativeBucketedTimeAndPositionBasedBias` of
meta-recsys/generative-recommenders (research/modeling/sequential/hstu.py): for query row i and
key row j, `position_w[(j - i) + N - 1] + time_w[bucket(t[i + 1] - t[j])]`, shared by all heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BUCKET_WIDTH = 0.301
"""In natural logarithms: each bucket spans a factor of e^0.301, about 1.35."""


def time_bucket_edges(num_buckets: int) -> Tensor:
    """Smallest whole seconds of buckets 1..num_buckets: [num_buckets], int64.

    Whole-second edges make the bucket an integer comparison, so that no device, batch shape or
    vector lane can round a logarithm across an edge and break exact reuse. The reference's fp32
    logarithm may choose the neighbouring bucket for differences within its rounding of an edge,
    which are a few millionths of all.
    """
    edges = [math.ceil(math.exp(BUCKET_WIDTH * bucket)) for bucket in range(1, num_buckets + 1)]
    largest = torch.iinfo(torch.int64).max
    # The device is named, so that a module built on the meta device has its constants all the same.
    return torch.tensor([min(edge, largest) for edge in edges], dtype=torch.int64, device="cpu")


def time_buckets(query_times: Tensor, key_times: Tensor, edges: Tensor) -> Tensor:
    """floor(ln(max(1, |dt|)) / 0.301), clamped to the table.

    Args:
        query_times: seconds, int64 [..., n]; of row i this is the time of event i + 1.
        key_times: seconds, int64 [..., m].
        edges: from `time_bucket_edges`.

    Returns:
        Buckets, int16 [..., n, m]: they are kept for all layers of a step.
    """
    distance = (query_times.unsqueeze(-1) - key_times.unsqueeze(-2)).abs_()
    return torch.bucketize(distance, edges, right=True, out_int32=True).to(torch.int16)


class RelativeBias(nn.Module):
    """The two tables of one layer."""

    def __init__(self, num_positions: int, num_time_buckets: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.position_weight = nn.Parameter(torch.empty(2 * num_positions - 1))
        self.time_weight = nn.Parameter(torch.empty(num_time_buckets + 1))

    def forward(self, query_positions: Tensor, buckets: Tensor, first_key: int = 0) -> Tensor:
        """Bias of each pair, float [..., n, m]; the keys are rows first_key .. first_key + m - 1.

        Args:
            query_positions: rows of the queries, int64 [n], each below the table's positions.
            buckets: from `time_buckets`, [..., n, m].
            first_key: row of the first key.
        """
        # For query row i the entries of keys 0, 1, 2, ... follow one another in the table, so a
        # row of the bias is a window of it and no [n, m] index is needed.
        windows = self.position_weight.unfold(0, buckets.shape[-1], 1)
        by_position = windows[self.num_positions - 1 + first_key - query_positions]
        return by_position + self.time_weight[buckets.long()]
