"""`run-batch` as a user runs it, on a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helm_engine.batches import HISTORY, line, read_answers, refusal, run
from tests.toy_models import read_reference, toy_config, write_toy_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


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
        line("half a \ud800 pair", good),
        line("user of half a pair", {**good, "user": "\ud800"}),
        line("no body", good),
        line("good again", good),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    done = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model_dir)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("2 answered, 12 failed")

    answers = read_answers(tmp_path / "out.jsonl")
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
        (None, 400),
        ("user of half a pair", 400),
        ("no body", 400),
        ("good again", 200),
    ]
    broken = answers[2]["response"]["body"]["error"]
    assert broken["message"].startswith("line 4: line: is not JSON")
    refused = answers[1]["response"]["body"]["error"]
    assert refused["param"] == "history.item_ids[0]"
    duplicate = answers[-2]["response"]["body"]["error"]
    assert duplicate["message"] == "line 14: custom_id: must be unique, line 7 has the same"
    assert duplicate["param"] == "custom_id"
    want = read_reference(model_dir).scores([3, 1, 4], [10, 20, 30, 30])
    for answer in (answers[0], answers[-1]):
        scores = {item["item_id"]: item["score"] for item in answer["response"]["body"]["data"]}
        assert scores == pytest.approx({5: want[4], 6: want[5]}, abs=1e-5)


def test_more_lines_than_may_wait_are_all_answered(model_dir: Path, tmp_path: Path) -> None:
    bodies = [line(str(n), {"user": f"u{n % 50}", "history": HISTORY}) for n in range(1500)]
    (tmp_path / "in.jsonl").write_text("\n".join(bodies))
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model_dir).returncode == 0
    answers = read_answers(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == [str(n) for n in range(1500)]
    assert {answer["response"]["status_code"] for answer in answers} == {200}


def test_a_line_beyond_the_limit_becomes_an_error_line(model_dir: Path, tmp_path: Path) -> None:
    good = line("good", {"history": HISTORY})
    for end in ("\n", ""):
        long = line("long", "x" * 300_000)
        (tmp_path / "in.jsonl").write_text(f"{good}\n{long}\n{good[:-1]} }}{end}")
        target = tmp_path / f"out{len(end)}.jsonl"
        assert run(tmp_path / "in.jsonl", target, model_dir, "--max-body-bytes", "1KiB").stderr
        statuses = [one["response"]["status_code"] for one in read_answers(target)]
        assert statuses == [200, 400, 400]
        error = read_answers(target)[1]["response"]["body"]["error"]
        assert error["message"] == (
            f"line 2: line: has {len(long) + 1} bytes, the limit is 66560 (1024 for its body)"
        )


def test_an_absent_input_file_is_said_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    message = refusal(run(tmp_path / "absent.jsonl", tmp_path / "out.jsonl", model_dir))
    assert "absent.jsonl" in message
    assert not (tmp_path / "out.jsonl").exists()


def test_an_absent_model_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line("a", {"history": HISTORY}))
    message = refusal(run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "no model"))
    assert "no model" in message
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_is_the_input_is_refused_and_left_alone(
    model_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "both.jsonl"
    source.write_text(line("a", {"history": HISTORY}))
    assert "is the input file" in refusal(run(source, source, model_dir))
    assert source.read_text() == line("a", {"history": HISTORY})


def test_an_output_that_is_no_file_is_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line("a", {"history": HISTORY}))
    message = refusal(run(tmp_path / "in.jsonl", Path("/dev/null"), model_dir))
    assert "/dev/null is not a regular file" in message
    assert str(tmp_path) in refusal(run(tmp_path / "in.jsonl", tmp_path, model_dir))
