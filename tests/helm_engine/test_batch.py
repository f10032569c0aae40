"""`run-batch` as a user runs it, on a toy model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running_server import command
from tests.toy_models import read_reference, toy_config, write_toy_model

HISTORY = {"item_ids": [3, 1, 4], "timestamps": [10, 20, 30]}


def line(custom_id: str, body: Any, **changes: Any) -> str:
    """One OpenAI batch line."""
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/recommend", "body": body}
    return json.dumps({**fields, **changes})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


def run(model_dir: Path, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        command("run-batch", "-i", str(source), "-o", str(target), "--model", str(model_dir)),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_line_is_answered_in_order_and_bad_ones_become_error_lines(
    model_dir: Path, tmp_path: Path
) -> None:
    good = {"user": "u", "history": HISTORY, "candidates": {"item_ids": [5, 6]}}
    lines = [
        line("good", good),
        "",
        line("unknown item", {"history": {"item_ids": [999], "timestamps": [1]}}),
        "{broken",
        "[1, 2]",
        "[" * 100_000,
        line("no body", None),
        line("wrong url", good, url="/v1/embeddings"),
        line("wrong method", good, method="GET"),
        line("arrays", good, method=[1, 2], url=[]),
        json.dumps({"custom_id": 7}),
        line("good again", good),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    done = run(model_dir, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("2 answered, 9 failed")

    answers = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(a["custom_id"], a["response"]["status_code"]) for a in answers] == [
        ("good", 200),
        ("unknown item", 400),
        (None, 400),
        (None, 400),
        (None, 400),
        ("no body", 400),
        ("wrong url", 400),
        ("wrong method", 400),
        ("arrays", 400),
        (None, 400),
        ("good again", 200),
    ]
    broken = answers[2]["response"]["body"]["error"]
    assert broken["message"].startswith("line 4: line: is not JSON")
    refused = answers[1]["response"]["body"]["error"]
    assert refused["param"] == "history.item_ids[0]"
    want = read_reference(model_dir).scores([3, 1, 4], [10, 20, 30, 30])
    for answer in (answers[0], answers[-1]):
        scores = {item["item_id"]: item["score"] for item in answer["response"]["body"]["data"]}
        assert scores == pytest.approx({5: want[4], 6: want[5]}, abs=1e-5)


def test_more_lines_than_may_wait_are_all_answered(model_dir: Path, tmp_path: Path) -> None:
    bodies = [line(str(n), {"user": f"u{n % 50}", "history": HISTORY}) for n in range(1500)]
    (tmp_path / "in.jsonl").write_text("\n".join(bodies))
    assert run(model_dir, tmp_path / "in.jsonl", tmp_path / "out.jsonl").returncode == 0
    answers = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [str(n) for n in range(1500)]
    assert {answer["response"]["status_code"] for answer in answers} == {200}


def test_an_absent_input_file_is_said_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    done = run(model_dir, tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 2
    (message,) = done.stderr.strip().splitlines()
    assert "absent.jsonl" in message


def test_an_output_that_is_the_input_is_refused_and_left_alone(
    model_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "both.jsonl"
    source.write_text(line("a", {"history": HISTORY}))
    done = run(model_dir, source, source)
    assert done.returncode == 2
    assert "is the input file" in done.stderr
    assert source.read_text() == line("a", {"history": HISTORY})
