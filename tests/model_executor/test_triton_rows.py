"""The row kernels, in Triton's interpreter, against the torch way over the same pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from block_manager.pool_layout import PoolLayout
from model_executor.page_arena import PageArena
from model_executor.row_access import TritonRowAccess
from model_executor.step import Int64Array
from tests.toy_models import toy_config

CPU = torch.device("cpu")
STAGING_ROWS = 6
NUM_PAGES = 5


def make_arena(width: int, page_elements: int, dtype: torch.dtype) -> PageArena:
    config = toy_config(embedding_dim=width)
    layout = PoolLayout(
        page_bytes=page_elements * dtype.itemsize,
        num_pages=NUM_PAGES,
        num_emb_pages=2,
        min_kv_pages=1,
        block_tokens=1,
        row_bytes=width * dtype.itemsize,
        rows_per_page=page_elements // width,
        staging_rows=STAGING_ROWS,
    )
    arena = PageArena(layout, config, CPU, dtype)
    arena.poison()
    return arena


def kernels_of(arena: PageArena) -> TritonRowAccess:
    return TritonRowAccess(arena._rows)


def places(arena: PageArena, rng: np.random.Generator) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Slots in any order, places of staging behind them, and the addresses of both."""
    slots = rng.permutation(NUM_PAGES * arena.layout.rows_per_page)[:9]
    staging = rng.permutation(STAGING_ROWS)[:4]
    slot_or_none = np.concatenate([slots, np.full(4, -1)])
    place_or_none = np.concatenate([np.full(9, -1), staging])
    return slots, staging, arena.addresses(slot_or_none, place_or_none)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN is to be equal to itself."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    ("width", "page_elements"),
    [(7, 128), (12, 192), (64, 256), (1100, 4416)],
    ids=["odd", "tail", "aligned", "wider than a tile"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_land_and_are_gathered_as_torch_does_it(
    width: int, page_elements: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(width)
    plain, compiled = (make_arena(width, page_elements, dtype) for _ in range(2))
    kernels = kernels_of(compiled)
    slots, staging, addresses = places(plain, rng)
    # Numbers that the dtype has: the interpreter cuts bf16 off where a GPU rounds.
    rows = torch.from_numpy(rng.standard_normal((13, width))).to(dtype).float()
    plain.access.land(addresses, slots, staging, rows)
    kernels.land(addresses, slots, staging, rows)
    # All of the pool: what was not written is still poison.
    assert torch.equal(bits(compiled._storage), bits(plain._storage))
    index = rng.integers(-1, 13, 30)
    assert (index == -1).any()
    found = kernels.gather(addresses, index)
    assert torch.equal(found, plain.access.gather(addresses, index))
    assert torch.equal(found[index >= 0], rows.to(dtype)[index[index >= 0]])
    assert not found[index == -1].any()


def test_nothing_to_gather_and_nothing_to_land_are_nothing() -> None:
    arena = make_arena(7, 128, torch.float32)
    kernels, nothing = kernels_of(arena), np.empty(0, dtype=np.int64)
    assert kernels.gather(nothing, nothing).shape == (0, 7)
    kernels.land(nothing, nothing, nothing, torch.empty(0, 7))
    assert bool(arena._storage.isnan().all())


def test_tokens_without_rows_are_zeros_also_where_no_row_is_known() -> None:
    arena = make_arena(7, 128, torch.float32)
    nothing = np.empty(0, dtype=np.int64)
    assert not kernels_of(arena).gather(nothing, np.full(5, -1)).any()
