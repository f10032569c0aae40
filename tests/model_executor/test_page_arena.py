"""One allocation seen as KV blocks and as rows: nothing overlaps, every gather finds its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_manager.pool_layout import PoolConfig, PoolLayout, plan_layout
from model_executor.model_config import ModelConfig
from model_executor.page_arena import PageArena
from tests.toy_models import toy_config

STAGING_ROWS = 3
FLOAT_BYTES = 4
CPU = torch.device("cpu")


def make_arena(
    *,
    embedding_dim: int = 7,
    block_tokens: int = 4,
    num_layers: int = 2,
    num_heads: int = 2,
    dqk: int = 3,
    dv: int = 5,
) -> PageArena:
    """By default: pages of 128 floats, all of them KV; 18 rows of 7 in a page, 2 floats unused."""
    config = toy_config(
        embedding_dim=embedding_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        dqk=dqk,
        dv=dv,
        max_sequence_len=4 * block_tokens,
    )
    return PageArena(smallest_layout(config, block_tokens), config, CPU, torch.float32)


def smallest_layout(config: ModelConfig, block_tokens: int) -> PoolLayout:
    """Five pages and the staging rows."""
    kv_bytes = config.kv_elements_per_token * FLOAT_BYTES
    row_bytes = config.row_dim * FLOAT_BYTES
    page_bytes = -(-max(block_tokens * kv_bytes, row_bytes) // 256) * 256
    return plan_layout(
        PoolConfig(5 * page_bytes + STAGING_ROWS * row_bytes, 0.0, block_tokens),
        kv_bytes_per_token=kv_bytes,
        row_bytes=row_bytes,
        max_context_tokens=config.max_sequence_len,
        staging_rows=STAGING_ROWS,
    )


geometries = st.fixed_dictionaries(
    {
        "embedding_dim": st.integers(1, 40),
        "block_tokens": st.integers(1, 5),
        "num_layers": st.integers(1, 3),
        "num_heads": st.integers(1, 3),
        "dqk": st.integers(1, 9),
        "dv": st.integers(1, 9),
    }
)


def all_elements(arena: PageArena) -> Tensor:
    """The whole allocation, flat: what the KV views are views of."""
    flat = torch.empty(0)
    flat.set_(arena.kv.k.untyped_storage())
    return flat


def slot_addresses(arena: PageArena, slots: Tensor) -> Tensor:
    return torch.from_numpy(arena.addresses(slots.numpy(), np.zeros(len(slots), np.int64)))


def staging_addresses(arena: PageArena, places: Tensor) -> Tensor:
    nowhere = np.full(len(places), -1, dtype=np.int64)
    return torch.from_numpy(arena.addresses(nowhere, places.numpy()))


def all_slots(arena: PageArena) -> Tensor:
    return torch.arange(arena.layout.num_pages * arena.layout.rows_per_page)


def all_row_addresses(arena: PageArena) -> Tensor:
    """Every slot of every page, then all staging rows."""
    staging = staging_addresses(arena, torch.arange(STAGING_ROWS))
    return torch.cat([slot_addresses(arena, all_slots(arena)), staging])


def write_all_rows(arena: PageArena, rows: Tensor) -> None:
    """To every slot of every page, then to staging."""
    slots, staging = all_slots(arena).numpy(), np.arange(STAGING_ROWS)
    arena.access.land(all_row_addresses(arena).numpy(), slots, staging, rows)


def read_rows(arena: PageArena, addresses: Tensor) -> Tensor:
    return arena.access.gather(addresses.numpy(), np.arange(len(addresses)))


def numbered(shape: torch.Size, first: int = 0) -> Tensor:
    return torch.arange(first, first + shape.numel(), dtype=torch.float32).view(shape)


# ---------------------------------------------------------------- no overlap


@settings(deadline=None)
@given(geometry=geometries)
def test_no_two_elements_of_the_kv_views_share_memory(geometry: dict[str, int]) -> None:
    arena = make_arena(**geometry)
    k = numbered(arena.kv.k.shape)
    v = numbered(arena.kv.v.shape, first=k.numel())
    arena.kv.k.copy_(k)
    arena.kv.v.copy_(v)
    assert torch.equal(arena.kv.k, k)
    assert torch.equal(arena.kv.v, v)


@settings(deadline=None)
@given(geometry=geometries)
def test_no_two_rows_of_pages_and_staging_share_memory(geometry: dict[str, int]) -> None:
    arena = make_arena(**geometry)
    addresses = all_row_addresses(arena)
    rows = numbered(torch.Size([len(addresses), geometry["embedding_dim"]]))
    write_all_rows(arena, rows)
    assert torch.equal(read_rows(arena, addresses), rows)


@settings(deadline=None)
@given(geometry=geometries, is_row_page=st.lists(st.booleans(), min_size=5, max_size=5))
def test_rows_and_blocks_of_different_pages_share_no_memory(
    geometry: dict[str, int], is_row_page: list[bool]
) -> None:
    arena = make_arena(**geometry)
    of_rows = torch.tensor(is_row_page)
    slots = all_slots(arena)[of_rows.repeat_interleave(arena.layout.rows_per_page)]
    staging = torch.arange(STAGING_ROWS)
    rows = numbered(torch.Size([len(slots) + STAGING_ROWS, geometry["embedding_dim"]]))
    k = numbered(arena.kv.k.shape, first=rows.numel())[~of_rows]
    v = -numbered(arena.kv.v.shape, first=1)[~of_rows]
    arena.kv.k[~of_rows] = k
    addresses = torch.cat([slot_addresses(arena, slots), staging_addresses(arena, staging)])
    arena.access.land(addresses.numpy(), slots.numpy(), staging.numpy(), rows)
    arena.kv.v[~of_rows] = v
    assert torch.equal(read_rows(arena, addresses), rows)
    assert torch.equal(arena.kv.k[~of_rows], k)
    assert torch.equal(arena.kv.v[~of_rows], v)


# ---------------------------------------------------------------- where things lie


@settings(deadline=None)
@given(geometry=geometries)
def test_rows_lie_one_behind_another_from_the_start_of_their_page(geometry: dict[str, int]) -> None:
    arena = make_arena(**geometry)
    layout, width = arena.layout, geometry["embedding_dim"]
    num_rows = len(all_slots(arena)) + STAGING_ROWS
    rows = numbered(torch.Size([num_rows, width]), first=1)
    write_all_rows(arena, rows)
    page_elements = layout.page_bytes // FLOAT_BYTES
    starts = [
        page * page_elements + place * width
        for page in range(layout.num_pages)
        for place in range(layout.rows_per_page)
    ]
    starts += [layout.num_pages * page_elements + place * width for place in range(STAGING_ROWS)]
    flat = all_elements(arena)
    for row, start in zip(rows, starts, strict=True):
        assert torch.equal(flat[start : start + width], row)


@settings(deadline=None)
@given(geometry=geometries)
def test_block_lies_within_its_page(geometry: dict[str, int]) -> None:
    arena = make_arena(**geometry)
    arena.kv.k[3], arena.kv.v[3] = 1.0, 1.0
    pages = all_elements(arena)[: -STAGING_ROWS * geometry["embedding_dim"]].view(5, -1)
    written = arena.kv.k[3].numel() + arena.kv.v[3].numel()
    assert pages.sum(dim=1).tolist() == [0.0, 0.0, 0.0, written, 0.0]


def test_allocation_is_exactly_pages_and_staging() -> None:
    arena = make_arena()
    assert arena.nbytes == 5 * 512 + STAGING_ROWS * 28


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_and_blocks_of_another_dtype_fill_the_same_pages(dtype: torch.dtype) -> None:
    config = toy_config(embedding_dim=7, num_layers=2, num_heads=2, dqk=3, dv=5)
    layout = PoolLayout(
        page_bytes=512 * dtype.itemsize // FLOAT_BYTES,
        num_pages=5,
        num_emb_pages=2,
        min_kv_pages=1,
        block_tokens=4,
        row_bytes=7 * dtype.itemsize,
        rows_per_page=18,
        staging_rows=STAGING_ROWS,
    )
    arena = PageArena(layout, config, CPU, dtype)
    assert arena.nbytes == layout.total_bytes
    addresses = all_row_addresses(arena)
    # Whole numbers up to 256 are exact in all of them.
    rows = (numbered(torch.Size([len(addresses), 7])) % 251).to(dtype)
    write_all_rows(arena, rows)
    assert torch.equal(read_rows(arena, addresses), rows)
    k = (numbered(arena.kv.k.shape) % 241).to(dtype)
    v = (numbered(arena.kv.v.shape) % 239).to(dtype)
    arena.kv.k.copy_(k)
    arena.kv.v.copy_(v)
    assert torch.equal(arena.kv.k, k)
    assert torch.equal(arena.kv.v, v)
    arena.poison()
    assert bool(read_rows(arena, addresses).isnan().all())


# ---------------------------------------------------------------- gathers


@pytest.mark.parametrize("embedding_dim", [1, 7, 12, 13, 64, 100, 129])
def test_rows_are_read_in_any_order_and_more_than_once(embedding_dim: int) -> None:
    arena = make_arena(embedding_dim=embedding_dim)
    addresses = all_row_addresses(arena)
    rows = numbered(torch.Size([len(addresses), embedding_dim]))
    write_all_rows(arena, rows)
    wanted = torch.from_numpy(np.random.default_rng(1).integers(0, len(addresses), 50))
    assert torch.equal(read_rows(arena, addresses[wanted]), rows[wanted])


def test_rows_are_written_to_slots_in_any_order() -> None:
    arena = make_arena()
    order = torch.randperm(len(all_slots(arena)), generator=torch.Generator().manual_seed(0))
    rows = numbered(torch.Size([len(order), 7]))
    for slot in order:
        arena.rows.write(slot.view(1), rows[slot].view(1, 7))
    assert torch.equal(read_rows(arena, slot_addresses(arena, order)), rows[order])


def test_read_rows_are_copies() -> None:
    arena = make_arena()
    slot = torch.tensor([5])
    row = read_rows(arena, slot_addresses(arena, slot))
    arena.rows.write(slot, torch.ones(1, 7))
    assert not row.any()


def test_gather_finds_the_tokens_that_were_appended_one_by_one() -> None:
    arena = make_arena(block_tokens=4)
    table = torch.tensor([3, 1, 4])
    k, v = torch.randn(10, 2, 3), torch.randn(10, 2, 5)
    for token in torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist():
        page, offset = table[token // 4 : token // 4 + 1], torch.tensor([token % 4])
        arena.kv.append(1, k[token : token + 1], v[token : token + 1], page, offset)
    got_k, got_v = arena.kv.gather(1, table, 10)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)


def test_append_to_one_layer_leaves_the_others_alone() -> None:
    arena = make_arena()
    arena.kv.append(
        1, torch.ones(1, 2, 3), torch.ones(1, 2, 5), torch.tensor([2]), torch.tensor([0])
    )
    k, v = arena.kv.gather(0, torch.tensor([2]), 4)
    assert not k.any()
    assert not v.any()


def test_gather_leaves_out_what_lies_behind_the_last_token() -> None:
    arena = make_arena(block_tokens=4)
    arena.poison_pages(torch.tensor([1, 2]))
    arena.kv.k[1], arena.kv.v[1] = 1.0, 1.0
    arena.kv.k[2, :, :1], arena.kv.v[2, :, :1] = 1.0, 1.0
    k, v = arena.kv.gather(0, torch.tensor([1, 2]), 5)
    assert k.shape == (5, 2, 3)
    assert bool(k.isfinite().all() and v.isfinite().all())


# ---------------------------------------------------------------- poison


def test_poisoned_pages_are_nan_throughout_and_the_others_are_not_touched() -> None:
    arena = make_arena()
    arena.poison_pages(torch.tensor([1, 4]))
    poisoned = all_elements(arena).isnan()
    assert poisoned[: 5 * 128].view(5, 128).all(dim=1).tolist() == [False, True, False, False, True]
    assert int(poisoned.sum()) == 2 * 128


def test_poisoned_slots_are_nan_and_their_neighbours_are_not() -> None:
    arena = make_arena()
    arena.rows.poison(torch.tensor([0, 20, 89]))
    poisoned = read_rows(arena, all_row_addresses(arena)).isnan().all(dim=1)
    assert poisoned.nonzero().flatten().tolist() == [0, 20, 89]
    assert int(all_elements(arena).isnan().sum()) == 3 * 7


def test_allocation_that_the_device_has_no_room_for_is_refused_by_field() -> None:
    layout = replace(make_arena().layout, num_pages=2**45)
    with pytest.raises(ValueError, match=r"^pool_bytes: "):
        PageArena(layout, toy_config(), CPU, torch.float32)
