"""Scores of engines, worked by hand, and what happens to users when engines come and go."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from router.policies import (
    LOAD_BOUND,
    POLICIES,
    Offers,
    consistent_hash,
    policy_named,
    predicted_ms,
    round_robin,
)


def offers(
    names: Sequence[str],
    *,
    queue_ms: Sequence[float] = (),
    service_ms: Sequence[float] = (),
    is_open: Sequence[bool] = (),
    user_tag: int = 0,
) -> Offers:
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return Offers(
        is_open=np.array(is_open or [True] * len(names)),
        queue_ms=np.array(queue_ms or [0.0] * len(names)),
        service_ms=np.array(service_ms or [1.0] * len(names)),
        name_hashes=np.array([int.from_bytes(one, "little") for one in digests], dtype=np.uint64),
        turns=np.arange(len(names)),
        user_tag=user_tag,
    )


def best(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(scores == scores.min()).tolist()


def test_default_policy_knows_both_tenants() -> None:
    first = next(iter(POLICIES))
    assert first == "joint"
    assert POLICIES[first].knows_kv
    assert POLICIES[first].knows_rows


def test_unknown_policy_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ValueError, match=r"joint, kv, emb, .*not 'best'"):
        policy_named("best")


def test_queue_and_own_work_weigh_alike() -> None:
    found = predicted_ms(offers("abc", queue_ms=[5.0, 0.0, 3.0], service_ms=[1.0, 7.0, 2.0]))
    assert best(found) == [2]


def test_a_lead_of_less_than_a_hundredth_of_the_work_is_a_tie() -> None:
    found = predicted_ms(offers("abc", service_ms=[10.0, 10.05, 10.2]))
    assert best(found) == [0, 1]


def test_what_is_resident_counts_behind_long_queues_too() -> None:
    found = predicted_ms(offers("ab", queue_ms=[5000.0, 5000.0], service_ms=[10.0, 4.0]))
    assert best(found) == [1]


def test_engines_that_are_not_open_set_no_mark() -> None:
    offered = offers("ab", service_ms=[1.0, 9.0], is_open=[False, True])
    assert predicted_ms(offered)[1] == 9.0


def test_round_robin_takes_turns() -> None:
    assert best(round_robin(offers("abc"))) == [0]


USERS = list(np.random.default_rng(1).integers(1, 1 << 62, size=4000).tolist())


def homes(names: Sequence[str]) -> list[str]:
    return [names[int(consistent_hash(offers(names, user_tag=user)).argmin())] for user in USERS]


def test_hashed_users_spread_evenly() -> None:
    names = [f"engine-{number}" for number in range(8)]
    counts = Counter(homes(names))
    assert set(counts) == set(names)
    # 500 each; a binomial's standard deviation is 21.
    assert max(abs(count - 500) for count in counts.values()) < 110


def test_only_the_users_of_an_engine_that_leaves_move() -> None:
    names = [f"engine-{number}" for number in range(8)]
    before, after = homes(names), homes(names[:3] + names[4:])
    assert [old for old, new in zip(before, after, strict=True) if old != new] == [
        home for home in before if home == names[3]
    ]
    assert len(set(Counter(after))) == 7


def test_a_users_home_depends_on_no_order() -> None:
    names = [f"engine-{number}" for number in range(8)]
    assert homes(names) == homes(names[::-1])


def test_a_hashed_queue_never_grows_far_beyond_the_average() -> None:
    names = [f"engine-{number}" for number in range(6)]
    queue = [0.0] * 6
    rng = np.random.default_rng(2)
    for _ in range(600):
        # One user sends most of it.
        user = USERS[0] if rng.random() < 0.8 else USERS[int(rng.integers(4000))]
        slot = int(consistent_hash(offers(names, queue_ms=queue, user_tag=user)).argmin())
        assert queue[slot] <= LOAD_BOUND * (np.mean(queue) + 1.0)
        queue[slot] += 1.0
    assert max(queue) <= LOAD_BOUND * (600 / 6 + 1.0) + 1.0


def test_a_user_alone_stays_at_home() -> None:
    names = [f"engine-{number}" for number in range(6)]
    home = int(consistent_hash(offers(names, user_tag=USERS[0])).argmin())
    queue = [0.0] * 6
    queue[home] = 1.0
    again = int(consistent_hash(offers(names, queue_ms=queue, user_tag=USERS[0])).argmin())
    assert again == home


def test_requests_without_a_user_are_not_hashed_to_one_place() -> None:
    found = consistent_hash(offers("abc", queue_ms=[5.0, 0.0, 3.0]))
    assert best(found) == [1]
