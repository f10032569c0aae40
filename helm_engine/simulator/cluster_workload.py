"""A cluster's workload, made of one that is fitted to a single engine."""

from __future__ import annotations

import msgspec

from helm_engine.simulator.workloads import Regime, Workload


def cluster_workload(workload: Workload, engines: int, pace: float = 1.0) -> Workload:
    """What so many engines are asked to bear together, each as much as the one before.

    A cluster of N engines gets N times the requests, of N times the users and N times the hot
    users; hot users begin at an id N times as large, so that who is hot in one regime and not in
    another stays apart. What one engine's pool has to hold stays as it was if users are spread
    evenly; there is one catalogue, whose rows every engine may be asked for, and it drifts as
    before. Requests, histories, pools and the SLO are those of one engine.

    Args:
        workload: fitted to one engine.
        engines: at least 1.
        pace: everything takes so many times less time, warm-up and ramps included; loads stay.
            Above 1 a run is cheaper, and regimes change faster than they were written to.

    Raises:
        ValueError: a number is below its limit, or grows above it; names the field.
    """
    if engines < 1:
        raise ValueError(f"engines: must be at least 1, not {engines}")
    if not pace > 0.0:
        raise ValueError(f"pace: must be above 0, not {pace}")
    setting = workload.resolved_setting
    larger = msgspec.structs.replace(
        workload,
        setting=msgspec.structs.replace(
            setting,
            requests_per_s=setting.requests_per_s * engines,
            num_users=setting.num_users * engines,
        ),
        warm_up_s=workload.warm_up_s / pace,
        regimes=[_larger(one, engines, pace) for one in workload.regimes],
    )
    try:  # Once more through the limits of every field.
        return msgspec.convert(msgspec.to_builtins(larger), Workload)
    except msgspec.ValidationError as error:
        raise ValueError(f"engines: {engines} are too many for this workload: {error}") from error


def _larger(regime: Regime, engines: int, pace: float) -> Regime:
    return msgspec.structs.replace(
        regime,
        seconds=regime.seconds / pace,
        ramp_s=regime.ramp_s / pace,
        hot_users=regime.hot_users * engines,
        first_hot_user=regime.first_hot_user * engines,
    )
