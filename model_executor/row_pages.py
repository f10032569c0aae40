"""Rows of one width class in the pages of an allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from model_executor.scaled_rows import ScaledRows


class RowPages:
    """Every page as slots of one row size; which pages hold such rows is the pool's business.

    Slot = page * rows_per_page + place. Classes of several widths and dtypes look at the same
    bytes, each through a view of its own.
    """

    def __init__(
        self,
        storage: Tensor,
        num_pages: int,
        page_bytes: int,
        row_elements: int,
        dtype: torch.dtype,
        codec: ScaledRows | None = None,
    ) -> None:
        """Looks at the first `num_pages * page_bytes` bytes of a storage, [n], of any dtype.

        With a codec, `row_elements` and `dtype` are those of what it stores.

        Raises:
            ValueError: a page has no room for a row.
        """
        self.rows_per_page = page_bytes // (row_elements * dtype.itemsize)
        """Slots of a page; what is left at its tail is unused."""
        if not self.rows_per_page:
            raise ValueError(
                f"row_elements: {row_elements} of {dtype} do not fit {page_bytes} bytes"
            )
        self._codec = codec
        # A length that every dtype divides: pages are aligned, what follows them may not be.
        num_elements = num_pages * page_bytes // storage.dtype.itemsize
        self._slots = (
            storage[:num_elements]
            .view(dtype)
            .as_strided(
                (num_pages, self.rows_per_page, row_elements),
                (page_bytes // dtype.itemsize, row_elements, 1),
            )
        )

    def read(self, slots: Tensor) -> Tensor:
        """Copies of the rows in slots (int64 [n]): [n, D]."""
        stored = self._slots[self._places(slots)]
        return stored if self._codec is None else self._codec.decode(stored)

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Writes rows [n, D] to distinct slots (int64 [n])."""
        stored = rows if self._codec is None else self._codec.encode(rows)
        self._slots.index_put_(self._places(slots), stored)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copies rows from slot to slot (int64 [n] each); no source is a destination."""
        self._slots.index_put_(self._places(destinations), self._slots[self._places(sources)])

    def poison(self, slots: Tensor) -> None:
        """Fills slots (int64 [n]) with NaN."""
        dtype = self._slots.dtype if self._codec is None else torch.float32
        shape = (len(slots), self._slots.shape[-1])
        nan = torch.full(shape, torch.nan, dtype=dtype, device=self._slots.device)
        self.write(slots, nan if self._codec is None else nan[:, : self._codec.dim])

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        pages = torch.div(slots, self.rows_per_page, rounding_mode="floor")
        return pages, slots - pages * self.rows_per_page
