"""`run-batch` from and to Parquet, against the same batch as JSON lines."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helm_engine.batch import parquet_output
from helm_engine.batch.journal import open_journal
from helm_engine.batch.parquet_input import ParquetInput
from helm_engine.batch.resume import BatchCount
from helm_engine.batch.run import run_batch
from helm_engine.config import EngineConfig
from tests.helm_engine.batches import (
    HISTORY,
    assert_same_answers,
    line,
    read_answers,
    refusal,
    run,
    scattered_bodies,
)
from tests.toy_models import toy_config, write_toy_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    """Requests of which two are wrong, one retrieves with nothing optional, one has candidates."""
    made: list[dict[str, Any]] = scattered_bodies(60, 10, max_events=20, num_items=60)
    made[3] = {"history": {"item_ids": [999], "timestamps": [1]}}
    made[4] = {"history": HISTORY, "top_k": -1}
    made[5] = {"history": HISTORY}
    made[6] = {"history": HISTORY, "candidates": {"item_ids": [5, 6, 5]}, "exclude_history": True}
    return made


@pytest.fixture(scope="module")
def done(
    bodies: list[dict[str, Any]], model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The batch in three forms, and its answers as JSON lines."""
    directory = tmp_path_factory.mktemp("done")
    ids = [f"line-{number}" for number in range(len(bodies))]
    lines = "\n".join(line(*one) for one in zip(ids, bodies, strict=True))
    (directory / "in.jsonl").write_text(lines)
    rows = [{"custom_id": name, **body} for name, body in zip(ids, bodies, strict=True)]
    columns = {key: [row.get(key) for row in rows] for key in {k: 0 for row in rows for k in row}}
    pq.write_table(pa.table(columns), directory / "fields.parquet", row_group_size=25)
    texts = [json.dumps(body) for body in bodies]
    pq.write_table(pa.table({"custom_id": ids, "body": texts}), directory / "body.parquet")
    finished = run(directory / "in.jsonl", directory / "out.jsonl", model_dir)
    assert finished.returncode == 0, finished.stderr
    return directory


def answer(config: Path, source: Path, target: Path) -> BatchCount:
    """The batch within this process."""
    return run_batch(EngineConfig(config), source, target, lambda *_: None)


def without_line_ids(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids differ with the form that a line came in."""
    return [{**one, "id": None} for one in answers]


@pytest.mark.parametrize("form", ["fields.parquet", "body.parquet"])
def test_a_table_is_answered_as_its_lines_are(
    form: str, done: Path, model_dir: Path, tmp_path: Path
) -> None:
    count = answer(model_dir, done / form, tmp_path / "out.jsonl")
    assert (count.succeeded, count.failed) == (58, 2)
    found, wanted = read_answers(tmp_path / "out.jsonl"), read_answers(done / "out.jsonl")
    assert_same_answers(without_line_ids(found), without_line_ids(wanted))


def test_a_table_of_answers_holds_what_the_lines_hold(
    done: Path, model_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.parquet"
    finished = run(done / "in.jsonl", target, model_dir)
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    table = pq.read_table(target)
    assert table.schema.equals(parquet_output.SCHEMA)
    wanted = read_answers(done / "out.jsonl")
    assert table.num_rows == len(wanted)
    for row, one in zip(table.to_pylist(), wanted, strict=True):
        body = one["response"]["body"]
        assert row["custom_id"] == one["custom_id"]
        assert row["id"] == one["id"]
        assert row["status_code"] == one["response"]["status_code"]
        assert row["error"] == body.get("error")
        assert row["task_scores"] is None
        if row["status_code"] != 200:
            assert row["item_ids"] is row["scores"] is row["usage"] is None
            continue
        assert row["item_ids"] == [item["item_id"] for item in body["data"]]
        assert row["scores"] == pytest.approx([item["score"] for item in body["data"]], abs=1e-5)
        timings = row["usage"].pop("timings_ms")
        assert timings.keys() == body["usage"].pop("timings_ms").keys()
        assert None not in timings.values()
        cached = ("cached_tokens", "rows_resident")
        assert {key: row["usage"][key] for key in row["usage"] if key not in cached} == {
            key: body["usage"][key] for key in body["usage"] if key not in cached
        }
        assert row["usage"].keys() == body["usage"].keys()


def test_scores_of_tasks_are_lists_by_task(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "nvidia", toy_config("nvidia"))
    history = {"item_ids": [3, 1, 4], "actions": [1, 2, 3]}
    candidates = {"item_ids": [5, 6, 7]}
    table = pa.table(
        {"custom_id": ["a"], "history": [history], "candidates": [candidates], "top_k": [2]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    assert answer(model, tmp_path / "in.parquet", tmp_path / "out.jsonl").succeeded == 1
    assert answer(model, tmp_path / "in.parquet", tmp_path / "out.parquet").succeeded == 1
    (wanted,) = read_answers(tmp_path / "out.jsonl")
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist(maps_as_pydicts="strict")
    data = wanted["response"]["body"]["data"]
    assert row["item_ids"] == [item["item_id"] for item in data]
    assert list(row["task_scores"]) == ["click", "like"]
    for task, scores in row["task_scores"].items():
        assert scores == pytest.approx([item["task_scores"][task] for item in data], abs=1e-5)
    assert row["scores"] == row["task_scores"]["like"]


def test_a_table_that_was_begun_is_completed(done: Path, model_dir: Path, tmp_path: Path) -> None:
    """A full disk: first for the lines beside the table, then for the table itself."""
    target, journal = tmp_path / "out.parquet", tmp_path / "out.parquet.partial.jsonl"
    limit = (done / "out.jsonl").stat().st_size // 2
    full = run(done / "in.jsonl", target, model_dir, "--log-level", "warning", max_file_bytes=limit)
    assert "out.parquet.partial.jsonl: File too large" in refusal(full)
    assert not target.exists()
    begun = journal.read_bytes()
    assert begun.endswith(b"\n")

    # All lines are answered and the process dies before the table is made.
    journal.write_bytes((done / "out.jsonl").read_bytes())
    full = run(done / "in.jsonl", target, model_dir, max_file_bytes=2000)
    assert "out.parquet: File too large" in refusal(full)
    assert [path.name for path in tmp_path.iterdir()] == [journal.name]

    journal.write_bytes(begun)
    finished = run(done / "in.jsonl", target, model_dir)
    assert f"{len(begun.splitlines())} lines were there already" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    wanted = read_answers(done / "out.jsonl")
    assert pq.read_table(target)["id"].to_pylist() == [one["id"] for one in wanted]


def test_a_finished_table_stays_as_it_is(done: Path, model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    answer(model_dir, done / "in.jsonl", target)
    before = target.read_bytes()
    count = answer(model_dir, done / "in.jsonl", target)
    assert (count.succeeded, count.failed, count.kept) == (58, 2, 60)
    lines = (done / "in.jsonl").read_text().splitlines()
    (tmp_path / "less.jsonl").write_text("\n".join(lines[:-1]))
    (tmp_path / "more.jsonl").write_text("\n".join([*lines, line("more", {})]))
    (tmp_path / "other.jsonl").write_text("\n".join([line("x", {}), *lines[1:]]))
    for other, problem in (
        ("less", "line 60 is beyond the last input line"),
        ("more", "line 61 is missing, the answer to input line 61"),
        ("other", "line 1 answers custom_id 'line-0', input line 1 has 'x'"),
    ):
        with pytest.raises(ValueError, match=problem):
            answer(model_dir, tmp_path / f"{other}.jsonl", target)
        assert target.read_bytes() == before
        assert not (tmp_path / "out.parquet.partial.jsonl").exists()


@pytest.mark.parametrize("content", [b"no table", b""])
def test_a_table_that_is_none_is_refused(
    content: bytes, done: Path, model_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.parquet: line 1 is no answer of a batch"):
        answer(model_dir, done / "in.jsonl", broken)
    with pytest.raises(ValueError, match=r"input: .*broken\.parquet: "):
        answer(model_dir, broken, tmp_path / "out.jsonl")
    assert broken.read_bytes() == content


def test_a_damaged_table_is_refused(done: Path, model_dir: Path, tmp_path: Path) -> None:
    content = bytearray((done / "body.parquet").read_bytes())
    content[4:400] = bytes(396)
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"input: .*in\.parquet: cannot be read: "):
        answer(model_dir, tmp_path / "in.parquet", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"user": ["u"]}, "column custom_id: is missing, the columns are user"),
        ({"custom_id": [1], "body": ["{}"]}, "column custom_id: must be string, not int64"),
        ({"custom_id": ["a"], "body": [{"x": 1}]}, "column body: must be string, not struct"),
        ({"custom_id": ["a"], "histroy": [1]}, "column histroy: does not belong here"),
        ({"custom_id": ["a"], "body": ["{}"], "user": ["u"]}, "column user: does not belong here"),
        (
            {
                "custom_id": ["a"],
                "history": [{"item_ids": [1], "timestamps": [np.datetime64(1, "s")]}],
            },
            r"column history\.timestamps: of type timestamp",
        ),
    ],
)
def test_a_column_that_does_not_belong_is_named(
    columns: dict[str, list[Any]], problem: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=rf"in\.parquet: {problem}"):
        ParquetInput(tmp_path / "in.parquet", 1 << 20)


def test_what_is_wrong_with_a_row_comes_in_its_place(tmp_path: Path) -> None:
    table = pa.table(
        {
            "custom_id": ["a", None, "c", "d", "e"],
            "body": ["{}", "{}", None, '{}, "custom_id": "x"', "x" * 2000],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    with ParquetInput(tmp_path / "in.parquet", 1000) as batch:
        lines = list(batch.lines("model"))
    assert batch.size == 5
    assert [one.custom_id for one in lines] == ["a", None, "c", "d", "e"]
    assert [one.error and one.error.param for one in lines] == [
        None,
        "custom_id",
        *(3 * ["body"]),
    ]
    assert len({one.id for one in lines}) == 5


def test_maps_are_objects_and_nulls_are_absent(tmp_path: Path) -> None:
    table = pa.table(
        {
            "custom_id": ["a", "b"],
            "history": [{"item_ids": [1], "actions": None}, {"item_ids": [1], "actions": [2]}],
            "context": pa.array([[("device", 1)], None], pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    with ParquetInput(tmp_path / "in.parquet", 1 << 20) as batch:
        first, second = (one.body for one in batch.lines("model"))
    assert first["history"].keys() == {"item_ids"}
    assert first["context"] == {"device": 1}
    assert second.keys() == {"history"}
    assert second["history"]["actions"].tolist() == [2]


def test_a_table_is_read_no_further_than_asked(tmp_path: Path) -> None:
    table = pa.table({"custom_id": [str(n) for n in range(5000)], "body": ["{}"] * 5000})
    pq.write_table(table, tmp_path / "in.parquet")
    with ParquetInput(tmp_path / "in.parquet", 1 << 20) as batch:
        rows = batch.lines("model")
        ends = [next(rows).end for _ in range(20)]
    assert ends == list(range(1, 21))


def test_without_pyarrow_the_extra_is_named(
    done: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source, target in (("in.jsonl", "out.parquet"), ("body.parquet", "out.jsonl")):
        with pytest.raises(ValueError, match=r"helm-engine\[parquet\]"):
            answer(model_dir, done / source, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_a_journal_that_its_owner_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may end, and remove its journal, between our opening it and our locking it."""
    path = tmp_path / "journal"
    path.write_text("of the other run\n")
    lock = fcntl.flock

    def ended_in_between(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ended_in_between)
    with open_journal(path) as journal:
        assert list(journal.lines()) == []
        journal.append(b"ours\n")
    assert path.read_text() == "ours\n"
