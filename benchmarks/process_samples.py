"""What a server's processes hold, read from /proc, and whether it grows."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

_FIELD = re.compile(r"^(Pss|Pss_Anon):\s+(\d+) kB$", re.MULTILINE)
_CORE = b"multiprocessing.spawn"


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process at one moment."""

    role: Literal["front", "core"]
    pid: int
    seconds: float
    """Since the start of the run."""
    anonymous_mib: float
    """Memory that belongs to no file. Libraries are left out: a process's share of them falls
    whenever another one starts."""
    pss_mib: float
    """Proportional set size: with its share of the libraries."""
    files: int
    threads: int


def sample_server(pid: int, seconds: float) -> list[ProcessSample]:
    """The front and its engine cores; a process that ends meanwhile is left out.

    Args:
        pid: of the front.
        seconds: since the start of the run.
    """
    found = [_sample("front", pid, seconds)]
    found += [_sample("core", child, seconds) for child in core_pids(pid)]
    return [sample for sample in found if sample is not None]


def core_pids(pid: int) -> list[int]:
    """The engine cores of a front."""
    return [child for child in _children(pid) if _CORE in _read(f"/proc/{child}/cmdline")]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _children(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, _read(str(tasks)).split())


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _sample(role: Literal["front", "core"], pid: int, seconds: float) -> ProcessSample | None:
    try:
        memory = dict(_FIELD.findall(Path(f"/proc/{pid}/smaps_rollup").read_text()))
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not memory:  # It has ended and waits for its parent.
        return None
    anonymous, pss = (int(memory[name]) / 1024 for name in ("Pss_Anon", "Pss"))
    return ProcessSample(role, pid, seconds, anonymous, pss, files, threads)


def mib_per_minute(samples: Sequence[ProcessSample]) -> float | None:
    """Theil and Sen's slope of the anonymous memory: the median of the slopes of all pairs.

    Only pairs of samples of one process count, so that the step from an engine core to the one
    that replaces it does not. None without such a pair.
    """
    by_process: dict[int, list[ProcessSample]] = defaultdict(list)
    for sample in samples:
        by_process[sample.pid].append(sample)
    slopes = []
    for held in by_process.values():
        times = np.array([sample.seconds for sample in held])
        memory = np.array([sample.anonymous_mib for sample in held])
        first, second = np.triu_indices(len(held), 1)
        slopes.append((memory[second] - memory[first]) / (times[second] - times[first]))
    pooled = np.concatenate(slopes) if slopes else np.empty(0)
    return float(np.median(pooled)) * 60 if len(pooled) else None
