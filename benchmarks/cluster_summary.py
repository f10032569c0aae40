"""What the cells of the cluster benchmark come to: means over seeds, ratios of equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.controller_summary import mean_and_interval

Record = dict[str, Any]
_Key = tuple[Any, ...]

FIGURES = ("p50_ms", "p99_ms", "slo", "kv_hit", "emb_hit", "load_spread")
_RUN = ("k", "workload", "seed")


def by_policy(cells: Sequence[Record]) -> list[Record]:
    """Of each scale, workload and policy: figures, and P99 over that of `joint`."""
    joint = {_key(one, _RUN): one["p99_ms"] for one in cells if one["policy"] == "joint"}
    found = []
    for key, mine in _groups(cells, ("k", "workload", "policy")):
        ratios = [
            one["p99_ms"] / joint[_key(one, _RUN)] for one in mine if _key(one, _RUN) in joint
        ]
        found.append(key | _means(mine) | {"p99_vs_joint": mean_and_interval(ratios)})
    return found


def along(records: Sequence[Record], cells: Sequence[Record], axis: str) -> list[Record]:
    """Of a sweep, at each place on its axis: figures, and P99 over that of the usual run.

    Args:
        records: of the sweep.
        cells: the usual runs, which are a place on the axis too.
        axis: what differs.
    """
    swept = {_key(one, ("k", "workload", "policy")) for one in records}
    usual = [one for one in cells if _key(one, ("k", "workload", "policy")) in swept]
    base = {_key(one, (*_RUN, "policy")): one["p99_ms"] for one in usual}
    found = []
    for key, mine in _groups([*usual, *records], ("k", "workload", "policy", axis)):
        keys = [_key(one, (*_RUN, "policy")) for one in mine]
        ratios = [
            one["p99_ms"] / base[which]
            for one, which in zip(mine, keys, strict=True)
            if which in base
        ]
        found.append(key | _means(mine) | {"p99_vs_usual": mean_and_interval(ratios)})
    return sorted(found, key=lambda one: _key(one, ("k", "workload", "policy", axis)))


def papers_table(cells: Sequence[Record], static: Sequence[Record]) -> list[Record]:
    """Static split or controller, `least_load` or `joint`: P99 over that of the first of both."""
    told = [one | {"split": "best static"} for one in static]
    scales = {one["k"] for one in static}
    told += [
        one | {"split": "controller"}
        for one in cells
        if one["k"] in scales and one["policy"] in ("least_load", "joint")
    ]
    base = {
        _key(one, _RUN): one["p99_ms"]
        for one in told
        if one["split"] == "best static" and one["policy"] == "least_load"
    }
    found = []
    for key, mine in _groups(told, ("k", "workload", "split", "policy")):
        ratios = [one["p99_ms"] / base[_key(one, _RUN)] for one in mine if _key(one, _RUN) in base]
        found.append(
            key | _means(mine) | {"p99_vs_best_static_least_load": mean_and_interval(ratios)}
        )
    return found


def _groups(records: Sequence[Record], names: Sequence[str]) -> list[tuple[Record, list[Record]]]:
    """Records by what they have in common."""
    groups: dict[_Key, list[Record]] = {}
    for one in records:
        groups.setdefault(_key(one, names), []).append(one)
    return [(dict(zip(names, key, strict=True)), mine) for key, mine in groups.items()]


def _key(record: Record, names: Sequence[str]) -> _Key:
    return tuple(record[name] for name in names)


def _means(records: Sequence[Record]) -> Record:
    return {name: mean_and_interval([one[name] for one in records]) for name in FIGURES}
