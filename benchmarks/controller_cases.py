"""What controllers are measured on: the package's workloads, and those that training never sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from helm_engine.simulator.hindsight import Case, Effort
from helm_engine.simulator.workloads import Regime, Workload, builtin_or_file, load_workload
from model_executor.cost_profile import load_cost_profile

SETTINGS = ("dlrmv3", "ml100k", "production")
WORKLOADS = ("steady", "trend", "burst")
HELD_OUT_PROFILE = "l20-25gbe"
L20_LOAD = 0.42
"""Of the load that an A100 bears: an L20 computes a row in 2.6 times the time."""

EFFORTS = {
    "dlrmv3": Effort(coarse_step=2, evaluations=30),
    "ml100k": Effort(coarse_step=4, evaluations=16),
    "production": Effort(coarse_step=4, evaluations=16),
}
"""By what a run costs."""
QUICK = Effort(scale=16, coarse_step=10, evaluations=5)
HELD_OUT_EFFORT = Effort(scale=16, coarse_step=4)


class Named(NamedTuple):
    """A workload and the device that it runs on."""

    workload: Workload
    profile: str


def named(workload: str, setting: str) -> Named:
    """One of the package's, on the device that its setting names."""
    wanted = load_workload(workload, setting)
    return Named(wanted, wanted.resolved_setting.profile)


def case_of(one: Named, seed: int) -> Case:
    """The case of a seed."""
    profile = load_cost_profile(builtin_or_file("profiles", one.profile, "profile"))
    return Case(one.workload, profile, seed)


def _changed(workload: Workload, **changes: object) -> Workload:
    """The workload with other values of these fields in all its regimes."""
    regimes = [msgspec.structs.replace(one, **changes) for one in workload.regimes]
    return msgspec.structs.replace(workload, regimes=regimes)


def _zipf(by: float) -> Named:
    """Items that are more popular, or less."""
    workload = load_workload("burst")
    regimes = [
        msgspec.structs.replace(one, item_zipf=max(0.0, (one.item_zipf or 0.0) + by))
        for one in workload.regimes
    ]
    return _on_cpu(msgspec.structs.replace(workload, regimes=regimes))


def _day_and_night() -> Named:
    """Two days of four minutes: browsing, an evening of regulars, a quiet night."""
    workload = load_workload("trend")
    browsing, regulars, _ = workload.regimes
    first = msgspec.structs.replace(browsing, name="day", seconds=60.0)
    rest = [
        msgspec.structs.replace(regulars, name="evening", seconds=120.0, ramp_s=60.0, load=1.3),
        msgspec.structs.replace(regulars, name="night", seconds=60.0, ramp_s=30.0, load=0.2),
        msgspec.structs.replace(browsing, name="day", seconds=90.0, ramp_s=45.0),
    ]
    return _on_cpu(msgspec.structs.replace(workload, regimes=[first, *rest, *rest]))


def _heavy_burst() -> tuple[Workload, Regime, Regime, Regime]:
    """The regimes of a burst whose KV fills most of the pool with any seed."""
    workload = load_workload("burst")
    browsing, burst, after = workload.regimes[:3]
    return (
        workload,
        browsing,
        msgspec.structs.replace(burst, history_mean=2400, history_sd=100),
        after,
    )


def _two_bursts() -> Named:
    """A second burst half a minute after the first."""
    workload, browsing, burst, after = _heavy_burst()
    pause = msgspec.structs.replace(after, name="pause", seconds=30.0)
    second = msgspec.structs.replace(burst, name="second burst")
    return _on_cpu(
        msgspec.structs.replace(workload, regimes=[browsing, burst, pause, second, after])
    )


def _silent_hour() -> Named:
    """Nobody for an hour, then regulars instead of those who browsed before."""
    workload, browsing, burst, after = _heavy_burst()
    silence = msgspec.structs.replace(browsing, name="silence", seconds=3600.0, load=1e-4)
    back = msgspec.structs.replace(burst, name="regulars", seconds=90.0, ramp_s=0.0, load=1.3)
    return _on_cpu(msgspec.structs.replace(workload, regimes=[browsing, silence, back, after]))


def _wide_rows() -> Named:
    """Rows of eight times the bytes, in a pool of the same size; fewer items are shown."""
    workload = load_workload("burst")
    setting = workload.resolved_setting
    wide = msgspec.structs.replace(setting, row_bytes=8 * setting.row_bytes)
    fewer = _changed(workload, catalogue_share=workload.regimes[0].catalogue_share / 8.0)
    return _on_cpu(msgspec.structs.replace(fewer, setting=wide))


def _other_device(name: str, setting: str) -> Named:
    """On an L20, with as much load as it bears."""
    workload = load_workload(name, setting)
    regimes: list[Regime] = [
        msgspec.structs.replace(one, load=one.load * L20_LOAD) for one in workload.regimes
    ]
    return Named(msgspec.structs.replace(workload, regimes=regimes), HELD_OUT_PROFILE)


def _on_cpu(workload: Workload) -> Named:
    return Named(workload, workload.resolved_setting.profile)


HELD_OUT: dict[str, Callable[[], Named]] = {
    "zipf -0.3": lambda: _zipf(-0.3),
    "zipf +0.3": lambda: _zipf(0.3),
    "day and night": _day_and_night,
    "two bursts": _two_bursts,
    "silent hour": _silent_hour,
    "rows eight times wider": _wide_rows,
    "burst on l20-25gbe": lambda: _other_device("burst", "ml100k"),
    "trend on l20-25gbe": lambda: _other_device("trend", "production"),
}
"""By name; none of them is drawn in training."""
