"""Which law a setting's events follow."""

from __future__ import annotations

from helm_engine.datasets.ml100k import load_local_ml100k
from helm_engine.simulator.events.dlrmv3 import Dlrmv3Law
from helm_engine.simulator.events.law import EventLaw
from helm_engine.simulator.events.ml100k import MovieLensLaw
from helm_engine.simulator.events.production import ProductionLaw
from helm_engine.simulator.workloads import Regime, Setting


def event_law(setting: Setting, regimes: list[Regime]) -> EventLaw:
    """The law of a setting under these regimes, which fit it.

    Raises:
        DatasetError: the data that it replays are not there, or are not what they should be.
        ValueError: its events were recorded.
    """
    if setting.data == "recorded":
        raise ValueError("data: recorded requests follow no law; simulate --trace has them")
    if setting.data == "ml100k":
        return MovieLensLaw(load_local_ml100k(), regimes)
    if setting.data == "production":
        return ProductionLaw(setting.num_items, regimes)
    return Dlrmv3Law(setting, regimes)
