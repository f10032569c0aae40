"""Steps replayed from recordings give the scores of eager steps, before and after pages moved."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from helm_engine.clock import VirtualClock
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.protocol import parse_request
from helm_engine.sample_request import sample_request
from model_executor.attention.padded import TorchPaddedAttention
from model_executor.padded_step import StepBucket
from model_executor.step import CandidateScoring, ScheduledRequest
from model_executor.step_graphs import StepGraphs, usual_buckets
from tests.model_executor.recorded_work import RecordedWork
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

GATE = 1e-5
LENGTHS = (10, 9, 18)
"""Of histories, so that each dialect has full blocks once, and one row beyond full blocks once."""


def load(directory: Path, dialect: str, emb_fraction: float = 0.3) -> LoadedEngine:
    config = toy_engine_config(directory, max_num_batched_tokens=100)
    config = replace(
        config,
        pool=replace(config.pool, emb_fraction=emb_fraction),
        poison_freed_memory=True,
    )
    return load_engine(config, VirtualClock())


def add_graphs(engine: LoadedEngine, buckets: list[StepBucket]) -> RecordedWork:
    runner, recorded = engine.runner, RecordedWork()
    runner.graphs = StepGraphs(
        runner.model, runner.arena.kv, TorchPaddedAttention(), recorded, buckets
    )
    runner.arena.poison()
    return recorded


_numbers = count()


def scores(
    engine: LoadedEngine, users: list[tuple[str, list[int]]], candidates: list[int]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Each user's candidates, in one step where they fit it."""
    requests = []
    for user, items in users:
        body = sample_request(
            engine.served.model_config, items, list(range(len(items))), candidates
        )
        body["user"] = user
        name = f"request-{next(_numbers)}"
        requests.append(engine.processor.process(parse_request(body), name, 0.0).request)
        engine.core.add_request(requests[-1])
    engine.core.run_until_idle()
    engine.core.check_integrity()
    assert all(one.error is None for one in requests)
    found = [one.scores for one in requests if one.scores is not None]
    assert len(found) == len(requests)
    return np.stack([one.ravel() for one in found]).astype(float)


def buckets_of(engine: LoadedEngine) -> list[StepBucket]:
    tokens = engine.served.layout.block_tokens
    most = engine.served.model_config.max_context_tokens
    longest = -(-most // tokens)
    if engine.served.model_config.candidates_in_sequence:
        return [StepBucket(2, rows, 7, longest) for rows in (0, most)]
    return [StepBucket(2, rows, 0, longest) for rows in (1, most)]


@pytest.mark.parametrize("dialect", ["stu", "nvidia", "sasrec"])
def test_replayed_steps_score_as_eager_ones_while_pages_move(dialect: str, tmp_path: Path) -> None:
    write_toy_model(tmp_path, toy_config(dialect))
    eager, graphed = load(tmp_path, dialect), load(tmp_path, dialect)
    recorded = add_graphs(graphed, buckets_of(graphed))
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 60, 24).tolist() for _ in range(3)]
    address = graphed.runner.arena._storage.data_ptr()
    for turn, length in enumerate(LENGTHS):
        # All that can move does, to and fro.
        for engine in (eager, graphed):
            engine.core.set_target((0.9, 0.1)[turn % 2])
            while engine.core.scheduler.boundary.lag_pages:
                engine.core.step()
        moved = graphed.core.scheduler.boundary.num_moved_pages
        assert moved > 0
        for first in (0, 0, 1):  # The second time all is cached.
            users = [(f"user-{n}", histories[n][:length]) for n in (first, (first + 1) % 3)]
            users = users[: 1 + turn % 2]
            candidates = rng.integers(1, 60, 1 + turn).tolist()
            want = scores(eager, users, candidates)
            found = scores(graphed, users, candidates)
            assert np.abs(found - want).max() <= GATE * max(1.0, np.abs(want).max())
    assert all(recorded.replays)
    assert graphed.runner.arena._storage.data_ptr() == address
    for engine in (eager, graphed):
        engine.close()


def test_what_fits_no_bucket_is_computed_eagerly(tmp_path: Path) -> None:
    write_toy_model(tmp_path, toy_config("stu"))
    eager, graphed = load(tmp_path, "stu"), load(tmp_path, "stu")
    recorded = add_graphs(graphed, [StepBucket(1, 0, 3, 1)])
    users = [("a", list(range(1, 20)))]
    np.testing.assert_array_equal(scores(graphed, users, [4, 5]), scores(eager, users, [4, 5]))
    assert recorded.replays == [0]
    eager.close()
    graphed.close()


def request(num_rows: int, blocks: int, candidates: int) -> ScheduledRequest:
    task = CandidateScoring(np.arange(candidates), np.zeros((candidates, 1), dtype=np.int64))
    return ScheduledRequest(
        "r",
        4 * blocks - num_rows,
        np.arange(num_rows),
        np.arange(blocks),
        np.zeros((1, 1), dtype=np.int64),
        task,
    )


@pytest.mark.parametrize(
    ("requests", "fits"),
    [
        ([request(0, 2, 5)], False),
        ([request(1, 2, 5)], True),
        ([request(3, 4, 5), request(2, 1, 0)], True),
        ([request(3, 4, 5), request(0, 1, 0)], False),
        ([request(4, 4, 5)], False),
        ([request(3, 5, 5)], False),
        ([request(3, 4, 6)], False),
        ([request(1, 1, 1)] * 3, False),
        ([request(1, 0, 1)], False),
    ],
)
def test_a_step_fits_a_bucket_in_every_number(requests: list[ScheduledRequest], fits: bool) -> None:
    assert StepBucket(2, 3, 5, 4).fits(requests, candidates_in_sequence=True) is fits


def test_the_smallest_bucket_is_found(tmp_path: Path) -> None:
    write_toy_model(tmp_path, toy_config("stu"))
    engine = load(tmp_path, "stu")
    buckets = [StepBucket(1, 0, 7, 5), StepBucket(2, 0, 7, 5), StepBucket(1, 0, 3, 2)]
    add_graphs(engine, buckets)
    graphs = engine.runner.graphs
    assert graphs is not None
    assert graphs.find([request(0, 2, 3)]) == buckets[2]
    assert graphs.find([request(0, 3, 3)]) == buckets[0]
    assert graphs.find([request(0, 1, 1)] * 2) == buckets[1]
    assert graphs.find([request(0, 1, 8)]) is None
    engine.close()


def test_the_ledger_counts_graphs_and_their_inputs(tmp_path: Path) -> None:
    write_toy_model(tmp_path, toy_config("stu"))
    engine = load(tmp_path, "stu")
    before = engine.runner.memory
    assert before.graphs == 0
    add_graphs(engine, [StepBucket(2, 3, 5, 4)])
    x = 2 * (3 + 5) * 12 * 4
    numbers = (2 * 4 + 2 + 3 * 2 * 3 + 2 * (3 + 5)) * 8
    assert engine.runner.memory.graphs == 1000 + x + numbers
    assert engine.runner.memory.total == before.total + 1000 + x + numbers
    engine.close()


def test_usual_buckets_are_within_a_step_and_none_for_models_with_pair_bias(tmp_path: Path) -> None:
    attention = TorchPaddedAttention()
    for dialect in ("stu", "nvidia", "sasrec", "research"):
        write_toy_model(tmp_path / dialect, toy_config(dialect))
        engine = load(tmp_path / dialect, dialect)
        buckets = usual_buckets(engine.runner.model, attention, 4, 600)
        assert bool(buckets) is (dialect != "research")
        assert all(one.num_tokens <= 600 for one in buckets)
        assert len(set(buckets)) == len(buckets)
        longest = engine.served.model_config.max_context_tokens
        if buckets:
            assert max(one.blocks for one in buckets) * 4 >= longest
        engine.close()
    assert not torch.cuda.is_initialized()
