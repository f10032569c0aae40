"""Controllers that differ from `helm` in one thing, to be run beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from block_manager.refill import RefillConfig
from helm_engine.controller.allocation_controller import (
    AdaptiveController,
    AllocationController,
)
from helm_engine.controller.base_policy import BasePolicy
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.hindsight import Case
from helm_engine.simulator.simulation import Result

LAYERED = ("helm+residual", "helm+recovery", "helm+residual+recovery")
RANDOM_NETS = 3
SLEWS = (0.012, 0.03, 0.06, 0.12, 0.3)
"""Shares of the pool per second; 0.012 is 0.06 in 5 s."""
QUICK_SLEWS = (0.012,)
SLEW_CONTROLLERS = ("helm", "marginal")


def random_net(seed: int, config: ControllerConfig) -> AllocationController:
    """`helm` with a network that has learned nothing."""
    return AdaptiveController(BasePolicy.random(seed), config)


def ablations(case: Case, scale: int) -> Iterator[tuple[str, Result]]:
    """`helm`, with other layers, and without one thing after the other."""
    for name in ("helm", *LAYERED):
        yield name, case.run_controller(name, scale)
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
