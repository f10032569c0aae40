"""The online layer: bounded, learns which way pages want to go, forgets when it is told to."""

from __future__ import annotations

from math import inf

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from helm_engine.controller.allocation_controller import AdaptiveController
from helm_engine.controller.baselines import ThresholdPolicy
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.controller.residual_adapter import ResidualAdapter, ResidualConfig

SEEN = Observation(
    num_requests=500.0, kv_samples=500.0, emb_samples=5000.0, num_pages=1000, slo_ms=80.0,
    emb_fraction=0.5, p99_over_slo=0.5,
)  # fmt: skip


def wants(to_emb: float, hot: float = 0.5, now: float = 0.0) -> Observation:
    """A window in which one page more of EMB would have saved more, or less, than it cost KV."""
    return replace(
        SEEN,
        now=now,
        hot_user_share=hot,
        emb_page_gain_ms=1.0 + to_emb,
        kv_page_loss_ms=1.0 - to_emb,
        kv_page_gain_ms=1.0 - to_emb,
        emb_page_loss_ms=1.0 + to_emb,
    )


def test_it_corrects_nothing_before_it_has_learned() -> None:
    assert ResidualAdapter().rate(wants(0.8)) == 0.0


def test_it_learns_which_way_pages_want_to_go() -> None:
    adapter = ResidualAdapter()
    # Hot users announce a window in which KV is worth more, others one in which EMB is.
    for now in range(0, 2000, 2):
        hot = float(now % 4 == 0)
        adapter.rate(wants(0.0, hot, float(now)))
        adapter.rate(wants(-0.6 if hot else 0.6, 0.5, float(now + 1)))
    assert adapter.rate(wants(0.0, 1.0, 2000.0)) < -0.05
    adapter.rate(wants(0.0, 0.5, 2001.0))
    assert adapter.rate(wants(0.0, 0.0, 2002.0)) > 0.05


def test_it_learns_faster_while_p99_is_unusual() -> None:
    def correction(p99: float) -> float:
        adapter = ResidualAdapter()
        adapter.rate(wants(0.5, now=0.0))
        adapter.rate(replace(wants(0.5, now=1.0), p99_over_slo=p99))
        return adapter.rate(wants(0.5, now=2.0))

    assert correction(1.5) > correction(0.5) > 0.0


@given(st.lists(st.tuples(st.floats(-1.0, 1.0), st.floats(0.0, 8.0)), max_size=60))
def test_its_part_is_bounded(windows: list[tuple[float, float]]) -> None:
    config = ResidualConfig()
    adapter = ResidualAdapter(config)
    for now, (to_emb, p99) in enumerate(windows):
        part = adapter.rate(replace(wants(to_emb, now=float(now)), p99_over_slo=p99))
        assert abs(part) <= config.bound


def test_without_samples_it_says_nothing() -> None:
    adapter = ResidualAdapter()
    for now in range(50):
        adapter.rate(wants(0.8, now=float(now)))
    assert adapter.rate(wants(0.8, now=50.0)) > 0.0
    assert adapter.rate(replace(wants(0.8, now=51.0), kv_samples=3.0)) == 0.0


def test_reset_forgets_all() -> None:
    adapter, fresh = ResidualAdapter(), ResidualAdapter()
    for now in range(50):
        adapter.rate(wants(0.8, now=float(now)))
    adapter.reset()
    for now in range(3):
        assert adapter.rate(wants(0.3, now=float(now))) == fresh.rate(wants(0.3, now=float(now)))


def test_a_correction_that_is_no_number_holds_the_split() -> None:
    class Broken(ResidualAdapter):
        def rate(self, observation: Observation) -> float:
            return inf - inf

    controller = AdaptiveController(ThresholdPolicy(), ControllerConfig(), residual=Broken())
    assert controller.decide(1.0, 0.4, lambda now: replace(SEEN, now=now)) == 0.4
    assert controller.latest is not None
    assert controller.latest.held == "the residual adapter did not return a number"


def test_base_and_residual_add_up() -> None:
    class Says(ResidualAdapter):
        def rate(self, observation: Observation) -> float:
            return 0.25

    class Base:
        def rate(self, observation: Observation) -> float:
            return -2 / 3

    config = ControllerConfig(slew_per_s=0.3)
    controller = AdaptiveController(Base(), config, residual=Says())
    controller.decide(1.0, 0.5, lambda now: replace(SEEN, now=now))
    assert controller.latest is not None
    np.testing.assert_allclose(controller.latest.rate, (0.25 - 2 / 3) * 0.3)
    assert controller.latest.parts == {"base": -2 / 3, "residual": 0.25}
