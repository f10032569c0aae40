"""Workloads that a controller is trained over: those of the package, each time changed at random.

What is changed: how heavy each kind of traffic is, how long regimes last and how fast they give
way, who is hot, how long histories are, how popular items, what work costs, the service level, and
where the split begins. Most are over the setting `dlrmv3`, whose virtual seconds are the cheapest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import msgspec
import numpy as np

from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.environment import Episode
from helm_engine.simulator.simulation import EngineModel
from helm_engine.simulator.trace import Trace, make_trace
from helm_engine.simulator.workloads import (
    Regime,
    Setting,
    Workload,
    builtin_or_file,
    load_workload,
)
from model_executor.cost_profile import CostProfile, load_cost_profile

_WORKLOADS = ("burst", "trend", "steady")
_WORKLOAD_SHARES = (0.45, 0.35, 0.2)
_SETTINGS = ("dlrmv3", "ml100k", "production")
_SETTING_SHARES = (0.6, 0.2, 0.2)
_LARGE_SETTING_S = 0.5
"""Share of an episode's seconds over the other settings, with four times as many requests each."""
_KEPT_TRACES = 32
_NEW_TRACE_SHARE = 0.25
"""Drawing a trace takes as long as running it: it is run four times, each time on another device
from another split."""
_PRICES = ("prefill_row_ms", "attention_pair_ms", "candidate_ms", "row_miss_ms")


class EpisodeDrawer:
    """Draws episodes; everything follows from the generator that it is called with."""

    def __init__(
        self,
        scale: int,
        seconds: float,
        config: ControllerConfig | None = None,
    ) -> None:
        """Takes what all episodes share.

        Args:
            scale: of the simulation.
            seconds: of virtual time.
            config: bounds, period and slew limit.
        """
        self._scale = scale
        self._seconds = seconds
        self._config = config or ControllerConfig()
        self._kept: list[tuple[Trace, CostProfile]] = []

    def __call__(self, rng: np.random.Generator) -> Episode:
        """One episode."""
        if len(self._kept) < _KEPT_TRACES // 4 or rng.random() < _NEW_TRACE_SHARE:
            self._kept = [self._draw(rng), *self._kept][:_KEPT_TRACES]
            trace, profile = self._kept[0]
        else:
            trace, profile = self._kept[int(rng.integers(len(self._kept)))]
        model = EngineModel(
            trace.setting,
            vary_profile(profile, rng),
            controller=replace(self._config, slo_ms=trace.setting.slo_ms),
            scale=self._scale,
            watches_worth=False,  # See `train_controller.save_policy`.
        )
        return Episode(trace, model, float(rng.uniform(0.1, 0.9)))

    def _draw(self, rng: np.random.Generator) -> tuple[Trace, CostProfile]:
        name = _WORKLOADS[int(rng.choice(len(_WORKLOADS), p=_WORKLOAD_SHARES))]
        place = int(rng.choice(len(_SETTINGS), p=_SETTING_SHARES))
        workload, profile = _load(name, _SETTINGS[place])
        seconds = self._seconds * (_LARGE_SETTING_S if place else 1.0)
        workload = vary_workload(workload, seconds, rng)
        return make_trace(workload, int(rng.integers(1 << 31)), scale=self._scale), profile


@lru_cache(maxsize=len(_WORKLOADS) * len(_SETTINGS))
def _load(name: str, setting: str) -> tuple[Workload, CostProfile]:
    workload = load_workload(name, setting)
    profile = builtin_or_file("profiles", workload.resolved_setting.profile, "profile")
    return workload, load_cost_profile(profile)


def vary_workload(workload: Workload, seconds: float, rng: np.random.Generator) -> Workload:
    """The workload with other regimes, which begin anywhere and last so long in all.

    Regimes of one kind, those where hot users make most of the requests and the others, are changed
    alike, so that what comes back is what it was.
    """
    setting = workload.resolved_setting
    kinds = {kind: _Change(rng) for kind in (False, True)}
    stretch = _between(rng, 0.6, 1.5)
    begin = int(rng.integers(len(workload.regimes)))
    regimes: list[Regime] = []
    left = seconds
    while left > 0.0:
        regime = workload.regimes[(begin + len(regimes)) % len(workload.regimes)]
        changed = kinds[regime.hot_user_share > 0.5].apply(regime, setting)
        length = min(left, max(changed.ramp_s, regime.seconds * stretch * _between(rng, 0.8, 1.25)))
        ramp = min(regime.ramp_s * stretch, length) if regimes else 0.0
        regimes.append(msgspec.structs.replace(changed, seconds=length, ramp_s=ramp))
        left -= length
    varied = msgspec.structs.replace(setting, slo_ms=setting.slo_ms * _between(rng, 0.7, 1.4))
    return msgspec.structs.replace(workload, regimes=regimes, warm_up_s=0.0, setting=varied)


class _Change:
    """Factors for the regimes of one kind."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._load = _between(rng, 0.7, 1.08)
        self._users = _between(rng, 0.75, 1.15)
        self._history = _between(rng, 0.8, 1.15)
        self._candidates = _between(rng, 0.75, 1.15)
        self._zipf = float(rng.uniform(-0.15, 0.15))
        self._catalogue = _between(rng, 0.75, 1.4)

    def apply(self, regime: Regime, setting: Setting) -> Regime:
        """The regime, changed; what means nothing to the setting's data stays."""
        candidates = max(regime.new_events, round(regime.candidates * self._candidates))
        changed = msgspec.structs.replace(
            regime,
            load=regime.load * self._load,
            hot_users=max(1, round(regime.hot_users * self._users)),
            history_mean=min(setting.max_history, round(regime.history_mean * self._history)),
            candidates=candidates,
        )
        if regime.item_zipf is None:
            return changed
        return msgspec.structs.replace(
            changed,
            item_zipf=max(0.0, regime.item_zipf + self._zipf),
            catalogue_share=min(1.0, regime.catalogue_share * self._catalogue),
        )


def vary_profile(profile: CostProfile, rng: np.random.Generator) -> CostProfile:
    """Another device: each price up to a quarter less or more."""
    prices = {name: getattr(profile, name) * _between(rng, 0.8, 1.25) for name in _PRICES}
    return replace(profile, **prices)


def _between(rng: np.random.Generator, least: float, most: float) -> float:
    """A factor, evenly spread on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(least), np.log(most))))
