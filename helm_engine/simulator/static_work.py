"""How busy static splits keep a device, second by second, and other devices as busy as that one.

A trace is run at a handful of static splits on a device so fast that nothing queues: what each
request costs then depends on the split and on nothing else, and is worked out for slower devices.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.environment import Episode
from helm_engine.simulator.simulation import simulate
from model_executor.cost_profile import CostProfile

FloatArray = npt.NDArray[np.float64]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85)
"""Static splits that are run; between them a device is taken to be busy in straight lines."""
_HASTE = 4.0
"""The device is so many times faster while splits are compared."""
_LOAD_PRICES = (0.15, 2.0)
"""Least and largest factor of what loading rows costs on another device."""
_BUSY = (0.8, 1.25)
"""Least and largest factor of how busy it is with the cheapest split."""


class StaticWork(NamedTuple):
    """How busy each of `SHARES` keeps a device in each second, float64 [seconds, SHARES]."""

    loading: FloatArray
    """Seconds of loading and copying rows."""
    computing: FloatArray

    def on(self, load_price: float) -> FloatArray:
        """All of it, where loading takes so many times as long."""
        return self.loading * load_price + self.computing


def static_work(episode: Episode) -> StaticWork:
    """Runs a trace at each of `SHARES`."""
    model = episode.model
    still = replace(
        model, profile=_times(model.profile, 1.0 / _HASTE), controller=ControllerConfig()
    )
    seconds = int(episode.trace.seconds) + 1
    found = StaticWork(*np.empty((2, seconds, len(SHARES))))
    for place, share in enumerate(SHARES):
        steps = simulate(episode.trace, still, share).steps
        second = np.minimum(steps["began_s"].astype(np.int64), seconds - 1)
        load_ms, rest_ms = steps["load_ms"], steps["prefill_ms"] + steps["score_ms"]
        for work, spent_ms in zip(found, (load_ms, rest_ms), strict=True):
            work[:, place] = np.bincount(second, spent_ms * _HASTE / 1e3, seconds)
    return found


class Device(NamedTuple):
    """An episode on a device, and how busy each of `SHARES` keeps that device."""

    episode: Episode
    busy: FloatArray
    """float64 [seconds, SHARES]."""


def another_device(episode: Episode, work: StaticWork, rng: np.random.Generator) -> Device:
    """The episode on a device to which rows cost more or less than to its own.

    All prices change by one more factor, so that the device is about as busy as the other one.
    """
    price = _between(rng, *_LOAD_PRICES)
    least = work.on(1.0).mean(axis=0).min()
    factor = _between(rng, *_BUSY) * least / work.on(price).mean(axis=0).min()
    model = episode.model
    dearer = _times(model.profile, factor)
    profile = replace(
        dearer,
        row_miss_ms=dearer.row_miss_ms * price,
        round_trip_ms=dearer.round_trip_ms * price,
    )
    # As busy with the same requests: what one takes has changed by as much.
    slo_ms = model.controller.slo_ms * work.on(price).mean(axis=0).min() * factor / least
    changed = replace(
        model,
        profile=profile,
        setting=msgspec.structs.replace(model.setting, slo_ms=slo_ms),
        controller=replace(model.controller, slo_ms=slo_ms),
    )
    return Device(episode._replace(model=changed), work.on(price) * factor)


def _times(profile: CostProfile, factor: float) -> CostProfile:
    prices = {one.name: getattr(profile, one.name) for one in fields(profile)}
    return replace(
        profile, **{name: ms * factor for name, ms in prices.items() if name.endswith("_ms")}
    )


def _between(rng: np.random.Generator, least: float, most: float) -> float:
    """Evenly spread on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(least), np.log(most))))
