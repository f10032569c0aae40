"""Real arrival times: of a recorded trace, or a text file with a number on each line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from helm_engine.request_trace.file_format import MAGIC, read_trace_file

FloatArray = npt.NDArray[np.float64]

_MAX_BYTES = 1 << 28
"""Of a text file: ten million times."""


def read_arrivals(path: Path) -> FloatArray:
    """Reads times, in any unit, ascending: float64 [n], two at least.

    Raises:
        ValueError: names the file and the line.
    """
    try:
        with path.open("rb") as file:
            is_trace = file.read(len(MAGIC)) == MAGIC
            file.seek(0)
            text = b"" if is_trace else file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"arrivals: {path}: {error.strerror}") from error
    if len(text) > _MAX_BYTES:
        raise ValueError(f"arrivals: {path}: has more than {_MAX_BYTES} bytes")
    times = (
        np.sort([one.at for one in read_trace_file(path).records])
        if is_trace
        else _numbers(path, text)
    )
    if len(times) < 2 or times[0] == times[-1]:
        raise ValueError(f"arrivals: {path}: must hold two different times at least")
    return times


def _numbers(path: Path, text: bytes) -> FloatArray:
    times = np.empty(text.count(b"\n") + 1)
    number, before = 0, -np.inf
    for place, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = float(line)
        except ValueError:
            value = np.nan
        if not before <= value < np.inf:
            raise ValueError(
                f"arrivals: {path}: line {place}: must be a number, none below the one before"
            )
        times[number] = before = value
        number += 1
    return times[:number]
