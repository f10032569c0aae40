from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from block_manager.pool_layout import PoolConfig, plan_layout
from model_executor.page_arena import PageArena
from model_executor.scaled_rows import ScaledRows, scaled_row_bytes
from tests.toy_models import toy_config

# Half a step of int8, and half of the three bits behind the point of e4m3, of the largest number.
LARGEST_ERROR = {"int8": 0.5 / 127, "fp8": 2.0**-4}
KINDS = tuple(LARGEST_ERROR)


@pytest.mark.parametrize("kind", KINDS)
@given(
    dim=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 100),
)
def test_what_is_read_is_near_what_was_written(
    kind: str, dim: int, exponent: int, seed: int
) -> None:
    rows = 2.0**exponent * torch.randn(5, dim, generator=torch.Generator().manual_seed(seed))
    codec = ScaledRows(kind, dim, torch.float32)
    stored = codec.encode(rows)
    assert stored.shape == (5, codec.row_bytes)
    assert codec.row_bytes == scaled_row_bytes(dim) >= dim + 4
    largest = rows.abs().amax(dim=1, keepdim=True)
    assert ((codec.decode(stored) - rows).abs() <= 1.001 * LARGEST_ERROR[kind] * largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros_and_nan_is_seen(kind: str) -> None:
    rows = torch.zeros(3, 6)
    rows[1, 2], rows[2, 0] = torch.nan, torch.inf
    codec = ScaledRows(kind, 6, torch.bfloat16)
    read = codec.decode(codec.encode(rows))
    assert read.dtype == torch.bfloat16
    assert (read[0] == 0.0).all()
    assert read[1:].isnan().all()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="row_dtype: 'int4' is none of int8, fp8"):
        ScaledRows("int4", 6, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_and_staging_hold_such_rows_beside_kv(kind: str, dtype: torch.dtype) -> None:
    config = toy_config(embedding_dim=13)
    codec = ScaledRows(kind, 13, dtype)
    layout = plan_layout(
        PoolConfig(40_000, 0.5, 4),
        kv_bytes_per_token=config.kv_elements_per_token * dtype.itemsize,
        row_bytes=codec.row_bytes,
        max_context_tokens=config.max_context_tokens,
        staging_rows=7,
    )
    arena = PageArena(layout, config, torch.device("cpu"), dtype, codec)
    arena.poison()
    slots = torch.randperm(layout.num_pages * layout.rows_per_page)[:50]
    rows = torch.randn(57, 13)
    nowhere, places = np.full(7, -1), np.arange(7)
    found = np.concatenate([slots.numpy(), nowhere]), np.concatenate([np.full(50, -1), places])
    addresses = arena.addresses(*found)
    arena.access.land(addresses, slots.numpy(), places, rows)
    want = codec.decode(codec.encode(rows))
    assert torch.equal(arena.access.gather(addresses, np.arange(57)), want)
    with_none = arena.access.gather(addresses, np.array([3, -1, 52]))
    assert torch.equal(with_none, torch.stack([want[3], torch.zeros_like(want[3]), want[52]]))
    assert torch.equal(arena.rows.read(slots), want[:50])
    # What moves is the same to the bit; what died is NaN.
    free = torch.tensor(np.setdiff1d(np.arange(layout.num_pages * layout.rows_per_page), slots))
    arena.rows.move(slots[:9], free[:9])
    assert torch.equal(arena.rows.read(free[:9]), want[:9])
    arena.rows.poison(slots[:9])
    assert arena.rows.read(slots[:9]).isnan().all()
    assert torch.equal(arena.rows.read(slots[9:]), want[9:50])
    assert arena.rows.read(free[9:]).isnan().all()
