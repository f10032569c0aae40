"""The one allocation of a device, and the two ways to look at its pages.

    | page 0 | page 1 | ... | page num_pages-1 | staging row 0 | staging row 1 | ... |

    as KV:   K [layers, block_tokens, H, dqk], then V [layers, block_tokens, H, dv]
    as EMB:  rows_per_page rows of D numbers; what is left at the tail is unused

Both views are strided over the same storage and never move, so a page changes hands without a
byte being copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from block_manager.pool_layout import PoolLayout
from model_executor.exceptions import DeviceMemoryError
from model_executor.memory_meter import free_of
from model_executor.model_config import ModelConfig
from model_executor.row_access import RowAccess, TorchRowAccess, TritonRowAccess
from model_executor.row_pages import RowPages
from model_executor.scaled_rows import ScaledRows
from model_executor.step import Int64Array


@dataclass(frozen=True, slots=True)
class PagedKV:
    """K and V of every page that is a block."""

    k: Tensor
    """float [num_pages, layers, block_tokens, H, dqk], strided."""
    v: Tensor
    """float [num_pages, layers, block_tokens, H, dv], strided."""
    read_as: torch.dtype | None = None
    """None = K and V are stored as they are; else they are stored as float8 e4m3 (of which the
    tensors hold the bits, uint8) and read as this."""

    def append(
        self, layer: int, k: Tensor, v: Tensor, page_ids: Tensor, page_offsets: Tensor
    ) -> None:
        """Writes K [T, H, dqk] and V [T, H, dv] of T tokens to their places (int64 [T] each)."""
        if self.read_as is not None:
            k, v = _as_fp8(k), _as_fp8(v)
        self.k[:, layer].index_put_((page_ids, page_offsets), k)
        self.v[:, layer].index_put_((page_ids, page_offsets), v)

    def gather(self, layer: int, block_table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Copies the first `num_tokens` tokens of a block table: [tokens, H, dqk], [tokens, H, dv].

        Tokens beyond are cut off and not masked: unwritten memory may hold NaN.
        """
        k = self.k[:, layer].index_select(0, block_table).flatten(0, 1)
        v = self.v[:, layer].index_select(0, block_table).flatten(0, 1)
        k, v = k[:num_tokens], v[:num_tokens]
        if self.read_as is not None:
            k, v = (one.view(torch.float8_e4m3fn).to(self.read_as) for one in (k, v))
        return k, v


def _as_fp8(numbers: Tensor) -> Tensor:
    """Bits of the nearest float8 e4m3, uint8; numbers beyond its largest, 448, become that."""
    return numbers.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def _allocate(num_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    except RuntimeError as error:  # torch's out-of-memory errors, of the CPU and of CUDA.
        raise DeviceMemoryError(
            f"pool_bytes: {device} has no room for {num_bytes} bytes{free_of(device)}; lower "
            "pool_bytes, or on a GPU gpu_memory_utilization"
        ) from error


class PageArena:
    """Owns the allocation; nothing else on the device holds rows or KV."""

    def __init__(
        self,
        layout: PoolLayout,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        row_codec: ScaledRows | None = None,
        fp8_kv: bool = False,
    ) -> None:
        """Allocates `layout.total_bytes` on the device.

        Args:
            layout: of the pool.
            config: of the model.
            device: where.
            dtype: of K, V and rows.
            row_codec: how rows are stored instead.
            fp8_kv: K and V are stored as float8 e4m3, without a scale.

        Raises:
            ValueError: the device does not have that much.
        """
        self.layout = layout
        self._page_elements = layout.page_bytes // dtype.itemsize
        self._storage = _allocate(layout.total_bytes, dtype, device)
        self.kv = self._view_kv(config, dtype if fp8_kv else None)
        stored = dtype if row_codec is None else row_codec.stored_dtype
        row_elements = layout.row_bytes // stored.itemsize
        page_elements = layout.page_bytes // stored.itemsize
        storage = self._storage.view(stored)
        # Rows start at multiples of this many elements, in pages and in staging alike, so that
        # one row view with this stride reaches them all and a gather is one indexed read.
        stride = math.gcd(page_elements, row_elements)
        self._page_stride, self._row_stride = page_elements // stride, row_elements // stride
        self._rows = storage.as_strided(
            ((storage.numel() - row_elements) // stride + 1, row_elements), (stride, 1)
        )
        first_staging = layout.num_pages * page_elements
        self._staging = storage[first_staging:].view(layout.staging_rows, row_elements)
        self.rows = RowPages(
            self._storage, layout.num_pages, layout.page_bytes, row_elements, stored, row_codec
        )
        """Rows in pages; `addresses` and `access` reach those of staging too."""
        self.access: RowAccess = (
            TritonRowAccess(self._rows)
            if device.type == "cuda" and row_codec is None
            else TorchRowAccess(self._rows, self._staging, self.rows, row_codec)
        )
        """How a step's rows are read and written."""

    def _view_kv(self, config: ModelConfig, fp8_read_as: torch.dtype | None) -> PagedKV:
        tokens = self.layout.block_tokens
        storage = self._storage if fp8_read_as is None else self._storage.view(torch.uint8)
        page_elements = self.layout.page_bytes // storage.itemsize

        def view(width: int, offset: int) -> Tensor:
            per_token = config.num_heads * width
            return storage.as_strided(
                (self.layout.num_pages, config.num_layers, tokens, config.num_heads, width),
                (page_elements, tokens * per_token, per_token, width, 1),
                offset,
            )

        k_elements = config.num_layers * tokens * config.num_heads * config.dqk
        return PagedKV(view(config.dqk, 0), view(config.dv, k_elements), fp8_read_as)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self._storage.untyped_storage().nbytes()

    def addresses(self, slots: Int64Array, staging: Int64Array) -> Int64Array:
        """Addresses of rows, int64 [n], on the host: of their slots, or else of staging.

        Args:
            slots: page * rows_per_page + place, int64 [n]; negative where a row is in staging.
            staging: place in staging, int64 [n]; read where there is no slot.
        """
        found: Int64Array = row_addresses(
            slots,
            staging,
            self.layout.rows_per_page,
            self._page_stride,
            self._row_stride,
            self.layout.num_pages,
        )
        return found

    def poison(self) -> None:
        """Fills everything with NaN: a read of memory that was never written shows as NaN."""
        self._fill_with_nan(self._storage)

    def poison_pages(self, page_ids: Tensor) -> None:
        """Fills whole pages (int64 [n]) with NaN: a later read of freed KV shows as NaN."""
        pages = self._storage[: self.layout.num_pages * self._page_elements]
        self._fill_with_nan(pages.view(self.layout.num_pages, -1), page_ids)

    def _fill_with_nan(self, memory: Tensor, page_ids: Tensor | None = None) -> None:
        if self.kv.read_as is None:
            value = math.nan
        else:
            # All bits set is NaN in every float, and also as float8.
            memory, value = memory.view(torch.uint8), 255
        if page_ids is None:
            memory.fill_(value)
        else:
            memory.index_fill_(0, page_ids, value)


@njit(nogil=True, cache=True)
def row_addresses(
    slots: Any, staging: Any, per_page: Any, page_stride: Any, row_stride: Any, num_pages: Any
) -> Any:
    """See `PageArena.addresses`; strides are in addresses."""
    addresses = np.empty(len(slots), dtype=np.int64)
    for row in range(len(slots)):
        slot = slots[row]
        if slot >= 0:
            page = slot // per_page
            addresses[row] = page * page_stride + (slot - page * per_page) * row_stride
        else:
            addresses[row] = num_pages * page_stride + staging[row] * row_stride
    return addresses
