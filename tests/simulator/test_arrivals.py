"""Requests that come when real ones did: the same rhythm at the workload's load."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helm_engine.simulator.arrival_file import read_arrivals
from helm_engine.simulator.trace import make_trace
from helm_engine.simulator.workloads import Workload, as_json, load_workload
from tests.simulator.recorded import write_recording
from tests.simulator.small import regime, workload


def following(path: Path, *regimes: object) -> Workload:
    return msgspec.structs.replace(workload(*regimes), arrivals=str(path))  # type: ignore[arg-type]


def written(path: Path, times: list[float]) -> Path:
    path.write_text("".join(f"{time!r}\n" for time in times), encoding="utf-8")
    return path


def test_gaps_keep_their_order_and_proportions_at_the_load_of_the_workload(tmp_path: Path) -> None:
    """Bursts of three and a pause, over and over, at 40 requests/s and then at 80."""
    path = written(tmp_path / "times.txt", [1000.0, 1001.0, 1002.0, 1012.0, 1013.0, 1014.0])
    laws = following(path, regime(seconds=20.0), regime(name="second", seconds=10.0, load=2.0))
    arrivals = make_trace(laws, 1).arrivals
    # With the warm-up the first regime takes 25 s.
    assert len(arrivals) == pytest.approx(40 * 25 + 80 * 10, abs=4)
    for begin, end, rate in ((0.0, 25.0, 40.0), (25.0, 35.0, 80.0)):
        mine = arrivals[(arrivals > begin + 0.5) & (arrivals < end - 0.5)]
        gaps = np.diff(mine) * rate
        # Five gaps of mean 1, of 1, 1, 10, 1 and 1 parts, and one of 1 until it begins again.
        assert {round(float(gap), 6) for gap in gaps} == {round(5 / 14, 6), round(50 / 14, 6), 1.0}
        assert gaps.mean() == pytest.approx(1.0, rel=0.02)


def test_seeds_draw_the_rest(tmp_path: Path) -> None:
    laws = following(written(tmp_path / "times.txt", [0.0, 0.5, 3.0]))
    one, other = make_trace(laws, 1), make_trace(laws, 2)
    np.testing.assert_array_equal(one.arrivals, other.arrivals)
    assert not np.array_equal(one.people, other.people)


def test_a_recorded_trace_is_such_a_file_too(tmp_path: Path) -> None:
    drawn = make_trace(workload(), 1)
    path = write_recording(tmp_path / "served.trace", drawn)
    np.testing.assert_allclose(read_arrivals(path), drawn.arrivals)
    laws = msgspec.structs.replace(workload(), arrivals=str(path))
    assert len(make_trace(laws, 1).arrivals) == pytest.approx(40 * 25, rel=0.1)


def test_the_file_is_looked_for_beside_the_workload(tmp_path: Path) -> None:
    written(tmp_path / "times.txt", [0.0, 1.0])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(as_json(workload()) | {"arrivals": "times.txt"}), encoding="utf-8")
    assert load_workload(str(path)).arrivals == str(tmp_path / "times.txt")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1\nsoon\n", "line 2: must be a number"),
        ("1\n2\n\n1.5\n", "line 4: must be a number, none below"),
        ("1\ninf\n", "line 2: "),
        ("nan\n1\n", "line 1: "),
        ("1\n", "must hold two different"),
        ("1\n1\n", "must hold two different"),
        ("", "must hold two different"),
    ],
)
def test_what_is_no_time_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "times.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"arrivals: .*times\.txt: {named}"):
        read_arrivals(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arrivals: .*none\.txt: No such file"):
        read_arrivals(tmp_path / "none.txt")
