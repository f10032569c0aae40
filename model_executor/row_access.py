"""How a step's rows get into the pool and out of it: plain torch, or kernels on CUDA."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from block_manager.distinct_rows import NO_ROW
from model_executor.paged_batch import to_device
from model_executor.row_pages import RowPages
from model_executor.scaled_rows import ScaledRows
from model_executor.step import Int64Array


class RowAccess(Protocol):
    """Reads and writes rows by address; see `PageArena.addresses`."""

    def gather(self, addresses: Int64Array, row_index: Int64Array) -> Tensor:
        """Rows of tokens, zeros where a token has none: float [T, D].

        Args:
            addresses: of the step's distinct rows, int64 [n].
            row_index: which of these each token reads, or NO_ROW, int64 [T].
        """
        ...

    def land(
        self, addresses: Int64Array, slots: Int64Array, staging: Int64Array, rows: Tensor
    ) -> None:
        """Writes rows that came from the host to their places.

        Args:
            addresses: of the rows, int64 [n].
            slots: of the first rows, int64 [s]; those behind them go to staging.
            staging: places of the others, int64 [n - s].
            rows: on the device, float32 [n, D].
        """
        ...


class TorchRowAccess:
    """Any device; indices are put together on the host."""

    def __init__(
        self, rows: Tensor, staging: Tensor, pages: RowPages, codec: ScaledRows | None = None
    ) -> None:
        """Takes three views of the pool: rows by address, of staging [places, D], and by slot.

        With a codec, the views are of what it stores.
        """
        self._rows = rows
        self._codec = codec
        self._staging = staging
        self._pages = pages

    def gather(self, addresses: Int64Array, row_index: Int64Array) -> Tensor:
        """See `RowAccess.gather`."""
        device = self._rows.device
        has_row = row_index != NO_ROW
        if has_row.all():
            return self._read(to_device(addresses[row_index], device))
        found = self._read(to_device(addresses[row_index[has_row]], device))
        rows = found.new_zeros(len(row_index), found.shape[1])
        # Not by the mask: on a GPU the host would wait to learn how many there are.
        rows.index_copy_(0, to_device(np.flatnonzero(has_row), device), found)
        return rows

    def land(
        self, addresses: Int64Array, slots: Int64Array, staging: Int64Array, rows: Tensor
    ) -> None:
        """See `RowAccess.land`."""
        device = self._rows.device
        if self._codec is None:
            rows = rows.to(self._rows.dtype)
        self._pages.write(to_device(slots, device), rows[: len(slots)])
        staged = rows[len(slots) :]
        if self._codec is not None:
            staged = self._codec.encode(staged)
        self._staging.index_copy_(0, to_device(staging, device), staged)

    def _read(self, addresses: Tensor) -> Tensor:
        stored = self._rows.index_select(0, addresses)
        return stored if self._codec is None else self._codec.decode(stored)


class TritonRowAccess:
    """CUDA; and any device in Triton's interpreter, which is how it is tested."""

    def __init__(self, rows: Tensor) -> None:
        """Takes the view of the pool by address, [places, D]."""
        # Only where it is wanted: it takes seconds, and only CUDA builds of torch bring it.
        from model_executor import triton_rows

        self._kernels = triton_rows
        self._rows = rows
        self._stride = rows.stride(0)

    def gather(self, addresses: Int64Array, row_index: Int64Array) -> Tensor:
        """See `RowAccess.gather`."""
        device = self._rows.device
        # One copy to the device.
        numbers = to_device(np.concatenate([addresses, row_index]), device)
        out = torch.empty(
            len(row_index), self._rows.shape[1], dtype=self._rows.dtype, device=device
        )
        self._kernels.gather_rows(
            self._rows, self._stride, numbers[: len(addresses)], numbers[len(addresses) :], out
        )
        return out

    def land(
        self, addresses: Int64Array, slots: Int64Array, staging: Int64Array, rows: Tensor
    ) -> None:
        """See `RowAccess.land`; one write for slots and staging, and the change of dtype."""
        places = to_device(addresses, self._rows.device)
        self._kernels.land_rows(self._rows, self._stride, places, rows)
