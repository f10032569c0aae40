"""What the pool notes of its reusable content, against the content itself."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from block_manager.block_hash import user_tag
from block_manager.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from block_manager.kv_event_log import KvEventLog, events_of, snapshot_events
from tests.router.deviceless_engine import (
    BLOCK_TOKENS,
    LONGEST,
    NUM_USERS,
    Books,
    Tokens,
    digest_of,
    hashes_of,
    history,
)
from tests.router.holdings import Holdings


class Listened(Books):
    """Books that somebody listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.log = self.kv.pool.event_log = KvEventLog()
        self.holdings = Holdings()

    def batch(self) -> KVEventBatch:
        return KVEventBatch(0.0, events_of(self.log.take(), BLOCK_TOKENS))

    def listen(self) -> Counter[object]:
        self.holdings.apply_kv("", self.batch())
        return Counter(self.holdings.blocks(""))


@given(st.integers(0, 2**32), st.integers(1, 120))
def test_events_add_up_to_what_the_pool_holds(seed: int, number: int) -> None:
    books, rng = Listened(), np.random.default_rng(seed)
    for _ in range(number):
        books.act(rng)
        if not rng.integers(0, 3):
            assert books.listen() == books.blocks()
    assert books.listen() == books.blocks()


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_a_snapshot_is_what_the_pool_holds(seed: int, number: int) -> None:
    books, rng, late = Books(), np.random.default_rng(seed), Holdings()
    for _ in range(number):
        books.act(rng)
    for events in snapshot_events(books.kv.pool.cached_hashes(), BLOCK_TOKENS):
        late.apply_kv("", KVEventBatch(0.0, events))
    assert late.blocks("") == books.blocks()


def test_stored_blocks_come_with_parent_items_and_what_else_is_hashed() -> None:
    books = Listened()
    books.visit(1, 19)
    first, second = books.batch().events  # A visit computes its history in two parts.
    tokens, hashes = history(1, 19), hashes_of(1, 19)
    items = [max(0, row) for row in tokens.rows.tolist()]
    tag = f"{user_tag(digest_of(1)):016x}"
    keys: list[tuple[str, ...] | None] = [
        (
            tag,
            hashlib.blake2b(
                tokens.features[start : start + BLOCK_TOKENS].astype("<i8").tobytes(),
                digest_size=8,
            ).hexdigest(),
        )
        for start in range(0, 16, BLOCK_TOKENS)
    ]
    assert first == BlockStored(
        block_hashes=list(hashes[:2]),
        parent_block_hash=None,
        token_ids=items[:8],
        block_size=BLOCK_TOKENS,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=keys[:2],
    )
    assert isinstance(second, BlockStored)
    assert (second.block_hashes, second.parent_block_hash) == (list(hashes[2:]), hashes[1])
    assert (second.token_ids, second.extra_keys) == (items[8:16], keys[2:])


def test_redacted_events_tell_hashes_and_users_only() -> None:
    books = Listened()
    books.visit(1, 19)
    for event in events_of(books.log.take(), BLOCK_TOKENS, redact=True):
        assert isinstance(event, BlockStored)
        assert event.token_ids == []
        assert event.extra_keys == [(f"{user_tag(digest_of(1)):016x}",)] * 2
        assert event.block_hashes


def test_content_of_a_model_without_features_has_no_digest() -> None:
    books = Listened()
    tokens = history(1, 8)
    without = Tokens(tokens.rows, tokens.features[:, :0])
    books.kv.allocate("a", hashes_of(1, 8), 8, 0)
    books.kv.cache_blocks("a", hashes_of(1, 8), 8, 5, without)
    books.kv.free("a")
    (event,) = books.batch().events
    assert isinstance(event, BlockStored)
    assert event.extra_keys == [("0000000000000005",)] * 2


def test_the_same_content_twice_is_stored_twice_and_removed_twice() -> None:
    books = Listened()
    books.visit(0, 9, others=1)
    assert set(books.listen().values()) == {2}
    books.forget_user(0)
    (event,) = books.batch().events
    assert isinstance(event, BlockRemoved)
    assert Counter(event.block_hashes) == {each: 2 for each in hashes_of(0, 9)}


def test_reuse_is_no_event() -> None:
    books = Listened()
    books.visit(0, LONGEST - 1)
    books.listen()
    books.visit(0, LONGEST - 1)
    assert books.batch().events == []


def test_a_reset_is_one_event() -> None:
    books = Listened()
    for user in range(NUM_USERS):
        books.visit(user, 9)
    books.listen()
    books.reset()
    assert books.batch().events == [AllBlocksCleared()]


def test_nothing_is_noted_where_nobody_listens() -> None:
    books = Books()
    books.visit(0, 9)
    assert books.kv.pool.event_log is None
    assert books.emb.row_log is None
