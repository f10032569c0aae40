"""Embedding rows in eight bits: each number as a code, and one scale per row.

    | D codes of one byte | padding to 4 | scale, float32 |

`int8` codes are round(x / scale) with scale = max|x| / 127; `fp8` codes are x / scale as float8
e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022), with scale = max|x| / 448. A row
is encoded when it is written and decoded when it is read; moves copy bytes.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LARGEST_CODE: Final = {"int8": 127.0, "fp8": 448.0}
_SCALE_BYTES = 4


def scaled_row_bytes(dim: int) -> int:
    """Bytes of a row of so many numbers."""
    return -(-dim // _SCALE_BYTES) * _SCALE_BYTES + _SCALE_BYTES


class ScaledRows:
    """How rows of one table width lie in memory, as int8 whatever the codes are."""

    stored_dtype: Final = torch.int8

    def __init__(self, kind: str, dim: int, dtype: torch.dtype) -> None:
        """Takes `int8` or `fp8`, the numbers of a row, and what they are read as.

        Raises:
            ValueError: there is no such kind.
        """
        if kind not in LARGEST_CODE:
            raise ValueError(f"row_dtype: {kind!r} is none of {', '.join(LARGEST_CODE)}")
        self.row_bytes = scaled_row_bytes(dim)
        self._largest = LARGEST_CODE[kind]
        self._is_float = kind == "fp8"
        self.dim = dim
        self._dtype = dtype

    def encode(self, rows: Tensor) -> Tensor:
        """Rows [n, D] of any float as they are stored: int8 [n, row_bytes].

        A row that holds a NaN or an infinity is read back as NaN throughout.
        """
        rows = rows.float()
        scales = rows.abs().amax(dim=1) / self._largest
        scales = torch.where(scales.isfinite(), scales, torch.nan)
        # A row of zeros has no scale of its own.
        divided = (rows / torch.where(scales == 0.0, 1.0, scales).unsqueeze(1)).nan_to_num(0.0)
        if self._is_float:
            codes = divided.to(torch.float8_e4m3fn).view(torch.int8)
        else:
            codes = divided.round().to(torch.int8)
        stored = codes.new_zeros(len(rows), self.row_bytes)
        stored[:, : self.dim] = codes
        stored[:, -_SCALE_BYTES:] = scales.unsqueeze(1).view(torch.int8)
        return stored

    def decode(self, stored: Tensor) -> Tensor:
        """What `encode` gave, as numbers: [n, D]."""
        codes = stored[:, : self.dim]
        if self._is_float:
            codes = codes.view(torch.float8_e4m3fn)
        scales = stored[:, -_SCALE_BYTES:].contiguous().view(torch.float32)
        return (codes.float() * scales).to(self._dtype)
