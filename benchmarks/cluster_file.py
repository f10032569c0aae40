"""The result file of the cluster benchmark, to which each run adds its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster_runs import Found, Task

_IDENTITY = ("workload", "policy", "seed", "k", "engines", "routers", "staleness_s")


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


def add_found(figures: dict[str, Any], task: Task, found: Found) -> None:
    """Adds what a task found; records of the same run are replaced."""
    for section, records in found.sections.items():
        kept = {_identity(one): one for one in [*figures.get(section, []), *records]}
        figures[section] = sorted(kept.values(), key=lambda one: str(_identity(one)))
    speeds = figures.setdefault("simulated_requests_per_s_of_runs", {})
    measured = speeds.setdefault(str(task.scale), [])
    measured += [round(one) for one in found.requests_per_s]
    figures["simulated_requests_per_s"] = {
        scale: float(np.median(runs)) for scale, runs in speeds.items()
    }
    figures["pace"] = task.pace


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in _IDENTITY)
