"""The index of what engines hold, against sets and counts in plain Python."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_manager.events import (
    AllBlocksCleared,
    BlockStored,
    KVEventBatch,
    RowEventBatch,
    RowsCleared,
)
from router.residency import Residency
from tests.router.fleet import (
    history,
    kv_batch,
    packed,
    removed,
    row_batch,
    rows_removed,
    rows_stored,
    stored,
)
from tests.router.plain_residency import PlainResidency

NAMES = [f"e{slot}" for slot in range(70)]
"""Their sets take two words each."""
WATCHED = ["e0", "e1", "e62", "e63", "e64", "e69"]
NUM_ROWS = 300


def as_bytes(number: int) -> bytes:
    """Hashes of which 30 at a time would like the same place of any table up to 2^20 entries."""
    return bytes(24) + (number % 4 + (number // 4 << 20)).to_bytes(8, "big")


BLOCKS = st.integers(0, 119)
HASHES = st.builds(
    lambda number, is_int: int.from_bytes(as_bytes(number), "big") if is_int else as_bytes(number),
    BLOCKS,
    st.booleans(),
)
MEDIA = st.sampled_from(["GPU", "GPU", "GPU", None, "CPU"])
KV_EVENTS = st.one_of(
    st.builds(lambda some, medium: stored(*some, medium=medium), st.lists(HASHES), MEDIA),
    st.builds(lambda some, medium: removed(*some, medium=medium), st.lists(HASHES), MEDIA),
    st.builds(AllBlocksCleared),
)


def row_events(num_positions: int) -> st.SearchStrategy[object]:
    positions = st.lists(st.integers(0, num_positions - 1))
    return st.one_of(
        st.builds(lambda some: rows_stored(*some), positions),
        st.builds(lambda some: rows_removed(*some), positions),
        st.builds(RowsCleared),
    )


@given(data=st.data(), num_positions=st.sampled_from([NUM_ROWS, 101]))
def test_residency_is_what_the_events_say(data: st.DataObject, num_positions: int) -> None:
    residency, plain = Residency(), PlainResidency(NUM_ROWS, num_positions)
    for name in NAMES:
        residency.add_engine(name, NUM_ROWS, num_positions)
    engines = st.sampled_from(WATCHED)
    for _ in range(data.draw(st.integers(0, 12))):
        name = data.draw(engines)
        match data.draw(st.sampled_from(["kv", "kv", "rows", "rows", "forget"])):
            case "kv":
                batch = kv_batch(*data.draw(st.lists(KV_EVENTS, max_size=6)))
                residency.apply_kv(name, batch)
                plain.apply_kv(name, batch)
            case "rows":
                events = data.draw(st.lists(row_events(num_positions), max_size=4))
                changes = row_batch(*events, num_positions=num_positions)  # type: ignore[arg-type]
                residency.apply_rows(name, changes)
                plain.apply_rows(name, changes)
            case _:
                residency.forget(name)
                plain.forget(name)
    hashes = data.draw(st.lists(HASHES))
    some_rows = st.lists(st.integers(-1, NUM_ROWS - 1))
    rows, candidates = data.draw(some_rows), data.draw(some_rows)
    cached = np.array([data.draw(st.integers(0, len(rows))) for _ in NAMES])
    blocks = residency.cached_blocks(hashes)
    missing = residency.rows_missing(np.array(rows, int), np.array(candidates, int), cached)
    for slot, name in enumerate(NAMES):
        assert blocks[slot] == plain.cached_blocks(name, hashes)
        expected = plain.rows_missing(name, rows, candidates, int(cached[slot]))
        assert missing[slot] == expected
        assert residency.num_blocks(name) == len(+plain.blocks[name])
        assert residency.num_row_positions(name) == len(plain.positions[name])


def test_thousands_of_blocks_come_and_go() -> None:
    rng = np.random.default_rng(1)
    residency, plain = Residency(), PlainResidency(1, 1)
    hashes = [rng.bytes(32) for _ in range(3000)]
    for name in ("a", "b"):
        residency.add_engine(name, 0, 0)
    for _ in range(60):
        name = str(rng.choice(["a", "b"]))
        some = [hashes[place] for place in rng.integers(3000, size=400)]
        batch = kv_batch(stored(*some) if rng.random() < 0.6 else removed(*some))
        residency.apply_kv(name, batch)
        plain.apply_kv(name, batch)
    for slot, name in enumerate("ab"):
        assert residency.num_blocks(name) == len(+plain.blocks[name])
        found = [int(residency.cached_blocks([one])[slot]) for one in hashes]
        assert found == [plain.cached_blocks(name, [one]) for one in hashes]


@pytest.fixture
def residency() -> Residency:
    """Of engines `a` and `b`, which hold nothing."""
    residency = Residency()
    residency.add_engine("a", 10, 10)
    residency.add_engine("b", 10, 10)
    return residency


def test_content_of_two_blocks_stays_until_both_are_gone(residency: Residency) -> None:
    one = history(1, 1)
    residency.apply_kv("a", kv_batch(stored(*one), stored(*one)))
    residency.apply_kv("a", kv_batch(removed(*one)))
    assert residency.cached_blocks(one).tolist() == [1, 0]
    residency.apply_kv("a", kv_batch(removed(*one)))
    assert residency.cached_blocks(one).tolist() == [0, 0]


def test_removal_of_what_was_never_stored_is_passed_over(residency: Residency) -> None:
    one = history(1, 1)
    residency.apply_kv("a", kv_batch(removed(*one), removed(*one)))
    residency.apply_kv("a", kv_batch(stored(*one)))
    assert residency.cached_blocks(one).tolist() == [1, 0]


def test_blocks_behind_a_gap_are_no_prefix(residency: Residency) -> None:
    first, second, third = history(1, 3)
    residency.apply_kv("a", kv_batch(stored(first, third)))
    residency.apply_kv("b", kv_batch(stored(second, third)))
    assert residency.cached_blocks([first, second, third]).tolist() == [1, 0]


def test_a_cleared_engine_loses_its_blocks_and_keeps_its_rows(residency: Residency) -> None:
    one = history(1, 1)
    for name in ("a", "b"):
        residency.apply_kv(name, kv_batch(stored(*one)))
        residency.apply_rows(name, row_batch(rows_stored(3), num_positions=10))
    residency.apply_kv("a", kv_batch(AllBlocksCleared()))
    assert residency.cached_blocks(one).tolist() == [0, 1]
    row, none = np.array([3]), np.zeros(2, dtype=np.int64)
    assert residency.rows_missing(row, row[:0], none).tolist() == [0, 0]
    residency.apply_rows("b", row_batch(RowsCleared(), num_positions=10))
    assert residency.rows_missing(row, row[:0], none).tolist() == [0, 1]
    assert residency.cached_blocks(one).tolist() == [0, 1]


def test_batches_are_read_as_other_programs_write_them(residency: Residency) -> None:
    one = history(1, 2)
    event = {
        "type": "BlockStored",
        "block_hashes": [int.from_bytes(each[-8:], "big") for each in one],
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "a_field_of_tomorrow": {"x": 1},
    }
    payload = msgspec.msgpack.encode([1.0, [event], None, "something behind"])
    residency.apply_kv("a", msgspec.msgpack.decode(payload, type=KVEventBatch))
    assert residency.cached_blocks(one).tolist() == [2, 0]


def test_row_batches_survive_the_wire(residency: Residency) -> None:
    sent = row_batch(rows_stored(1, 9), rows_removed(1), RowsCleared(), rows_stored(4))
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=RowEventBatch)
    assert received == sent


def test_events_of_other_memory_and_further_groups_do_not_count(residency: Residency) -> None:
    one = history(1, 1)
    other_group = BlockStored(one, None, [], 4, None, "GPU", None, group_idx=1)  # type: ignore[arg-type]
    residency.apply_kv("a", kv_batch(stored(*one, medium="CPU"), other_group))
    assert residency.cached_blocks(one).tolist() == [0, 0]


def test_events_of_an_engine_that_left_are_passed_over(residency: Residency) -> None:
    residency.remove_engine("b")
    residency.slots.remove("b")
    residency.apply_kv("b", kv_batch(stored(*history(1, 1))))
    residency.apply_rows("b", row_batch(rows_stored(1), num_positions=10))
    residency.forget("b")
    residency.add_engine("c", 10, 10)
    assert residency.num_blocks("c") == residency.num_row_positions("c") == 0


def test_an_engine_added_again_holds_nothing(residency: Residency) -> None:
    residency.apply_kv("a", kv_batch(stored(*history(1, 1))))
    residency.apply_rows("a", row_batch(rows_stored(1), num_positions=10))
    residency.add_engine("a", 10, 10)
    assert residency.num_blocks("a") == residency.num_row_positions("a") == 0


def test_engines_without_a_digest_lack_every_row() -> None:
    residency = Residency()
    residency.add_engine("a", 0, 0)
    rows = np.array([5, 5, 10**12, -1])
    assert residency.rows_missing(rows, rows[:0], np.array([0])).tolist() == [2]


def test_unknown_rows_are_all_missing(residency: Residency) -> None:
    residency.apply_rows("a", row_batch(rows_stored(1, 2), num_positions=10))
    rows, cached = np.array([1, 2, 3, 1]), np.array([0, 3])
    assert residency.rows_missing(rows, rows[:0], cached).tolist() == [1, 1]
    assert residency.rows_missing(rows, rows[:0], cached, is_known=False).tolist() == [3, 1]


@pytest.mark.parametrize(("sizes", "field"), [((11, 10), "num_rows"), ((10, 8), "num_positions")])
def test_digests_of_another_size_are_refused(
    residency: Residency, sizes: tuple[int, int], field: str
) -> None:
    with pytest.raises(ValueError, match=f"{field}: c has"):
        residency.add_engine("c", *sizes)


def test_a_fleet_may_change_its_catalogue_when_no_digest_is_left(residency: Residency) -> None:
    for name in ("a", "b"):
        residency.remove_engine(name)
    residency.add_engine("c", 20, 16)
    residency.apply_rows("c", row_batch(rows_stored(15), num_positions=16))
    assert residency.num_row_positions("c") == 1


@pytest.mark.parametrize(
    ("positions", "num_positions", "message"),
    [
        (packed([1]), 9, "num_positions: a has 10, not 9"),
        (packed([1, 10]), 10, "10 is beyond the last of 10"),
        (b"12345", 10, "5 bytes"),
    ],
)
def test_row_events_that_fit_no_digest_change_nothing(
    residency: Residency, positions: bytes, num_positions: int, message: str
) -> None:
    event = rows_stored()
    event.positions = positions
    with pytest.raises(ValueError, match=message):
        residency.apply_rows("a", row_batch(event, num_positions=num_positions))
    assert residency.num_row_positions("a") == 0


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(20)[::2],
        np.frombuffer(np.arange(0, 20, 2).tobytes(), dtype=np.int64),
        np.arange(0, 20, 2, dtype=np.int32),
    ],
    ids=["strided", "read-only", "int32"],
)
def test_rows_may_lie_in_any_memory(residency: Residency, rows: np.ndarray) -> None:
    none = np.zeros(2, dtype=np.int64)
    assert residency.rows_missing(rows, rows[:2], none).tolist() == [10, 10]
