"""`run-batch --ray`: the reader's blocks, and one batch over a real Ray of one node."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helm_engine.batch.lines import refuse_duplicates
from helm_engine.batch.run import open_input, run_batch
from helm_engine.config import EngineConfig
from tests.helm_engine.batches import (
    line,
    read_answers,
    refusal,
    run,
    scattered_bodies,
)
from tests.toy_models import toy_config, write_toy_model

pytest.importorskip("ray", reason="the extra ray is not installed")

from ray.data.block import BlockAccessor

from helm_engine.batch.ray_answers import read_blocks

NUM_LINES = 600
NUM_KEPT = 100
MAX_BODY_BYTES = 1 << 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch in two forms: two lines are wrong, and two have one custom_id."""
    directory = tmp_path_factory.mktemp("batch")
    bodies: list[Any] = scattered_bodies(NUM_LINES, 40, max_events=24, num_items=60)
    bodies[7] = bodies[470] = {"history": {}}
    ids = [f"line-{number}" for number in range(NUM_LINES)]
    ids[500] = ids[3]
    lines = [line(*one) for one in zip(ids, bodies, strict=True)]
    (directory / "in.jsonl").write_text("\n".join(lines) + "\n\n")
    texts = [json.dumps(body) for body in bodies]
    pq.write_table(pa.table({"custom_id": ids, "body": texts}), directory / "in.parquet")
    return directory


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("first", [1, 65, 100, NUM_LINES])
def test_the_reader_hands_over_every_line_from_the_first_one_on(
    batch: Path, name: str, first: int
) -> None:
    with open_input(batch / name, MAX_BODY_BYTES) as opened:
        wanted = list(refuse_duplicates(opened.lines("salt")))[first - 1 :]
    blocks = list(read_blocks(batch / name, "salt", first, MAX_BODY_BYTES))
    assert len(blocks) == -(-len(wanted) // 64)
    found = [one for block in blocks for one in BlockAccessor.for_block(block).to_numpy()["line"]]
    assert [one.id for one in found] == [one.id for one in wanted]
    assert [one.user for one in found] == [one.user for one in wanted]
    assert all(one.end < later.end for one, later in pairwise(found))
    assert [one.number for one in found if one.error is not None] == [501] * (first <= 501)


def test_a_batch_that_an_earlier_run_began_is_completed_by_two_engines(
    batch: Path, model_dir: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    run_batch(EngineConfig(model_dir), batch / "in.jsonl", whole, lambda *_: None)
    wanted = read_answers(whole)
    target = tmp_path / "out.parquet"
    kept = whole.read_bytes().splitlines(keepends=True)[:NUM_KEPT]
    target.with_name("out.parquet.partial.jsonl").write_bytes(b"".join(kept))
    finished = run(batch / "in.jsonl", target, model_dir, "--ray", "--num-engines", "2")
    assert finished.returncode == 0, finished.stderr
    assert f"{NUM_KEPT} lines were there already" in finished.stderr
    assert finished.stderr.endswith(f"{NUM_LINES - 3} answered, 3 failed\n")
    rows = pq.read_table(target).to_pylist()
    for row, one in zip(rows, wanted, strict=True):
        body = one["response"]["body"]
        assert (row["custom_id"], row["id"]) == (one["custom_id"], one["id"])
        assert (row["status_code"], row["error"]) == (
            one["response"]["status_code"],
            body.get("error"),
        )
        if row["error"] is None:
            scores = [item["score"] for item in body["data"]]
            assert row["scores"] == pytest.approx(scores, abs=1e-5)
            assert sorted(row["item_ids"]) == sorted(item["item_id"] for item in body["data"])


def test_several_engines_need_ray(batch: Path, model_dir: Path, tmp_path: Path) -> None:
    refused = run(batch / "in.jsonl", tmp_path / "out.jsonl", model_dir, "--num-engines", "2")
    assert "num_engines: several need --ray" in refusal(refused)
