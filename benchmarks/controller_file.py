"""The result file of the controller benchmark, to which each run adds its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.controller_parts import Found

SECTIONS = (
    "cells", "ablations", "random_weights", "slew_sweep", "held_out", "schedules", "traces",
)  # fmt: skip
_IDENTITY = ("workload", "setting", "profile", "k", "controller", "slew_per_s", "seed")


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


def add_found(figures: dict[str, Any], found: Found) -> None:
    """Adds what a task found; records of the same run are replaced."""
    for section, records in found.sections.items():
        kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        for one in [*figures.get(section, []), *records]:
            before = kept.get(_identity(one), {})
            if "emb_fraction" in one:  # Lines of a trace that were not drawn anew stay.
                lines = before.get("emb_fraction", {}) | one["emb_fraction"]
                one = {**one, "emb_fraction": lines}
            kept[_identity(one)] = one
        figures[section] = sorted(kept.values(), key=lambda one: str(_identity(one)))
    speeds = figures.setdefault("simulated_requests_per_s_of_runs", {})
    for scale, measured in found.requests_per_s.items():
        speeds.setdefault(str(scale), []).extend(round(one) for one in measured)
    figures["simulated_requests_per_s"] = {
        scale: float(np.median(measured)) for scale, measured in speeds.items()
    }


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in _IDENTITY)
