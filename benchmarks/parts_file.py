"""A result file to which each run of a benchmark adds its part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def read_earlier(path: Path) -> dict[str, Any]:
    """Figures of the file as it is; none if there is no file.

    What every result file says besides (machine, versions) is left out: it is of the last run.
    """
    figures: dict[str, Any] = {"commands": [], "cells": []}
    if path.is_file():
        figures |= json.loads(path.read_text(encoding="utf-8"))
        for name in ("command", "machine", "versions", "seeds"):
            figures.pop(name, None)
    return figures


def add_records(
    figures: dict[str, Any], section: str, records: Iterable[Record], identity: Sequence[str]
) -> None:
    """Adds records to a section; those of the same run are replaced.

    Where both have a mapping under the same name, its entries that are not new stay.

    Args:
        figures: of the file.
        section: of the figures.
        records: of the runs.
        identity: fields that tell runs apart.
    """
    kept: dict[tuple[Any, ...], Record] = {}
    for one in [*figures.get(section, []), *records]:
        key = tuple(one.get(name) for name in identity)
        before = kept.get(key, {})
        merged = {
            name: before.get(name, {}) | value
            for name, value in one.items()
            if isinstance(value, dict)
        }
        kept[key] = one | merged
    figures[section] = [kept[key] for key in sorted(kept, key=str)]


def add_speeds(figures: dict[str, Any], speeds: Mapping[int, Iterable[float]]) -> None:
    """Adds requests per second of processor time, by scale; the median of each is told beside."""
    of_runs = figures.setdefault("simulated_requests_per_s_of_runs", {})
    for scale, measured in speeds.items():
        of_runs.setdefault(str(scale), []).extend(round(one) for one in measured)
    figures["simulated_requests_per_s"] = {
        scale: float(np.median(measured)) for scale, measured in of_runs.items()
    }
