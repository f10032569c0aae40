"""The dispatcher's promises, over fleets of engines that exist as names only."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.circuit_breaker import BreakerConfig
from router.dispatcher import Assignment, Dispatcher, NoEngineError
from router.engine_registry import EngineState
from router.policies import POLICIES
from tests.router.fleet import COSTS, fleet, history, kv_batch, row_batch, rows_stored, stored
from tests.router.fleet import work_of as work

NAMES = ("a", "b", "c", "d")


def queues(dispatcher: Dispatcher) -> list[float]:
    found: list[float] = dispatcher.registry.queue_ms().tolist()
    return found


@given(st.integers(0, 2**32))
def test_with_the_index_emptied_joint_is_least_load(seed: int) -> None:
    rng = np.random.default_rng(seed)
    joint = fleet(*NAMES, policy="joint", seed=seed, expected_for_s=0.0)
    plain = fleet(*NAMES, policy="least_load", seed=seed, expected_for_s=0.0)
    for name in NAMES:
        joint.residency.apply_kv(name, kv_batch(stored(*history(1, 5))))
        joint.residency.apply_rows(name, row_batch(rows_stored(1, 2, 3)))
        joint.residency.forget(name)
    running: list[tuple[Assignment, Assignment]] = []
    for now in range(60):
        if running and rng.random() < 0.4:
            for made, dispatcher in zip(running.pop(0), (joint, plain), strict=True):
                dispatcher.finished(made, now)
            continue
        one = work(int(rng.integers(9)), int(rng.integers(1, 9)), candidates=range(3))
        running.append((joint.route(one, now), plain.route(one, now)))
        assert running[-1][0].engine == running[-1][1].engine
        assert running[-1][0].predicted_ms == running[-1][1].predicted_ms
    assert queues(joint) == queues(plain)


@given(st.permutations(NAMES), st.integers(0, 2**32))
def test_other_names_change_nothing(names: list[str], seed: int) -> None:
    """Engine i of the one fleet is engine i of the other, whatever both are called."""
    picked = []
    for called in (NAMES, names):
        rng = np.random.default_rng(seed)
        dispatcher = fleet(*called, seed=seed)
        for name in called:
            user = int(rng.integers(5))
            dispatcher.residency.apply_kv(name, kv_batch(stored(*history(user, 5))))
            dispatcher.residency.apply_rows(name, row_batch(rows_stored(*range(10 * user))))
        routed = [dispatcher.route(work(int(rng.integers(5))), now) for now in range(40)]
        picked.append([called.index(made.engine) for made in routed])
    assert picked[0] == picked[1]


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
def test_no_charge_is_left_when_all_have_ended(policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dispatcher = fleet(*NAMES, policy=policy, seed=seed)
    running: list[Assignment] = []
    for now in range(80):
        match int(rng.integers(6)):
            case 0 | 1 | 2:
                running.append(dispatcher.route(work(int(rng.integers(9))), now))
                assert running[-1].charged_ms > 0.0
            case 3 if running:
                made = running.pop(int(rng.integers(len(running))))
                dispatcher.finished(made, now, service_ms=3.0, cached_tokens=0)
                dispatcher.failed(made, now)  # An end of what has ended does nothing.
            case 4 if running:
                end = running.pop(int(rng.integers(len(running))))
                if rng.random() < 0.5:
                    dispatcher.failed(end, now)
                else:
                    dispatcher.abandoned(end)
            case 5:
                dispatcher.restart_engine(NAMES[int(rng.integers(4))])
        assert min(queues(dispatcher)) >= 0.0
    for made in running:
        dispatcher.abandoned(made)
    assert queues(dispatcher) == [0.0] * len(NAMES)


def test_work_counts_as_soon_as_it_is_routed() -> None:
    dispatcher = fleet(*NAMES)
    made = [dispatcher.route(work(user), 0.0) for user in range(8)]
    assert set(Counter(one.engine for one in made).values()) == {2}


def test_ties_are_broken_at_random() -> None:
    first = Counter(fleet(*NAMES, seed=seed).route(work(1), 0.0).engine for seed in range(200))
    assert set(first) == set(NAMES)
    assert min(first.values()) > 25


def test_a_user_goes_where_the_history_is() -> None:
    dispatcher = fleet(*NAMES)
    dispatcher.residency.apply_kv("c", kv_batch(stored(*history(1, 5))))
    made = dispatcher.route(work(1), 0.0)
    assert (made.engine, made.cached_tokens) == ("c", 20)


def test_rows_decide_between_engines_without_the_history() -> None:
    dispatcher = fleet(*NAMES)
    dispatcher.residency.apply_rows("b", row_batch(rows_stored(*range(10, 30))))
    made = dispatcher.route(work(1), 0.0)
    assert (made.engine, made.rows_missing) == ("b", 0)


def test_a_long_queue_outweighs_what_is_resident() -> None:
    dispatcher = fleet("a", "b", expected_for_s=0.0)
    dispatcher.residency.apply_kv("a", kv_batch(stored(*history(1, 5))))
    engines = [dispatcher.route(work(1), 0.0).engine for _ in range(30)]
    assert engines[0] == "a"
    assert "b" in engines


def test_a_second_request_follows_the_first_before_any_event() -> None:
    dispatcher = fleet(*NAMES, expected_for_s=2.0)
    for user in range(20):
        first = dispatcher.route(work(user), 0.0)
        dispatcher.finished(first, 0.5)
        again = dispatcher.route(work(user, 6), 1.0)
        assert (again.engine, again.cached_tokens) == (first.engine, 20)
        dispatcher.finished(again, 1.0)
    late = dispatcher.route(work(3, 6), 9.0)
    assert late.cached_tokens == 0


def test_what_failed_is_not_expected() -> None:
    dispatcher = fleet("a")
    dispatcher.failed(dispatcher.route(work(1), 0.0), 0.1)
    assert dispatcher.route(work(1), 0.2).cached_tokens == 0


def test_a_restarted_engine_is_cold_and_idle() -> None:
    dispatcher = fleet("a")
    dispatcher.residency.apply_kv("a", kv_batch(stored(*history(1, 5))))
    made = dispatcher.route(work(1), 0.0)
    dispatcher.restart_engine("a")
    assert queues(dispatcher) == [0.0]
    dispatcher.finished(made, 1.0)
    assert queues(dispatcher) == [0.0]
    assert dispatcher.route(work(1), 1.0).cached_tokens == 0


def test_excluded_engines_are_taken_only_when_there_are_no_others() -> None:
    dispatcher = fleet("a", "b")
    assert {dispatcher.route(work(1), 0.0, exclude=["a"]).engine for _ in range(9)} == {"b"}
    assert dispatcher.route(work(1), 0.0, exclude=["a", "b"]).engine in "ab"


def test_draining_engines_get_nothing_while_others_are_ready() -> None:
    dispatcher = fleet("a", "b")
    dispatcher.registry.set_state("a", EngineState.DRAINING)
    assert {dispatcher.route(work(1), 0.0).engine for _ in range(9)} == {"b"}


def test_an_engine_that_fails_is_left_alone_and_then_tried_once() -> None:
    dispatcher = Dispatcher(seed=0, breakers=BreakerConfig(failures_to_open=2, open_s=10.0))
    for name in ("a", "b"):
        dispatcher.add_engine(name, COSTS)
    failures = 0
    for _ in range(20):
        made = dispatcher.route(work(1), 0.0)
        if made.engine == "a":
            failures += 1
            dispatcher.failed(made, 0.0)
        else:
            dispatcher.abandoned(made)
    assert failures <= 2
    trial = dispatcher.route(work(1), 11.0, exclude=["b"])
    assert (trial.engine, trial.is_trial) == ("a", True)
    assert dispatcher.route(work(1), 11.0).engine == "b"
    dispatcher.finished(trial, 11.0)
    assert not dispatcher.route(work(1), 11.0, exclude=["b"]).is_trial


def test_without_engines_nothing_can_be_routed() -> None:
    with pytest.raises(NoEngineError):
        fleet().route(work(1), 0.0)


def test_a_slow_engine_is_found_out() -> None:
    dispatcher = fleet("a", "b", policy="least_load")
    for number in range(200):
        for name, took_ms in (("a", 9.0), ("b", 36.0)):
            made = dispatcher.route(work(number), number / 100, exclude=["ab".replace(name, "")])
            assert made.engine == name
            dispatcher.finished(made, number / 100, service_ms=took_ms)
    counts = Counter(dispatcher.route(work(user), 2.0).engine for user in range(50))
    assert 35 <= counts["a"] <= 45
