"""Controllers that differ from `helm` in one thing, to be run beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec

from block_manager.refill import RefillConfig
from helm_engine.controller.allocation_controller import (
    AdaptiveController,
    AllocationController,
    Decision,
)
from helm_engine.controller.base_policy import BasePolicy
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.controller.registry import make_controller
from helm_engine.simulator.hindsight import Case
from helm_engine.simulator.simulation import Result

LAYERED = ("helm+residual", "helm+recovery", "helm+residual+recovery")
RANDOM_NETS = 3
SLEWS = (0.012, 0.03, 0.06, 0.12, 0.3)
"""Shares of the pool per second; 0.012 is 0.06 in 5 s."""
QUICK_SLEWS = (0.012,)
SLEW_CONTROLLERS = ("helm", "marginal")


class WithoutWorth:
    """A controller that is not told what a page is worth."""

    def __init__(self, controller: AllocationController) -> None:
        self._controller = controller

    @property
    def stops_refill(self) -> bool:
        """See `AllocationController`."""
        return self._controller.stops_refill

    @property
    def latest(self) -> Decision | None:
        """See `AllocationController`."""
        return self._controller.latest

    @property
    def num_queries(self) -> int:
        """See `AllocationController`."""
        return self._controller.num_queries

    @property
    def num_holds(self) -> int:
        """See `AllocationController`."""
        return self._controller.num_holds

    @property
    def num_recoveries(self) -> int:
        """See `AllocationController`."""
        return self._controller.num_recoveries

    def decide(
        self, now: float, committed: float, observe: Callable[[float], Observation]
    ) -> float:
        """See `AllocationController.decide`; the worth of pages is 0."""

        def without_worth(when: float) -> Observation:
            return msgspec.structs.replace(
                observe(when),
                kv_page_gain_ms=0.0,
                kv_page_loss_ms=0.0,
                emb_page_gain_ms=0.0,
                emb_page_loss_ms=0.0,
            )

        return self._controller.decide(now, committed, without_worth)


def random_net(seed: int, config: ControllerConfig) -> AllocationController:
    """`helm` with a network that has learned nothing."""
    return AdaptiveController(BasePolicy.random(seed), config)


def ablations(case: Case, scale: int) -> Iterator[tuple[str, Result]]:
    """`helm`, with other layers, and without one thing after the other."""
    for name in ("helm", *LAYERED):
        yield name, case.run_controller(name, scale)
    blind = WithoutWorth(make_controller("helm", case.config))
    yield "helm, worth of pages zeroed", case.run_controller(blind, scale)
    narrow = case.changed(config=replace(case.config, least_share=0.3, largest_share=0.7))
    yield "helm, within 0.3 and 0.7", narrow.run_controller("helm", scale)
    # The rates are what the throttle goes by; what is read in one go stays.
    refill = replace(RefillConfig(), cap_bytes_per_s=float(1 << 50))
    unthrottled = case.changed(refill=refill)
    yield "helm, refill without a throttle", unthrottled.run_controller("helm", scale)


def random_nets(case: Case, scale: int, number: int) -> Iterator[tuple[str, Result]]:
    """`helm` with random weights, so many times."""
    for seed in range(number):
        yield f"random weights {seed}", case.run_controller(random_net(seed, case.config), scale)


def slews(case: Case, scale: int, limits: tuple[float, ...]) -> Iterator[tuple[str, float, Result]]:
    """`helm` and `marginal` under other slew limits."""
    for slew in limits:
        slower = case.changed(config=replace(case.config, slew_per_s=slew))
        for name in SLEW_CONTROLLERS:
            yield name, slew, slower.run_controller(name, scale)
