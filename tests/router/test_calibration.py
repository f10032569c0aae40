"""What the router learns of the speed of engines, and forgets."""

from __future__ import annotations

import pytest

from router.calibration import MAX_FACTOR, Calibration


def calibration(num_engines: int) -> Calibration:
    made = Calibration()
    for slot in range(num_engines):
        made.forget(slot)
    return made


def learn(made: Calibration, slot: int, ratio: float, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        made.learn(slot, ratio, now)


def test_nothing_is_corrected_before_anything_is_known() -> None:
    assert calibration(3).factors(5.0).tolist() == [1.0, 1.0, 1.0]


def test_factor_approaches_the_ratio_slowly() -> None:
    made = calibration(1)
    learn(made, 0, 3.0, 1)
    assert 1.0 < made.factors(0.0)[0] < 1.1
    learn(made, 0, 3.0, 200)
    assert made.factors(0.0)[0] == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize(("ratio", "limit"), [(1e9, MAX_FACTOR), (1e-9, 1.0 / MAX_FACTOR)])
def test_factor_stays_within_limits(ratio: float, limit: float) -> None:
    made = calibration(1)
    learn(made, 0, ratio, 500)
    assert made.factors(0.0)[0] == pytest.approx(limit)


def test_an_engine_that_nobody_hears_of_fades_to_the_usual() -> None:
    made = calibration(3)
    learn(made, 0, 6.0, 200)
    for slot in (1, 2):
        learn(made, slot, 2.0, 200, now=300.0)
    slow, first, second = made.factors(300.0)
    assert first == pytest.approx(second, rel=1e-3)
    # The logarithms' average: of one engine at 6 and two at about 2.
    assert 2.0 < slow < 3.5


def test_a_new_engine_is_taken_for_an_ordinary_one() -> None:
    made = calibration(3)
    for slot in (0, 1):
        learn(made, slot, 4.0, 300)
    assert made.factors(0.0)[2] == pytest.approx(4.0, rel=0.01)
    learn(made, 2, 1.0, 300)
    made.forget(2)
    assert made.factors(0.0)[2] == pytest.approx(4.0, rel=0.01)
