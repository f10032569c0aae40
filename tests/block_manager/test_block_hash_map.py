"""The map of hashes to blocks, above all where hashes meet in one bucket."""

from __future__ import annotations

import numpy as np
import pytest

from block_manager.block_hash import BlockHash
from block_manager.block_hash_map import BlockHashToBlockMap
from block_manager.exceptions import IntegrityError
from block_manager.kv_kernels import IN_BUCKET, OWN_KEY

A, B, C, D = (BlockHash(bytes(8) + letter * 24) for letter in (b"a", b"b", b"c", b"d"))
"""They begin alike and so share a bucket."""


@pytest.fixture
def table() -> BlockHashToBlockMap:
    """Of ids 0..7, of which 5, 3 and 6 hold A, B and C."""
    table = BlockHashToBlockMap(8)
    table.insert(np.array([5, 3, 6]), [A, B, C])
    return table


def test_hashes_that_share_a_bucket_are_told_apart(table: BlockHashToBlockMap) -> None:
    assert table.find_prefix([C, A, B, D, A]).tolist() == [6, 5, 3]


@pytest.mark.parametrize("differing_word", range(4))
def test_hashes_are_equal_only_in_all_their_bytes(differing_word: int) -> None:
    words = np.arange(4)
    table = BlockHashToBlockMap(8)
    table.insert(np.array([1]), [BlockHash(words.tobytes())])
    words[differing_word] += 16  # The lowest bits, and so the bucket, stay as they are.
    assert table.find_prefix([BlockHash(words.tobytes())]).tolist() == []


@pytest.mark.parametrize("popped", [5, 3, 6], ids=["first", "middle", "last"])
def test_bucket_stays_whole_when_one_of_it_is_popped(
    table: BlockHashToBlockMap, popped: int
) -> None:
    holders = {5: A, 3: B, 6: C}
    assert table.pop(np.array([popped])).tolist() == [popped]
    for block, block_hash in holders.items():
        found = [] if block == popped else [block]
        assert table.find_prefix([block_hash]).tolist() == found
    assert len(table) == 2
    table.check_integrity()


def test_of_equal_hashes_the_first_inserted_is_found(table: BlockHashToBlockMap) -> None:
    table.insert(np.array([1, 7]), [B, B])
    assert table.find_prefix([B]).tolist() == [3]
    table.pop(np.array([3]))
    assert table.find_prefix([B]).tolist() == [1]


def test_block_that_carries_a_hash_again_stands_behind_its_copies(
    table: BlockHashToBlockMap,
) -> None:
    table.insert(np.array([1]), [B])
    table.pop(np.array([3]))
    table.insert(np.array([3]), [B])
    assert table.find_prefix([B]).tolist() == [1]


def test_pop_leaves_out_blocks_without_a_hash(table: BlockHashToBlockMap) -> None:
    assert table.pop(np.array([4, 6, 0, 5])).tolist() == [6, 5]
    assert len(table) == 1


@pytest.mark.parametrize("wrong", [b"", b"a" * 31, b"a" * 33], ids=["empty", "short", "long"])
def test_hash_of_another_length_is_refused(table: BlockHashToBlockMap, wrong: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        table.find_prefix([BlockHash(wrong)])
    with pytest.raises(ValueError, match="32 bytes"):
        table.insert(np.array([1]), [BlockHash(wrong)])
    assert len(table) == 3
    table.check_integrity()


def test_each_block_needs_a_hash(table: BlockHashToBlockMap) -> None:
    with pytest.raises(ValueError, match=r"2 blocks.*1 hash"):
        table.insert(np.array([1, 2]), [D])
    table.check_integrity()


# ---------------------------------------------------------------- self-check


def test_self_check_finds_a_hash_that_no_lookup_finds(table: BlockHashToBlockMap) -> None:
    table.key_kinds[1] = OWN_KEY
    with pytest.raises(IntegrityError, match=r"block 1 .*missing"):
        table.check_integrity()


def test_self_check_finds_an_indexed_block_that_lost_its_hash(table: BlockHashToBlockMap) -> None:
    table.key_kinds[6] = 0
    with pytest.raises(IntegrityError, match=r"hash index holds block 6"):
        table.check_integrity()


def test_self_check_finds_a_block_in_the_wrong_bucket(table: BlockHashToBlockMap) -> None:
    table._hashes[6] += 1
    with pytest.raises(IntegrityError, match=r"block 6 .*missing"):
        table.check_integrity()


def test_self_check_ends_where_a_bucket_runs_in_a_ring(table: BlockHashToBlockMap) -> None:
    table._links[IN_BUCKET, 3] = 5
    with pytest.raises(IntegrityError, match=r"block 6 .*missing"):
        table.check_integrity()
