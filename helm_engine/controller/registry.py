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
from helm_engine.controller.base_policy import load_base_policy
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
}
_HELM = "helm"
_NEED_COSTS = frozenset({"marginal", "ms_per_byte", _HELM})
_STATIC = "static:"
_RECOVERY = "+recovery"
_ABSENT_LAYERS: tuple[list[str], ...] = ([], ["residual"], ["recovery"], ["residual", "recovery"])


def controller_names() -> list[str]:
    """What `make_controller` knows; `static:X` stands for every share X of EMB."""
    return ["static:X", *_POLICIES, _HELM]


def make_controller(name: str, config: ControllerConfig | None = None) -> AllocationController:
    """Builds a controller that knows nothing yet.

    Args:
        name: one of `controller_names`. With `+recovery` behind an adaptive one's name, bursts
            override it; `helm-residual`, `helm-recovery` and `helm-residual-recovery` are `helm`
            without these layers.
        config: its bounds; the name in it is not looked at.

    Raises:
        ValueError: the name is unknown; lists those that are known.
    """
    if name.startswith(_STATIC):
        try:
            share = float(name.removeprefix(_STATIC))
        except ValueError:
            raise ValueError(f"controller: {name!r}: X of static:X must be a number") from None
        return StaticController(share)
    helm, *absent = name.split("-")
    if helm == _HELM and absent in _ABSENT_LAYERS:
        return make_helm(
            config,
            residual=None if "residual" in absent else ResidualAdapter(),
            recovery=None if "recovery" in absent else BurstRecovery(),
        )
    base = name.removesuffix(_RECOVERY)
    policy = _POLICIES.get(base)
    if policy is None:
        raise ValueError(
            f"controller: {name!r} is unknown (known: {', '.join(controller_names())}; "
            f"{_RECOVERY} may follow any but static:X and helm, -residual and -recovery may "
            "follow helm)"
        )
    recovery = BurstRecovery() if name != base else None
    return AdaptiveController(policy(), config, recovery)


def make_helm(
    config: ControllerConfig | None = None,
    residual: ResidualAdapter | None = None,
    recovery: BurstRecovery | None = None,
) -> AdaptiveController:
    """The learned controller, of these layers over the base policy.

    A policy that cannot be read does not keep an engine from serving: the split is held, and the
    log says why.
    """
    policy: Policy
    try:
        policy = load_base_policy()
    except ValueError as error:
        logger.error("the committed split is held: %s", error)
        policy = _Unreadable(str(error))
        residual = recovery = None
    return AdaptiveController(policy, config, recovery, residual)


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
    make_controller(name)
    base = name.removesuffix(_RECOVERY).split("-")[0]
    if not has_costs and base in _NEED_COSTS:
        raise ValueError(
            f"controller: {name} needs cost_profile, the milliseconds of the device: without it "
            "nothing tells what a page is worth"
        )
