"""The exactness gate: whatever is cached, chunked, split or batched, the scores are the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block_manager.block_hash import hash_blocks, root_hash
from helm_engine.protocol import Recommendation
from helm_engine.recommender import Recommender
from helm_engine.request import Request, ReuseBlocked
from tests.reference_hstu import ReferenceHSTU
from tests.toy_models import read_reference, toy_config, toy_engine_config, write_toy_model

TOLERANCE = 1e-5
BREAKS = 1e-3
ALL_ITEMS = list(range(1, 61))


def largest_difference(answer: Recommendation, want: np.ndarray[Any, Any]) -> float:
    """Largest |a - b| / max(1, |a|) over an answer's items; `want` holds items 1..num_items."""
    assert answer.data
    expected = np.array([want[item.item_id - 1] for item in answer.data])
    got = np.array([item.score for item in answer.data])
    return float(np.max(np.abs(got - expected) / np.maximum(1.0, np.abs(expected))))


def body(items: list[int], times: list[int], **fields: Any) -> dict[str, Any]:
    """A request that scores every item."""
    return {
        "history": {"item_ids": items, "timestamps": times},
        "candidates": {"item_ids": ALL_ITEMS},
        **fields,
    }


def random_history(
    rng: np.random.Generator, length: int, last: int = 200_000
) -> tuple[list[int], list[int]]:
    """Item ids and times, some of them equal."""
    times = np.sort(rng.integers(0, last, length) // 50 * 50)
    return rng.integers(1, 61, length).tolist(), times.tolist()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> ReferenceHSTU:
    """The slow reference of that model."""
    return read_reference(model_dir)


@pytest.fixture
def recommender(model_dir: Path) -> Iterator[Recommender]:
    """An engine over few pages, checked afterwards."""
    made = Recommender.from_config(toy_engine_config(model_dir))
    yield made
    made.engine.core.check_integrity()


def test_cold_scores_equal_the_reference(
    recommender: Recommender, reference: ReferenceHSTU
) -> None:
    items, times = random_history(np.random.default_rng(1), 24)
    answer = recommender.recommend(body(items, times, request_time=times[-1] + 77))
    want = reference.scores(items, [*times, times[-1] + 77])
    assert largest_difference(answer, want) <= TOLERANCE


def test_a_returning_user_reuses_kv_and_gets_the_same_scores(
    recommender: Recommender, reference: ReferenceHSTU
) -> None:
    items, times = random_history(np.random.default_rng(2), 24)
    for length in (13, 14, 19, 24):
        answer = recommender.recommend(body(items[:length], times[:length], user="u"))
        want = reference.scores(items[:length], [*times[:length], times[length - 1]])
        assert largest_difference(answer, want) <= TOLERANCE
    # All full blocks of four rows that lie before the last row of the history of 19.
    assert answer.usage.cached_tokens == 16


@pytest.mark.parametrize("budget", [2, 3, 5, 11])
def test_chunks_and_micro_batches_change_no_score(
    model_dir: Path, reference: ReferenceHSTU, budget: int
) -> None:
    recommender = Recommender.from_config(
        toy_engine_config(model_dir, max_num_batched_tokens=budget)
    )
    items, times = random_history(np.random.default_rng(budget), 23)
    answer = recommender.recommend(body(items, times, request_time=times[-1] + 5))
    assert recommender.engine.core.scheduler.stats.steps >= (23 + 60) // budget
    assert largest_difference(answer, reference.scores(items, [*times, times[-1] + 5])) <= TOLERANCE
    recommender.engine.core.check_integrity()


@st.composite
def _scenario(draw: st.DrawFn) -> dict[str, Any]:
    """A random model shape, pool, budget and stream of growing histories."""
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "model": {
            "num_layers": draw(st.integers(1, 4)),
            "num_heads": draw(st.integers(1, 3)),
            "embedding_dim": draw(st.sampled_from([5, 8, 12])),
            "dqk": draw(st.integers(1, 6)),
            "dv": draw(st.integers(1, 6)),
        },
        "engine": {
            "num_pages": draw(st.integers(14, 40)),
            "emb_fraction": draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])),
            "block_tokens": draw(st.integers(2, 6)),
            "max_num_batched_tokens": draw(st.integers(2, 80)),
            "max_num_seqs": draw(st.integers(1, 6)),
        },
        "num_users": draw(st.integers(1, 4)),
        "rounds": draw(st.integers(1, 4)),
    }


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=_scenario())
def test_any_mix_of_reuse_chunks_and_strangers_gives_the_reference_scores(
    scenario: dict[str, Any],
) -> None:
    rng = np.random.default_rng(scenario["seed"])
    with tempfile.TemporaryDirectory() as directory:
        path = write_toy_model(
            Path(directory), toy_config(**scenario["model"]), seed=scenario["seed"] % 1000
        )
        reference = read_reference(path)
        recommender = Recommender.from_config(toy_engine_config(path, **scenario["engine"]))
        histories = [random_history(rng, 30) for _ in range(scenario["num_users"])]
        length = 1
        for _ in range(scenario["rounds"]):
            length = min(30, length + int(rng.integers(0, 9)))
            bodies, wants = [], []
            for user, (items, times) in enumerate(histories):
                asked_at = times[length - 1] + int(rng.integers(0, 3)) * 40
                asked = body(items[:length], times[:length], user=f"u{user}", request_time=asked_at)
                if user % 2:
                    asked = {**asked, "candidates": None, "top_k": len(ALL_ITEMS)}
                bodies.append(asked)
                kept = slice(max(0, length - 24), length)
                wants.append(reference.scores(items[kept], [*times[kept], asked_at]))
            answers = recommender.recommend_batch(bodies)
            recommender.engine.core.check_integrity()
            for answer, want in zip(answers, wants, strict=True):
                assert len(answer.data) == len(ALL_ITEMS)
                assert largest_difference(answer, want) <= TOLERANCE


def _cached_after(recommender: Recommender, first: dict[str, Any], second: dict[str, Any]) -> int:
    recommender.recommend(first)
    return recommender.recommend(second).usage.cached_tokens


@pytest.mark.parametrize("place", range(16))
@pytest.mark.parametrize("field", ["item_ids", "timestamps"])
def test_an_edited_event_never_hits_at_or_after_its_block(
    recommender: Recommender, field: str, place: int
) -> None:
    items = list(range(1, 21))
    times = [100 * place for place in range(20)]
    edited = {"item_ids": list(items), "timestamps": list(times)}
    edited[field][place] += 30
    cached = _cached_after(
        recommender,
        body(items, times, user="u"),
        body(edited["item_ids"], edited["timestamps"], user="u"),
    )
    assert cached <= place // 4 * 4
    if field == "timestamps" and place:
        # The row before reads this event's time.
        assert cached <= (place - 1) // 4 * 4


def test_an_event_inserted_late_never_hits_behind_it(recommender: Recommender) -> None:
    items, times = list(range(1, 21)), [100 * place for place in range(20)]
    late = body([*items[:9], 50, *items[9:]], [*times[:9], 850, *times[9:]], user="u")
    assert _cached_after(recommender, body(items, times, user="u"), late) <= 8


def test_kv_is_never_shared_between_users_nor_without_one(recommender: Recommender) -> None:
    items, times = random_history(np.random.default_rng(3), 20)
    assert (
        _cached_after(recommender, body(items, times, user="a"), body(items, times, user="b")) == 0
    )
    recommender.recommend(body(items, times))
    anonymous = recommender.recommend(body(items, times))
    assert anonymous.usage.cached_tokens == 0
    assert anonymous.usage.reuse_blocked == ReuseBlocked.NO_USER


def test_a_cut_window_misses_and_says_so(
    recommender: Recommender, reference: ReferenceHSTU
) -> None:
    items, times = random_history(np.random.default_rng(4), 30)
    recommender.recommend(body(items[:24], times[:24], user="u"))
    answer = recommender.recommend(body(items, times, user="u"))
    assert answer.usage.history_tokens == 24
    assert answer.usage.cached_tokens == 0
    assert answer.usage.reuse_blocked == ReuseBlocked.WINDOW_SHIFTED
    want = reference.scores(items[-24:], [*times[-24:], times[-1]])
    assert largest_difference(answer, want) <= TOLERANCE


def _forge(request: Request, features: list[list[int]]) -> Request:
    """The same request with hashes over fewer inputs than the rows depend on."""
    rows = np.array(features, dtype=np.int64)
    return replace(
        request, block_hashes=hash_blocks(root_hash("forged", b"u"), rows, block_tokens=4)
    )


def _run(recommender: Recommender, request: Request) -> np.ndarray[Any, Any]:
    core = recommender.engine.core
    core.add_request(request)
    while core.has_work:
        core.step()
    assert request.error is None
    return request.scores


def _engine_request(request_id: str, items: list[int], times: list[int]) -> Request:
    return Request(
        request_id=request_id,
        item_ids=np.array(items),
        event_times=np.array(times),
        candidate_ids=np.array(ALL_ITEMS),
        top_k=0,
        excluded_ids=np.empty(0, dtype=np.int64),
        block_hashes=[],
        arrival=0.0,
    )


def test_reusing_the_last_row_would_break_scores(
    recommender: Recommender, reference: ReferenceHSTU
) -> None:
    """Hashes without the next event's time, last row included: what the engine refuses to do."""
    items, times = random_history(np.random.default_rng(5), 13, last=4_000)
    asked_long_after = [*times[:12], times[11] + 9_000_000]
    features = [[item] for item in items]
    first = _engine_request("first", items[:12], asked_long_after)
    _run(recommender, _forge(first, features[:12]))
    second = _engine_request("second", items, [*times, times[-1]])
    forged = _forge(second, features)
    got = _run(recommender, forged)
    assert forged.cached_tokens == 12
    want = reference.scores(items, [*times, times[-1]])
    assert np.max(np.abs(got - want)) > BREAKS


def test_reusing_kv_across_a_shifted_window_would_break_scores(
    recommender: Recommender, reference: ReferenceHSTU
) -> None:
    items, times = random_history(np.random.default_rng(6), 24)
    features = [[item, time] for item, time in zip(items, times, strict=True)]
    first = _engine_request("first", items[4:20], [*times[4:20], times[20]])
    _run(recommender, _forge(first, features[4:16]))
    # The same events, now four places further from the oldest one.
    second = _engine_request("second", items[:20], [*times[:20], times[20]])
    forged = _forge(second, features[4:16])
    got = _run(recommender, forged)
    assert forged.cached_tokens == 12
    assert np.max(np.abs(got - reference.scores(items[:20], times[:21]))) > BREAKS
