"""Equal hashes mean equal content: what a block's hash covers, and where it changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_digest

BLOCK_TOKENS = 3
NUM_FEATURES = 3
ROOT = root_hash("model", b"user")

int64s = st.integers(-(2**63), 2**63 - 1)
rows = st.tuples(int64s, int64s, int64s)
histories = st.lists(rows, min_size=1, max_size=14)

Rows = list[tuple[int, int, int]]


def hashes_of(history: Rows, root: BlockHash = ROOT) -> list[BlockHash]:
    features = np.array(history, dtype=np.int64).reshape(-1, NUM_FEATURES)
    return hash_blocks(root, features, BLOCK_TOKENS)


@settings(deadline=None)
@given(prefix=histories, first=histories, second=histories)
def test_equal_prefixes_have_equal_hashes(prefix: Rows, first: Rows, second: Rows) -> None:
    shared = len(prefix) // BLOCK_TOKENS
    assert hashes_of(prefix + first)[:shared] == hashes_of(prefix + second)[:shared]


@settings(deadline=None)
@given(history=histories, data=st.data())
def test_changing_one_feature_changes_its_block_and_all_later_ones_alone(
    history: Rows, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, len(history) - 1))
    feature = data.draw(st.integers(0, NUM_FEATURES - 1))
    value = data.draw(int64s.filter(lambda value: value != history[row][feature]))
    features = np.array(history, dtype=np.int64)
    features[row, feature] = value
    changed = hash_blocks(ROOT, features, BLOCK_TOKENS)
    pairs = zip(hashes_of(history), changed, strict=True)
    equal = [before == after for before, after in pairs]
    assert equal == [block < row // BLOCK_TOKENS for block in range(len(equal))]


@settings(deadline=None)
@given(history=histories)
def test_each_full_block_has_a_hash_and_a_partial_one_has_none(history: Rows) -> None:
    assert len(hashes_of(history)) == len(history) // BLOCK_TOKENS


@settings(deadline=None)
@given(history=histories)
def test_hash_is_sha256_of_the_root_and_all_rows_to_the_end_of_the_block(history: Rows) -> None:
    for number, block_hash in enumerate(hashes_of(history), start=1):
        covered = history[: number * BLOCK_TOKENS]
        text = b"".join(x.to_bytes(8, "little", signed=True) for row in covered for x in row)
        assert block_hash == hashlib.sha256(ROOT + text).digest()


def test_history_without_rows_has_no_hash() -> None:
    assert hashes_of([]) == []


def test_equal_blocks_at_different_places_have_different_hashes() -> None:
    hashes = hashes_of([(1, 2, 3)] * 4 * BLOCK_TOKENS)
    assert len(set(hashes)) == 4


def test_hash_does_not_depend_on_how_the_features_lie_in_memory() -> None:
    features = np.arange(18, dtype=np.int64).reshape(6, 3)
    by_column = np.asfortranarray(features)
    assert hash_blocks(ROOT, by_column, 3) == hash_blocks(ROOT, features, 3)


@pytest.mark.parametrize(
    "other",
    [
        root_hash("model 2", b"user"),
        root_hash("model", b"user 2"),
    ],
    ids=["model version", "user"],
)
def test_chain_under_another_root_shares_no_hash(other: BlockHash) -> None:
    history: Rows = [(1, 2, 3)] * 4 * BLOCK_TOKENS
    assert not set(hashes_of(history)) & set(hashes_of(history, other))


def test_root_tells_apart_parts_that_read_alike_when_joined() -> None:
    assert root_hash("mu", b"ser") != root_hash("m", b"user")


def test_user_digest_is_another_one_under_another_key() -> None:
    assert user_digest("ada", b"key 1") != user_digest("ada", b"key 2")


def test_user_digest_is_the_same_under_the_same_key() -> None:
    assert user_digest("ada", b"key 1") == user_digest("ada", b"key 1")


def test_user_digest_tells_users_apart() -> None:
    assert user_digest("ada", b"key 1") != user_digest("bob", b"key 1")


def test_user_digest_cannot_be_had_from_the_user_id_alone() -> None:
    assert user_digest("ada", b"key 1") != hashlib.blake2b(b"ada", digest_size=16).digest()
