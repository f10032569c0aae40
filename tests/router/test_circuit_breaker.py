"""A breaker's life, step by step."""

from __future__ import annotations

import pytest

from router.circuit_breaker import BreakerConfig, BreakerState, CircuitBreaker

CONFIG = BreakerConfig(failures_to_open=2, open_s=10.0, max_open_s=30.0)


def broken(at: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(CONFIG)
    breaker.failed(at)
    breaker.failed(at)
    return breaker


def test_opens_after_failures_in_a_row() -> None:
    breaker = CircuitBreaker(CONFIG)
    breaker.failed(0.0)
    breaker.answered(0.0)
    breaker.failed(0.0)
    assert breaker.state(0.0) is BreakerState.CLOSED
    assert breaker.lets_pass(0.0)
    breaker.failed(0.0)
    assert breaker.state(0.0) is BreakerState.OPEN
    assert not breaker.lets_pass(9.9)


def test_lets_one_trial_pass_when_its_time_is_over() -> None:
    breaker = broken()
    assert breaker.state(10.0) is BreakerState.HALF_OPEN
    assert breaker.lets_pass(10.0)
    assert breaker.sent(10.0)
    assert not breaker.lets_pass(10.0)
    assert not breaker.sent(10.0)


def test_closes_when_the_trial_is_answered() -> None:
    breaker = broken()
    breaker.sent(10.0)
    breaker.answered(11.0)
    assert breaker.state(11.0) is BreakerState.CLOSED
    breaker.failed(11.0)
    assert breaker.state(11.0) is BreakerState.CLOSED


def test_stays_away_longer_each_time_a_trial_fails_up_to_a_limit() -> None:
    breaker, now = broken(), 0.0
    for open_s in (10.0, 20.0, 30.0, 30.0):
        assert breaker.state(now + open_s - 0.1) is BreakerState.OPEN
        now += open_s
        assert breaker.sent(now)
        breaker.failed(now)


def test_a_trial_that_tells_nothing_makes_room_for_another() -> None:
    breaker = broken()
    breaker.sent(10.0)
    breaker.abandoned()
    assert breaker.lets_pass(10.0)


def test_requests_from_before_it_opened_change_nothing() -> None:
    breaker = broken()
    breaker.failed(1.0)
    breaker.answered(2.0)
    assert breaker.state(9.9) is BreakerState.OPEN
    assert breaker.state(10.0) is BreakerState.HALF_OPEN


def test_a_new_engine_starts_closed() -> None:
    breaker = broken()
    breaker.reset()
    assert breaker.state(0.0) is BreakerState.CLOSED


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"failures_to_open": 0}, "failures_to_open"),
        ({"open_s": 0.0}, "open_s"),
        ({"open_s": 31.0}, "open_s"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        BreakerConfig(**{"max_open_s": 30.0, **changes})  # type: ignore[arg-type]
