"""The share of the host link that refill gets: against a slow integration of the rule itself.

`SlowBucket` advances in small steps of time and applies the formula at each; the throttle jumps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from block_manager.refill import HostTraffic, RefillConfig, RefillThrottle, TrafficClass

DEMAND, ONBOARDING, REFILL = TrafficClass
LINK = RefillConfig(
    cap_bytes_per_s=400.0,
    link_bytes_per_s=1000.0,
    margin_bytes_per_s=100.0,
    mark_bytes_per_s=700.0,
    burst_bytes=300,
    decay_s=0.5,
)


class SlowBucket:
    """The rule in steps of a tenth of a millisecond."""

    STEP_S = 1e-4

    def __init__(self, config: RefillConfig) -> None:
        self.config = config
        self.tokens = self.demand = self.onboarding = 0.0

    def wait(self, seconds: float) -> None:
        config = self.config
        for _ in range(round(seconds / self.STEP_S)):
            left = config.link_bytes_per_s - self.demand - self.onboarding
            rate = max(0.0, min(config.cap_bytes_per_s, left - config.margin_bytes_per_s))
            if self.demand > config.mark_bytes_per_s:
                rate = 0.0
            self.tokens = min(config.burst_bytes, self.tokens + rate * self.STEP_S)
            self.demand -= self.demand * self.STEP_S / config.decay_s
            self.onboarding -= self.onboarding * self.STEP_S / config.decay_s


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(TrafficClass),
        st.integers(0, 600),
        st.integers(0, 8).map(lambda tenths: tenths / 10),
    ),
    max_size=8,
)
CONFIGS = st.builds(
    RefillConfig,
    cap_bytes_per_s=st.sampled_from([0.0, 50.0, 400.0, 2000.0]),
    link_bytes_per_s=st.sampled_from([50.0, 1000.0, math.inf]),
    margin_bytes_per_s=st.sampled_from([0.0, 100.0]),
    mark_bytes_per_s=st.sampled_from([0.0, 300.0, math.inf]),
    burst_bytes=st.sampled_from([1, 300, 100_000]),
    decay_s=st.sampled_from([0.2, 1.0]),
)


@given(config=CONFIGS, events=EVENTS)
def test_tokens_are_the_integral_of_the_rule(
    config: RefillConfig, events: list[tuple[TrafficClass, int, float]]
) -> None:
    throttle, slow, now = RefillThrottle(config, 0.0), SlowBucket(config), 0.0
    for traffic, num_bytes, pause in events:
        if traffic is REFILL:
            throttle.spend(num_bytes, now)
            slow.tokens -= num_bytes
        else:
            throttle.count_foreground(traffic, num_bytes, now)
            if traffic is DEMAND:
                slow.demand += num_bytes / config.decay_s
            else:
                slow.onboarding += num_bytes / config.decay_s
        slow.wait(pause)
        now += pause
        assert throttle.foreground(now) == pytest.approx(slow.demand + slow.onboarding, abs=1.0)
        if slow.demand == 0.0 or abs(slow.demand - config.mark_bytes_per_s) > 1.0:
            resting = slow.demand > config.mark_bytes_per_s
            expected = 0.0 if resting else max(0.0, slow.tokens)
            assert throttle.available(now) == pytest.approx(expected, abs=2.0)


@given(config=CONFIGS, events=EVENTS, parts=st.integers(1, 50))
def test_how_often_it_is_asked_does_not_matter(
    config: RefillConfig, events: list[tuple[TrafficClass, int, float]], parts: int
) -> None:
    often, seldom, now = RefillThrottle(config, 0.0), RefillThrottle(config, 0.0), 0.0
    for traffic, num_bytes, pause in events:
        for throttle in (often, seldom):
            if traffic is REFILL:
                throttle.spend(num_bytes, now)
            else:
                throttle.count_foreground(traffic, num_bytes, now)
        for part in range(1, parts):
            often.available(now + pause * part / parts)
        now += pause
    assert often.rate(now) == pytest.approx(seldom.rate(now), rel=1e-6, abs=1e-6)
    assert abs(often.available(now) - seldom.available(now)) <= 1


@given(config=CONFIGS, events=EVENTS)
def test_refill_never_gets_more_than_the_cap_and_one_chunk(
    config: RefillConfig, events: list[tuple[TrafficClass, int, float]]
) -> None:
    throttle, now, taken = RefillThrottle(config, 0.0), 0.0, 0
    for traffic, num_bytes, pause in events:
        if traffic is not REFILL:
            throttle.count_foreground(traffic, num_bytes, now)
        now += pause
        allowed = throttle.available(now)
        assert 0 <= allowed <= config.burst_bytes
        throttle.spend(allowed, now)
        taken += allowed
        assert taken <= config.cap_bytes_per_s * now + config.burst_bytes + 1e-6
        assert throttle.available(now) == 0


def test_hand_worked_rates() -> None:
    throttle = RefillThrottle(LINK, 10.0)
    assert throttle.rate(10.0) == 400.0  # The cap: 900 are free.
    throttle.count_foreground(ONBOARDING, 300, 10.0)  # 300 bytes over half a second: 600 a second.
    assert throttle.foreground(10.0) == pytest.approx(600.0)
    assert throttle.rate(10.0) == pytest.approx(300.0)  # 1,000 - 600 - 100.
    throttle.count_foreground(ONBOARDING, 300, 10.0)
    assert throttle.rate(10.0) == 0.0
    # 1,200 a second fall to 500, where the cap holds again, in 0.5 ln(1200 / 500) seconds.
    assert throttle.rate(10.0 + 0.5 * math.log(1200 / 500)) == pytest.approx(400.0)


def test_hand_worked_tokens_of_a_rest_and_of_a_rising_rate() -> None:
    wide = replace(LINK, link_bytes_per_s=10_000.0, mark_bytes_per_s=300.0, burst_bytes=100_000)
    throttle = RefillThrottle(wide, 0.0)
    throttle.count_foreground(DEMAND, 300, 0.0)
    # 600 a second are above the mark for 0.5 ln 2 seconds; then 400 a second are gained.
    assert throttle.available(1.0) == int(400 * (1 - 0.5 * math.log(2)))
    narrow = RefillConfig(2000.0, 1000.0, burst_bytes=100_000, decay_s=0.5)
    throttle = RefillThrottle(narrow, 0.0)
    throttle.count_foreground(ONBOARDING, 500, 0.0)
    # The integral of 1,000 (1 - exp(-2 t)) over a second.
    assert throttle.available(1.0) == int(1000 - 500 * (1 - math.exp(-2)))


def test_a_steady_foreground_is_estimated_by_its_rate() -> None:
    throttle, now = RefillThrottle(replace(LINK, decay_s=1.0), 0.0), 0.0
    for _ in range(1000):
        now += 0.01
        throttle.count_foreground(DEMAND, 5, now)
    assert throttle.foreground(now) == pytest.approx(500.0, rel=0.01)


def test_nothing_may_be_refilled_while_misses_are_above_the_mark_though_it_was_saved_up() -> None:
    throttle = RefillThrottle(LINK, 0.0)
    assert throttle.available(10.0) == 300
    throttle.count_foreground(DEMAND, 400, 10.0)  # 800 a second, the mark is 700.
    assert (throttle.rate(10.0), throttle.available(10.0)) == (0.0, 0)
    assert throttle.available(10.0 + 0.5 * math.log(800 / 700) + 1e-6) == 300


def test_kv_onboarding_does_not_count_towards_the_mark() -> None:
    throttle = RefillThrottle(LINK, 0.0)
    throttle.count_foreground(ONBOARDING, 400, 10.0)
    assert throttle.available(10.0) == 300


def test_a_debt_is_worked_off_first() -> None:
    throttle = RefillThrottle(LINK, 0.0)
    throttle.spend(400, 0.0)
    assert throttle.available(1.0) == 0
    assert throttle.available(1.5) == 200


def test_time_does_not_go_back() -> None:
    throttle = RefillThrottle(LINK, 5.0)
    throttle.spend(0, 6.0)
    assert throttle.available(5.5) == throttle.available(6.0) == 300


def test_refill_is_no_foreground() -> None:
    with pytest.raises(ValueError, match="traffic"):
        RefillThrottle(LINK, 0.0).count_foreground(REFILL, 1, 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cap_bytes_per_s", -1.0),
        ("cap_bytes_per_s", math.inf),
        ("cap_bytes_per_s", math.nan),
        ("link_bytes_per_s", 0.0),
        ("margin_bytes_per_s", -1.0),
        ("mark_bytes_per_s", -1.0),
        ("burst_bytes", 0),
        ("decay_s", 0.0),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        replace(LINK, **{field: value})


def test_the_order_of_the_classes() -> None:
    assert sorted(TrafficClass) == [DEMAND, ONBOARDING, REFILL]
    assert [one.name for one in TrafficClass] == ["DEMAND_MISS", "KV_ONBOARDING", "REFILL"]


def test_bytes_and_failures_are_counted_by_class() -> None:
    traffic = HostTraffic()
    traffic.count(DEMAND, 10)
    traffic.count(REFILL, 7)
    traffic.count(REFILL, 1)
    traffic.count_failure(DEMAND)
    assert [traffic.num_bytes(one) for one in TrafficClass] == [10, 0, 8]
    assert [traffic.num_failures(one) for one in TrafficClass] == [1, 0, 0]
