"""A short storm: the queue stays bounded, refusals say so, and afterwards all is as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.running_server import BUNDLED_MODEL, REPOSITORY, running_server


def test_a_storm_is_refused_and_leaves_a_server_that_answers(tmp_path: Path) -> None:
    result = tmp_path / "overload.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/overload.py", "--quick", "--json", str(result)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    # It checks statuses, Retry-After, the queue, the time after the storm and the exit status.
    assert done.returncode == 0, done.stderr
    figures = json.loads(result.read_text())
    assert figures["problems"] == []
    assert 0 < figures["most_waiting"] <= figures["limit"]
    (run,) = figures["runs"]
    assert len(run["sweep"]) == 2
    assert len(run["rounds"]) == 2
    for one in run["rounds"]:
        storm = one["overload"]
        assert storm["statuses"].keys() <= {"200", "429", "504"}
        assert storm["statuses"]["429"] > 0


def test_requests_of_one_body_beyond_the_limit_are_refused_each_on_its_own() -> None:
    flags = ("--max-num-seqs", "1", "--max-num-waiting", "2")
    one = {"history": {"item_ids": [50, 172], "timestamps": [100, 160]}}
    with running_server(BUNDLED_MODEL, *flags) as server:
        for _ in range(2):  # The first body gave back all that it held.
            answer = server.post({"requests": [one] * 5})
            assert answer.status_code == 200
            data = answer.json()["data"]
            assert [item.get("error", {}).get("code") for item in data] == [None] * 3 + [429] * 2
        assert server.post(one).status_code == 200
        assert server.stop() == 0
