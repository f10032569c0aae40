"""A result file to which runs add their parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.parts_file import add_records, add_speeds, read_earlier


def test_a_run_replaces_its_own_record_and_leaves_the_others() -> None:
    figures: dict[str, Any] = {"cells": [{"seed": 2, "p99": 5.0}, {"seed": 1, "p99": 7.0}]}
    add_records(figures, "cells", [{"seed": 1, "p99": 6.0}, {"seed": 3, "p99": 1.0}], ["seed"])
    assert [(one["seed"], one["p99"]) for one in figures["cells"]] == [(1, 6.0), (2, 5.0), (3, 1.0)]


def test_lines_of_a_trace_that_were_not_drawn_anew_stay() -> None:
    figures: dict[str, Any] = {}
    add_records(figures, "traces", [{"seed": 1, "lines": {"old": [1], "helm": [2]}}], ["seed"])
    add_records(figures, "traces", [{"seed": 1, "lines": {"helm": [3]}}], ["seed"])
    assert figures["traces"] == [{"seed": 1, "lines": {"old": [1], "helm": [3]}}]


def test_speeds_of_all_runs_make_one_median() -> None:
    figures: dict[str, Any] = {}
    add_speeds(figures, {1: [10.0, 20.0]})
    add_speeds(figures, {1: [90.4], 16: [5.0]})
    assert figures["simulated_requests_per_s"] == {"1": 20.0, "16": 5.0}
    assert figures["simulated_requests_per_s_of_runs"] == {"1": [10, 20, 90], "16": [5]}


def test_a_file_is_gone_on_with_but_for_what_is_said_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert read_earlier(path) == {"commands": [], "cells": []}
    path.write_text(json.dumps({"command": "a", "machine": {}, "commands": ["a"], "cells": [1]}))
    assert read_earlier(path) == {"commands": ["a"], "cells": [1]}
