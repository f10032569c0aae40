"""The curve of the KV tenant against the tenant itself, replayed at every size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_manager import reuse_distance
from block_manager.block_hash import BlockHash, hash_blocks, root_hash
from block_manager.block_pool import BlockPool
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.reuse_distance import KVReuseCurve, PageCosts
from block_manager.spatial_sampling import SpatialSample

BLOCK_TOKENS = 4
NUM_ROWS = 50
EVERYONE = SpatialSample(1.0, seed=0)
NO_ROWS = np.empty(0, dtype=np.int64)
ABSENT = np.full(NUM_ROWS, -1, dtype=np.int32)


def hashes_of(user: int, num_blocks: int, first_row: int = 0) -> list[BlockHash]:
    rows = np.arange(first_row, first_row + num_blocks * BLOCK_TOKENS).reshape(-1, 1)
    return hash_blocks(root_hash("m", str(user).encode()), rows, BLOCK_TOKENS)


def curve(num_pages: int, costs: PageCosts, sample: SpatialSample = EVERYONE) -> KVReuseCurve:
    return KVReuseCurve(num_pages, BLOCK_TOKENS, NUM_ROWS, costs, sample)


@pytest.fixture(autouse=True, scope="module")
def every_visit_is_priced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse_distance, "_FAR_VISITS", 1)
        patch.setattr(reuse_distance, "_ROW_VISITS", 1)
        yield


def see(
    seen: KVReuseCurve,
    user: int,
    hashes: list[BlockHash],
    slot_of_row: np.ndarray = ABSENT,
    rows: np.ndarray | None = None,
    candidates: np.ndarray = NO_ROWS,
) -> None:
    if rows is None:
        rows = np.full(len(hashes) * BLOCK_TOKENS, -1)
    seen.observe(user, hashes, rows, candidates, slot_of_row, 0, len(rows))


def cached_tokens(num_pages: int, visits: list[tuple[int, list[BlockHash]]]) -> int:
    """Tokens that the tenant itself reuses, one request after the other."""
    kv = KVCacheManager(BlockPool(np.arange(num_pages)), BLOCK_TOKENS)
    total = 0
    for number, (user, hashes) in enumerate(visits):
        tokens = len(hashes) * BLOCK_TOKENS
        cached = kv.allocate(str(number), hashes, tokens, tokens)
        assert cached is not None
        total += cached
        kv.cache_blocks(str(number), hashes, tokens, user)
        kv.free(str(number))
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 7), st.integers(0, 2), st.sampled_from([0, 0, 0, 0, 100])),
        min_size=1,
        max_size=60,
    )
)
def test_each_page_spares_what_the_tenant_itself_reuses_with_one_page_more(
    drawn: list[tuple[int, int, int]],
) -> None:
    lengths: dict[int, int] = {}
    edits: dict[int, int] = {}
    visits = []
    for user, growth, edit in drawn:
        lengths[user] = min(6, lengths.get(user, 1) + growth)
        # An edit of the oldest event makes another history of it, for good.
        edits[user] = edits.get(user, 0) + edit
        visits.append((user, hashes_of(user, lengths[user], edits[user])))
    seen = curve(60, PageCosts(1.0, 0.0, 0.0))
    for user, hashes in visits:
        see(seen, user, hashes)
    # The longest history and the null block are the least that the tenant can be.
    sizes = range(7, 50)
    reused = [cached_tokens(pages, visits) for pages in sizes]
    found = [seen.saved_ms(pages, pages + 1) for pages in sizes[:-1]]
    np.testing.assert_allclose(found, np.diff(reused), atol=1e-9)


def test_a_block_spares_the_pairs_of_its_tokens() -> None:
    seen = curve(60, PageCosts(0.0, 1.0, 0.0))
    for _ in range(2):
        see(seen, 1, hashes_of(1, 2))
    # Two blocks of four tokens: 1 + 2 + 3 + 4 pairs, then 5 + 6 + 7 + 8; page 0 is the null block.
    assert [seen.saved_ms(page, page + 1) for page in range(4)] == [0.0, 10.0, 26.0, 0.0]


def test_a_block_spares_absent_rows_that_nothing_behind_it_reads() -> None:
    seen = curve(60, PageCosts(0.0, 0.0, 1.0))
    rows = np.array([1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 9, -1])
    slot_of_row = ABSENT.copy()
    slot_of_row[3] = 0
    see(seen, 1, hashes_of(1, 2), rows=rows[:8])
    see(seen, 1, hashes_of(1, 3), slot_of_row, rows, candidates=np.array([6, 2]))
    # Of the first block 1: 2 is a candidate, 3 is resident, 4 comes again. Of the second 4 and 5.
    assert [seen.saved_ms(page, page + 1) for page in range(4)] == [0.0, 1.0, 2.0, 0.0]


def test_half_of_the_users_say_the_same_of_many() -> None:
    whole = curve(4000, PageCosts(1.0, 0.0, 0.0))
    half = curve(4000, PageCosts(1.0, 0.0, 0.0), SpatialSample(0.5, seed=3))
    rng = np.random.default_rng(5)
    tags = rng.integers(1, 1 << 62, 1000).tolist()
    for user in rng.integers(0, 1000, 8000).tolist():
        for one in (whole, half):
            see(one, tags[user], hashes_of(user, 3))
    for pages in (500, 1000, 2000):
        expected = whole.saved_ms(pages, pages + 200)
        assert half.saved_ms(pages, pages + 200) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("pages", [400, 4000])
def test_few_of_the_visits_stand_for_those_that_matter_little(
    pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the present size only rows are sampled, elsewhere whole visits."""
    costs = PageCosts(1.0, 0.0, 1.0)
    exact, thrifty = curve(4000, costs), curve(4000, costs)
    thrifty.num_pages = pages
    rng = np.random.default_rng(6)
    for user in rng.integers(1, 400, 20_000).tolist():
        rows = rng.integers(0, NUM_ROWS, 3 * BLOCK_TOKENS)
        see(exact, user, hashes_of(user, 3), rows=rows)
        with monkeypatch.context() as patch:
            patch.setattr(reuse_distance, "_FAR_VISITS", 8)
            patch.setattr(reuse_distance, "_ROW_VISITS", 4)
            see(thrifty, user, hashes_of(user, 3), rows=rows)
    expected = exact.saved_ms(300, 600)
    assert thrifty.saved_ms(300, 600) == pytest.approx(expected, rel=0.05)
    assert thrifty.saved_ms(300, 600) != expected


def test_what_is_older_than_the_ring_is_forgotten_with_its_user() -> None:
    seen = curve(60, PageCosts(1.0, 0.0, 0.0))
    see(seen, 1, hashes_of(1, 2))
    for user in range(2, 2 + 1024):
        see(seen, user, hashes_of(user, 1))
    assert 1 not in seen._latest
    assert len(seen._latest) == 1024
    see(seen, 1, hashes_of(1, 2))
    assert seen.saved_ms(0, 60) == 0.0


def test_requests_without_a_user_or_hashes_teach_nothing() -> None:
    seen = curve(60, PageCosts(1.0, 0.0, 0.0))
    for _ in range(2):
        see(seen, 0, hashes_of(1, 2))
        see(seen, 1, [], rows=np.arange(8))
    assert seen.saved_ms(0, 60) == 0.0


@pytest.mark.parametrize("name", ["token_ms", "attention_pair_ms", "row_miss_ms"])
def test_costs_must_be_finite_and_not_negative(name: str) -> None:
    costs = {"token_ms": 1.0, "attention_pair_ms": 1.0, "row_miss_ms": 1.0}
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=name):
            PageCosts(**costs | {name: value})
