"""Requests follow the laws that their workload states, and are the same for the same seed."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_manager.block_hash import hash_blocks, root_hash, user_digest, user_tag
from helm_engine.simulator.events.dlrmv3 import Dlrmv3Law
from helm_engine.simulator.events.law import Asked
from helm_engine.simulator.histories import distinct_items
from helm_engine.simulator.trace import Trace, make_trace
from tests.simulator.small import regime, setting, workload


def history(trace: Trace, number: int) -> list[int]:
    items: list[int] = trace.tokens(number).rows.tolist()
    return items


# ---------------------------------------------------------------- what is the same


def test_a_seed_says_all() -> None:
    one, same, other = (make_trace(workload(), seed) for seed in (3, 3, 4))
    for field in fields(Trace):
        first, second = getattr(one, field.name), getattr(same, field.name)
        if isinstance(first, np.ndarray):
            np.testing.assert_array_equal(first, second)
        else:
            assert first == second
    assert len(one) != len(other) or (one.arrivals != other.arrivals).any()


def test_a_history_only_grows_and_by_candidates_of_the_last_visit() -> None:
    trace = make_trace(workload(), 1)
    last: dict[int, int] = {}
    num_returns = 0
    for number, person in enumerate(trace.people.tolist()):
        now = history(trace, number)
        assert 1 <= len(now) <= trace.setting.max_history
        if person in last:
            before = history(trace, last[person])
            assert now[: len(before)] == before
            joined = now[len(before) :]
            assert len(joined) == 4
            shown = trace.tokens(last[person]).candidate_rows
            assert np.isin(joined, shown).all()
            num_returns += 1
        last[person] = number
    assert num_returns > 200
    assert len(last) > 20


def test_candidates_are_distinct_as_the_front_sends_them() -> None:
    trace = make_trace(workload(), 1)
    for number in range(50):
        rows = trace.tokens(number).candidate_rows
        assert (np.diff(rows) > 0).all()
        assert 15 < len(rows) <= 30
        assert 0 <= rows[0] <= rows[-1] < 6000


def test_hashes_are_those_of_the_histories() -> None:
    trace = make_trace(workload(), 1, model_version="m", user_key=b"k")
    for number in range(0, len(trace), 7):
        digest = user_digest(f"user-{trace.people[number]}", b"k")
        request = trace.request(number)
        expected = hash_blocks(root_hash("m", digest), request.tokens.hash_inputs(), 8)
        assert request.block_hashes == expected
        assert request.user_tag == user_tag(digest)


# ---------------------------------------------------------------- laws


def sigmas(found: float, expected: float, spread: float) -> float:
    return abs(found - expected) / spread


def test_arrivals_are_a_poisson_process_of_the_stated_rate() -> None:
    steps = workload(
        regime(seconds=50.0), regime(seconds=50.0, load=3.0), regime(seconds=50.0, load=0.5)
    )
    arrivals = make_trace(steps, 5).arrivals
    for begin, end, rate in ((0, 55, 40), (55, 105, 120), (105, 155, 20)):
        number = int(((arrivals >= begin) & (arrivals < end)).sum())
        mean = (end - begin) * rate
        assert sigmas(number, mean, mean**0.5) < 4
    gaps = np.diff(arrivals[arrivals < 55])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # An exponential law.


def test_on_a_ramp_load_and_laws_change_evenly() -> None:
    ramp = regime(seconds=100.0, ramp_s=100.0, load=5.0, candidates=50)
    trace = make_trace(workload(regime(seconds=1.0), ramp), 5)
    times = trace.arrivals - 6.0
    for begin in range(0, 100, 20):
        mine = (times >= begin) & (times < begin + 20)
        share = (begin + 10) / 100
        mean = 20 * 40 * (1 + 4 * share)
        number = int(mine.sum())
        assert sigmas(number, mean, mean**0.5) < 4
        follows = float((trace.regimes[mine] == 1).mean())
        # Within the stretch more requests come when more of them follow the new laws.
        assert sigmas(follows, share, 0.5 / number**0.5) < 4 + 1


def test_hot_users_make_their_share_of_requests_and_the_others_follow_zipf() -> None:
    laws = regime(seconds=200.0, hot_users=5, first_hot_user=100, user_zipf=1.2, history_sd=0.0)
    trace = make_trace(workload(laws, max_history=65536), 5)
    counts = np.sort(np.bincount(trace.people))[::-1]
    total = counts.sum()
    hot = counts[:6].sum()  # The five, and the most frequent of the others.
    weights = np.arange(1, 201) ** -1.2
    shares = weights / weights.sum()
    assert sigmas(hot / total, 0.7 + 0.3 * shares[0], (0.25 / total) ** 0.5) < 5
    second = 0.3 * shares[1]
    assert counts[6] / total == pytest.approx(second, rel=0.25)


def test_first_histories_have_the_stated_mean_and_spread() -> None:
    laws = regime(hot_user_share=0.0, seconds=100.0)
    trace = make_trace(workload(laws, num_users=100_000), 5)
    first = trace.lengths[np.unique(trace.people, return_index=True)[1]]
    assert len(first) > 3000
    assert sigmas(first.mean(), 100, 30 / len(first) ** 0.5) < 4
    assert first.std() == pytest.approx(30, rel=0.05)


def uniform(number: int, key: int) -> float:
    """SplitMix64, written once more."""
    mask = (1 << 64) - 1
    bits = ((number + 1) * 0x9E3779B97F4A7C15 + key) & mask
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
    return ((bits ^ (bits >> 31)) >> 11) * 2.0**-53


@pytest.mark.parametrize(("item_zipf", "on_offer"), [(0.0, 1.0), (0.7, 0.25), (2.5, 1.0)])
def test_items_are_drawn_as_plain_searches_would_draw_them(
    item_zipf: float, on_offer: float
) -> None:
    other = regime(item_zipf=item_zipf, catalogue_share=on_offer)
    laws = [regime(item_zipf=1.1), other, regime(item_zipf=1.1)]
    asked = Asked(
        people=np.array([3, 1, 2, 0]),
        lengths=np.array([40, 1, 90, 1]),
        regimes=np.array([1, 0, 2, 1]),
        candidates=np.array([400, 0, 900, 0]),
        new_events=np.array([1, 1, 1, 1]),
        drift=np.array([0, 5, 1234, 2]),
    )
    law = Dlrmv3Law(setting(), laws)
    drawn = law.draw(asked, np.random.default_rng(1), (5, 77)).shown.tolist()
    liked = law._draw_tastes(4, np.random.default_rng(1))
    expected: list[int] = []
    for size, person, number, drift in zip(
        asked.candidates, asked.people, asked.regimes, asked.drift, strict=True
    ):
        exponent, share = laws[number].item_zipf, laws[number].catalogue_share
        assert exponent is not None
        table = np.cumsum(np.arange(1.0, 1000 * share + 1.0) ** -exponent)
        table /= table[-1]
        for _ in range(size):
            place = len(expected)
            shares = liked.bounds[person][:-1]
            category = np.searchsorted(shares, uniform(2 * place, 77), side="right")
            rank = np.searchsorted(table, uniform(2 * place + 1, 77), side="right")
            expected.append(int(liked.categories[person][category] * 1000 + (rank - drift) % 1000))
    assert drawn == expected


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6))
def test_equal_candidates_of_a_request_count_once(bags: list[list[int]]) -> None:
    items = np.array([item for bag in bags for item in bag], dtype=np.int64)
    bounds = np.cumsum([0, *map(len, bags)])
    kept, new_bounds = distinct_items(items, bounds)
    found = [kept[a:b].tolist() for a, b in pairwise(new_bounds)]
    assert found == [sorted(set(bag)) for bag in bags]


def ranks(trace: Trace, numbers: Any) -> Any:
    """How often each place of a category is drawn, over all categories."""
    items = np.concatenate([history(trace, number) for number in numbers])
    return np.bincount(items % 1000, minlength=1000)


def test_items_follow_zipf_within_a_category() -> None:
    laws = regime(hot_user_share=0.0, seconds=100.0, item_zipf=0.8)
    trace = make_trace(workload(laws, num_users=100_000), 5)
    counts = ranks(trace, np.unique(trace.people, return_index=True)[1])
    weights = np.arange(1, 1001) ** -0.8
    expected = counts.sum() * weights / weights.sum()
    off = np.abs(counts - expected) / expected**0.5
    assert off.max() < 5
    categories = np.bincount(trace.events // 1000)
    assert len(categories) == 6
    assert categories.min() > 0.9 * categories.mean()


def test_a_person_likes_so_many_categories() -> None:
    trace = make_trace(workload(), 1)
    for number in range(0, len(trace), 5):
        liked = {item // 1000 for item in history(trace, number)}
        assert len(liked) <= 2


def spread_of_visits(regularity: int) -> float:
    """Standard deviation of the visits between two of the same hot user, over their mean."""
    trace = make_trace(
        workload(regime(hot_user_share=1.0, hot_user_regularity=regularity, seconds=100.0)), 2
    )
    order = np.lexsort((np.arange(len(trace)), trace.people))
    same = trace.people[order][1:] == trace.people[order][:-1]
    between = np.diff(order)[same]
    return float(between.std() / between.mean())


def test_regular_users_come_at_intervals_that_vary_less() -> None:
    # Where each visit's user is drawn at random, intervals are geometric: their spread is near 1.
    assert spread_of_visits(1) > 0.9
    assert spread_of_visits(4) < 0.5
    assert spread_of_visits(16) < 0.2


def test_with_drift_new_items_come_in_at_the_top() -> None:
    laws = regime(hot_user_share=0.0, seconds=100.0, drift_per_s=2.0)
    trace = make_trace(workload(laws, num_users=100_000, warm_up_s=0.0), 5)
    firsts = np.unique(trace.people, return_index=True)[1]
    late = firsts[(trace.arrivals[firsts] > 90.0) & (trace.arrivals[firsts] < 90.5)]
    # 180 ranks by then: place -180 leads, and place 0 is no more popular than rank 180.
    counts = ranks(trace, late)
    assert counts.argmax() == 1000 - 180
    assert counts[0] < 0.05 * counts.max()


def test_the_package_data_is_where_setup_says() -> None:
    text = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    assert '"helm_engine.simulator": ["builtin/*/*.json"]' in text
