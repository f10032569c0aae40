"""Every controller by its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from helm_engine.controller.allocation_controller import (
    AdaptiveController,
    AllocationController,
    Policy,
    StaticController,
)
from helm_engine.controller.baselines import (
    HillClimbPolicy,
    MarginalPolicy,
    MillisecondsPerBytePolicy,
    SetPointPolicy,
    ThresholdPolicy,
)
from helm_engine.controller.burst_recovery import BurstRecovery
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import Observation
from helm_engine.controller.residual_adapter import ResidualAdapter

logger = logging.getLogger(__name__)

_POLICIES: dict[str, Callable[[], Policy]] = {
    "threshold": ThresholdPolicy,
    "hill_climb": HillClimbPolicy,
    "marginal": MarginalPolicy,
    "kv_only": lambda: SetPointPolicy(is_kv=True, mark=0.9),
    "emb_only": lambda: SetPointPolicy(is_kv=False, mark=0.95),
    "ms_per_byte": MillisecondsPerBytePolicy,
    "helm": lambda: _learned_policy(),
}
_NEED_COSTS = frozenset({"marginal", "ms_per_byte", "residual"})
"""Policies and layers that go by what a page is worth."""
_STATIC = "static:"
_LAYERS: tuple[list[str], ...] = ([], ["residual"], ["recovery"], ["residual", "recovery"])


def controller_names() -> list[str]:
    """What `make_controller` knows; `static:X` stands for every share X of EMB."""
    return ["static:X", *_POLICIES]


def make_controller(name: str, config: ControllerConfig | None = None) -> AllocationController:
    """Builds a controller that knows nothing yet.

    Args:
        name: one of `controller_names`; behind an adaptive one's, layers may follow: `+residual`
            corrects it online, `+recovery` overrides it in bursts.
        config: its bounds; the name in it is not looked at.

    Raises:
        ValueError: the name is unknown; lists those that are known.
    """
    if name.startswith(_STATIC):
        return StaticController(_static_share(name))
    base, layers = _parts(name)
    return AdaptiveController(
        _POLICIES[base](),
        config,
        BurstRecovery() if "recovery" in layers else None,
        ResidualAdapter() if "residual" in layers else None,
    )


def _static_share(name: str) -> float:
    try:
        return float(name.removeprefix(_STATIC))
    except ValueError:
        raise ValueError(f"controller: {name!r}: X of static:X must be a number") from None


def _parts(name: str) -> tuple[str, list[str]]:
    """The policy's name and its layers'."""
    base, *layers = name.split("+")
    if base not in _POLICIES or layers not in _LAYERS:
        raise ValueError(
            f"controller: {name!r} is unknown (known: {', '.join(controller_names())}; "
            "+residual, +recovery or both may follow any but static:X)"
        )
    return base, layers


def _learned_policy() -> Policy:
    """The shipped base policy.

    One that cannot be read does not keep an engine from serving: the split is held, and the log
    says why.
    """
    # Here, since its kernels need numba, and whoever only names controllers does not.
    from helm_engine.controller.base_policy import load_base_policy

    try:
        return load_base_policy()
    except ValueError as error:
        logger.error("the committed split is held: %s", error)
        return _Unreadable(str(error))


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a policy whose file is missing or damaged."""

    reason: str

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`: none, so that the split is held."""
        raise ValueError(self.reason)


def check_controller(name: str, has_costs: bool) -> None:
    """Checks a name before anything is loaded.

    Args:
        name: of a controller.
        has_costs: whether the engine will know the milliseconds of the device.

    Raises:
        ValueError: it is unknown, or blind without the costs.
    """
    if name.startswith(_STATIC):
        StaticController(_static_share(name))
        return
    base, layers = _parts(name)
    if not has_costs and not _NEED_COSTS.isdisjoint((base, *layers)):
        raise ValueError(
            f"controller: {name} needs cost_profile, the milliseconds of the device: without it "
            "nothing tells what a page is worth"
        )
