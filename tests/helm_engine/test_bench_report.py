"""Figures of `bench`: counted by hand, and shown as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from helm_engine.bench.load import Outcome
from helm_engine.bench.plot import write_plot
from helm_engine.bench.report import Figures, figures_of, remarks_of, table_of, write_json
from helm_engine.entrypoints.cli import app


def outcome(due: float, ended: float, status: str = "200", late: float = 0.0) -> Outcome:
    usage = (100, 60, 40, 10) if status == "200" else (0, 0, 0, 0)
    message = f"{status}: sorry" if status == "429" else ""
    return Outcome(due, due + late, ended, status, message, *usage)


OUTCOMES = [
    outcome(10.0, 10.010),
    outcome(11.0, 11.020),
    outcome(12.0, 12.030),
    outcome(13.0, 13.001, "429"),
    outcome(13.5, 13.501, "429"),
    outcome(13.0, 14.0, "timeout"),
]


def figures(deadline_ms: float | None = None, rate: float | None = 5.0) -> Figures:
    return figures_of(
        OUTCOMES, rate=rate, concurrency=None if rate else 2, deadline_ms=deadline_ms, started=9.0
    )


def test_figures_are_those_counted_by_hand() -> None:
    found = figures(deadline_ms=25.0)
    assert (found.sent, found.ok, found.errors) == (6, 3, {"429": 2, "timeout": 1})
    assert found.seconds == 5.0
    assert found.requests_per_s == pytest.approx(3 / 5)
    assert found.goodput_per_s == pytest.approx(2 / 5)
    assert found.p50_ms == pytest.approx(20.0)
    assert found.p99_ms == pytest.approx(29.8)
    assert found.cached_token_share == pytest.approx(0.6)
    assert found.row_hit_share == pytest.approx(0.25)
    assert found.first_error == "429: sorry"
    assert figures().goodput_per_s == figures().requests_per_s


def test_a_load_of_which_nothing_was_answered_has_no_percentiles() -> None:
    found = figures_of(OUTCOMES[3:], rate=5.0, concurrency=None, deadline_ms=1.0, started=9.0)
    assert (found.p50_ms, found.cached_token_share, found.goodput_per_s) == (None, None, 0.0)


def _shown(runs: list[Figures], deadline_ms: float | None) -> list[str]:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table_of(runs, deadline_ms))
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


def test_the_table_has_a_row_for_each_load() -> None:
    heading, _, first, second = _shown([figures(25.0), figures(25.0, rate=None)], 25.0)
    assert heading == "load sent ok errors req/s goodput p50 ms p95 ms p99 ms cached rows"
    assert first == "5/s 6 3 2 × 429, 1 × timeout 0.6 0.4 20.0 29.0 29.8 60% 25%"
    assert second.startswith("2 at once 6 3 ")
    assert "goodput" not in _shown([figures()], None)[0]


def test_a_late_client_is_remarked() -> None:
    assert remarks_of([figures()]) == ["5/s: 429: sorry"]
    late = figures_of(
        [outcome(0.0, 1.0, late=0.02)], rate=5.0, concurrency=None, deadline_ms=None, started=0.0
    )
    (remark,) = remarks_of([late])
    assert "20.0 ms late" in remark


def test_json_holds_all_figures(tmp_path: Path) -> None:
    write_json(tmp_path / "load.json", {"model": "toy"}, [figures(25.0)])
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["model"] == "toy"
    assert result["runs"][0].keys() == set(Figures.__dataclass_fields__)


def test_a_plot_is_drawn_also_where_nothing_was_answered(tmp_path: Path) -> None:
    empty = figures_of(OUTCOMES[3:], rate=9.0, concurrency=None, deadline_ms=25.0, started=9.0)
    for name, magic in (("load.png", b"\x89PNG"), ("load.svg", b"<?xml")):
        write_plot(tmp_path / name, [empty, figures(25.0)], "toy", 25.0)
        assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rate", "5", "--concurrency", "2"], "--rate: is the open loop"),
        (["--requests", "5", "--duration", "2"], "--requests: says how long"),
        (["--rate", "0"], "--rate: "),
        (["--plot", "load.txt"], "--plot: load.txt: must end with one of"),
        (["--plot", "no/such/load.png"], "--plot: no/such/load.png: cannot be written there"),
        (["--json", "."], "--json: .: cannot be written there"),
        (["--candidates", "-1"], "--candidates: "),
        ([], "http://127.0.0.1:9: cannot be reached"),
    ],
)
def test_errors_are_one_line(arguments: list[str], expected: str) -> None:
    done = CliRunner().invoke(app, ["bench", "http://127.0.0.1:9", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"helm-engine: error: {expected}")


@pytest.mark.parametrize(
    ("module", "arguments"), [("aiohttp", []), ("matplotlib", ["--plot", "load.png"])]
)
def test_a_missing_library_names_the_extra(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "helm_engine.entrypoints.bench.find_spec", lambda name: None if name == module else name
    )
    done = CliRunner().invoke(app, ["bench", "http://127.0.0.1:9", *arguments])
    assert done.exit_code == 2
    assert f"{module} is not installed; pip install 'helm-engine[bench]'" in done.stderr
