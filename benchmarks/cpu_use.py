"""How busy processors were: of processes by role, and of the whole machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.process_samples import cpu_seconds

MOST_BUSY = 0.9
"""Of the machine's processors: beyond it a run says nothing."""
_IDLE, _IOWAIT = 3, 4
"""Columns of the machine's line of /proc/stat that are no work."""


class CpuUse:
    """Counts from the moment that it is made."""

    def __init__(self, processes: Mapping[str, Sequence[int]]) -> None:
        """Takes process ids by role."""
        self._processes = {role: tuple(pids) for role, pids in processes.items()}
        self._began = time.monotonic()
        self._used = self._of_each()
        self._machine = _busy_seconds()

    def _of_each(self) -> dict[str, float]:
        return {role: sum(map(cpu_seconds, pids)) for role, pids in self._processes.items()}

    def shares(self) -> dict[str, float]:
        """Of one processor by role, and of all of them: `ours` together, `machine` with others."""
        seconds = time.monotonic() - self._began
        used = {role: end - self._used[role] for role, end in self._of_each().items()}
        everything = seconds * (os.cpu_count() or 1)
        return {
            **{role: spent / seconds for role, spent in used.items()},
            "ours": sum(used.values()) / everything,
            "machine": (_busy_seconds() - self._machine) / everything,
        }


def _busy_seconds() -> float:
    """Of all processors since the machine was started."""
    line = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0]
    # Guests' time is counted in that of the users.
    columns = [int(one) for one in line.split()[1:9]]
    working = sum(columns) - columns[_IDLE] - columns[_IOWAIT]
    return working / os.sysconf("SC_CLK_TCK")
