"""The exactness gate while the boundary moves: pages change hands under running requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helm_engine.clock import SystemClock
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.exceptions import HelmError
from helm_engine.protocol import parse_request
from model_executor.checkpoint import load_config, map_tables
from model_executor.host_store import MemoryMappedTables
from tests.helm_engine.clients import Client
from tests.helm_engine.served import TOLERANCE, Served, largest_error, serve
from tests.reference import load_reference
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model

NUM_USERS = 7
NUM_ROUNDS = 10
NUM_ITEMS = 400


def unsettle(served: Served, steps: int) -> None:
    """Makes somebody ask for another split every few steps, while requests run."""
    core = served.recommender.engine.core
    step, taken = core.step, 0

    def unsettled_step() -> Any:
        nonlocal taken
        if taken % steps == 0:
            core.set_target(0.9 if taken // steps % 2 else 0.1)
        taken += 1
        return step()

    core.step = unsettled_step  # type: ignore[method-assign]


def visits(served: Served, seed: int) -> list[list[dict[str, Any]]]:
    """Rounds of users who come back with a few events more."""
    rng = np.random.default_rng(seed)
    clients = [Client(served.config, seed + n, user=f"u{n}") for n in range(NUM_USERS)]
    rounds = []
    for _ in range(NUM_ROUNDS):
        for client in clients:
            client.grow(int(rng.integers(4)) if len(client) else 8)
        rounds.append([client.request(client.candidates(12)) for client in clients])
    return rounds


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_scores_are_exact_while_the_boundary_swings(
    dialect: str, steps: int, tmp_path: Path
) -> None:
    config = toy_config(dialect, num_items=NUM_ITEMS)
    engine: dict[str, Any] = {"num_pages": 60, "max_num_batched_tokens": 80}
    moving = serve(tmp_path, config, emb_fraction=0.5, max_pages_per_step=9, **engine)
    unsettle(moving, steps)
    for bodies in visits(moving, seed=steps):
        moving.ask_all(bodies)  # Each answer against the reference; an error would be raised.
    boundary = moving.scheduler.boundary
    assert boundary.num_moved_pages > 100
    if steps > 1:  # A boundary that turns at every step moves pages that nobody has used yet.
        assert boundary.num_moved_rows > 0
    assert moving.scheduler.stats.row_hits > 0
    if moving.recommender.engine.served.capabilities.cross_request_reuse.value:
        assert moving.scheduler.stats.prefix_hits > 0


def test_an_engine_whose_boundary_swings_answers_as_one_whose_boundary_stands(
    tmp_path: Path,
) -> None:
    config = toy_config("research", num_items=NUM_ITEMS)
    answers = []
    for name in ("still", "moving"):
        served = serve(tmp_path / name, config, num_pages=60, max_pages_per_step=9)
        if name == "moving":
            unsettle(served, steps=2)
        bodies = [body for one_round in visits(served, seed=5) for body in one_round]
        answers.append(served.recommender.recommend_batch(bodies))
        assert (served.scheduler.boundary.num_moved_pages > 0) == (name == "moving")
    for still, moved in zip(*answers, strict=True):
        scores = [{one.index: one.score for one in answer.data} for answer in (still, moved)]
        assert scores[0] == pytest.approx(scores[1], rel=TOLERANCE, abs=TOLERANCE)


def test_copies_that_are_not_made_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config("research", num_items=NUM_ITEMS)
    served = serve(tmp_path, config, num_pages=60, max_pages_per_step=9)
    monkeypatch.setattr(served.recommender.engine.runner.arena.rows, "move", lambda *_: None)
    unsettle(served, steps=4)
    with pytest.raises((AssertionError, HelmError)):
        for bodies in visits(served, seed=4):
            served.ask_all(bodies)


# ---------------------------------------------------------------- what a move reads of the host


class CountingStore:
    """A host tier that remembers which rows were read."""

    def __init__(self, store: MemoryMappedTables) -> None:
        self._store = store
        self.num_rows = store.num_rows
        self.read: set[int] = set()

    def read_rows(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.read |= set(row_ids.tolist())
        return self._store.read_rows(row_ids)


def ask(engine: LoadedEngine, body: dict[str, Any], name: str) -> npt.NDArray[np.float64]:
    request = engine.processor.process(parse_request(body), name, now=0.0).request
    engine.core.add_request(request)
    engine.core.run_until_idle()
    assert request.error is None and request.scores is not None
    return request.scores.astype(np.float64)


def body_of(items: list[int], user: str) -> dict[str, Any]:
    history = {"item_ids": items[:8], "timestamps": list(range(len(items[:8])))}
    return {"user": user, "history": history, "candidates": {"item_ids": items}}


def test_giving_pages_to_kv_reads_nothing_of_the_host_and_rows_that_moved_are_read_no_more(
    tmp_path: Path,
) -> None:
    path = write_toy_model(tmp_path / "toy", toy_config("research", num_items=3000))
    store = CountingStore(MemoryMappedTables(map_tables(path, load_config(path))))
    engine = load_engine(
        toy_engine_config(path, num_pages=60, emb_fraction=0.6), SystemClock(), store
    )
    emb = engine.core.scheduler.emb
    # Rows of pages in turn are hot and cold, so that hot ones are on pages that leave.
    items = np.arange(1, 1 + emb.num_slots)
    for first in range(0, len(items), 40):
        ask(engine, body_of(items[first : first + 40].tolist(), "all"), f"all-{first}")
    hot = items[::7]
    for number in range(4):
        for first in range(0, len(hot), 40):
            some = hot[first : first + 40].tolist()
            ask(engine, body_of(some, f"hot-{number}"), f"hot-{number}-{first}")
    before = emb.lookup(np.arange(emb.num_rows))
    store.read.clear()

    engine.core.set_target(0.2)
    for _ in range(1000):
        if not engine.core.has_background_work:
            break
        engine.core.step()
    assert engine.core.scheduler.boundary.lag_pages == 0
    assert store.read == set()
    after = emb.lookup(np.arange(emb.num_rows))
    moved = np.flatnonzero((after != before) & (after >= 0))
    assert len(np.intersect1d(moved, hot)) > 10
    assert (before[hot] >= 0).all() and (after[hot] >= 0).all()

    reference = load_reference(path)
    for first in range(0, len(moved), 40):
        body = body_of(moved[first : first + 40].tolist(), "new")
        assert largest_error(ask(engine, body, f"new-{first}"), reference.answer(body)) <= TOLERANCE
    assert store.read == set()
