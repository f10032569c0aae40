"""Kernels that read and write the pool's rows by address; see `PageArena.addresses`.

An address reaches a slot of a page and a place of staging alike, so the rows that a step found
and those that it missed are gathered by one kernel.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 4096
"""Numbers that one program moves at a time: 16 bytes for each of 256 threads, twice in bf16."""
_MAX_COLUMNS = 1024


def gather_rows(
    rows: Tensor, stride: int, addresses: Tensor, row_index: Tensor, out: Tensor
) -> None:
    """Copies rows to their tokens, zeros where a token has none.

    Args:
        rows: view of the pool, float [places, D] with row stride `stride`.
        stride: numbers from one address to the next.
        addresses: of the step's distinct rows, int64 [n].
        row_index: which of these each token reads, int64 [T]; negative = none.
        out: float [T, D], contiguous.
    """
    num_tokens, width = out.shape
    if not num_tokens:
        return
    height, columns = _tile(width)
    _gather[(triton.cdiv(num_tokens, height),)](
        rows, addresses, row_index, out, num_tokens, stride, width, height, columns
    )


def land_rows(rows: Tensor, stride: int, addresses: Tensor, landed: Tensor) -> None:
    """Writes rows that came from the host to their places, as the pool's dtype.

    Args:
        rows: view of the pool, float [places, D] with row stride `stride`.
        stride: numbers from one address to the next.
        addresses: distinct, int64 [n].
        landed: float32 [n, D], contiguous.
    """
    number, width = landed.shape
    if not number:
        return
    height, columns = _tile(width)
    _land[(triton.cdiv(number, height),)](
        rows, addresses, landed, number, stride, width, height, columns
    )


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of one program's tile, powers of two."""
    columns = min(_MAX_COLUMNS, triton.next_power_of_2(width))
    return max(1, _TILE_ELEMENTS // columns), columns


@triton.jit  # type: ignore[untyped-decorator]
def _gather(
    rows: Any,
    addresses: Any,
    row_index: Any,
    out: Any,
    num_tokens: Any,
    stride: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """One program copies `height` tokens' rows; `stride` is constant so that loads are wide."""
    tokens = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    is_token = tokens < num_tokens
    index = tl.load(row_index + tokens, mask=is_token, other=-1)
    has_row = index >= 0
    sources = tl.load(addresses + index, mask=has_row, other=0) * stride
    for first in range(0, width, columns):
        column = first + tl.arange(0, columns)
        inside = column[None, :] < width
        found = tl.load(
            rows + sources[:, None] + column[None, :], mask=has_row[:, None] & inside, other=0.0
        )
        target = out + tokens[:, None] * width + column[None, :]
        tl.store(target, found, mask=is_token[:, None] & inside)


@triton.jit  # type: ignore[untyped-decorator]
def _land(
    rows: Any,
    addresses: Any,
    landed: Any,
    number: Any,
    stride: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """One program writes `height` rows."""
    places = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    is_row = places < number
    targets = tl.load(addresses + places, mask=is_row, other=0) * stride
    for first in range(0, width, columns):
        column = first + tl.arange(0, columns)
        inside = is_row[:, None] & (column[None, :] < width)
        come = tl.load(landed + places[:, None] * width + column[None, :], mask=inside, other=0.0)
        tl.store(
            rows + targets[:, None] + column[None, :], come.to(rows.dtype.element_ty), mask=inside
        )
